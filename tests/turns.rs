//! Memory used in turn, against every order in which two ranks can take its steps.
//!
//! `cargo test` runs the counters' rules here; what a processor may reorder is `turns_loom.rs`.

use std::sync::atomic::AtomicU32;

use proptest::prelude::*;
use zerort_core::turns::{Line, TURNS, TurnError, Turns, reached};

fn lines(world: usize) -> Vec<Line> {
    (0..world).map(|_| Line::default()).collect()
}

/// A rank as the engine runs it: writes a use, posts it, waits for the peers, reads, goes on.
struct Rank {
    turns: Turns,
    reading: bool,
}

/// One step of a rank, as far as it goes without waiting. What each rank's pieces hold is in
/// `memory`.
fn advance(rank: usize, ranks: &mut [Rank], memory: &mut [[u32; 2]], lines: &[Line]) {
    let me = &mut ranks[rank];
    if !me.reading {
        let number = me.turns.next();
        let piece = Turns::turn(number) as usize;
        memory[rank][piece] = number;
        me.turns.post(number, lines).expect("TRN-2: a use finds its memory read");
        me.reading = true;
        return;
    }
    let number = me.turns.posted();
    if Turns::missing(number, lines).is_none() {
        let piece = Turns::turn(number) as usize;
        assert!(memory.iter().all(|pieces| pieces[piece] == number), "{memory:?} at {number}");
        me.turns.finish(number, lines);
        me.reading = false;
    }
}

proptest! {
    #[test]
    fn trn_2_a_use_finds_its_memory_read_in_whatever_order_ranks_run(
        world in 1..5_usize,
        order in proptest::collection::vec(0..4_usize, 0..200),
    ) {
        let lines = lines(world);
        let mut ranks: Vec<Rank> =
            (0..world).map(|rank| Rank { turns: Turns::new(rank), reading: false }).collect();
        let mut memory = vec![[0; TURNS as usize]; world];
        for rank in order {
            advance(rank % world, &mut ranks, &mut memory, &lines);
        }
    }
}

#[test]
fn trn_2_a_use_that_would_be_written_over_what_a_peer_reads_is_refused_by_name() {
    let lines = lines(3);
    let mut fast = Turns::new(0);
    for number in 1..=TURNS {
        assert_eq!(fast.post(number, &lines), Ok(true));
        fast.finish(number, &lines);
    }
    Turns::new(1).finish(1, &lines);
    let unread = TurnError::Unread { number: 3, rank: 2, read: 0 };
    assert_eq!(fast.post(3, &lines), Err(unread));
    assert_eq!(fast.next(), 3);
    assert!(!reached(lines[0].posted.load(std::sync::atomic::Ordering::Relaxed), 3));
    Turns::new(2).finish(1, &lines);
    assert_eq!(fast.post(3, &lines), Ok(true));
}

#[test]
fn trn_3_what_was_posted_or_read_is_not_posted_or_read_again() {
    let lines = lines(2);
    let mut turns = Turns::new(0);
    assert_eq!(turns.post(1, &lines), Ok(true));
    assert_eq!(turns.post(1, &lines), Ok(false));
    assert_eq!(turns.post(3, &lines), Err(TurnError::OutOfOrder { number: 3, posted: 1 }));
    turns.finish(1, &lines);
    turns.finish(1, &lines);
    assert_eq!(turns.next(), 2);
    assert_eq!(Turns::missing(1, &lines), Some(1));
}

#[test]
fn counters_go_on_behind_their_largest_number() {
    assert!(reached(1, 1) && reached(2, 1) && !reached(0, 1));
    assert!(reached(0, u32::MAX) && !reached(u32::MAX, 0));
    assert_ne!(Turns::turn(u32::MAX), Turns::turn(0));
}

#[test]
fn a_rank_has_a_cache_line_of_its_own() {
    assert_eq!(size_of::<Line<AtomicU32>>(), 64);
    assert_eq!(align_of::<Line<AtomicU32>>(), 64);
}
