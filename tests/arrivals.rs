//! The gradient cursor against a slow twin: every order of arrival in a small scope, random ones in
//! a large one.

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
        Self {
            plan: Arc::clone(plan),
            expected: expected.to_vec(),
            history: Vec::new(),
            hi: 0,
            late: BTreeSet::new(),
        }
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
        let stuck = |command: &Command| match *command {
            Command::Launch(bucket) => !self.is_full(bucket),
            Command::Retire(_) | Command::Need(_) | Command::Gather(_) | Command::Free(_) => false,
        };
        let hi = commands.iter().position(stuck).unwrap_or(commands.len());
        (hi > std::mem::replace(&mut self.hi, hi)).then_some(hi)
    }

    fn finish(self) -> Finished {
        let all = (0..self.expected.len() as u32).map(ParamId);
        let absent = all
            .filter(|&param| self.expected[param.index()] > 0 && self.fired(param) == 0)
            .collect();
        Finished {
            hi: self.plan.schedule().commands().len(),
            absent,
            late: self.late.into_iter().collect(),
        }
    }
}

/// Runs a pass on both and compares every answer.
fn compare(reducer: &mut Reducer, expected: &[usize], arrivals: &[ParamId]) {
    let mut twin = Twin::new(reducer.plan(), expected);
    reducer.begin().unwrap();
    for &param in arrivals {
        assert_eq!(
            reducer.grad_ready(param).unwrap(),
            twin.grad_ready(param),
            "{param:?} of {arrivals:?}"
        );
    }
    assert_eq!(reducer.finish().unwrap(), twin.finish(), "{arrivals:?}");
}

/// How often each parameter is waited for: `fires` where it is watched. With sentinels that is one
/// parameter of a bucket whose active ones all came in `taught`, the last of them there; otherwise
/// every active one. What is only held is never waited for.
fn expected(
    plan: &Plan,
    active: &[bool],
    taught: &[ParamId],
    fires: impl Fn(ParamId) -> usize,
) -> Vec<usize> {
    let mut expected = vec![0; active.len()];
    let place = |param: &ParamId| taught.iter().rposition(|came| came == param);
    for bucket in plan.buckets().iter().filter(|bucket| bucket.is_trained()) {
        let waited: Vec<ParamId> =
            bucket.params.iter().copied().filter(|param| active[param.index()]).collect();
        let sentinel = waited
            .iter()
            .all(|param| place(param).is_some())
            .then(|| waited.iter().max_by_key(|p| place(p)));
        let watched =
            sentinel.map_or(waited.clone(), |sentinel| sentinel.into_iter().copied().collect());
        for param in watched {
            expected[param.index()] = fires(param);
        }
    }
    expected
}

/// Runs the pass that observes.
fn teach(reducer: &mut Reducer, arrivals: &[ParamId]) {
    reducer.begin().unwrap();
    assert!(arrivals.iter().all(|&param| reducer.grad_ready(param) == Ok(None)));
    reducer.finish().unwrap();
}

/// Every plan of up to 6 parameters in up to 3 buckets with windows of 1 to 3, and every order in
/// which they can arrive.
fn each_order(
    params: std::ops::RangeInclusive<usize>,
    mut check: impl FnMut(&Arc<Plan>, &[ParamId]),
) {
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
        let ends: Vec<usize> =
            order.iter().filter_map(|&param| reducer.grad_ready(param).unwrap()).collect();
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
fn red_3_every_duplicate_at_every_place_is_reduced_or_late() {
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
        for (present, active) in
            subsets().flat_map(|present| subsets().map(move |active| (present, active)))
        {
            let has = |set: u32, param: ParamId| set >> param.0 & 1 == 1;
            let active: Vec<bool> =
                (0..order.len() as u32).map(|param| has(active, ParamId(param))).collect();
            let expected: Vec<usize> = active.iter().map(|&active| usize::from(active)).collect();
            let arrivals: Vec<ParamId> =
                order.iter().copied().filter(|&param| has(present, param)).collect();
            reducer.set_active(&active).unwrap();
            compare(&mut reducer, &expected, &arrivals);
        }
    });
}

#[test]
fn red_2_a_bucket_with_a_sentinel_leaves_when_that_has_come_whatever_the_order() {
    each_order(1..=4, |plan, order| {
        let mut reducer = Reducer::new(Arc::clone(plan));
        reducer.post_sentinels().unwrap();
        assert_eq!(reducer.watched().count(), order.len(), "what has not been observed is watched");
        teach(&mut reducer, order);
        let expected = expected(plan, &vec![true; order.len()], order, |_| 1);
        let watched: Vec<ParamId> = reducer.watched().collect();
        assert_eq!(watched.len(), plan.buckets().len());
        assert!(watched.iter().all(|param| expected[param.index()] == 1));
        for arrivals in permutations(order.len() as u32) {
            compare(&mut reducer, &expected, &arrivals);
            let announced: Vec<ParamId> =
                arrivals.into_iter().filter(|param| watched.contains(param)).collect();
            compare(&mut reducer, &expected, &announced);
        }
    });
}

#[test]
fn red_4_every_set_of_unseen_frozen_and_missing_parameters_has_its_watch() {
    each_order(1..=4, |plan, order| {
        let subsets = || 0..1_u32 << order.len();
        let of = |set: u32| {
            order.iter().copied().filter(move |param| set >> param.0 & 1 == 1).collect::<Vec<_>>()
        };
        for (seen, active, present) in
            subsets().flat_map(|a| subsets().flat_map(move |b| subsets().map(move |c| (a, b, c))))
        {
            let taught = of(seen);
            if taught.is_empty() {
                continue; // a pass without arrivals teaches nothing
            }
            let mut reducer = Reducer::new(Arc::clone(plan));
            reducer.post_sentinels().unwrap();
            teach(&mut reducer, &taught);
            let active: Vec<bool> =
                (0..order.len()).map(|param| active >> param & 1 == 1).collect();
            reducer.set_active(&active).unwrap();
            let expected = expected(plan, &active, &taught, |_| 1);
            assert!(
                reducer
                    .watched()
                    .eq((0..order.len() as u32).map(ParamId).filter(|p| expected[p.index()] > 0))
            );
            compare(&mut reducer, &expected, &of(present));
        }
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Random models and plans; passes with duplicates and gaps; between them freezing, sentinels,
    /// new launch orders.
    #[test]
    fn red_1_to_4_hold_over_many_passes(
        plan in plan(),
        first in vec(any::<Index>(), 1..60),
        passes in vec(
            (vec(any::<bool>(), 24), vec(any::<Index>(), 0..80), any::<bool>(), any::<bool>()),
            1..5,
        ),
    ) {
        let params = plan.params().len();
        let named = |places: &[Index]| -> Vec<ParamId> {
            places.iter().map(|at| ParamId(at.index(params) as u32)).collect()
        };
        let mut reducer = Reducer::new(Arc::new(plan));
        let first = named(&first);
        teach(&mut reducer, &first);
        let fires = |param: u32| first.iter().filter(|came| came.0 == param).count().max(1);
        for (active, arrivals, reorder, sentinels) in passes {
            let active = &active[..params];
            reducer.set_active(active).unwrap();
            if sentinels {
                reducer.post_sentinels().unwrap();
            } else {
                reducer.dismiss_sentinels().unwrap();
            }
            if reorder {
                let plan = reducer.plan().reordered(reducer.observed()).unwrap();
                reducer.reorder(Arc::new(plan)).unwrap();
            }
            // Nobody is taken to have been seen where there are to be no sentinels.
            let seen: &[ParamId] = if sentinels { &first } else { &[] };
            let expected = expected(reducer.plan(), active, seen, |param| fires(param.0));
            compare(&mut reducer, &expected, &named(&arrivals));
        }
    }
}
