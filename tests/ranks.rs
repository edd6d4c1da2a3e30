//! Random programs on two to four ranks under random interleavings: no rank blocks for ever, no
//! collective meets another, no use finds its units elsewhere, and no gradient is lost.

mod arbitrary;
mod model;

use std::collections::BTreeMap;
use std::sync::Arc;

use arbitrary::{Makeup, partly_trained};
use model::program::{DIVERGENCES, Divergence, Random, Shape, program};
use model::{Mutant, Setting, Step, World};

/// At least as many as the design asks for.
const TRIALS: u64 = 6300;

/// One trial, all of it decided by its seed.
fn trial(seed: u64, mutant: Mutant) -> (Divergence, Result<World, String>) {
    let mut random = Random(seed);
    let divergence = DIVERGENCES[seed as usize % DIVERGENCES.len()];
    let ranks = [2, 2, 3, 4][random.below(4)];
    let units = random.within(1..7);
    let window = Some(random.within(1..units + 1) as u32);
    let plan = partly_trained(&makeup(&mut random, units), window, ranks);
    let numel = plan.units().iter().map(|unit| unit.numel).min().unwrap_or(1);
    let setting = Setting {
        plan: Arc::new(plan),
        room: numel * random.within(1..units + 2) as u64,
        depth: random.below(4) as u32,
        mutant,
    };
    let shape = Shape::random(&mut random, units);
    let programs =
        (0..ranks as usize).map(|rank| program(&mut random, &shape, divergence, rank)).collect();
    (divergence, run(World::new(&setting, programs), &mut random))
}

/// Every third model has adapters over what is frozen, of which the optimizer knows nothing.
fn makeup(random: &mut Random, units: usize) -> Vec<Makeup> {
    let all = [Makeup::Trained, Makeup::Held, Makeup::Both];
    let kinds = if random.chance(33) { &all[..] } else { &all[..1] };
    (0..units).map(|_| kinds[random.below(kinds.len())]).collect()
}

/// Runs to the end, ranks in random order.
fn run(mut world: World, random: &mut Random) -> Result<World, String> {
    loop {
        let mut ready: Vec<usize> =
            (0..world.ranks.len()).filter(|&rank| !world.ranks[rank].is_done()).collect();
        if ready.is_empty() {
            return world.end().map(|()| world);
        }
        // A rank that is blocked is asked again only when another has moved.
        loop {
            if ready.is_empty() {
                return Err(format!("all ranks that are not done are blocked: {}", stuck(&world)));
            }
            let rank = ready.swap_remove(random.below(ready.len()));
            if world.step(rank).map_err(|error| format!("rank {rank}: {error}"))? != Step::Blocked {
                break;
            }
        }
    }
}

fn stuck(world: &World) -> String {
    let last =
        |rank: usize| (rank, world.shared.control[rank].last(), world.shared.logs[rank].len());
    format!("{:?}", (0..world.ranks.len()).map(last).collect::<Vec<_>>())
}

#[test]
fn gat_1_2_3_6_7_10_11_whatever_ranks_run_nobody_blocks_and_nothing_mispairs() {
    let mut met: BTreeMap<Divergence, [u32; 8]> = BTreeMap::new();
    for seed in 0..TRIALS {
        let (divergence, world) = trial(seed, Mutant::None);
        let world = world.unwrap_or_else(|error| panic!("seed {seed}, {divergence:?}: {error}"));
        let sums = met.entry(divergence).or_default();
        sums[0] += 1;
        for rank in &world.ranks {
            let stats = rank.stats;
            let counts = [
                stats.listed,
                stats.free,
                stats.went_off,
                stats.served,
                stats.reruns,
                stats.lost,
                u32::from(rank.diverged),
            ];
            assert!(divergence != Divergence::None || rank.within_room(), "GAT-4: seed {seed}");
            for (sum, count) in sums[1..].iter_mut().zip(counts) {
                *sum += count;
            }
        }
    }
    let names = ["trials", "listed", "free", "off", "served", "reruns", "lost", "diverged"];
    println!("{names:?}");
    for (divergence, sums) in &met {
        println!("{divergence:?}: {sums:?}");
    }
    // Every way that the protocol has was taken.
    assert!((1..8).all(|way| met.values().any(|sums| sums[way] > 100)), "{met:?}");
    assert_eq!(met[&Divergence::None][3..], [0, met[&Divergence::None][4], 0, 0, 0]);
}

#[test]
fn a_rank_that_waits_for_sums_before_it_has_rolled_blocks() {
    let blocked = (0..TRIALS).filter(|&seed| {
        trial(seed, Mutant::WaitsForSums).1.is_err_and(|error| error.contains("are blocked"))
    });
    assert!(blocked.count() > 20, "the mutant of GAT-11 is not found");
}
