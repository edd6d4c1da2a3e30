//! What a rank learns from its passes, and which of them follow a list.

mod alone;
mod arbitrary;

use std::sync::Arc;

use alone::{Alone, EVALUATION, FORWARD, LOCAL, UNIT, frees, gathers};
use arbitrary::sharded_over;
use zerort_core::{At, PassKind, UnitId};

#[test]
fn a_need_that_the_list_has_not_runs_its_rest_and_goes_on_free() {
    let mut alone = Alone::new(4, 2);
    alone.evaluate(&[&[0], &[1], &[2]]);
    alone.learn(2, 0);
    alone.open(EVALUATION, 0);
    alone.need(&[0]);
    let answer = alone.answer(&[3], None).unwrap();
    assert_eq!(answer.ask, Some(UnitId(3)));
    let rest = [frees(&[0]), gathers(&[1, 2]), frees(&[1])].concat();
    assert_eq!(answer.actions, rest, "GAT-1: peers pair with it");
    assert!(alone.gatherer.went_off() && alone.gatherer.list().is_none());
    assert_eq!(alone.need(&[3]), gathers(&[3]));
    alone.close();
    assert!(!alone.open(EVALUATION, 0), "it is seen anew");
    for unit in [0, 3, 1, 2] {
        alone.need(&[unit]);
    }
    alone.close();
    assert!(alone.gatherer.news());
    alone.learn(2, 0);
    assert!(alone.open(EVALUATION, 0));
}

#[test]
fn after_three_passes_in_a_row_that_went_off_it_stays_free() {
    let mut alone = Alone::new(3, 3);
    alone.evaluate(&[&[0]]);
    alone.learn(3, 0);
    for strike in 0..3 {
        assert_eq!(alone.gatherer.strays().count(), 0, "{strike}");
        assert!(alone.open(EVALUATION, 0));
        alone.need(&[1 + strike % 2]);
        alone.close();
        alone.evaluate(&[&[0]]);
    }
    assert!(!alone.open(EVALUATION, 0));
    assert_eq!(alone.gatherer.strays().collect::<Vec<_>>(), [(PassKind::Evaluation, 0)]);
}

#[test]
fn a_route_that_is_another_every_time_is_no_news_any_more() {
    let mut alone = Alone::new(3, 3);
    let orders = [[0, 1, 2], [1, 2, 0], [2, 1, 0], [0, 2, 1], [1, 0, 2], [2, 0, 1]];
    let news = orders.map(|[a, b, c]| {
        alone.evaluate(&[&[a], &[b], &[c]]);
        let news = alone.gatherer.news();
        alone.gatherer.told();
        news
    });
    assert_eq!(news, [true, true, true, true, false, false]);
}

#[test]
fn a_pass_that_left_something_out_teaches_nothing() {
    let mut alone = Alone::new(3, 3);
    alone.evaluate(&[&[0], &[1], &[2]]);
    assert!(alone.gatherer.news());
    alone.gatherer.told();
    alone.evaluate(&[&[0], &[2]]);
    assert!(!alone.gatherer.news());
    alone.evaluate(&[&[0], &[2], &[1]]);
    assert!(alone.gatherer.news());
}

#[test]
fn what_a_forward_leaves_is_what_its_backward_finds() {
    let mut alone = Alone::new(3, 2);
    let pass = |alone: &mut Alone, lists: bool| {
        assert_eq!(alone.open(FORWARD, 0), lists);
        for unit in 0..3 {
            alone.run(&[unit], 10 * u64::from(unit) + 10);
        }
        alone.close();
        assert_eq!(alone.whole(), [1, 2]);
        assert_eq!(alone.open(LOCAL, 0), lists);
        for unit in [2, 1, 0] {
            alone.need_at(&[unit], Some(10 * u64::from(unit) + 15));
        }
        alone.close();
        assert_eq!(alone.whole(), [] as [u32; 0]);
    };
    pass(&mut alone, false);
    alone.boundary();
    alone.learn(2, 1);
    pass(&mut alone, true);
    // An evaluation between the two takes what the backward's list begins with.
    alone.boundary();
    alone.open(FORWARD, 0);
    alone.close();
    alone.evaluate(&[&[0]]);
    assert!(!alone.open(LOCAL, 0));
}

#[test]
fn a_backward_that_has_to_observe_follows_no_list() {
    let plan = sharded_over(2, Some(1), 1);
    let mut alone = Alone::over(Arc::new(plan), 2 * UNIT);
    let backward = At::Pass(PassKind::Backward);
    assert!(!alone.open(backward, 0));
    alone.reducer.observe().unwrap();
    for unit in [1, 0] {
        alone.need(&[unit]);
        alone.reducer.grad_ready(zerort_core::ParamId(unit)).unwrap();
    }
    alone.reducer.finish().unwrap();
    alone.close();
    let fills: Vec<u32> = alone.gatherer.routes()[0].fills.iter().map(|&(_, stop)| stop).collect();
    assert_eq!(fills, [0, 1], "the bucket of u1 was full while it was in use");
    alone.learn(2, 1);
    assert!(alone.open(backward, 0));
    alone.close();
    alone.boundary();
    alone.reducer.observe().unwrap();
    alone.reducer.finish().unwrap(); // nothing came, which teaches nothing
    assert!(!alone.open(backward, 0));
}
