//! Whole gradients brought to their owners and parameters brought back, by actually moving data.

mod arbitrary;

use std::collections::{HashMap, HashSet};

use arbitrary::spec;
use proptest::prelude::*;
use zerort_core::{
    Bucket, BucketId, Cap, Dtype, Exchange, Grain, Group, GroupId, Mesh, Param, ParamId, Piece,
    Plan, PlanError, PlanSpec, Rank, Stage, Way, WireId,
};

/// A plan in which whole parameters are likely, over a mesh or over 1 to 8 ranks.
fn plan() -> impl Strategy<Value = Plan> {
    (spec(), prop::option::of(1..=8_u32), 1..=3_u8).prop_map(|(mut spec, world, stage)| {
        spec.rules = Stage::new(stage).unwrap().rules();
        if let Some(world) = world {
            spec.mesh = Mesh::flat(world).unwrap();
        }
        Plan::new(spec).unwrap()
    })
}

fn exchanged(plan: &Plan) -> impl Iterator<Item = &Bucket> {
    let is = |bucket: &&Bucket| plan.way(bucket.id).unwrap() == Some(Way::Exchanged);
    plan.buckets().iter().filter(is)
}

fn ranks(plan: &Plan) -> impl Iterator<Item = Rank> {
    (0..plan.world()).map(Rank)
}

fn peer(plan: &Plan, rank: Rank, shard: u32) -> Rank {
    plan.mesh().members(Group::Shard, rank).unwrap()[shard as usize]
}

/// An element: whose parameter, which of its elements, from which rank's copy of the model state.
type Element = Option<(ParamId, u64, u32)>;
type Shards = HashMap<(Rank, BucketId), Vec<Element>>;
type Rooms = HashMap<(Rank, Dtype), Vec<Element>>;

/// What all ranks hold of exchanged buckets. Padding is None.
fn shards(plan: &Plan) -> Shards {
    let mut shards = Shards::new();
    for (rank, bucket) in ranks(plan).flat_map(|rank| exchanged(plan).map(move |b| (rank, b))) {
        let numel = plan.partition(bucket.id).unwrap().shard_numel();
        let copy = plan.mesh().position(Group::Replica, rank).unwrap();
        let mut shard = vec![None; numel as usize];
        for fragment in plan.fragments(bucket.id, rank).unwrap() {
            for at in 0..fragment.length {
                let element = (fragment.param, fragment.param_start + at, copy);
                shard[(fragment.shard_start + at) as usize] = Some(element);
            }
        }
        shards.insert((rank, bucket.id), shard);
    }
    shards
}

/// The pieces between `rank` and one peer.
fn with(pieces: &[Piece], peer: u32) -> Vec<Piece> {
    pieces.iter().copied().filter(|piece| piece.peer == peer).collect()
}

/// One all-to-all: what each rank packs along its own list arrives at its peers, who unpack it along
/// theirs, which is looked at by nobody else.
fn carry<Key>(
    plan: &Plan,
    from: &HashMap<Key, Vec<Element>>,
    pack: impl Fn(&Exchange) -> &[Piece],
    source: impl Fn(Rank, &Exchange, &Piece) -> (Key, u64),
    mut unpack: impl FnMut(Rank, &Exchange, &Piece, Element, u64),
    other: impl Fn(&Exchange) -> &[Piece],
) -> u64
where
    Key: std::hash::Hash + Eq,
{
    let mut moved = 0;
    for rank in ranks(plan) {
        let own = plan.mesh().position(Group::Shard, rank).unwrap();
        for (index, here) in plan.exchanges(rank).unwrap().iter().enumerate() {
            for shard in 0..plan.mesh().size(Group::Shard) {
                let mut sent = Vec::new();
                for piece in with(pack(here), shard) {
                    let (key, start) = source(rank, here, &piece);
                    sent.extend_from_slice(&from[&key][start as usize..][..piece.length as usize]);
                }
                moved += sent.len() as u64;
                let there = peer(plan, rank, shard);
                let exchange = &plan.exchanges(there).unwrap()[index];
                let mut sent = sent.into_iter();
                for piece in with(other(exchange), own) {
                    for at in 0..piece.length {
                        unpack(there, exchange, &piece, sent.next().expect("too little"), at);
                    }
                }
                assert_eq!(sent.next(), None, "more than its peer takes");
            }
        }
    }
    moved
}

fn send(exchange: &Exchange) -> &[Piece] {
    &exchange.send
}

fn receive(exchange: &Exchange) -> &[Piece] {
    &exchange.receive
}

/// Rooms after gradients were brought there, and how many elements were sent.
fn gather(plan: &Plan, shards: &Shards) -> (Rooms, u64) {
    let mut rooms = Rooms::new();
    for rank in ranks(plan) {
        for exchange in plan.exchanges(rank).unwrap() {
            let mut room = vec![None; exchange.room as usize];
            for piece in &exchange.kept {
                for at in 0..piece.length {
                    let element = shards[&(rank, piece.bucket)][(piece.shard_start + at) as usize];
                    room[(piece.room_start + at) as usize] = element;
                }
            }
            rooms.insert((rank, exchange.dtype), room);
        }
    }
    let sent = carry(
        plan,
        shards,
        send,
        |rank, _, piece| ((rank, piece.bucket), piece.shard_start),
        |rank, exchange, piece, element, at| {
            let room = rooms.get_mut(&(rank, exchange.dtype)).unwrap();
            let place = &mut room[(piece.room_start + at) as usize];
            assert_eq!(place.replace(element.unwrap()), None, "an element came twice");
        },
        receive,
    );
    (rooms, sent)
}

/// Shards filled anew from rooms, and how many elements were sent.
fn scatter(plan: &Plan, rooms: &Rooms) -> (Shards, u64) {
    let mut back: Shards =
        shards(plan).into_iter().map(|(key, shard)| (key, vec![None; shard.len()])).collect();
    for rank in ranks(plan) {
        for exchange in plan.exchanges(rank).unwrap() {
            for piece in &exchange.kept {
                for at in 0..piece.length {
                    let element = rooms[&(rank, exchange.dtype)][(piece.room_start + at) as usize];
                    back.get_mut(&(rank, piece.bucket)).unwrap()
                        [(piece.shard_start + at) as usize] = element;
                }
            }
        }
    }
    let sent = carry(
        plan,
        rooms,
        receive,
        |rank, exchange, piece| ((rank, exchange.dtype), piece.room_start),
        |rank, _, piece, element, at| {
            let shard = back.get_mut(&(rank, piece.bucket)).unwrap();
            let place = &mut shard[(piece.shard_start + at) as usize];
            assert_eq!(place.replace(element.unwrap()), None, "an element came back twice");
        },
        send,
    );
    (back, sent)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn exc_1_2_5_owners_get_whole_parameters_and_bring_them_back(plan in plan()) {
        let before = shards(&plan);
        let (rooms, sent) = gather(&plan, &before);
        for rank in ranks(&plan) {
            let copy = plan.mesh().position(Group::Replica, rank).unwrap();
            for exchange in plan.exchanges(rank).unwrap() {
                let mut expected = vec![None; exchange.room as usize];
                for &(param, start) in &exchange.places {
                    for at in 0..plan.params()[param.index()].numel {
                        expected[(start + at) as usize] = Some((param, at, copy));
                    }
                }
                prop_assert_eq!(&rooms[&(rank, exchange.dtype)], &expected);
            }
        }
        let (back, returned) = scatter(&plan, &rooms);
        prop_assert_eq!(back, before);
        // What does not lie on its owner goes once each way, in every copy of the model state.
        let elsewhere = |bucket: &Bucket| {
            let fragments = ranks(&plan).flat_map(|rank| plan.fragments(bucket.id, rank).unwrap());
            fragments
                .filter(|one| plan.owner(one.param).unwrap() != Some(one.shard))
                .map(|one| one.length)
                .sum::<u64>()
        };
        let all: u64 = exchanged(&plan).map(elsewhere).sum();
        prop_assert_eq!((sent, returned), (all, all));
    }

    #[test]
    fn exc_1_places_are_apart_and_on_64_bytes_and_every_parameter_has_one(plan in plan()) {
        for copy in 0..plan.mesh().size(Group::Replica) {
            let mut placed = HashSet::new();
            let of_copy = |rank: &Rank| plan.mesh().position(Group::Replica, *rank) == Ok(copy);
            for rank in ranks(&plan).filter(of_copy) {
                let shard = plan.mesh().position(Group::Shard, rank).unwrap();
                for exchange in plan.exchanges(rank).unwrap() {
                    let mut end = 0;
                    for (param, start) in exchange.places {
                        let numel = plan.params()[param.index()].numel;
                        prop_assert!(start >= end && start * exchange.dtype.size() % 64 == 0);
                        prop_assert_eq!(plan.params()[param.index()].dtype, exchange.dtype);
                        prop_assert_eq!(plan.owner(param).unwrap(), Some(shard));
                        prop_assert!(placed.insert(param));
                        end = start + numel;
                    }
                    prop_assert!(end <= exchange.room);
                }
            }
            let all = exchanged(&plan).flat_map(|bucket| bucket.params.iter().copied());
            prop_assert_eq!(placed, all.collect::<HashSet<_>>());
        }
    }

    #[test]
    fn exc_3_what_one_rank_sends_is_what_its_peer_receives(plan in plan()) {
        let size = plan.mesh().size(Group::Shard);
        for rank in ranks(&plan) {
            let own = plan.mesh().position(Group::Shard, rank).unwrap();
            let here = plan.exchanges(rank).unwrap();
            for shard in 0..size {
                let there = plan.exchanges(peer(&plan, rank, shard)).unwrap();
                prop_assert_eq!(here.len(), there.len());
                for (mine, theirs) in here.iter().zip(&there) {
                    let sent = with(&mine.send, shard);
                    let taken = with(&theirs.receive, own);
                    let named = |piece: &Piece| Piece { peer: 0, ..*piece };
                    prop_assert_eq!(mine.dtype, theirs.dtype);
                    prop_assert!(sent.iter().map(named).eq(taken.iter().map(named)));
                    let splits = (mine.send_splits(size), theirs.receive_splits(size));
                    let length = sent.iter().map(|piece| piece.length).sum::<u64>();
                    prop_assert_eq!(splits.0[shard as usize], length);
                    prop_assert_eq!(splits.1[own as usize], length);
                    prop_assert!(shard != own || length == 0);
                }
            }
            for exchange in &here {
                prop_assert!(exchange.send.is_sorted_by_key(|piece| piece.peer));
                prop_assert!(exchange.receive.is_sorted_by_key(|piece| piece.peer));
            }
        }
    }

    #[test]
    fn exc_4_the_costliest_rank_is_bounded(plan in plan()) {
        let shards = u128::from(plan.mesh().size(Group::Shard));
        let cost = |param: &ParamId| u128::from(plan.params()[param.index()].cost);
        let mut costs = vec![0; shards as usize];
        let mut owned = vec![0; shards as usize];
        for bucket in plan.buckets() {
            for param in &bucket.params {
                let Some(owner) = plan.owner(*param).unwrap() else { continue };
                costs[owner as usize] += cost(param);
                if plan.way(bucket.id).unwrap() == Some(Way::Owned) {
                    owned[owner as usize] += cost(param);
                }
            }
        }
        prop_assert_eq!(&costs, plan.costs());
        let most = costs.iter().max().unwrap();
        let total: u128 = costs.iter().sum();
        let dearest = exchanged(&plan).flat_map(|bucket| bucket.params.iter().map(cost)).max();
        let bound = dearest.map_or(0, |dearest| total + dearest * shards);
        prop_assert!(most * shards <= bound || Some(most) == owned.iter().max());
    }
}

/// `sizes` are (elements, cost); one bucket, too long for any padding.
fn matrices(sizes: &[(u64, u64)], world: u32) -> Plan {
    let (dtype, group, wire, grain) = (Dtype::F32, Some(GroupId(0)), WireId(0), Grain::Whole);
    let param = |&(numel, cost)| Param { numel, dtype, group, wire, unit: None, grain, cost };
    let (mesh, rules) = (Mesh::flat(world).unwrap(), Stage::Two.rules());
    let (params, cap) = (sizes.iter().map(param).collect(), Cap::Bytes(u64::MAX));
    Plan::new(PlanSpec { params, mesh, rules, cap, window: None, whole_padding: 0 }).unwrap()
}

fn owners(plan: &Plan) -> Vec<u32> {
    let params = (0..plan.params().len() as u32).map(ParamId);
    params.map(|param| plan.owner(param).unwrap().unwrap()).collect()
}

fn sent(plan: &Plan) -> u64 {
    let all = ranks(plan).flat_map(|rank| plan.exchanges(rank).unwrap());
    all.flat_map(|exchange| exchange.send_splits(plan.world())).sum()
}

#[test]
fn the_costliest_goes_first_and_each_to_the_rank_that_has_least_to_do() {
    // Of different lengths, so that nothing is traded: 9, then 5 and 4, then 3 and the rest.
    let plan = matrices(&[(1100, 3), (1300, 9), (1500, 5), (2500, 4)], 2);
    assert_eq!(plan.way(BucketId(0)), Ok(Some(Way::Exchanged)));
    let found = owners(&plan);
    assert_eq!((found[2], found[3]), (1 - found[1], 1 - found[1]));
    assert_eq!(plan.costs().iter().max(), Some(&12));
}

#[test]
fn a_tie_goes_to_the_rank_that_holds_most() {
    // From the end: 2048 elements a rank, of which the first hold 1, the last 0.
    let plan = matrices(&[(1500, 7), (2500, 7)], 2);
    assert_eq!(owners(&plan), [1, 0]);
    let pieces = plan.exchanges(Rank(1)).unwrap()[0].send.clone();
    let piece = Piece {
        peer: 0,
        bucket: BucketId(0),
        param: ParamId(1),
        shard_start: 0,
        room_start: 2048,
        length: 452,
    };
    assert_eq!(pieces, [piece]);
    assert_eq!(sent(&plan), 452);
}

#[test]
fn what_is_alike_is_traded_so_that_less_is_sent() {
    // Nine alike, four and a half a rank: only the one in the middle is cut.
    let plan = matrices(&[(1024, 5); 9], 2);
    let costs: Vec<u128> = plan.costs().to_vec();
    assert_eq!((costs.iter().max(), costs.iter().min()), (Some(&25), Some(&20)));
    assert_eq!(sent(&plan), 512);
    // Longer than a shard: who has the middle of one owns it.
    let plan = matrices(&[(4096, 5); 3], 8); // 1536 a rank
    assert_eq!(sent(&plan), 3 * (4096 - 1536));
}

#[test]
fn what_costs_more_is_not_traded_for_what_costs_less() {
    // Rank 0 holds the last two and half of the third, and may own only one of the dear ones.
    let plan = matrices(&[(1024, 1), (1024, 1), (1024, 1), (1024, 8), (1024, 9)], 2);
    assert_eq!((owners(&plan), plan.costs()), (vec![1, 1, 0, 1, 0], &[10, 10][..]));
}

#[test]
fn more_ranks_than_matrices_leave_some_that_own_nothing_and_still_take_part() {
    let plan = matrices(&[(5000, 1)], 4);
    let idle = plan.costs().iter().filter(|&&cost| cost == 0).count();
    assert_eq!(idle, 3);
    for rank in ranks(&plan) {
        let exchanges = plan.exchanges(rank).unwrap();
        assert_eq!((exchanges.len(), exchanges[0].dtype), (1, Dtype::F32));
        let owns = plan.owner(ParamId(0)) == Ok(Some(rank.0));
        assert_eq!((exchanges[0].room > 0, exchanges[0].send.is_empty()), (owns, owns));
    }
}

#[test]
fn owners_of_what_is_owned_count() {
    // b0 is owned: rank 0 has the matrix of cost 8, rank 1 nothing of cost. b1 is cut.
    let mut spec = PlanSpec {
        params: Vec::new(),
        mesh: Mesh::flat(2).unwrap(),
        rules: Stage::Two.rules(),
        cap: Cap::Elements(2048),
        window: None,
        whole_padding: 0,
    };
    let (dtype, group, wire, grain) = (Dtype::F32, Some(GroupId(0)), WireId(0), Grain::Whole);
    for (numel, cost) in [(2000, 3), (1024, 0), (1024, 8)] {
        spec.params.push(Param { numel, dtype, group, wire, unit: None, grain, cost });
    }
    let plan = Plan::new(spec).unwrap();
    let ways = [0, 1].map(|bucket| plan.way(BucketId(bucket)).unwrap());
    assert_eq!(ways, [Some(Way::Owned), Some(Way::Exchanged)]);
    assert_eq!((owners(&plan), plan.costs()), (vec![1, 1, 0], &[8, 3][..]));
}

#[test]
fn a_rank_that_is_not_there_exchanges_nothing() {
    let plan = matrices(&[(5000, 1)], 2);
    let unknown = PlanError::UnknownRank { rank: Rank(2), world: 2 };
    assert_eq!(plan.exchanges(Rank(2)), Err(unknown));
    let params = PlanError::UnknownParam { param: ParamId(1), params: 1 };
    assert_eq!(plan.owner(ParamId(1)), Err(params));
    let bucket = PlanError::UnknownBucket { bucket: BucketId(1), buckets: 1 };
    assert_eq!(plan.way(BucketId(1)), Err(bucket));
}
