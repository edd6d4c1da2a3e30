//! The cursor for parameters on one rank, case by case. `tests/ranks.rs` runs several.

mod alone;
mod arbitrary;

use std::sync::Arc;

use alone::{Alone, EVALUATION, FORWARD, LOCAL, frees, gathers};
use arbitrary::{Walk, walk};
use proptest::prelude::*;
use proptest::sample::Index;
use zerort_core::roll::OWN;
use zerort_core::{
    Action, Answer, At, Command, Key, Mesh, Plan, PlanSpec, Residence, Route, SetId, StepError,
    Stop, UnitId, WHOLE_PADDING,
};

#[test]
fn without_a_list_each_unit_is_asked_for_and_the_longest_unneeded_goes() {
    let mut alone = Alone::new(4, 2);
    assert!(!alone.open(EVALUATION, 0));
    let ask = alone.answer(&[0, 1], None).unwrap();
    assert_eq!(ask, Answer { actions: vec![], ask: Some(UnitId(0)) });
    assert_eq!(alone.gatherer.asking(), Some(UnitId(0)));
    assert_eq!(alone.need(&[0, 1]), gathers(&[0, 1]));
    assert_eq!(alone.need(&[1]), []);
    assert_eq!(alone.need(&[2]), [frees(&[0]), gathers(&[2])].concat());
    assert_eq!(alone.need(&[1]), []);
    assert_eq!(alone.need(&[3]), [frees(&[2]), gathers(&[3])].concat());
    assert_eq!(alone.close(), frees(&[1, 3]), "GAT-10");
}

#[test]
fn gat_2_a_set_is_current_only_when_it_has_arrived() {
    let mut alone = Alone::new(2, 2);
    alone.evaluate(&[&[0], &[1]]);
    alone.learn(2, 0);
    assert!(alone.open(EVALUATION, 0));
    let set = alone.set(&[0]);
    assert_eq!(alone.gatherer.acquire(set, None), Ok(false));
    assert_eq!(alone.answer(&[0], None).unwrap().actions, gathers(&[0]));
    let again = Answer { actions: vec![], ask: None };
    assert_eq!(alone.answer(&[0], None), Some(again), "what broke off is answered again");
    assert_eq!(alone.gatherer.acquire(set, None), Ok(false));
    alone.gatherer.arrived(set).unwrap();
    assert_eq!(alone.answer(&[0], None), None);
    assert_eq!(alone.gatherer.acquire(set, None), Ok(true));
    assert_eq!(alone.gatherer.residence(UnitId(0)), Some(Residence::Whole { users: 1 }));
}

#[test]
fn gat_3_what_is_in_use_stays_when_its_free_comes_by_and_goes_later() {
    let mut alone = Alone::new(3, 1);
    alone.evaluate(&[&[0], &[1], &[2]]);
    alone.learn(1, 0);
    assert!(alone.open(EVALUATION, 0));
    let outer = alone.set(&[0]);
    alone.need(&[0]);
    assert_eq!(alone.gatherer.acquire(outer, None), Ok(true));
    assert_eq!(alone.need(&[1]), gathers(&[1]), "Free u0 stands before it");
    assert_eq!(alone.whole(), [0, 1]);
    alone.gatherer.release(outer).unwrap();
    assert_eq!(alone.need(&[2]), [frees(&[1, 0]), gathers(&[2])].concat());
}

#[test]
fn gat_1_who_is_asked_within_a_pass_hands_out_the_rest_of_its_list_first() {
    let mut alone = Alone::new(4, 2);
    alone.evaluate(&[&[0], &[1], &[2], &[3]]);
    alone.learn(2, 0);
    assert!(alone.open(EVALUATION, 0));
    alone.need(&[0]);
    let set = alone.set(&[0]);
    assert_eq!(alone.gatherer.acquire(set, None), Ok(true));
    let rest = alone.gatherer.leave(&mut alone.reducer);
    let gathered: Vec<Action> =
        rest.into_iter().filter(|action| matches!(action, Action::Gather(_))).collect();
    assert_eq!(gathered, gathers(&[1, 2, 3]));
    assert!(alone.gatherer.list().is_none() && alone.gatherer.went_off());
    assert!(!alone.gatherer.is_current(set), "what is read next is asked for anew");
    assert!(alone.whole().contains(&0), "it is in use");
    assert_eq!(alone.gatherer.leave(&mut alone.reducer), [], "once");
    let served = alone.gatherer.serve(&[UnitId(1)]).unwrap();
    assert!(served.contains(&Action::Gather(UnitId(1))));
    alone.gatherer.served();
    assert!(alone.whole().contains(&0));
}

#[test]
fn a_use_is_a_further_one_only_in_a_forward_that_has_seen_the_first() {
    let mut alone = Alone::new(2, 2);
    let set = alone.set(&[0]);
    assert!(!alone.gatherer.reuse(set), "no pass");
    alone.open(FORWARD, 100);
    assert!(!alone.gatherer.reuse(set), "not current");
    alone.need(&[0]);
    assert!(!alone.gatherer.reuse(set), "its first use tells where it stands");
    assert_eq!(alone.gatherer.acquire(set, Some(100)), Ok(true));
    assert!(alone.gatherer.reuse(set));
    assert_eq!(alone.gatherer.residence(UnitId(0)), Some(Residence::Whole { users: 2 }));
    for _ in 0..2 {
        assert!(alone.gatherer.in_use());
        alone.gatherer.release(set).unwrap();
    }
    assert!(!alone.gatherer.in_use());
    alone.need(&[1]);
    assert!(!alone.gatherer.reuse(set), "not current any more");
    alone.close();
    alone.open(LOCAL, 200);
    alone.need(&[0]);
    assert!(!alone.gatherer.reuse(set), "a backward's thread may count anew");
    assert_eq!(alone.gatherer.acquire(set, Some(7)), Ok(true));
}

#[test]
fn gat_3_a_backward_holds_a_unit_until_a_node_older_than_its_first_use() {
    let mut alone = Alone::new(3, 1);
    alone.open(FORWARD, 100);
    for unit in 0..3 {
        alone.run(&[unit], 100 + 10 * u64::from(unit));
    }
    alone.run(&[2], 140);
    alone.close();
    alone.open(LOCAL, 0);
    alone.need_at(&[2], Some(145));
    assert_eq!(alone.need_at(&[1], Some(125)), gathers(&[1]), "u2 was first used at 120");
    assert_eq!(alone.need_at(&[0], Some(105)), [frees(&[2, 1]), gathers(&[0])].concat());
    assert_eq!(alone.need_at(&[2], Some(95)), gathers(&[2]), "an older graph: nothing is known");
    assert_eq!(alone.close(), frees(&[0, 2]));
}

#[test]
fn what_was_never_seen_in_a_forward_is_held_to_the_end() {
    let mut alone = Alone::new(2, 1);
    alone.open(LOCAL, 0);
    alone.need_at(&[1], Some(50));
    assert_eq!(alone.need_at(&[0], Some(1)), gathers(&[0]));
    assert_eq!(alone.close(), frees(&[0, 1]));
}

#[test]
fn a_forward_of_the_next_micro_batch_begins_a_new_count_of_first_uses() {
    let mut alone = Alone::new(2, 1);
    for start in [0, 1000] {
        alone.open(FORWARD, start);
        alone.run(&[0], start + 10);
        alone.run(&[1], start + 20);
        alone.close();
        alone.open(LOCAL, 0);
        alone.need_at(&[1], Some(start + 25));
        assert_eq!(alone.need_at(&[0], Some(start + 15)), [frees(&[1]), gathers(&[0])].concat());
        alone.close();
    }
}

#[test]
fn of_two_forwards_the_first_use_in_either_counts() {
    let mut alone = Alone::new(2, 1);
    for start in [0, 100] {
        alone.open(FORWARD, start);
        alone.run(&[0], start + 10);
        alone.run(&[1], start + 20);
        alone.close();
    }
    alone.open(LOCAL, 0);
    alone.need_at(&[1], Some(125));
    assert_eq!(alone.need_at(&[0], Some(115)), gathers(&[0]), "the older graph may still read u1");
}

#[test]
fn gat_7_a_pass_that_ends_early_hands_out_its_whole_list() {
    let mut alone = Alone::new(3, 1);
    alone.evaluate(&[&[0], &[1], &[2]]);
    alone.learn(1, 0);
    alone.open(EVALUATION, 0);
    alone.need(&[0]);
    assert_eq!(
        alone.gatherer.close(&mut alone.reducer, false),
        [frees(&[0]), gathers(&[1]), frees(&[1]), gathers(&[2]), frees(&[2])].concat()
    );
    assert_eq!((alone.whole(), alone.gatherer.live()), (vec![], 0));
}

#[test]
fn a_module_that_is_skipped_costs_nothing_and_one_out_of_order_finds_what_was_passed_over() {
    let mut alone = Alone::new(4, 3);
    alone.evaluate(&[&[0], &[1], &[2], &[3]]);
    alone.learn(2, 0);
    alone.open(EVALUATION, 0);
    assert_eq!(alone.need(&[1]), gathers(&[0, 1]), "u0 has room, and may be asked for");
    assert_eq!(alone.need(&[0]), []);
    assert_eq!(alone.need(&[3]), [frees(&[1, 0]), gathers(&[2, 3])].concat());
    assert_eq!(alone.whole(), [2, 3], "what was passed over has room");
    assert!(!alone.gatherer.went_off());
}

#[test]
fn one_use_more_of_what_is_here_does_not_jump_ahead() {
    let mut alone = Alone::new(3, 3);
    alone.evaluate(&[&[0], &[1], &[2], &[0]]);
    alone.learn(3, 0);
    alone.open(EVALUATION, 0);
    alone.need(&[0]);
    alone.need(&[1]);
    assert_eq!(alone.need(&[0]), [], "the stop that needs it again is behind another");
    assert_eq!(alone.need(&[2]), [frees(&[1]), gathers(&[2])].concat());
    assert_eq!(alone.need(&[0]), frees(&[2]));
    assert!(!alone.gatherer.went_off());
}

#[test]
fn what_is_next_along_a_list_can_be_asked() {
    let mut alone = Alone::new(2, 1);
    alone.evaluate(&[&[0], &[1]]);
    alone.learn(1, 0);
    alone.open(EVALUATION, 0);
    alone.need(&[0]);
    assert_eq!(alone.gatherer.explain(), Some((2, Command::Need(1))));
    alone.close();
    assert_eq!(alone.gatherer.explain(), None);
}

#[test]
fn a_rank_that_only_serves_puts_units_back_as_they_were() {
    let mut alone = Alone::new(3, 3);
    alone.open(FORWARD, 0);
    alone.need(&[0]);
    alone.close();
    alone.gatherer.open(LOCAL, 0, 0).unwrap();
    let asked = [UnitId(0), UnitId(1)];
    assert_eq!(alone.gatherer.serve(&asked).unwrap(), gathers(&[0, 1]));
    assert_eq!(alone.whole(), [0, 1]);
    assert_eq!(alone.gatherer.served(), frees(&[1]));
    assert_eq!(alone.whole(), [0]);
}

#[test]
fn gat_4_a_list_begins_with_what_it_expects_and_no_more() {
    let mut alone = Alone::new(3, 3);
    alone.evaluate(&[&[0], &[1]]);
    alone.learn(3, 1);
    alone.open(FORWARD, 0);
    alone.need(&[2]);
    alone.close();
    assert_eq!(alone.whole(), [2]);
    alone.gatherer.open(EVALUATION, 0, 0).unwrap();
    alone.roll();
    assert_eq!(alone.gatherer.begin().unwrap(), frees(&[2]));
    assert!(alone.gatherer.list().is_some());
}

#[test]
fn gat_10_nothing_is_whole_behind_the_boundary_and_what_is_abandoned() {
    let mut alone = Alone::new(2, 2);
    alone.open(FORWARD, 0);
    alone.need(&[0]);
    alone.close();
    assert_eq!(alone.whole(), [0]);
    alone.gatherer.open(At::Boundary, 0, 0).unwrap();
    alone.roll();
    assert_eq!(alone.gatherer.begin().unwrap(), frees(&[0]));
    alone.open(FORWARD, 0);
    alone.need(&[1]);
    assert_eq!(alone.gatherer.abandon(), frees(&[1]));
    assert!(!alone.gatherer.in_pass());
}

#[test]
fn calls_out_of_order_are_refused_and_change_nothing() {
    let mut alone = Alone::new(2, 2);
    let set = alone.set(&[1, 0, 1]);
    assert_eq!((set, alone.gatherer.set(set)), (SetId(0), Some(&[UnitId(0), UnitId(1)][..])));
    let Alone { gatherer, reducer } = &mut alone;
    let unknown = StepError::UnknownSet { set: 9, sets: 1 };
    let rows = gatherer.read(&[]);
    assert_eq!(rows, Err(StepError::BadRows));
    assert_eq!(gatherer.need(reducer, set, None), Err(StepError::NoPass));
    assert_eq!(gatherer.row(reducer, [0; OWN]), Err(StepError::NotRolling));
    assert_eq!(gatherer.begin(), Err(StepError::NotRolling));
    assert_eq!(gatherer.open(At::Need(UnitId(0)), 0, 0), Err(StepError::NotRolling));
    assert_eq!(gatherer.arrived(set), Err(StepError::NotGathered { unit: UnitId(0) }));
    assert_eq!(gatherer.arrived(SetId(9)), Err(unknown));
    assert_eq!(gatherer.acquire(SetId(9), None), Err(unknown));
    assert_eq!(gatherer.release(SetId(9)), Err(unknown));
    assert_eq!(gatherer.release(set), Ok(()));
    let unit = UnitId(2);
    assert_eq!(gatherer.set_of(&[unit]), Err(StepError::UnknownUnit { unit, units: 2 }));
    assert_eq!(gatherer.serve(&[unit]), Err(StepError::UnknownUnit { unit, units: 2 }));
    assert_eq!(gatherer.close(reducer, true), []);
    assert_eq!((gatherer.reached(7), gatherer.served()), (vec![], vec![]));
    gatherer.open(FORWARD, 0, 0).unwrap();
    assert_eq!(gatherer.begin(), Err(StepError::NotRolling));
    assert_eq!(gatherer.open(FORWARD, 0, 0), Err(StepError::PassUnderWay));
    assert_eq!(gatherer.close(reducer, true), []);
    gatherer.open(FORWARD, 0, 0).unwrap();
    alone.roll();
    alone.gatherer.begin().unwrap();
    let plan = Arc::clone(alone.reducer.plan());
    assert_eq!(alone.gatherer.load(plan), Err(StepError::PassUnderWay));
}

/// What a rank may do in a pass.
#[derive(Clone, Copy, Debug)]
enum Do {
    Need,
    Hold,
    Release,
}

fn doing() -> impl Strategy<Value = (Do, Index)> {
    let kind = prop_oneof![4 => Just(Do::Need), 2 => Just(Do::Hold), 2 => Just(Do::Release)];
    (kind, any::<Index>())
}

proptest! {
    /// Whatever a rank needs and holds, along any list: it is handed out the list's gathers as they
    /// stand, its sets are whole, what is held is not freed, and in the end nothing is whole.
    #[test]
    fn gat_1_2_3_7_10_whatever_a_rank_does_along_a_list(
        Walk { plan, routes, room, depth } in walk(),
        doings in prop::collection::vec(doing(), 0..40),
    ) {
        let spec = PlanSpec {
            params: plan.params().to_vec(),
            mesh: Mesh::flat(1).unwrap(),
            rules: plan.rules(),
            cap: zerort_core::Cap::Elements(500),
            window: Some(plan.window().max(1)),
            whole_padding: WHOLE_PADDING,
        };
        let plan = Plan::new(spec).unwrap();
        let mut alone = Alone::over(Arc::new(plan.clone()), room);
        alone.gatherer.open(EVALUATION, 0, 0).unwrap();
        let key = alone.gatherer.row(&alone.reducer, [0; OWN]).unwrap().key;
        alone.close();
        let stops: Vec<Stop> = routes[2].stops.clone();
        let route = Route { key, then: None, fills: Vec::new(), stops: stops.clone(), ..routes[2].clone() };
        let routed = Arc::new(plan.routed(&[route], room, depth).unwrap());
        alone.reducer.reorder(Arc::clone(&routed)).unwrap();
        alone.gatherer.load(Arc::clone(&routed)).unwrap();
        prop_assert!(alone.open(EVALUATION, 0));
        prop_assert_ne!(key, Key(0));
        let (mut done, mut held, mut listed) = (Vec::new(), Vec::<SetId>::new(), true);
        for (what, index) in doings {
            if stops.is_empty() {
                break;
            }
            let units: Vec<u32> =
                stops[index.index(stops.len())].units.iter().map(|unit| unit.0).collect();
            match what {
                Do::Need | Do::Hold => {
                    let actions = alone.need(&units);
                    for set in &held {
                        for unit in alone.gatherer.set(*set).unwrap() {
                            prop_assert!(!actions.contains(&Action::Free(*unit)), "GAT-3");
                        }
                    }
                    listed &= !alone.gatherer.went_off();
                    if listed {
                        done.extend(actions);
                    }
                    let set = alone.set(&units);
                    for unit in alone.gatherer.set(set).unwrap() {
                        let residence = alone.gatherer.residence(*unit).unwrap();
                        prop_assert!(matches!(residence, Residence::Whole { .. }), "GAT-2");
                    }
                    if matches!(what, Do::Hold) {
                        prop_assert_eq!(alone.gatherer.acquire(set, None), Ok(true));
                        held.push(set);
                    }
                }
                Do::Release => {
                    if let Some(set) = held.pop() {
                        alone.gatherer.release(set).unwrap();
                    }
                }
            }
        }
        let tail = alone.close();
        if listed {
            done.extend(tail);
            let is_gather = |action: &&Action| matches!(action, Action::Gather(_));
            let all = routed.lists()[0].commands().iter().filter_map(|command| command.action());
            let all: Vec<Action> = all.collect();
            prop_assert!(done.iter().filter(is_gather).eq(all.iter().filter(is_gather)), "GAT-1, 7");
        }
        prop_assert_eq!(alone.gatherer.live(), 0);
    }
}
