//! One cursor for gradients and needs: any list, any order of arrivals, any stops asked for.

mod arbitrary;

use std::collections::BTreeSet;
use std::sync::Arc;

use arbitrary::{Walk, ids, sharded, walk};
use proptest::prelude::*;
use proptest::sample::Index;
use zerort_core::{
    BucketId, Command, Finished, Key, ParamId, PassKind, Plan, Reducer, Route, StepError, Stop,
    UnitId,
};

fn arrive(reducer: &mut Reducer, params: &[u32]) -> Vec<Option<usize>> {
    params.iter().map(|&param| reducer.grad_ready(ParamId(param)).unwrap()).collect()
}

/// The pass is over, and these came late.
fn late(params: &[u32]) -> Finished {
    Finished { hi: LENGTH, absent: Vec::new(), late: ids(params) }
}

/// Three units, the last of which is bucket 0; a backward that needs them from the last to the
/// first, with room for one.
fn listed() -> (Reducer, usize) {
    let stop = |unit| Stop { units: vec![UnitId(unit)], held: Vec::new() };
    let fills = (0..3).map(|bucket| (BucketId(bucket), bucket)).collect();
    let stops = [2, 1, 0].map(stop).to_vec();
    let route = Route { kind: PassKind::Backward, key: Key(1), then: None, stops, fills };
    let plan = Arc::new(sharded(3, Some(1)).routed(&[route], 256, 1).unwrap());
    let list = plan.lists().iter().position(|list| list.kind == PassKind::Backward).unwrap();
    let mut reducer = Reducer::new(plan);
    reducer.begin().unwrap();
    arrive(&mut reducer, &[2, 1, 0]);
    reducer.finish().unwrap();
    reducer.begin_list(list).unwrap();
    (reducer, list)
}

/// Need 0 · Gather u2 │ Need 1 · Free u2 · Gather u1 · Launch b0 │ Need 2 · Free u1 · Gather u0 ·
/// Retire b0 · Launch b1 · Retire b1 · Launch b2 · Retire b2 · Free u0
const LENGTH: usize = 15;

#[test]
fn the_cursor_stops_at_a_need_that_nobody_has_asked_for() {
    let (mut reducer, list) = listed();
    assert_eq!(reducer.plan().lists()[list].commands().len(), LENGTH);
    assert_eq!(reducer.grad_ready(ParamId(2)), Ok(None), "its launch stands behind two markers");
    assert_eq!(
        reducer.explain().unwrap().to_string(),
        "command 0 = Need 0; nobody has asked for it"
    );
    assert_eq!([reducer.need(0), reducer.need(0)], [Some(2), None]);
    assert_eq!(reducer.need(1), Some(6), "b0 is full");
    assert_eq!(reducer.explain().unwrap().command, Command::Need(2));
    assert_eq!(reducer.need(2), Some(10));
    assert_eq!(reducer.explain().unwrap().to_string(), "command 10 = Launch b1; b1 lacks 1");
    assert_eq!(arrive(&mut reducer, &[0, 1]), [None, Some(15)]);
    assert_eq!(reducer.finish().unwrap(), late(&[]));
}

#[test]
fn gat_6_a_need_overtakes_the_launches_before_it_and_their_gradients_are_late() {
    let (mut reducer, _) = listed();
    assert_eq!(reducer.need(1), Some(5), "up to the launch behind its own marker");
    assert_eq!(reducer.need(2), Some(10), "b0 leaves without its gradient");
    assert_eq!(arrive(&mut reducer, &[2, 1, 0]), [None, Some(12), Some(15)]);
    assert_eq!(reducer.finish().unwrap(), late(&[2]));
}

#[test]
fn the_rest_of_a_list_overtakes_everything() {
    let (mut reducer, _) = listed();
    reducer.need(0);
    assert_eq!([reducer.rest(), reducer.rest(), reducer.need(2)], [Some(LENGTH), None, None]);
    assert_eq!(arrive(&mut reducer, &[2, 1, 0]), [None; 3]);
    assert_eq!(reducer.finish().unwrap(), late(&[0, 1, 2]));
}

#[test]
fn outside_a_list_nothing_is_needed() {
    let (mut reducer, _) = listed();
    reducer.finish().unwrap();
    assert_eq!([reducer.need(0), reducer.rest()], [None; 2]);
    reducer.begin().unwrap();
    assert_eq!([reducer.need(0), reducer.rest()], [None; 2]);
    let unknown = StepError::UnknownList { list: 9, lists: 2 };
    assert_eq!(reducer.begin_list(9), Err(unknown));
}

/// What comes next in a backward.
#[derive(Clone, Debug)]
enum Event {
    /// The gradient of some parameter.
    Grad(Index),
    /// A stop so many behind the last.
    Need(usize),
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let event = prop_oneof![
        3 => any::<Index>().prop_map(Event::Grad),
        2 => (0..3_usize).prop_map(Event::Need),
    ];
    prop::collection::vec(event, 0..40)
}

/// A reducer that has learnt that each parameter fires once, along the backward's list of `walk`.
fn begun(walk: &Walk) -> (Arc<Plan>, Reducer, usize) {
    let plan = Arc::new(walk.plan.routed(&walk.routes, walk.room, walk.depth).unwrap());
    let mut reducer = Reducer::new(Arc::clone(&plan));
    reducer.begin().unwrap();
    for param in 0..plan.params().len() as u32 {
        reducer.grad_ready(ParamId(param)).unwrap();
    }
    reducer.finish().unwrap();
    let list = plan.lists().iter().position(|list| list.kind == PassKind::Backward).unwrap();
    reducer.begin_list(list).unwrap();
    (plan, reducer, list)
}

proptest! {
    #[test]
    fn gat_6_a_need_never_waits_for_a_gradient_and_none_is_lost(
        walk in walk(), events in events(),
    ) {
        let (plan, mut reducer, list) = begun(&walk);
        let commands = plan.lists()[list].commands();
        let (mut hi, mut stop, mut came) = (0, 0, BTreeSet::new());
        let mut late = BTreeSet::new();
        for event in events {
            let before = hi;
            match event {
                Event::Grad(param) => {
                    let param = ParamId(param.index(plan.params().len()) as u32);
                    let launch = Command::Launch(plan.home(param).unwrap().0);
                    if commands[..hi].contains(&launch) {
                        late.insert(param);
                    }
                    came.insert(param);
                    hi = reducer.grad_ready(param).unwrap().unwrap_or(hi);
                    for command in &commands[before..hi] {
                        // RED-2: nothing asked, so a bucket that leaves is full.
                        if let Command::Launch(bucket) = command {
                            let params = &plan.bucket(*bucket).unwrap().params;
                            prop_assert!(params.iter().all(|param| came.contains(param)));
                        }
                        prop_assert!(!matches!(command, Command::Need(_)));
                    }
                }
                Event::Need(skipped) => {
                    let asked = stop + skipped as u32;
                    let marker = commands.iter().position(|c| *c == Command::Need(asked));
                    hi = reducer.need(asked).unwrap_or(hi);
                    // Where there is no such stop, all is passed.
                    let passed = marker.map_or(commands.len(), |marker| marker + 1);
                    prop_assert!(hi >= passed, "it waits at {}", hi);
                    stop = asked + 1;
                }
            }
            prop_assert!(before <= hi, "RED-1");
        }
        let finished = reducer.finish().unwrap();
        prop_assert_eq!(finished.hi, commands.len());
        prop_assert!(finished.late.into_iter().eq(late));
        let trained = plan.buckets().iter().filter(|bucket| bucket.is_trained());
        let waited: BTreeSet<ParamId> = trained.flat_map(|b| b.params.iter().copied()).collect();
        prop_assert!(finished.absent.iter().eq(waited.difference(&came)));
    }
}
