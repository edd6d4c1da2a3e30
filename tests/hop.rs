//! What hops guarantee, by running them on vectors over explicit ranks.

mod arbitrary;

use std::collections::BTreeSet;

use arbitrary::mesh;
use proptest::prelude::*;
use zerort_core::{Group, Hop, Hops, Mesh, Op, Rank, Rules, Stage, WireId};

const WIRE: WireId = WireId(3);

/// Elements of a bucket: a multiple of every number of copies, hosts and ranks that is tried.
fn numel(mesh: &Mesh) -> usize {
    6 * mesh.size(Group::Shard) as usize
}

/// One element of a buffer: which of the bucket's it is, and whose values were added, in order.
type Element = (usize, Vec<Rank>);

/// What every rank has, by rank, and how many elements each has sent to others.
struct Job<'a> {
    mesh: &'a Mesh,
    held: Vec<Vec<Element>>,
    sent: Vec<usize>,
}

impl<'a> Job<'a> {
    /// Every rank has computed a gradient of its own.
    fn with_gradients(mesh: &'a Mesh) -> Self {
        let gradient = |rank| (0..numel(mesh)).map(|at| (at, vec![Rank(rank)])).collect();
        Self::with(mesh, (0..mesh.world()).map(gradient).collect())
    }

    fn with(mesh: &'a Mesh, held: Vec<Vec<Element>>) -> Self {
        let sent = vec![0; held.len()];
        Self { mesh, held, sent }
    }

    fn run(&mut self, hops: &[Hop]) {
        for hop in hops {
            let after = (0..self.mesh.world()).map(|rank| self.step(*hop, Rank(rank))).collect();
            self.held = after;
        }
    }

    /// What `rank` has behind a hop.
    fn step(&mut self, hop: Hop, rank: Rank) -> Vec<Element> {
        let members = self.mesh.members(hop.group, rank).unwrap();
        let all: Vec<_> = members.iter().map(|member| &self.held[member.index()]).collect();
        let (peers, length) = (members.len(), self.held[rank.index()].len());
        let piece = length / peers;
        let (after, sent) = match hop.op {
            Op::ReduceScatter => {
                let at = self.mesh.position(hop.group, rank).unwrap() as usize;
                let pieces = all.iter().map(|held| &held[at * piece..][..piece]);
                (sum(pieces), (peers - 1) * piece)
            }
            Op::AllReduce => (sum(all.iter().map(|held| &held[..])), 2 * (peers - 1) * piece),
            Op::AllGather => (all.into_iter().flatten().cloned().collect(), (peers - 1) * length),
            Op::Copy => (self.held[rank.index()].clone(), 0),
        };
        self.sent[rank.index()] += sent;
        after
    }
}

/// Element by element, in the order of the pieces.
fn sum<'a>(mut pieces: impl Iterator<Item = &'a [Element]>) -> Vec<Element> {
    let mut total = pieces.next().unwrap().to_vec();
    for piece in pieces {
        for (sum, more) in total.iter_mut().zip(piece) {
            assert_eq!(sum.0, more.0, "two different elements were added");
            sum.1.extend(&more.1);
        }
    }
    total
}

/// The elements of `rank`'s shard.
fn shard(mesh: &Mesh, rank: Rank) -> Vec<usize> {
    let length = numel(mesh) / mesh.size(Group::Shard) as usize;
    let start = mesh.position(Group::Shard, rank).unwrap() as usize * length;
    (start..start + length).collect()
}

fn places(held: &[Element]) -> Vec<usize> {
    held.iter().map(|(at, _)| *at).collect()
}

fn rules() -> impl Strategy<Value = Rules> {
    (0..=3_u8).prop_map(|stage| Stage::new(stage).unwrap().rules())
}

proptest! {
    #[test]
    fn hop_1_every_rank_ends_with_the_sum_over_all_ranks_of_what_its_optimizer_needs(
        mesh in mesh(), rules in rules(),
    ) {
        let mut job = Job::with_gradients(&mesh);
        job.run(&Hops::new(rules, &mesh, WIRE).reduce);
        for rank in mesh.ranks() {
            let held = &job.held[rank.index()];
            let whole: Vec<usize> = (0..numel(&mesh)).collect();
            let expected = if rules.gathers_gradient() { whole } else { shard(&mesh, rank) };
            prop_assert_eq!(places(held), expected);
            for (_, added) in held {
                prop_assert_eq!(added.len(), mesh.world() as usize);
                prop_assert_eq!(added.iter().collect::<BTreeSet<_>>().len(), added.len());
            }
        }
    }

    #[test]
    fn hop_1_published_shards_make_the_whole_on_every_rank(mesh in mesh(), rules in rules()) {
        let updated = |rank| shard(&mesh, Rank(rank)).into_iter().map(|at| (at, vec![])).collect();
        let mut job = Job::with(&mesh, (0..mesh.world()).map(updated).collect());
        let hops = Hops::new(rules, &mesh, WIRE).publish;
        job.run(&hops);
        let alone = mesh.size(Group::Shard) == 1;
        prop_assert_eq!(hops.is_empty(), alone || !rules.gathers_parameter());
        for rank in mesh.ranks().filter(|_| rules.gathers_parameter()) {
            prop_assert_eq!(places(&job.held[rank.index()]), (0..numel(&mesh)).collect::<Vec<_>>());
        }
    }

    #[test]
    fn hop_2_equal_shards_are_sums_in_one_order_whatever_the_stage(mesh in mesh()) {
        let sums = |stage: Stage| {
            let mut job = Job::with_gradients(&mesh);
            job.run(&Hops::new(stage.rules(), &mesh, WIRE).reduce);
            job.held
        };
        let (whole, shards) = (sums(Stage::Zero), sums(Stage::Two));
        for rank in mesh.ranks() {
            prop_assert_eq!(&whole[rank.index()], &whole[0]);
            for element in &shards[rank.index()] {
                prop_assert_eq!(element, &whole[0][element.0]);
            }
        }
    }

    #[test]
    fn hop_3_a_rank_sends_what_the_formulas_say(mesh in mesh(), rules in rules()) {
        let Hops { reduce, publish, .. } = Hops::new(rules, &mesh, WIRE);
        let size = |group| mesh.size(group) as usize;
        let (shards, copies) = (size(Group::Shard), size(Group::Replica));
        let (inner, outer) = (size(Group::Inner), size(Group::Outer));
        let whole = numel(&mesh);
        let once = (shards - 1) * whole / shards;
        prop_assert_eq!(
            (inner - 1) * whole / inner + (outer - 1) * whole / inner / outer,
            once,
            "hosts change where bytes go and not how many they are"
        );
        let gathered = if rules.gathers_gradient() { once } else { 0 };
        let among_copies = 2 * (copies - 1) * (whole / shards / copies);
        let mut job = Job::with_gradients(&mesh);
        job.run(&reduce);
        prop_assert!(job.sent.iter().all(|&sent| sent == once + among_copies + gathered));
        job.sent.fill(0);
        job.run(&publish);
        let published = if rules.gathers_parameter() { once } else { 0 };
        prop_assert!(job.sent.iter().all(|&sent| sent == published));
    }

    #[test]
    fn what_publishs_first_hop_leaves_is_enough_for_its_last(mesh in mesh()) {
        let publish = Hops::new(Stage::Two.rules(), &mesh, WIRE).publish;
        let updated = |rank| shard(&mesh, Rank(rank)).into_iter().map(|at| (at, vec![])).collect();
        let mut job = Job::with(&mesh, (0..mesh.world()).map(updated).collect());
        let Some((last, first)) = publish.split_last() else { return Ok(()) };
        job.run(first);
        job.sent.fill(0);
        job.run(&[*last]);
        let inner = mesh.size(last.group) as usize;
        let within = (inner - 1) * numel(&mesh) / inner;
        prop_assert!(job.sent.iter().all(|&sent| sent == within));
        prop_assert!(job.held.iter().all(|held| held.len() == numel(&mesh)));
    }
}

fn spelled(hops: &[Hop]) -> Vec<(Op, Group, bool)> {
    hops.iter().map(|hop| (hop.op, hop.group, hop.wire.is_some())).collect()
}

fn hops(stage: Stage, copies: &[Vec<Vec<Rank>>]) -> Hops {
    Hops::new(stage.rules(), &Mesh::new(copies).unwrap(), WIRE)
}

fn host(first: u32) -> Vec<Rank> {
    vec![Rank(first), Rank(first + 1)]
}

#[test]
fn the_stages_differ_in_their_hops_alone() {
    use Group::Shard;
    let of = |stage| hops(stage, &[vec![host(0)]]);
    let scatter = (Op::ReduceScatter, Shard, true);
    assert_eq!(spelled(&of(Stage::Zero).reduce), [scatter, (Op::AllGather, Shard, true)]);
    assert_eq!(spelled(&of(Stage::Zero).publish), []);
    for stage in [Stage::One, Stage::Two] {
        assert_eq!(spelled(&of(stage).reduce), [scatter]);
        assert_eq!(spelled(&of(stage).publish), [(Op::AllGather, Shard, false)]);
    }
    assert_eq!(spelled(&of(Stage::Three).reduce), [scatter]);
    assert_eq!(spelled(&of(Stage::Three).publish), []);
}

#[test]
fn one_rank_alone_takes_its_gradient_in_and_nothing_else() {
    for stage in [Stage::Zero, Stage::One, Stage::Two, Stage::Three] {
        let hops = hops(stage, &[vec![vec![Rank(0)]]]);
        assert_eq!(spelled(&hops.reduce), [(Op::ReduceScatter, Group::Shard, true)]);
        assert_eq!(spelled(&hops.publish), []);
    }
}

#[test]
fn between_hosts_gradients_are_encoded_and_inside_they_are_whole() {
    let hops = hops(Stage::Two, &[vec![host(0), host(2)]]);
    let [inner, outer] = [(Group::Inner, false), (Group::Outer, true)];
    let scatter = |(group, wire)| (Op::ReduceScatter, group, wire);
    assert_eq!(spelled(&hops.reduce), [scatter(inner), scatter(outer)]);
    let gather = |group| (Op::AllGather, group, false);
    assert_eq!(spelled(&hops.publish), [gather(Group::Outer), gather(Group::Inner)]);
}

#[test]
fn copies_of_the_model_state_agree_on_their_shards() {
    let hops = hops(Stage::Two, &[vec![host(0)], vec![host(2)]]);
    let scatter = (Op::ReduceScatter, Group::Shard, true);
    assert_eq!(spelled(&hops.reduce), [scatter, (Op::AllReduce, Group::Replica, true)]);
    assert_eq!(spelled(&hops.publish), [(Op::AllGather, Group::Shard, false)]);
}

#[test]
fn state_that_lives_elsewhere_is_one_copy_more() {
    let mesh = Mesh::flat(3).unwrap();
    let copy = Hop { op: Op::Copy, group: Group::Own, wire: None };
    let Hops { reduce, publish, .. } = Hops::new(Stage::Two.rules(), &mesh, WIRE);
    let mut job = Job::with_gradients(&mesh);
    job.run(&[reduce, vec![copy, copy], publish].concat());
    assert!(job.held.iter().all(|held| places(held) == (0..numel(&mesh)).collect::<Vec<_>>()));
    assert_eq!(job.sent, [24; 3], "a copy sends nothing: 2/3 of 18 there and 2/3 back");
}
