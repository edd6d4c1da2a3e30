//! What rows mean, as a table.

use proptest::collection::vec;
use proptest::prelude::*;
use zerort_core::roll::{OWN, WIDTH, asked, read};
use zerort_core::{Apart, At, Key, PassKind, Rank, Reading, Row, UnitId};

const FORWARD: At = At::Pass(PassKind::Forward);
const BACKWARD: At = At::Pass(PassKind::Backward);
const LOCAL: At = At::Pass(PassKind::LocalBackward);
const EVALUATION: At = At::Pass(PassKind::Evaluation);

fn row(at: At) -> Row {
    let (failed, news) = (false, false);
    Row { at, key: Key(1), count: 3, failed, ready: true, news, own: [0; OWN] }
}

fn rows<const N: usize>(at: [At; N]) -> [Row; N] {
    at.map(row)
}

fn need(unit: u32) -> At {
    At::Need(UnitId(unit))
}

fn together(at: At) -> Reading {
    Reading::Together { at, key: Some(Key(1)), ready: true, news: false }
}

fn serve(units: &[u32]) -> Reading {
    Reading::Serve(units.iter().copied().map(UnitId).collect())
}

#[test]
fn rows_mean_what_the_table_says() {
    let nobody = Reading::Together { at: At::Serve, key: None, ready: false, news: false };
    let away = |rank| Reading::Diverged(Rank(rank));
    let table = [
        // All alike, but for those that serve.
        ([FORWARD, FORWARD, FORWARD], [together(FORWARD), together(FORWARD), together(FORWARD)]),
        (
            [At::Serve, BACKWARD, At::Serve],
            [together(BACKWARD), together(BACKWARD), together(BACKWARD)],
        ),
        ([LOCAL, LOCAL, At::Serve], [together(LOCAL), together(LOCAL), together(LOCAL)]),
        (
            [EVALUATION, EVALUATION, At::Serve],
            [together(EVALUATION), together(EVALUATION), together(EVALUATION)],
        ),
        (
            [At::Boundary, At::Boundary, At::Serve],
            [together(At::Boundary), together(At::Boundary), together(At::Boundary)],
        ),
        ([At::Serve; 3], [nobody.clone(), nobody.clone(), nobody]),
        // Somebody asks.
        ([need(4), need(4), need(4)], [serve(&[4]), serve(&[4]), serve(&[4])]),
        ([need(4), FORWARD, need(2)], [serve(&[4, 2]), serve(&[4, 2]), serve(&[4, 2])]),
        ([At::Serve, EVALUATION, need(2)], [serve(&[2]), serve(&[2]), serve(&[2])]),
        ([FORWARD, BACKWARD, need(0)], [serve(&[0]), serve(&[0]), serve(&[0])]),
        // Some evaluate.
        ([EVALUATION, FORWARD, EVALUATION], [Reading::Alone, Reading::Again, Reading::Alone]),
        ([At::Boundary, At::Serve, EVALUATION], [Reading::Again, Reading::Again, Reading::Alone]),
        ([FORWARD, EVALUATION, BACKWARD], [Reading::Again, Reading::Alone, Reading::Again]),
        // Anything else.
        ([FORWARD, BACKWARD, FORWARD], [away(1), away(1), away(1)]),
        ([At::Serve, FORWARD, At::Boundary], [away(2), away(2), away(2)]),
        ([BACKWARD, BACKWARD, LOCAL], [away(2), away(2), away(2)]),
    ];
    for (at, readings) in table {
        let rows = rows(at);
        let read = [0, 1, 2].map(|own| read(&rows, Rank(own)));
        assert_eq!(read, readings, "{at:?}");
    }
}

#[test]
fn a_list_is_followed_where_all_ranks_are_ready_for_the_same_one() {
    let changed = |change: fn(&mut Row)| {
        let mut rows = rows([FORWARD; 3]);
        change(&mut rows[2]);
        read(&rows, Rank(0))
    };
    let free = |key| Reading::Together { at: FORWARD, key, ready: false, news: false };
    assert_eq!(changed(|row| row.ready = false), free(Some(Key(1))));
    assert_eq!(changed(|row| row.key = Key(2)), free(None));
    assert_eq!(changed(|row| row.failed = true), together(FORWARD));
    assert_eq!(changed(|row| row.own = [5; OWN]), together(FORWARD));
    assert_eq!(changed(|row| row.news = true), together(FORWARD), "only rank 0's routes count");
    assert_eq!(changed(|row| (row.at, row.ready) = (At::Serve, false)), together(FORWARD));
}

#[test]
fn a_rank_that_has_run_more_passes_is_elsewhere_unless_it_evaluates() {
    let mut rows = rows([BACKWARD, BACKWARD, At::Serve]);
    rows[1].count = 4;
    assert_eq!(read(&rows, Rank(2)), Reading::Diverged(Rank(1)));
    for row in &mut rows {
        row.at = EVALUATION;
    }
    assert_eq!(read(&rows, Rank(2)), together(EVALUATION));
}

#[test]
fn news_are_rank_zeros() {
    let mut rows = rows([FORWARD, FORWARD]);
    rows[0].news = true;
    let Reading::Together { news, .. } = read(&rows, Rank(1)) else { panic!() };
    assert!(news);
    rows[0].at = At::Serve;
    assert_eq!(read(&rows, Rank(1)), together(FORWARD));
}

/// Three ranks in calls of two engines, as each of the engines sees them.
fn seen(at: [At; 3], there: [bool; 3]) -> [Reading; 3] {
    [0, 1, 2].map(|own: u32| {
        let mut rows = rows(at);
        for (row, &other) in rows.iter_mut().zip(&there) {
            if other != there[own as usize] {
                *row = row.apart();
            }
        }
        read(&rows, Rank(own))
    })
}

#[test]
fn ranks_in_calls_of_two_engines_wait_for_who_evaluates_and_serve_who_asks() {
    let (again, alone) = (Reading::Again, Reading::Alone);
    let away = |rank| Reading::Diverged(Rank(rank));
    let table = [
        // Somebody asks, here or there.
        ([need(4), FORWARD, need(2)], [serve(&[4]), serve(&[4]), serve(&[2])]),
        ([FORWARD, EVALUATION, need(2)], [again.clone(), again.clone(), serve(&[2])]),
        ([BACKWARD, At::Serve, need(2)], [again.clone(), again.clone(), serve(&[2])]),
        // Somebody evaluates, here or there.
        ([EVALUATION, EVALUATION, EVALUATION], [alone.clone(), alone.clone(), alone.clone()]),
        ([EVALUATION, EVALUATION, FORWARD], [alone.clone(), alone.clone(), again.clone()]),
        ([FORWARD, At::Boundary, EVALUATION], [again.clone(), again.clone(), alone.clone()]),
        ([At::Serve, At::Serve, EVALUATION], [again.clone(), again, alone]),
        // Anything else.
        ([FORWARD, FORWARD, FORWARD], [away(2), away(2), away(0)]),
        ([At::Boundary, At::Serve, At::Boundary], [away(2), away(2), away(0)]),
        ([At::Serve, At::Serve, BACKWARD], [away(2), away(2), away(0)]),
    ];
    for (at, readings) in table {
        assert_eq!(seen(at, [false, false, true]), readings, "{at:?}");
    }
}

#[test]
fn what_is_asked_for_elsewhere_is_read_from_its_own_rows() {
    let rows = rows([need(4), FORWARD, need(4), need(1)]);
    assert_eq!(asked(&rows), [UnitId(4), UnitId(1)]);
    assert_eq!(asked(&rows.map(Row::apart)), []);
}

fn at() -> impl Strategy<Value = At> {
    prop_oneof![
        Just(FORWARD),
        Just(BACKWARD),
        Just(LOCAL),
        Just(EVALUATION),
        Just(At::Boundary),
        Just(At::Serve),
        any::<u32>().prop_map(need),
    ]
}

fn any_row() -> impl Strategy<Value = Row> {
    (at(), 0..3_u64, 0..2_u32, any::<[bool; 3]>(), any::<[i64; OWN]>()).prop_map(
        |(at, key, count, [failed, ready, news], own)| Row {
            at,
            key: Key(key),
            count,
            failed,
            ready,
            news,
            own,
        },
    )
}

proptest! {
    #[test]
    fn rows_are_integers_and_back(row in any_row()) {
        prop_assert_eq!(Row::from_words(row.words()), Some(row));
        prop_assert_eq!(Row::from_words(row.apart().words()), Some(row.apart()));
        prop_assert_eq!(row.apart().apart(), row.apart());
        prop_assert!(matches!(
            row.apart().at,
            At::Elsewhere(Apart::Asks | Apart::Evaluates | Apart::Waits)
        ));
    }

    /// So it is where ranks are in calls of several engines: all that one asks for all serve, and
    /// who begins does so with all others, or alone while they roll again.
    #[test]
    fn gat_11_ranks_in_calls_of_several_engines_come_to_one_decision(
        rows in vec((any_row(), 0..3_u8), 1..6)
    ) {
        let view = |engine: u8| -> Vec<Row> {
            let here = |&(row, other): &(Row, u8)| if other == engine { row } else { row.apart() };
            rows.iter().map(here).collect()
        };
        let readings: Vec<Reading> = (0..)
            .zip(&rows)
            .map(|(rank, &(_, engine))| read(&view(engine), Rank(rank)))
            .collect();
        let ask = rows.iter().any(|(row, _)| matches!(row.at, At::Need(_)));
        for ((row, engine), reading) in rows.iter().zip(&readings) {
            match reading {
                Reading::Serve(units) => prop_assert_eq!(units, &asked(&view(*engine))),
                Reading::Together { .. } => {
                    prop_assert!(!ask && readings.iter().all(|other| other == reading));
                }
                Reading::Diverged(_) => prop_assert!(
                    !ask && readings.iter().all(|other| matches!(other, Reading::Diverged(_)))
                ),
                Reading::Alone => prop_assert!(!ask && row.at == EVALUATION),
                Reading::Again => {
                    prop_assert!(!matches!(row.at, At::Need(_)));
                    prop_assert!(ask || row.at != EVALUATION);
                    prop_assert!(ask || readings.contains(&Reading::Alone));
                }
            }
        }
    }

    #[test]
    fn what_no_rank_has_written_is_no_row(words in any::<[i64; WIDTH]>()) {
        prop_assert!(Row::from_words(words).is_none_or(|row| row.words()[..4] == words[..4]));
        prop_assert_eq!(Row::from_words([0; WIDTH]), None);
    }

    /// Ranks that read the same rows never come to decisions that would block: they serve together,
    /// begin together, diverge together, and one is alone only while the others roll again.
    #[test]
    fn gat_11_ranks_come_to_one_decision(rows in vec(any_row(), 1..6)) {
        let readings: Vec<Reading> =
            (0..rows.len() as u32).map(|rank| read(&rows, Rank(rank))).collect();
        for (row, reading) in rows.iter().zip(&readings) {
            match reading {
                Reading::Serve(units) => {
                    prop_assert!(readings.iter().all(|other| other == reading));
                    let answered = |row: &Row| match row.at {
                        At::Need(unit) => units.contains(&unit),
                        At::Pass(_) | At::Boundary | At::Serve | At::Elsewhere(_) => true,
                    };
                    prop_assert!(rows.iter().all(answered));
                }
                Reading::Together { .. } | Reading::Diverged(_) => {
                    prop_assert!(readings.iter().all(|other| other == reading));
                }
                Reading::Alone => prop_assert_eq!(row.at, EVALUATION),
                Reading::Again => {
                    prop_assert!(row.at != EVALUATION && readings.contains(&Reading::Alone));
                }
            }
        }
    }
}
