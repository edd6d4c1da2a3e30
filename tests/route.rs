//! Routes and the lists that are made from them: what they hold whatever the route, and two that
//! can be read.

mod arbitrary;

use std::collections::BTreeSet;

use arbitrary::{Walk, sharded, walk};
use proptest::prelude::*;
use zerort_core::{BucketId, Command, Key, List, PassKind, Plan, PlanError, Route, Stop, UnitId};

fn units(ids: &[u32]) -> Vec<UnitId> {
    ids.iter().copied().map(UnitId).collect()
}

fn stops(sets: &[&[u32]]) -> Vec<Stop> {
    sets.iter().map(|set| Stop { units: units(set), held: Vec::new() }).collect()
}

/// A forward over `n` units and its backward, which fills each unit's bucket at its stop.
fn there_and_back(n: u32) -> Vec<Route> {
    let sets: Vec<Stop> =
        (0..n).map(|unit| Stop { units: units(&[unit]), held: Vec::new() }).collect();
    let (forth, back) = (Key(1), Key(2));
    let forward = Route {
        kind: PassKind::Forward,
        key: forth,
        then: Some(back),
        stops: sets.clone(),
        fills: Vec::new(),
    };
    // Bucket 0 is that of the last unit.
    let fills = (0..n).map(|stop| (BucketId(stop), stop)).collect();
    let stops = sets.into_iter().rev().collect();
    vec![forward, Route { kind: PassKind::Backward, key: back, then: None, stops, fills }]
}

/// The list as text, a line for each stop.
fn spelled(list: &List) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for command in list.commands() {
        match command {
            Command::Need(_) => lines.push(command.to_string()),
            Command::Launch(_) | Command::Retire(_) | Command::Gather(_) | Command::Free(_) => {
                let line = lines.last_mut().unwrap();
                *line = format!("{line} · {command}");
            }
        }
    }
    lines
}

#[test]
fn with_room_for_two_units_of_four_the_next_one_comes_while_one_is_in_use() {
    let plan = sharded(4, Some(1)).routed(&there_and_back(4), 2 * 256, 1).unwrap();
    let [forward, local, backward] = plan.lists() else { panic!() };
    assert_eq!(
        spelled(forward),
        [
            "Need 0 · Gather u0 · Gather u1",
            "Need 1 · Free u0 · Gather u2",
            "Need 2 · Free u1 · Gather u3",
            "Need 3"
        ]
    );
    assert_eq!((&forward.start, &forward.end), (&units(&[]), &units(&[2, 3])));
    assert_eq!(
        spelled(backward),
        [
            "Need 0",
            "Need 1 · Free u3 · Gather u1 · Launch b0",
            "Need 2 · Free u2 · Gather u0 · Retire b0 · Launch b1",
            "Need 3 · Free u1 · Retire b1 · Launch b2 · Retire b2 · Launch b3 · Retire b3 · Free u0"
        ]
    );
    assert_eq!((&backward.start, &backward.end), (&forward.end, &units(&[])));
    assert_eq!(
        spelled(local),
        [
            "Need 0",
            "Need 1 · Free u3 · Gather u1",
            "Need 2 · Free u2 · Gather u0",
            "Need 3 · Free u1 · Free u0"
        ]
    );
}

#[test]
fn with_room_for_all_everything_stays_from_forward_to_backward_and_is_gathered_once() {
    let plan = sharded(4, None).routed(&there_and_back(4), 4 * 256, 9).unwrap();
    let [forward, _, backward] = plan.lists() else { panic!() };
    assert_eq!(spelled(forward)[0], "Need 0 · Gather u0 · Gather u1 · Gather u2 · Gather u3");
    assert_eq!(forward.end, units(&[0, 1, 2, 3]));
    assert!(backward.commands().iter().all(|command| !matches!(command, Command::Gather(_))));
}

#[test]
fn with_room_for_one_each_unit_is_alone() {
    let plan = sharded(3, None).routed(&there_and_back(3), 1, 4).unwrap();
    assert_eq!(
        spelled(&plan.lists()[0]),
        ["Need 0 · Gather u0", "Need 1 · Free u0 · Gather u1", "Need 2 · Free u1 · Gather u2"]
    );
}

/// The fewest gathers that any list could do with for these stops, with room for so many units.
fn fewest(stops: &[u32], whole: &BTreeSet<u32>, room: usize) -> usize {
    let Some((next, rest)) = stops.split_first() else { return 0 };
    if whole.contains(next) {
        return fewest(rest, whole, room);
    }
    let with = |freed: Option<u32>| {
        let mut whole = whole.clone();
        whole.extend([*next]);
        freed.is_none_or(|freed| whole.remove(&freed)).then(|| fewest(rest, &whole, room))
    };
    let freed = whole.iter().copied().filter(|unit| unit != next).map(Some);
    let choices = if whole.len() < room { vec![None] } else { freed.collect() };
    1 + choices.into_iter().filter_map(with).min().unwrap_or(0)
}

proptest! {
    #[test]
    fn no_list_that_gathers_on_demand_could_gather_less(
        stops in prop::collection::vec(0..4_u32, 0..10), room in 1..4_usize,
    ) {
        let needs = |unit: &u32| Stop { units: units(&[*unit]), held: Vec::new() };
        let (kind, then, fills) = (PassKind::Evaluation, None, Vec::new());
        let route =
            Route { kind, key: Key(1), then, stops: stops.iter().map(needs).collect(), fills };
        let plan = sharded(4, None).routed(&[route], 256 * room as u64, 0).unwrap();
        let commands = plan.lists()[0].commands().iter();
        let gathers = commands.filter(|command| matches!(command, Command::Gather(_))).count();
        prop_assert_eq!(gathers, fewest(&stops, &BTreeSet::new(), room));
    }
}

#[test]
fn after_an_evaluation_nothing_stays() {
    let evaluation =
        Route { kind: PassKind::Evaluation, then: None, ..there_and_back(3).swap_remove(0) };
    let plan = sharded(3, None).routed(&[evaluation], 1 << 20, 1).unwrap();
    let last = spelled(&plan.lists()[0]).pop();
    assert_eq!(last.as_deref(), Some("Need 2 · Free u1 · Free u2"));
}

#[test]
fn what_is_held_is_not_freed_and_takes_room() {
    let mut route = there_and_back(3).swap_remove(0);
    (route.then, route.kind) = (None, PassKind::Evaluation);
    route.stops[1].held = units(&[0]);
    let plan = sharded(3, None).routed(&[route], 2 * 256, 1).unwrap();
    assert_eq!(
        spelled(&plan.lists()[0]),
        [
            "Need 0 · Gather u0 · Gather u1",
            "Need 1",
            "Need 2 · Free u0 · Free u1 · Gather u2 · Free u2"
        ]
    );
}

#[test]
fn two_forwards_before_a_backward_lead_into_one_another() {
    let mut routes = there_and_back(2);
    let mut second = Route { key: Key(3), ..routes[0].clone() };
    (routes[0].then, second.then) = (Some(Key(3)), Some(Key(2)));
    second.stops = stops(&[&[0, 1]]);
    routes.insert(1, second);
    let plan = sharded(2, None).routed(&routes, 1 << 20, 2).unwrap();
    let both = units(&[0, 1]);
    let [first, second, _, backward] = plan.lists() else { panic!() };
    assert_eq!([&first.end, &second.start, &second.end, &backward.start], [&both; 4]);
    assert_eq!(spelled(second), ["Need 0"]);
}

#[test]
fn a_route_that_is_not_this_plans_is_refused() {
    let plan = sharded(2, None);
    let error = |change: fn(&mut Route)| {
        let mut routes = there_and_back(2);
        change(&mut routes[1]);
        plan.routed(&routes, 1, 1).unwrap_err()
    };
    assert_eq!(error(|route| route.stops[0].units[0] = UnitId(2)), PlanError::BadRoute);
    assert_eq!(error(|route| route.stops[0].held.push(UnitId(9))), PlanError::BadRoute);
    assert_eq!(error(|route| route.fills[0].0 = BucketId(7)), PlanError::BadRoute);
    assert_eq!(error(|route| route.stops[0].units = units(&[1, 0])), PlanError::BadRoute);
    assert_eq!(error(|route| route.stops[0].units = units(&[1, 1])), PlanError::BadRoute);
}

#[test]
fn routes_that_lead_in_a_circle_are_lists_all_the_same() {
    let mut routes = there_and_back(2);
    routes[0].then = Some(routes[0].key);
    assert_eq!(sharded(2, None).routed(&routes, 1, 1).unwrap().lists().len(), 3);
}

proptest! {
    #[test]
    fn routes_are_integers_and_back(Walk { routes, .. } in walk()) {
        for route in routes {
            prop_assert_eq!(Route::from_words(&route.words()), Ok(route));
        }
    }

    #[test]
    fn any_integers_are_a_route_or_refused(
        words in prop::collection::vec(prop_oneof![-2..6_i64, any::<i64>()], 0..20),
    ) {
        match Route::from_words(&words) {
            Ok(route) => prop_assert_eq!(route.words().len(), words.len()),
            Err(error) => prop_assert_eq!(error, PlanError::BadRoute),
        }
    }

    #[test]
    fn gat_5_equal_plans_routes_and_rooms_make_equal_lists_and_digests(
        Walk { plan, routes, room, depth } in walk(),
    ) {
        let [one, two] = [(); 2].map(|()| plan.routed(&routes, room, depth).unwrap());
        prop_assert_eq!(one.lists(), two.lists());
        prop_assert_eq!((one.digest(), one.layout_digest()), (two.digest(), plan.layout_digest()));
        let other = plan.routed(&routes, room / 2, depth).unwrap();
        prop_assert_eq!(other.digest() == one.digest(), other.lists() == one.lists());
        prop_assert!(one.reordered(&[]).unwrap().lists().is_empty());
    }

    #[test]
    fn gat_1_every_list_needs_each_stop_once_in_order(walk in walk()) {
        each_list(&walk, |list, route| {
            let markers: Vec<u32> = list.commands().iter().filter_map(|command| match *command {
                Command::Need(stop) => Some(stop),
                Command::Launch(_) | Command::Retire(_) | Command::Gather(_) | Command::Free(_) => None,
            }).collect();
            assert!(markers.into_iter().eq(0..route.stops.len() as u32));
            let sets = route.stops.iter().map(|stop| &stop.units);
            assert!(list.stops.iter().eq(sets));
        });
    }

    #[test]
    fn gat_2_what_a_stop_needs_is_gathered_when_its_segment_has_run(walk in walk()) {
        each_list(&walk, |list, route| replay(&walk.plan, list, |at, whole, _| {
            let lacking = route.stops[at].units.iter().find(|unit| !whole.contains(unit));
            assert_eq!(lacking, None, "stop {at}");
        }));
    }

    #[test]
    fn gat_3_nothing_is_freed_that_its_stop_needs_or_holds(walk in walk()) {
        each_list(&walk, |list, route| {
            let mut at = None;
            let last = route.stops.len().saturating_sub(1);
            for (index, command) in list.commands().iter().enumerate() {
                match *command {
                    Command::Need(stop) => at = Some(stop as usize),
                    Command::Free(unit) => {
                        let at = at.unwrap();
                        let stop = &route.stops[at];
                        // The tail runs when the pass is over.
                        let tail = at == last && list.commands()[index..].iter().all(|command| {
                            matches!(command, Command::Free(_))
                        });
                        assert!(tail || !stop.units.contains(&unit) && !stop.held.contains(&unit));
                    }
                    Command::Launch(_) | Command::Retire(_) | Command::Gather(_) => {}
                }
            }
        });
    }

    #[test]
    fn gat_4_at_most_room_is_whole_or_a_stop_is_alone(walk in walk()) {
        each_list(&walk, |list, route| {
            let length = |units: &BTreeSet<UnitId>| -> u64 {
                units.iter().map(|unit| walk.plan.units()[unit.index()].numel).sum()
            };
            let mut whole: BTreeSet<UnitId> = list.start.iter().copied().collect();
            let mut at = 0;
            for command in list.commands() {
                match *command {
                    Command::Need(stop) => at = stop as usize,
                    Command::Gather(unit) => {
                        assert!(whole.insert(unit), "{unit:?} twice");
                        let stop = &route.stops[at];
                        let alone = whole.iter().all(|unit| {
                            stop.units.contains(unit) || stop.held.contains(unit)
                        });
                        assert!(length(&whole) <= walk.room || alone, "stop {at}: {whole:?}");
                    }
                    Command::Free(unit) => assert!(whole.remove(&unit), "{unit:?} twice"),
                    Command::Launch(_) | Command::Retire(_) => {}
                }
            }
            assert!(whole.into_iter().eq(list.end.iter().copied()));
        });
    }

    #[test]
    fn gat_7_a_backwards_list_launches_each_bucket_once_in_the_plans_order(walk in walk()) {
        each_list(&walk, |list, _| {
            let launches: Vec<BucketId> = list.schedule.launches().collect();
            let all: Vec<BucketId> = match list.kind {
                PassKind::Backward => walk.plan.schedule().launches().collect(),
                PassKind::Forward | PassKind::LocalBackward | PassKind::Evaluation => Vec::new(),
            };
            assert_eq!(launches, all);
            let mut open = 0;
            for command in list.commands() {
                match command {
                    Command::Launch(_) => open += 1,
                    Command::Retire(_) => open -= 1,
                    Command::Need(_) | Command::Gather(_) | Command::Free(_) => {}
                }
                assert!((0..=walk.plan.window()).contains(&open), "SCH-2");
            }
            assert_eq!(open, 0, "SCH-1");
        });
    }
}

/// Each list of a walk beside the route that it was made from.
fn each_list(walk: &Walk, mut check: impl FnMut(&List, &Route)) {
    let plan = walk.plan.routed(&walk.routes, walk.room, walk.depth).unwrap();
    for list in plan.lists() {
        let route = walk.routes.iter().find(|route| route.key == list.key).unwrap();
        check(list, route);
    }
}

/// Calls `check` with what is whole after the segment of each stop.
fn replay(plan: &Plan, list: &List, check: impl Fn(usize, &BTreeSet<UnitId>, &Plan)) {
    let mut whole: BTreeSet<UnitId> = list.start.iter().copied().collect();
    let mut at: Option<usize> = None;
    let tail = list.commands().iter().rev().take_while(|c| matches!(c, Command::Free(_))).count();
    for command in &list.commands()[..list.commands().len() - tail] {
        match *command {
            Command::Need(stop) => {
                if let Some(at) = at.replace(stop as usize) {
                    check(at, &whole, plan);
                }
            }
            Command::Gather(unit) => _ = whole.insert(unit),
            Command::Free(unit) => _ = whole.remove(&unit),
            Command::Launch(_) | Command::Retire(_) => {}
        }
    }
    if let Some(at) = at {
        check(at, &whole, plan);
    }
}
