//! The gradient cursor against a slow twin: every order of arrival in a small scope, random ones in a large one.

mod arbitrary;

use std::collections::BTreeSet;
use std::sync::Arc;

use arbitrary::{permutations, plan, uniform};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use zerort_core::{BucketId, Command, Finished, ParamId, Plan, Reducer};

/// What a reducer should do in a pass, computed anew from the whole history at every arrival.
struct Twin {
    plan: Arc<Plan>,
    expected: Vec<usize>,
    history: Vec<ParamId>,
    hi: usize,
    late: BTreeSet<ParamId>,
}

impl Twin {
    fn new(plan: &Arc<Plan>, expected: &[usize]) -> Self {
        Self { plan: Arc::clone(plan), expected: expected.to_vec(), history: Vec::new(), hi: 0, late: BTreeSet::new() }
    }

    fn fired(&self, param: ParamId) -> usize {
        self.history.iter().filter(|&&came| came == param).count()
    }

    fn is_full(&self, bucket: BucketId) -> bool {
        let params = &self.plan.bucket(bucket).unwrap().params;
        params.iter().all(|&param| self.fired(param) >= self.expected[param.index()])
    }

    fn has_left(&self, bucket: BucketId) -> bool {
        self.plan.schedule().commands()[..self.hi].contains(&Command::Launch(bucket))
    }

    fn grad_ready(&mut self, param: ParamId) -> Option<usize> {
        let (bucket, _) = self.plan.home(param).unwrap();
        if self.has_left(bucket) {
            self.late.insert(param);
        }
        let was_full = self.is_full(bucket);
        self.history.push(param);
        if was_full || !self.is_full(bucket) {
            return None;
        }
        let commands = self.plan.schedule().commands();
        let stuck = |command: &Command| matches!(*command, Command::Launch(bucket) if !self.is_full(bucket));
        let hi = commands.iter().position(stuck).unwrap_or(commands.len());
        (hi > std::mem::replace(&mut self.hi, hi)).then_some(hi)
    }

    fn finish(self) -> Finished {
        let all = (0..self.expected.len() as u32).map(ParamId);
        let absent = all.filter(|&param| self.expected[param.index()] > 0 && self.fired(param) == 0).collect();
        Finished { hi: self.plan.schedule().commands().len(), absent, late: self.late.into_iter().collect() }
    }
}

/// Runs a pass on both and compares every answer.
fn compare(reducer: &mut Reducer, expected: &[usize], arrivals: &[ParamId]) {
    let mut twin = Twin::new(reducer.plan(), expected);
    reducer.begin().unwrap();
    for &param in arrivals {
        assert_eq!(reducer.grad_ready(param).unwrap(), twin.grad_ready(param), "{param:?} of {arrivals:?}");
    }
    assert_eq!(reducer.finish().unwrap(), twin.finish(), "{arrivals:?}");
}

/// Runs the pass that observes.
fn teach(reducer: &mut Reducer, arrivals: &[ParamId]) {
    reducer.begin().unwrap();
    assert!(arrivals.iter().all(|&param| reducer.grad_ready(param) == Ok(None)));
    reducer.finish().unwrap();
}

/// Every plan of up to 6 parameters in up to 3 buckets with windows of 1 to 3, and every order in which they can arrive.
fn each_order(params: std::ops::RangeInclusive<usize>, mut check: impl FnMut(&Arc<Plan>, &[ParamId])) {
    for n in params {
        let orders = permutations(n as u32);
        for per_bucket in n.div_ceil(3)..=n {
            for window in 1..=3 {
                let plan = uniform(n, per_bucket, Some(window));
                assert!(plan.buckets().len() <= 3);
                for order in &orders {
                    check(&plan, order);
                }
            }
        }
    }
}

#[test]
fn red_1_ranges_tile_the_list_whatever_the_order() {
    each_order(1..=6, |plan, order| {
        let mut reducer = Reducer::new(Arc::clone(plan));
        teach(&mut reducer, order);
        reducer.begin().unwrap();
        let ends: Vec<usize> = order.iter().filter_map(|&param| reducer.grad_ready(param).unwrap()).collect();
        assert!(ends.is_sorted_by(|a, b| a < b), "{order:?}: {ends:?}");
        assert_eq!(ends.last(), Some(&plan.schedule().commands().len()), "{order:?}");
        assert_eq!(reducer.finish().unwrap().hi, plan.schedule().commands().len());
    });
}

#[test]
fn red_2_a_launch_is_handed_out_exactly_when_all_before_it_and_its_own_bucket_are_full() {
    each_order(1..=6, |plan, order| {
        let mut reducer = Reducer::new(Arc::clone(plan));
        teach(&mut reducer, order);
        compare(&mut reducer, &vec![1; order.len()], order);
        reducer.reorder(Arc::new(plan.reordered(reducer.observed()).unwrap())).unwrap();
        compare(&mut reducer, &vec![1; order.len()], order);
    });
}

#[test]
fn red_3_every_duplicate_at_every_place_travels_or_is_late() {
    each_order(1..=4, |plan, order| {
        let mut reducer = Reducer::new(Arc::clone(plan));
        teach(&mut reducer, order);
        for place in 0..=order.len() {
            for &again in order {
                let mut arrivals = order.to_vec();
                arrivals.insert(place, again);
                compare(&mut reducer, &vec![1; order.len()], &arrivals);
            }
        }
    });
}

#[test]
fn red_4_every_set_of_missing_and_frozen_parameters_is_told_apart() {
    each_order(1..=4, |plan, order| {
        let mut reducer = Reducer::new(Arc::clone(plan));
        teach(&mut reducer, order);
        let subsets = || 0..1_u32 << order.len();
        for (present, active) in subsets().flat_map(|present| subsets().map(move |active| (present, active))) {
            let has = |set: u32, param: ParamId| set >> param.0 & 1 == 1;
            let active: Vec<bool> = (0..order.len() as u32).map(|param| has(active, ParamId(param))).collect();
            let expected: Vec<usize> = active.iter().map(|&active| usize::from(active)).collect();
            let arrivals: Vec<ParamId> = order.iter().copied().filter(|&param| has(present, param)).collect();
            reducer.set_active(&active).unwrap();
            compare(&mut reducer, &expected, &arrivals);
        }
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Random models and plans; passes with duplicates and gaps; freezing and new launch orders between them.
    #[test]
    fn red_1_to_4_hold_over_many_passes(
        plan in plan(),
        first in vec(any::<Index>(), 1..60),
        passes in vec((vec(any::<bool>(), 24), vec(any::<Index>(), 0..80), any::<bool>()), 1..5),
    ) {
        let params = plan.params().len();
        let named = |places: &[Index]| places.iter().map(|at| ParamId(at.index(params) as u32)).collect::<Vec<_>>();
        let mut reducer = Reducer::new(Arc::new(plan));
        let first = named(&first);
        teach(&mut reducer, &first);
        let fires = |param: u32| first.iter().filter(|came| came.0 == param).count().max(1);
        for (active, arrivals, reorder) in passes {
            let active = &active[..params];
            reducer.set_active(active).unwrap();
            if reorder {
                reducer.reorder(Arc::new(reducer.plan().reordered(reducer.observed()).unwrap())).unwrap();
            }
            let expected: Vec<usize> =
                (0..params as u32).map(|param| if active[param as usize] { fires(param) } else { 0 }).collect();
            compare(&mut reducer, &expected, &named(&arrivals));
        }
    }
}
