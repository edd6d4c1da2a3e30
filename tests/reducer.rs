//! The gradient cursor, case by case. `tests/arrivals.rs` holds it against a twin for all orders.

mod arbitrary;

use std::sync::Arc;

use arbitrary::{Makeup, ids, partly_trained, uniform};
use zerort_core::{BucketId, Command, Finished, Life, ParamId, Phase, Plan, Reducer, StepError};

/// Two parameters a bucket: b0 = {5, 4}, b1 = {3, 2}, b2 = {1, 0}; six commands, at most one bucket
/// in flight.
fn plan() -> Arc<Plan> {
    uniform(6, 2, Some(1))
}

const BACKWARD: [u32; 6] = [5, 4, 3, 2, 1, 0];

fn arrive(reducer: &mut Reducer, params: &[u32]) -> Vec<Option<usize>> {
    params.iter().map(|&param| reducer.grad_ready(ParamId(param)).unwrap()).collect()
}

fn pass(reducer: &mut Reducer, params: &[u32]) -> (Vec<Option<usize>>, Finished) {
    reducer.begin().unwrap();
    let answers = arrive(reducer, params);
    (answers, reducer.finish().unwrap())
}

/// A reducer whose first pass saw `params`.
fn taught(params: &[u32]) -> Reducer {
    let mut reducer = Reducer::new(plan());
    pass(&mut reducer, params);
    reducer
}

fn finished(absent: &[u32], late: &[u32]) -> Finished {
    Finished { hi: 6, absent: ids(absent), late: ids(late) }
}

#[test]
fn the_first_pass_hands_everything_out_at_its_end() {
    let mut reducer = Reducer::new(plan());
    assert_eq!(pass(&mut reducer, &BACKWARD), (vec![None; 6], finished(&[], &[])));
}

#[test]
fn a_full_bucket_leaves_when_its_last_gradient_comes() {
    let (answers, end) = pass(&mut taught(&BACKWARD), &BACKWARD);
    assert_eq!(answers, [None, Some(2), None, Some(4), None, Some(6)]);
    assert_eq!(end, finished(&[], &[]));
}

#[test]
fn what_is_only_held_is_never_waited_for_whatever_is_said_to_require_grad() {
    let held = [Makeup::Held, Makeup::Trained, Makeup::Both];
    let mut reducer = Reducer::new(Arc::new(partly_trained(&held, None, 2)));
    reducer.set_active(&[true; 4]).unwrap();
    assert!(reducer.watched().eq(ids(&[1, 2])));
    let (_, first) = pass(&mut reducer, &[2, 1]);
    assert_eq!(first, Finished { hi: 4, absent: vec![], late: vec![] });
    let (answers, end) = pass(&mut reducer, &[0, 3, 2, 1]);
    assert_eq!(answers, [None, None, Some(1), Some(4)]);
    assert_eq!(end, first);
    let filled: Vec<_> =
        reducer.filled().iter().map(|&(bucket, place)| (bucket.0, place)).collect();
    assert_eq!(filled, [(1, 1), (2, 2)]);
}

#[test]
fn a_full_bucket_waits_for_those_before_it() {
    let (answers, _) = pass(&mut taught(&BACKWARD), &[0, 1, 2, 3, 4, 5]);
    assert_eq!(answers, [None, None, None, None, None, Some(6)]);
}

#[test]
fn the_order_of_last_arrivals_is_observed_and_can_be_followed() {
    let mut reducer = taught(&[1, 5, 0, 4, 3, 2, 5]);
    assert_eq!(reducer.observed(), ids(&[1, 0, 4, 3, 2, 5]));
    reducer.reorder(Arc::new(plan().reordered(reducer.observed()).unwrap())).unwrap();
    let launches: Vec<BucketId> = reducer.plan().schedule().launches().collect();
    assert_eq!(launches, [BucketId(2), BucketId(1), BucketId(0)]);
    let (answers, _) = pass(&mut reducer, &[1, 5, 0, 4, 3, 2, 5]);
    assert_eq!(answers, [None, None, Some(2), None, None, Some(4), Some(6)]);
}

#[test]
fn later_passes_do_not_change_what_was_observed() {
    let mut reducer = taught(&BACKWARD);
    pass(&mut reducer, &[0, 1, 2, 3, 4, 5]);
    assert_eq!(reducer.observed(), ids(&BACKWARD));
}

#[test]
fn a_parameter_that_fires_twice_is_waited_for_twice() {
    let mut reducer = taught(&[5, 4, 5, 3, 2, 1, 0]);
    let (answers, end) = pass(&mut reducer, &[5, 4, 5, 3, 2, 1, 0]);
    assert_eq!(answers, [None, None, Some(2), None, Some(4), None, Some(6)]);
    assert_eq!(end, finished(&[], &[]));
}

#[test]
fn a_parameter_that_fires_less_often_than_learnt_delays_its_bucket_and_is_not_absent() {
    let (answers, end) = pass(&mut taught(&[5, 4, 5, 3, 2, 1, 0]), &BACKWARD);
    assert_eq!(answers, [None; 6]);
    assert_eq!(end, finished(&[], &[]));
}

#[test]
fn a_pass_without_arrivals_teaches_nothing() {
    let mut reducer = taught(&[]);
    assert_eq!(reducer.observed(), []);
    assert_eq!(pass(&mut reducer, &BACKWARD).0, [None; 6]);
    assert_eq!(reducer.observed(), ids(&BACKWARD));
    assert_eq!(pass(&mut reducer, &BACKWARD).0[1], Some(2));
}

#[test]
fn red_3_a_gradient_after_its_bucket_left_is_named_once() {
    let (_, end) = pass(&mut taught(&BACKWARD), &[5, 4, 4, 5, 4, 3, 2, 1, 0]);
    assert_eq!(end, finished(&[], &[4, 5]));
}

#[test]
fn red_3_one_gradient_too_many_is_reduced_while_its_bucket_has_not_left() {
    let (answers, end) = pass(&mut taught(&BACKWARD), &[3, 2, 3, 5, 5, 4, 1, 0]);
    assert_eq!(answers, [None, None, None, None, None, Some(4), None, Some(6)]);
    assert_eq!(end, finished(&[], &[]));
}

#[test]
fn red_3_late_gradients_of_one_pass_are_not_those_of_the_next() {
    let mut reducer = taught(&BACKWARD);
    pass(&mut reducer, &[5, 4, 4, 3, 2, 1, 0]);
    assert_eq!(pass(&mut reducer, &BACKWARD).1, finished(&[], &[]));
}

#[test]
fn red_4_what_never_came_is_named_and_its_bucket_goes_at_the_end() {
    let (answers, end) = pass(&mut taught(&BACKWARD), &[5, 4, 3, 1, 0]);
    assert_eq!(answers, [None, Some(2), None, None, None]);
    assert_eq!(end, finished(&[2], &[]));
}

#[test]
fn frozen_parameters_are_neither_waited_for_nor_missed() {
    let mut reducer = taught(&BACKWARD);
    reducer.set_active(&[true, true, false, true, false, false]).unwrap();
    let (answers, end) = pass(&mut reducer, &[3, 1, 0]);
    assert_eq!(answers, [Some(4), None, Some(6)], "b0 is full from the start and goes with b1");
    assert_eq!(end, finished(&[], &[]));
}

#[test]
fn a_gradient_of_a_frozen_parameter_is_late_only_when_its_bucket_left() {
    let mut reducer = taught(&BACKWARD);
    reducer.set_active(&[true, true, true, true, true, false]).unwrap();
    assert_eq!(pass(&mut reducer, &[5, 4, 3, 2, 1, 0]).1, finished(&[], &[]));
    assert_eq!(pass(&mut reducer, &[4, 5, 3, 2, 1, 0]).1, finished(&[], &[5]));
}

#[test]
fn what_is_frozen_while_observing_comes_first() {
    let mut reducer = Reducer::new(plan());
    reducer.set_active(&[false, true, true, false, true, true]).unwrap();
    pass(&mut reducer, &[5, 2, 1, 4]);
    assert_eq!(reducer.observed(), ids(&[0, 3, 5, 2, 1, 4]));
}

#[test]
fn what_never_came_while_observing_is_not_listed() {
    assert_eq!(taught(&[5, 3, 2, 0]).observed(), ids(&[5, 3, 2, 0]));
}

#[test]
fn a_parameter_that_is_new_is_observed_first() {
    let mut reducer = Reducer::new(plan());
    let mut active = [true, true, true, true, true, false];
    reducer.set_active(&active).unwrap();
    pass(&mut reducer, &[4, 3, 2, 1, 0]);
    active[5] = true;
    reducer.set_active(&active).unwrap();
    let twice = [5, 4, 5, 3, 2, 1, 0];
    assert_eq!(pass(&mut reducer, &twice).0, [None; 7]);
    assert_eq!(pass(&mut reducer, &twice).0, [None, None, Some(2), None, Some(4), None, Some(6)]);
    active[5] = false;
    reducer.set_active(&active).unwrap();
    assert_eq!(
        pass(&mut reducer, &[4]).0,
        [Some(2)],
        "once known, it comes and goes without another observation"
    );
    active[5] = true;
    reducer.set_active(&active).unwrap();
    assert_eq!(pass(&mut reducer, &twice).0[2], Some(2));
}

#[test]
fn a_pass_with_everything_frozen_ends_at_once() {
    let mut reducer = Reducer::new(plan());
    reducer.set_active(&[false; 6]).unwrap();
    assert_eq!(pass(&mut reducer, &[]).1, finished(&[], &[]));
}

#[test]
fn gradients_outside_a_pass_belong_to_none() {
    let mut reducer = taught(&BACKWARD);
    assert_eq!(arrive(&mut reducer, &[5, 4, 5]), [None; 3]);
    assert_eq!(pass(&mut reducer, &[]).1, finished(&[0, 1, 2, 3, 4, 5], &[]));
}

#[test]
fn an_armed_reducer_tells_of_the_first_gradient_once() {
    let mut reducer = taught(&BACKWARD);
    reducer.arm().unwrap();
    assert!(!reducer.in_pass());
    assert_eq!(arrive(&mut reducer, &[5, 5]), [Some(0), None]);
    reducer.arm().unwrap();
    reducer.disarm();
    assert_eq!(arrive(&mut reducer, &[5]), [None]);
    reducer.arm().unwrap();
    reducer.begin().unwrap();
    reducer.disarm();
    assert!(reducer.in_pass(), "disarming ends no pass");
    assert_eq!(
        reducer.arm(),
        Err(StepError::OutOfPhase { have: Phase::Backward, want: Phase::Idle })
    );
    assert_eq!(arrive(&mut reducer, &[5, 4]), [None, Some(2)]);
}

#[test]
fn a_call_in_the_wrong_phase_is_refused_and_changes_nothing() {
    let mut reducer = taught(&BACKWARD);
    let idle = StepError::OutOfPhase { have: Phase::Idle, want: Phase::Backward };
    assert_eq!(reducer.finish(), Err(idle));
    reducer.begin().unwrap();
    arrive(&mut reducer, &[5]);
    let backward = StepError::OutOfPhase { have: Phase::Backward, want: Phase::Idle };
    assert_eq!(reducer.begin(), Err(backward));
    assert_eq!(reducer.set_active(&[false; 6]), Err(backward));
    assert_eq!(reducer.reorder(plan()), Err(backward));
    assert_eq!(arrive(&mut reducer, &[4]), [Some(2)]);
    assert!(reducer.in_pass());
}

#[test]
fn unknown_parameters_and_wrong_lengths_are_refused_in_every_phase() {
    let mut reducer = Reducer::new(plan());
    let unknown = StepError::UnknownParam { param: ParamId(6), params: 6 };
    assert_eq!(reducer.set_active(&[true; 5]), Err(StepError::WrongLength { params: 6, got: 5 }));
    for _ in 0..2 {
        assert_eq!(reducer.grad_ready(ParamId(6)), Err(unknown));
        reducer.begin().unwrap();
        assert_eq!(reducer.grad_ready(ParamId(6)), Err(unknown));
        assert_eq!(reducer.grad_ready_at(ParamId(6), 1), Err(unknown));
        arrive(&mut reducer, &BACKWARD);
        reducer.finish().unwrap();
    }
}

#[test]
fn a_plan_of_another_layout_is_refused() {
    let (one, other) = (plan(), uniform(6, 3, Some(1)));
    let (expected, got) = (one.layout_digest(), other.layout_digest());
    assert_eq!(Reducer::new(one).reorder(other), Err(StepError::OtherLayout { expected, got }));
}

#[test]
fn a_stuck_command_says_what_it_lacks() {
    let mut reducer = taught(&[5, 4, 3, 2, 3, 1, 0]);
    assert_eq!(reducer.explain(), None);
    reducer.begin().unwrap();
    arrive(&mut reducer, &[5, 4, 3, 0]);
    let stuck = reducer.explain().unwrap();
    assert_eq!(
        (stuck.index, stuck.command, &stuck.lacking),
        (2, Command::Launch(BucketId(1)), &ids(&[2, 3]))
    );
    assert_eq!(stuck.to_string(), "command 2 = Launch b1; b1 lacks 2, 3");
    arrive(&mut reducer, &[2, 3, 1]);
    assert_eq!(reducer.explain(), None, "everything has been handed out");
}

#[test]
fn an_observing_pass_stands_at_the_first_command() {
    let mut reducer = Reducer::new(plan());
    reducer.begin().unwrap();
    arrive(&mut reducer, &[5]);
    assert_eq!(reducer.explain().unwrap().lacking, ids(&[4]));
    arrive(&mut reducer, &[4, 3]);
    assert_eq!(reducer.explain().unwrap().to_string(), "command 0 = Launch b0; b0 lacks nothing");
}

#[test]
fn the_life_of_a_bucket_ends_when_it_is_full() {
    let mut reducer = taught(&BACKWARD);
    reducer.begin().unwrap();
    for (param, now) in [(3, 10), (5, 20), (2, 30), (2, 40), (4, 50), (4, 60)] {
        reducer.grad_ready_at(ParamId(param), now).unwrap();
    }
    arrive(&mut reducer, &[1, 0]);
    reducer.finish().unwrap();
    reducer.grad_ready_at(ParamId(5), 70).unwrap();
    let life = |bucket, first_ns, prior_ns, full_ns, last| Life {
        bucket: BucketId(bucket),
        first_ns,
        prior_ns,
        full_ns,
        last: ParamId(last),
    };
    assert_eq!(
        reducer.life().collect::<Vec<_>>(),
        [life(0, 20, 20, 50, 4), life(1, 10, 10, 30, 2)]
    );
    reducer.begin().unwrap();
    assert_eq!(reducer.life().count(), 0);
}

/// A reducer with sentinels, whose first pass saw `params`.
fn guarded(params: &[u32]) -> Reducer {
    let mut reducer = taught(params);
    reducer.post_sentinels().unwrap();
    reducer
}

fn watched(reducer: &Reducer) -> Vec<u32> {
    reducer.watched().map(|param| param.0).collect()
}

#[test]
fn a_sentinel_is_the_parameter_of_its_bucket_that_came_last() {
    assert_eq!(watched(&guarded(&BACKWARD)), [0, 2, 4]);
    assert_eq!(watched(&guarded(&[1, 5, 0, 4, 3, 2, 5])), [0, 2, 5], "the last arrival counts");
}

#[test]
fn everything_is_watched_until_a_pass_has_observed() {
    let mut reducer = Reducer::new(plan());
    reducer.post_sentinels().unwrap();
    assert_eq!(watched(&reducer), [0, 1, 2, 3, 4, 5]);
    pass(&mut reducer, &[]);
    assert_eq!(watched(&reducer), [0, 1, 2, 3, 4, 5]);
    reducer.begin().unwrap();
    assert!(reducer.observing());
    arrive(&mut reducer, &BACKWARD);
    assert_eq!(watched(&reducer), [0, 1, 2, 3, 4, 5]);
    reducer.finish().unwrap();
    assert_eq!(watched(&reducer), [0, 2, 4]);
    reducer.begin().unwrap();
    assert!(!reducer.observing());
}

#[test]
fn a_bucket_of_which_something_did_not_come_is_watched_whole() {
    let mut reducer = guarded(&[5, 3, 2, 0]);
    assert_eq!(watched(&reducer), [0, 1, 2, 4, 5]);
    assert_eq!(pass(&mut reducer, &[5, 2, 0]), (vec![None; 3], finished(&[1, 4], &[])));
}

#[test]
fn red_2_a_sentinel_stands_for_its_bucket() {
    let mut reducer = guarded(&BACKWARD);
    assert_eq!(
        pass(&mut reducer, &[4, 2, 0]),
        (vec![Some(2), Some(4), Some(6)], finished(&[], &[]))
    );
    assert_eq!(
        pass(&mut reducer, &[5, 3, 1]),
        (vec![None; 3], finished(&[0, 2, 4], &[])),
        "nobody else does"
    );
}

#[test]
fn red_2_a_sentinel_that_fires_twice_is_waited_for_twice() {
    let mut reducer = guarded(&[5, 4, 5, 3, 2, 1, 0]);
    assert_eq!(pass(&mut reducer, &[5, 5, 2, 0]).0, [None, Some(2), Some(4), Some(6)]);
    assert_eq!(pass(&mut reducer, &[5, 2, 0]).0, [None; 3]);
}

#[test]
fn red_3_a_gradient_behind_a_wrong_sentinel_is_named_if_it_is_told_of() {
    let mut reducer = guarded(&BACKWARD);
    assert_eq!(pass(&mut reducer, &[4, 5, 3, 2, 1, 0]).1, finished(&[], &[5]));
    assert_eq!(pass(&mut reducer, &[4, 4, 2, 0]).1, finished(&[], &[4]));
}

#[test]
fn dismissed_sentinels_leave_everything_watched() {
    let mut reducer = guarded(&BACKWARD);
    reducer.dismiss_sentinels().unwrap();
    assert_eq!(watched(&reducer), [0, 1, 2, 3, 4, 5]);
    assert_eq!(
        pass(&mut reducer, &[4, 5, 3, 2, 1, 0]).0,
        [None, Some(2), None, Some(4), None, Some(6)]
    );
}

#[test]
fn a_frozen_sentinel_is_relieved_by_the_one_that_came_before_it() {
    let mut reducer = guarded(&BACKWARD);
    reducer.set_active(&[true, true, true, true, false, true]).unwrap();
    assert_eq!(watched(&reducer), [0, 2, 5]);
    assert_eq!(pass(&mut reducer, &[5, 2, 0]).0, [Some(2), Some(4), Some(6)]);
    reducer.set_active(&[true; 6]).unwrap();
    assert_eq!(watched(&reducer), [0, 2, 4]);
    reducer.set_active(&[true, true, false, false, true, true]).unwrap();
    assert_eq!(watched(&reducer), [0, 4], "a frozen bucket needs none");
    assert_eq!(pass(&mut reducer, &[4, 0]).0, [Some(4), Some(6)]);
}

#[test]
fn what_is_new_is_watched_with_everything_else() {
    let mut reducer = Reducer::new(plan());
    let mut active = [true, true, true, true, true, false];
    reducer.post_sentinels().unwrap();
    reducer.set_active(&active).unwrap();
    pass(&mut reducer, &[4, 3, 2, 1, 0]);
    assert_eq!(watched(&reducer), [0, 2, 4]);
    active[5] = true;
    reducer.set_active(&active).unwrap();
    assert_eq!(watched(&reducer), [0, 1, 2, 3, 4, 5]);
    pass(&mut reducer, &[4, 5, 3, 2, 1, 0]);
    assert_eq!(watched(&reducer), [0, 2, 5]);
}

#[test]
fn sentinels_come_and_go_between_passes_only() {
    let mut reducer = guarded(&BACKWARD);
    reducer.begin().unwrap();
    let backward = StepError::OutOfPhase { have: Phase::Backward, want: Phase::Idle };
    assert_eq!(reducer.post_sentinels(), Err(backward));
    assert_eq!(reducer.dismiss_sentinels(), Err(backward));
    assert_eq!(watched(&reducer), [0, 2, 4]);
}

#[test]
fn a_pass_can_be_made_to_observe_and_says_when_buckets_were_full() {
    let mut reducer = taught(&BACKWARD);
    assert_eq!(reducer.filled(), [(BucketId(0), 2), (BucketId(1), 4), (BucketId(2), 6)]);
    reducer.post_sentinels().unwrap();
    reducer.observe().unwrap();
    assert!(reducer.observing() && reducer.watched().count() == 6);
    assert_eq!(arrive(&mut reducer, &[1, 0, 5, 4, 3]), [None; 5]);
    assert_eq!(reducer.arrivals(), 5);
    reducer.finish().unwrap();
    assert_eq!(reducer.observed(), ids(&[1, 0, 5, 4, 3]));
    assert_eq!(reducer.filled(), [(BucketId(0), 4), (BucketId(2), 2)], "2 never came");
    assert!(!reducer.has_to_observe());
}
