//! One cursor for gradients and needs: any list, any order of arrivals, any stops asked for.

mod arbitrary;

use std::collections::BTreeSet;
use std::sync::Arc;

use arbitrary::{Walk, walk};
use proptest::prelude::*;
use proptest::sample::Index;
use zerort_core::{Command, ParamId, PassKind, Plan, Reducer};

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
                    match marker {
                        Some(marker) => prop_assert!(hi > marker, "it waits at {hi}"),
                        None => prop_assert_eq!(hi, commands.len(), "there is no such stop"),
                    }
                    stop = asked + 1;
                }
            }
            prop_assert!(before <= hi, "RED-1");
        }
        let finished = reducer.finish().unwrap();
        prop_assert_eq!(finished.hi, commands.len());
        prop_assert!(finished.late.into_iter().eq(late));
        let all = (0..plan.params().len() as u32).map(ParamId);
        prop_assert!(finished.absent.into_iter().eq(all.filter(|param| !came.contains(param))));
    }
}
