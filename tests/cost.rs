//! The cost model: against figures worked out by hand, and what holds for every plan and machine.

mod arbitrary;

use std::sync::Arc;

use arbitrary::{plan, sharded, spec, uniform};
use proptest::collection::vec;
use proptest::prelude::*;
use zerort_core::cost::{
    Algorithm, Bound, CostError, Fabric, Link, Machine, Network, Overlap, Prediction, Rates,
    Workload, choose, guess, simulate, unmeasured,
};
use zerort_core::{Cap, Dtype, Group, GroupId, Mesh, Op, Param, Placement, Plan, PlanSpec, Stage};

const NOTHING: Link =
    Link { algorithm: Algorithm::Ring, alpha_ns: 0.0, byte_ns: 0.0, message_ns: None };

fn link(algorithm: Algorithm, alpha_ns: f64, byte_ns: f64) -> Link {
    Link { algorithm, alpha_ns, byte_ns, message_ns: None }
}

fn machine(link: Link, blocks: bool) -> Machine {
    let fabric = Fabric { scatter: link, gather: link, lanes: 1 };
    Machine {
        network: Network { outer: fabric, inner: fabric, control: NOTHING, hosts: 0 },
        rates: Rates::default(),
        blocks,
        sums_pieces: false,
        overlap: None,
        wires: Vec::new(),
        room: u64::MAX,
        depth: 1,
    }
}

fn workload(plan: &Plan, forward_ns: u64, backward_ns: u64) -> Workload {
    let params = plan.params().len() as u64;
    let arrivals = (0..params).map(|id| backward_ns * (params - id) / params).collect();
    Workload { forward_ns, backward_ns, arrivals, micro_batches: 1, other_ns: 0 }
}

/// Four buckets of 1024 bytes on the wire over two ranks, each full 100 ns behind the one before.
fn four(window: Option<u32>) -> (Arc<Plan>, Workload) {
    let plan = uniform(4, 1, window);
    let work = workload(&plan, 50, 400);
    (plan, work)
}

#[test]
fn what_fits_behind_the_next_gradient_is_hidden_and_the_last_bucket_is_not() {
    let (plan, work) = four(None);
    // a ring of two: one message of 60 ns, and half of 1024 bytes at 1/64 ns
    let predicted =
        simulate(&plan, &work, &machine(link(Algorithm::Ring, 60.0, 1.0 / 64.0), true)).unwrap();
    assert_eq!(predicted.exposed_ns, 68);
    assert_eq!(predicted.publish_ns, 4 * 68);
    assert_eq!(predicted.total_ns, 50 + 400 + 68 + 4 * 68);
    let ends: Vec<u64> = predicted.buckets.iter().map(|bucket| bucket.landed_ns).collect();
    assert_eq!(ends, [218, 318, 418, 518]);
    assert_eq!(predicted.reduce.sent_bytes, 4 * 512);
    assert_eq!(predicted.reduce.hidden_ns(), 3 * 68);
}

#[test]
fn a_wire_that_is_too_slow_is_busy_to_the_end() {
    let (plan, work) = four(None);
    let predicted =
        simulate(&plan, &work, &machine(link(Algorithm::Ring, 150.0, 0.0), true)).unwrap();
    // the first bucket is full at 150, and four of 150 ns follow one another
    assert_eq!(predicted.exposed_ns, 150 + 4 * 150 - 450);
}

#[test]
fn messages_of_two_lanes_overlap_and_bytes_do_not() {
    let (plan, work) = four(None);
    let mut wide = machine(link(Algorithm::Ring, 150.0, 10.0 / 512.0), true);
    wide.network.outer.lanes = 2;
    let ends: Vec<u64> = simulate(&plan, &work, &wide)
        .unwrap()
        .buckets
        .iter()
        .map(|bucket| bucket.landed_ns)
        .collect();
    assert_eq!(ends, [310, 410, 510, 610]);
}

#[test]
fn bytes_follow_one_another_also_where_two_may_be_under_way() {
    let (plan, work) = four(None);
    let mut wide = machine(link(Algorithm::Ring, 10.0, 150.0 / 512.0), true);
    wide.network.outer.lanes = 2;
    let predicted = simulate(&plan, &work, &wide).unwrap();
    let ends: Vec<u64> = predicted.buckets.iter().map(|bucket| bucket.landed_ns).collect();
    assert_eq!(ends, [310, 460, 610, 760]);
}

#[test]
fn a_launch_waits_where_the_window_has_no_memory_left() {
    for (window, launched) in [(Some(1), [150, 400, 650, 900]), (None, [150, 250, 350, 450])] {
        let (plan, work) = four(window);
        let slow = machine(link(Algorithm::Ring, 250.0, 0.0), false);
        let predicted = simulate(&plan, &work, &slow).unwrap();
        let at: Vec<u64> = predicted.buckets.iter().map(|bucket| bucket.launched_ns).collect();
        // the first backward's gradients come 100 ns apart, behind whatever it waited for
        assert_eq!(at, launched, "{window:?}");
        let most = window.map_or(4, u64::from);
        assert_eq!(predicted.peak_in_flight, most * 1024);
    }
}

#[test]
fn what_a_unit_needs_is_gathered_ahead_as_far_as_there_is_room() {
    let plan = sharded(3, None);
    let work = workload(&plan, 300, 300);
    for (room, waited, gathers) in [(768, 100, 3), (256, 500, 5)] {
        let machine = Machine { room, ..machine(link(Algorithm::Ring, 100.0, 0.0), false) };
        let predicted = simulate(&plan, &work, &machine).unwrap();
        assert_eq!(predicted.gather_ns, waited, "{room}");
        assert_eq!(predicted.gather.sent_bytes, gathers * 512, "{room}");
        assert_eq!(predicted.peak_whole, room);
        assert_eq!(predicted.publish_ns, 0);
    }
}

#[test]
fn on_a_blocking_host_packing_and_sums_take_time_of_the_backward() {
    let (plan, work) = four(Some(1));
    let mut slow = machine(link(Algorithm::Ring, 10.0, 0.0), true);
    slow.rates = Rates { launch_ns: 20.0, sum_byte_ns: 30.0 / 512.0, ..Rates::default() };
    let predicted = simulate(&plan, &work, &slow).unwrap();
    assert_eq!((predicted.pack_ns, predicted.sum_ns), (80, 120));
    // b0 is full at 150 and launched at 170; its Retire is complete when b1 is full, at 270
    assert_eq!(predicted.buckets[1].launched_ns, 270 + 30 + 20);
    // on streams the same sums hide
    slow.blocks = false;
    let beside = simulate(&plan, &work, &slow).unwrap();
    assert_eq!((beside.sum_ns, beside.exposed_ns), (0, 10 + 30));
}

#[test]
fn a_bucket_costs_its_host_something_however_small_it_is() {
    let rates = Rates { launch_ns: 20.0, sum_ns: 30.0, update_ns: 40.0, ..Rates::default() };
    for (stage, hops) in [(Stage::Zero, 2), (Stage::Two, 1)] {
        for cap in [Cap::Bytes(1), Cap::Bytes(u64::MAX)] {
            let spec = PlanSpec { rules: stage.rules(), cap, ..two_ranks() };
            let plan = Plan::new(spec).unwrap();
            let buckets = plan.buckets().len() as u64;
            for blocks in [true, false] {
                let dear = Machine { rates, ..machine(NOTHING, blocks) };
                let step = simulate(&plan, &workload(&plan, 0, 400), &dear).unwrap();
                let sums = if blocks { step.sum_ns } else { buckets * hops * 30 };
                assert_eq!(
                    (step.pack_ns, sums, step.update_ns),
                    (buckets * 20, buckets * hops * 30, buckets * 40),
                    "{stage:?} {cap:?}"
                );
            }
        }
    }
}

#[test]
fn what_a_bucket_costs_its_host_makes_larger_ones_faster() {
    let params = uniform(256, 1, None).params().to_vec();
    let spec = PlanSpec { params, ..two_ranks() };
    let plan = Plan::new(spec.clone()).unwrap();
    let work = workload(&plan, 0, 256 * 100);
    let chosen = |update_ns| {
        let mut machine = machine(link(Algorithm::Ring, 10.0, 0.1), true);
        machine.rates.update_ns = update_ns;
        choose(&spec, &work, &machine, &[None], &[]).unwrap()
    };
    let buckets = |choice: &zerort_core::cost::Choice| choice.prediction.buckets.len() as u64;
    let (free, dear) = (chosen(0.0), chosen(100.0));
    assert!(buckets(&dear) < buckets(&free), "{free:?} {dear:?}");
    // between one bucket, whose bytes nothing hides, and so many that hosts have nothing else to do
    assert!(buckets(&dear) > 1, "{dear:?}");
    assert_eq!(dear.prediction.update_ns, 100 * buckets(&dear));
}

#[test]
fn the_second_hop_of_stage_0_starts_when_the_host_comes_by_once_the_first_is_complete() {
    let mut spec = two_ranks();
    spec.rules = Stage::Zero.rules();
    let predicted = |window, blocks| {
        let plan = Plan::new(PlanSpec { window, ..spec.clone() }).unwrap();
        let slow = machine(link(Algorithm::Ring, 30.0, 0.0), blocks);
        simulate(&plan, &workload(&plan, 0, 400), &slow).unwrap()
    };
    // full at 100, 200, 300 and 400: b0's gather from 200 to 230, and b1's reduce-scatter behind it
    for window in [None, Some(2)] {
        let step = predicted(window, true);
        let ends: Vec<u64> = step.buckets.iter().map(|bucket| bucket.landed_ns).collect();
        assert_eq!(ends, [230, 330, 430, 490], "{window:?}");
        assert_eq!(step.exposed_ns, 90);
    }
    // on streams at its Retire: all four gathers behind the backward, or those of the last two
    assert_eq!(predicted(None, false).exposed_ns, 30 + 4 * 30);
    assert_eq!(predicted(Some(2), false).exposed_ns, 30 + 2 * 30);
}

const ALWAYS: Option<Overlap> = Some(Overlap { least_ns: 0.0, share: 0.0 });

/// Each collective takes 68 ns, and each bucket's update 20 ns.
fn updating(overlap: Option<Overlap>) -> Machine {
    let mut machine = machine(link(Algorithm::Ring, 60.0, 1.0 / 64.0), true);
    machine.rates.update_ns = 20.0;
    Machine { overlap, ..machine }
}

#[test]
fn a_forward_waits_for_each_updated_bucket_where_it_needs_it() {
    let (plan, work) = four(None);
    let within = simulate(&plan, &work, &updating(None)).unwrap();
    assert_eq!((within.publish_ns, within.overlapped), (4 * 68, false));
    let beside = simulate(&plan, &work, &updating(ALWAYS)).unwrap();
    // updated at 20, 40, 60 and 80, there at 88, 156, 224 and 292; the forward begins at 80, and
    // needs the first at once and the others behind 12, 25 and 37 ns of its 50
    assert_eq!(beside.publish_ns, (88 - 80) + (156 - 100) + (224 - 169) + (292 - 236));
    assert_eq!(beside.publish.flight_ns, 68 + (156 - 40) + (224 - 60) + (292 - 80));
    assert_eq!(beside.publish.exposed_ns, beside.publish_ns);
    assert_eq!(beside.total_ns, 80 + 50 + 175 + 400 + 68);
    assert!(beside.overlapped);
    assert_eq!(beside.buckets[0].full_ns - beside.publish_ns, within.buckets[0].full_ns);
}

#[test]
fn what_the_loader_and_a_longer_forward_cover_is_not_waited_for() {
    let (plan, work) = four(None);
    let work = Workload { forward_ns: 400, other_ns: 30, micro_batches: 2, ..work };
    let beside = simulate(&plan, &work, &updating(ALWAYS)).unwrap();
    // needed at 110, 210, 310 and 410; of the second micro-batch's forward nothing is
    assert_eq!((beside.publish_ns, beside.publish.exposed_ns), (0, 0));
    assert_eq!(beside.publish.hidden_ns(), 560);
    let within = simulate(&plan, &work, &updating(None)).unwrap();
    assert_eq!(beside.total_ns, within.total_ns - 4 * 68);
}

#[test]
fn updates_are_waited_for_in_the_step_where_that_costs_too_little() {
    let (plan, work) = four(None);
    let overlapped = |least_ns, share| {
        let machine = updating(Some(Overlap { least_ns, share }));
        simulate(&plan, &work, &machine).unwrap().overlapped
    };
    assert!(overlapped(272.0, 0.31) && !overlapped(273.0, 0.0) && !overlapped(0.0, 0.32));
    let alone = Plan::new(PlanSpec { mesh: Mesh::flat(1).unwrap(), ..two_ranks() }).unwrap();
    let nothing = simulate(&alone, &work, &updating(ALWAYS)).unwrap();
    assert_eq!((nothing.publish_ns, nothing.overlapped), (0, false));
    let units = sharded(3, None);
    let gathers = simulate(&units, &workload(&units, 50, 400), &updating(ALWAYS)).unwrap();
    assert!(!gathers.overlapped);
    let refused = simulate(&plan, &work, &updating(Some(Overlap { least_ns: -1.0, share: 0.0 })));
    assert!(matches!(refused, Err(CostError::BadRate { .. })));
}

#[test]
fn of_several_hops_only_the_last_goes_beside_the_forward() {
    let plan = Plan::new(PlanSpec { mesh: Mesh::flat(4).unwrap(), ..two_ranks() }).unwrap();
    let mut nested = machine(link(Algorithm::Ring, 1000.0, 0.0), false);
    nested.network.hosts = 2;
    nested.network.inner.gather = link(Algorithm::Ring, 10.0, 0.0);
    let work = workload(&plan, 100, 400);
    let waited = |overlap| {
        let machine = Machine { overlap, ..nested.clone() };
        simulate(&plan, &work, &machine).unwrap().publish_ns
    };
    assert_eq!((waited(None), waited(ALWAYS)), (4 * 1000 + 10, 4 * 1000));
}

fn two_ranks() -> PlanSpec {
    let plan = uniform(4, 1, None);
    PlanSpec {
        params: plan.params().to_vec(),
        mesh: Mesh::flat(2).unwrap(),
        rules: plan.rules(),
        cap: Cap::Elements(16),
        window: None,
        whole_padding: 0,
    }
}

#[test]
fn collectives_take_what_their_formulas_say() {
    let price = |algorithm, op, ranks| link(algorithm, 1e9, 1.0).duration_ns(op, ranks, 1024.0);
    let (scatter, gather, all) = (Op::ReduceScatter, Op::AllGather, Op::AllReduce);
    let messages = |algorithm, op, ranks| price(algorithm, op, ranks) / 1_000_000_000;
    let bytes = |algorithm, op, ranks| price(algorithm, op, ranks) % 1_000_000_000;
    for op in [scatter, gather] {
        assert_eq!((messages(Algorithm::Ring, op, 8), bytes(Algorithm::Ring, op, 8)), (7, 896));
        assert_eq!((messages(Algorithm::Flat, op, 8), bytes(Algorithm::Flat, op, 8)), (7, 896));
        assert_eq!(
            (messages(Algorithm::Halving, op, 8), bytes(Algorithm::Halving, op, 8)),
            (3, 896)
        );
        assert_eq!(
            (messages(Algorithm::Tree, op, 8), bytes(Algorithm::Tree, op, 8)),
            (6, 3 * 1024 + 896)
        );
        assert_eq!(
            (messages(Algorithm::Measured, op, 8), bytes(Algorithm::Measured, op, 8)),
            (1, 1024)
        );
        assert_eq!(price(Algorithm::Ring, op, 1), 0);
    }
    assert_eq!((messages(Algorithm::Ring, all, 4), bytes(Algorithm::Ring, all, 4)), (6, 1536));
    assert_eq!((messages(Algorithm::Tree, all, 4), bytes(Algorithm::Tree, all, 4)), (4, 4096));
    // no power of two: halving folds the rest in first, doubling needs a round more
    assert_eq!(
        (messages(Algorithm::Halving, scatter, 6), bytes(Algorithm::Halving, scatter, 6)),
        (4, 2048)
    );
    assert_eq!(
        (messages(Algorithm::Halving, gather, 6), bytes(Algorithm::Halving, gather, 6)),
        (3, 853)
    );
    assert_eq!(
        (messages(Algorithm::Broadcasts, gather, 4), bytes(Algorithm::Broadcasts, gather, 4)),
        (8, 2048)
    );
    let at_once = Link { message_ns: Some(5.0), ..link(Algorithm::Flat, 100.0, 0.0) };
    assert_eq!(at_once.duration_ns(scatter, 8, 1.0), 100 + 6 * 5);
    let best = |bytes| link(Algorithm::Best, 1000.0, 1.0).duration_ns(scatter, 6, bytes);
    assert_eq!(best(0.0), 4000, "few bytes: fewest messages");
    assert_eq!(best(60_000.0), 5000 + 50_000, "many bytes: a ring");
}

#[test]
fn two_hosts_reduce_within_and_then_between_them() {
    let mut spec = two_ranks();
    spec.mesh = Mesh::flat(4).unwrap();
    let plan = Plan::new(spec).unwrap();
    let mut nested = machine(link(Algorithm::Ring, 1000.0, 1.0), false);
    nested.network.hosts = 2;
    nested.network.inner.scatter = link(Algorithm::Ring, 10.0, 0.0);
    nested.network.inner.gather = nested.network.inner.scatter;
    let predicted = simulate(&plan, &workload(&plan, 0, 0), &nested).unwrap();
    // 2048 bytes a bucket: half of it within a host, half of what is left between hosts
    assert_eq!(predicted.reduce.sent_bytes, 4 * (1024 + 512));
    assert_eq!(predicted.reduce.wire_ns, 4 * (10 + 1000 + 512));
    // a publication goes back the same way
    assert_eq!(predicted.publish.sent_bytes, predicted.reduce.sent_bytes);
    nested.network.hosts = 3;
    let refused = simulate(&plan, &workload(&plan, 0, 0), &nested);
    assert_eq!(refused, Err(CostError::UnevenHosts { world: 4, hosts: 3 }));
}

#[test]
fn absurd_numbers_are_refused_or_saturate() {
    let (plan, work) = four(None);
    for value in [-1.0, f64::NAN, f64::INFINITY] {
        let refused = simulate(&plan, &work, &machine(link(Algorithm::Ring, value, 0.0), true));
        assert!(matches!(refused, Err(CostError::BadRate { .. })), "{value}");
        let refused = simulate(&plan, &work, &machine(link(Algorithm::Ring, 0.0, value), true));
        assert!(matches!(refused, Err(CostError::BadRate { .. })), "{value}");
    }
    let mut absurd = machine(link(Algorithm::Tree, f64::MAX, f64::MAX), true);
    absurd.rates.sum_byte_ns = f64::MAX;
    absurd.rates.sum_ns = f64::MAX;
    absurd.rates.update_element_ns = f64::MAX;
    let work = Workload { forward_ns: u64::MAX, micro_batches: 3, ..work };
    assert_eq!(simulate(&plan, &work, &absurd).unwrap().total_ns, u64::MAX);
    let short = Workload { arrivals: vec![0; 3], ..work };
    let refused = simulate(&plan, &short, &machine(NOTHING, true));
    assert_eq!(refused, Err(CostError::WrongLength { params: 4, got: 3 }));
}

#[test]
fn the_closed_form_is_where_nothing_waits_for_the_one_before() {
    // 1 byte a ns from the backward, 0.5 ns a byte: a bucket takes as long as the next one to fill
    let best = guess(1000.0, 0.5, 1.0, 1e9);
    assert!((best - 2000.0).abs() < 1e-9);
    assert!((guess(1000.0, 2.0, 1.0, 1e9) - 1e6).abs() < 1e-3);
    assert!((guess(1e9, 0.999, 1.0, 1e6) - 1e6).abs() < 1e-9, "no longer than everything");
}

/// Bytes that a bucket has at most, and why, of parameters (elements, dtype, whether it is trained).
fn unsaid(params: &[(u64, Dtype, bool)], ranks: u32, stage: u8) -> (u64, Bound) {
    let param = |&(numel, dtype, trains): &(u64, Dtype, bool)| Param {
        numel,
        dtype,
        group: trains.then_some(GroupId(0)),
        ..two_ranks().params[0]
    };
    let params: Vec<Param> = params.iter().map(param).collect();
    unmeasured(&params, ranks, Stage::new(stage).unwrap().rules())
}

#[test]
fn a_bucket_of_which_nothing_is_said_is_a_tenth_of_what_is_trained() {
    const MIB: u64 = 1 << 20;
    let gpt = [(20_488_192, Dtype::F32, true)];
    for stage in 0..3 {
        assert_eq!(unsaid(&gpt, 2, stage), (8_195_276, Bound::Share));
    }
    let low = [(20_488_192, Dtype::BF16, true), (1000, Dtype::F64, true)];
    assert_eq!(unsaid(&low, 2, 2), (4_098_438, Bound::Share), "as it lies in memory");
    let adapters = [(7_000_000_000, Dtype::BF16, false), (10_000_000, Dtype::F32, true)];
    assert_eq!(unsaid(&adapters, 2, 2), (4_000_000, Bound::Share), "of what is trained");
    assert_eq!(unsaid(&[(1000, Dtype::F32, true)], 2, 2), (MIB, Bound::Least));
    assert_eq!(unsaid(&[], 1, 0), (MIB, Bound::Least));
    assert_eq!(unsaid(&gpt, 63, 2), (63 << 17, Bound::Message));
    assert_eq!(unsaid(&gpt, 62, 2), (8_195_276, Bound::Share));
    assert_eq!(unsaid(&gpt, 200, 2), (25 * MIB, Bound::Message));
    assert_eq!(unsaid(&gpt, 201, 2), (25 * MIB, Bound::Most));
    assert_eq!(unsaid(&gpt, u32::MAX, 2), (25 * MIB, Bound::Most));
    assert_eq!(unsaid(&[(7_000_000_000, Dtype::BF16, true)], 8, 2), (25 * MIB, Bound::Most));
    assert_eq!(unsaid(&[(u64::MAX, Dtype::F64, true); 2], 8, 2), (25 * MIB, Bound::Most));
    assert_eq!(unsaid(&gpt, 2, 3), (25 * MIB, Bound::Unit), "a unit is not cut shorter");
}

#[test]
fn the_chooser_finds_a_size_that_is_faster_than_one_bucket_and_than_one_each() {
    let params = uniform(256, 1, None).params().to_vec();
    let spec = PlanSpec { params, ..two_ranks() };
    let plan = Plan::new(spec.clone()).unwrap();
    let work = workload(&plan, 0, 256 * 100);
    let slow = machine(link(Algorithm::Ring, 500.0, 0.5), true);
    let total = |cap| {
        let plan = Plan::new(PlanSpec { cap, ..spec.clone() }).unwrap();
        simulate(&plan, &work, &slow).unwrap().total_ns
    };
    let choice = choose(&spec, &work, &slow, &[None], &[]).unwrap();
    assert!(choice.prediction.total_ns < total(Cap::Bytes(1)));
    assert!(choice.prediction.total_ns < total(Cap::Bytes(u64::MAX)));
    assert_eq!(choice.prediction.total_ns, total(choice.cap));
}

// What holds for every plan.

fn any_link() -> impl Strategy<Value = Link> {
    let names = prop::sample::select(Algorithm::NAMES.to_vec());
    let price = || prop_oneof![Just(0.0), 0.0..10.0, 0.0..1e6];
    (names, price(), price(), prop::option::of(price())).prop_map(
        |((_, algorithm), alpha_ns, byte_ns, message_ns)| Link {
            algorithm,
            alpha_ns,
            byte_ns,
            message_ns,
        },
    )
}

fn any_machine() -> impl Strategy<Value = Machine> {
    let fabric = || {
        (any_link(), any_link(), 1..3_u32).prop_map(|(scatter, gather, lanes)| Fabric {
            scatter,
            gather,
            lanes,
        })
    };
    let rates = vec(0.0..5.0_f64, 7).prop_map(|rates| Rates {
        launch_ns: 10.0 * rates[0],
        pack_byte_ns: rates[1],
        sum_byte_ns: rates[2],
        update_element_ns: rates[3],
        update_ns: rates[4],
        vote_ns: rates[5],
        sum_ns: 10.0 * rates[6],
    });
    let network = (fabric(), fabric(), any_link()).prop_map(|(outer, inner, control)| Network {
        outer,
        inner,
        control,
        hosts: 0,
    });
    let overlap = prop_oneof![
        Just(None),
        Just(ALWAYS),
        (0.0..1e4_f64, 0.0..0.2_f64)
            .prop_map(|(least_ns, share)| Some(Overlap { least_ns, share })),
    ];
    let flags = (any::<bool>(), any::<bool>(), overlap, 1..5000_u64, 0..4_u32);
    (network, rates, flags, vec(0.5..8.0_f64, 0..3)).prop_map(
        |(network, rates, (blocks, sums_pieces, overlap, room, depth), wires)| Machine {
            network,
            rates,
            blocks,
            sums_pieces,
            overlap,
            wires,
            room,
            depth,
        },
    )
}

fn any_workload(params: usize) -> impl Strategy<Value = Workload> {
    (0..2000_u64, 0..5000_u64, vec(0..6000_u64, params), 0..4_u32, 0..100_u64).prop_map(
        |(forward_ns, backward_ns, arrivals, micro_batches, other_ns)| Workload {
            forward_ns,
            backward_ns,
            arrivals,
            micro_batches,
            other_ns,
        },
    )
}

fn any_step() -> impl Strategy<Value = (Plan, Workload, Machine)> {
    let plans = prop_oneof![
        3 => plan(),
        1 => arbitrary::walk().prop_map(|walk| walk.plan),
    ];
    plans.prop_flat_map(|plan| {
        let work = any_workload(plan.params().len());
        (Just(plan), work, any_machine())
    })
}

/// Every price of `machine` times `factor`.
fn dearer(machine: &Machine, factor: f64) -> Machine {
    let mut dearer = machine.clone();
    let Network { outer, inner, control, .. } = &mut dearer.network;
    let links = [&mut outer.scatter, &mut outer.gather, &mut inner.scatter, &mut inner.gather];
    for link in links.into_iter().chain([control]) {
        link.alpha_ns *= factor;
        link.byte_ns *= factor;
        link.message_ns = link.message_ns.map(|more| more * factor);
    }
    dearer
}

/// All micro-batches' sums.
fn sums(predicted: &Prediction) -> u64 {
    predicted.sum_ns
}

fn hops_once(plan: &Plan) -> bool {
    plan.buckets().iter().all(|bucket| plan.hops(bucket.id).unwrap().reduce.len() <= 1)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn cst_1_a_prediction_is_a_function_of_its_arguments((plan, work, machine) in any_step()) {
        prop_assert_eq!(simulate(&plan, &work, &machine), simulate(&plan, &work, &machine));
    }

    #[test]
    fn cst_2_the_parts_of_a_step_add_up((plan, work, machine) in any_step()) {
        let step = simulate(&plan, &work, &machine).unwrap();
        let parts = step.forward_ns + step.backward_ns + step.pack_ns + step.sum_ns
            + step.exposed_ns + step.gather_ns + step.vote_ns + step.update_ns + step.publish_ns
            + step.other_ns;
        prop_assert_eq!(step.total_ns, parts);
        for traffic in step.buckets.iter().map(|bucket| &bucket.reduce)
            .chain([&step.reduce, &step.gather, &step.publish]) {
            prop_assert!(traffic.exposed_ns <= traffic.flight_ns, "{traffic:?}");
        }
        let exposed: u64 = step.buckets.iter().map(|bucket| bucket.reduce.exposed_ns).sum();
        prop_assert_eq!(exposed, step.exposed_ns);
    }

    #[test]
    fn cst_3_a_better_network_is_never_slower(
        (plan, work, mut machine) in any_step(), factor in 1.0..50.0_f64,
    ) {
        machine.overlap = machine.overlap.and(ALWAYS);
        let fast = simulate(&plan, &work, &machine).unwrap();
        let slow = simulate(&plan, &work, &dearer(&machine, factor)).unwrap();
        let all = plan.window() as usize == plan.schedule().launches().count();
        let polls = machine.blocks && (!all || !plan.units().is_empty() || !hops_once(&plan));
        let spared = if polls { sums(&fast) } else { 0 };
        prop_assert!(fast.total_ns <= slow.total_ns + spared, "{fast:?} {slow:?}");
    }

    #[test]
    fn cst_4_a_window_of_all_is_never_slower_with_one_reduce_hop(
        (spec, machine, seed) in (spec(), any_machine(), any::<u64>()), window in 1..4_u32,
    ) {
        let all = Plan::new(PlanSpec { window: None, ..spec.clone() }).unwrap();
        prop_assume!(hops_once(&all));
        let few = Plan::new(PlanSpec { window: Some(window), ..spec }).unwrap();
        let arrivals: Vec<u64> = (0..all.params().len() as u64)
            .map(|id| seed.wrapping_mul(2 * id + 1) % 5000)
            .collect();
        let work = Workload {
            forward_ns: 10, backward_ns: 5000, arrivals, micro_batches: 1, other_ns: 0,
        };
        let observed = work.observed();
        let [all, few] = [all, few].map(|plan| plan.reordered(&observed).unwrap());
        let (all, few) = (
            simulate(&all, &work, &machine).unwrap(),
            simulate(&few, &work, &machine).unwrap(),
        );
        prop_assert!(all.total_ns <= few.total_ns, "{all:?} {few:?}");
    }

    #[test]
    fn cst_6_beside_the_forward_is_never_slower_and_nothing_else_changes(
        (plan, work, machine) in any_step(), hosts in 1..3_u32,
    ) {
        let mut machine = machine;
        if plan.world() % hosts == 0 && plan.mesh().size(Group::Outer) == 1 {
            machine.network.hosts = hosts;
        }
        let with = |overlap| simulate(&plan, &work, &Machine { overlap, ..machine.clone() });
        let (within, beside) = (with(None).unwrap(), with(ALWAYS).unwrap());
        prop_assert!(beside.total_ns <= within.total_ns, "{beside:?} {within:?}");
        prop_assert_eq!(
            within.total_ns - beside.total_ns, within.publish_ns - beside.publish_ns);
        prop_assert_eq!(beside.publish.sent_bytes, within.publish.sent_bytes);
        prop_assert_eq!(&beside.reduce, &within.reduce);
        prop_assert_eq!(beside.publish.exposed_ns, beside.publish_ns);
    }

    #[test]
    fn cst_5_what_is_sent_is_what_the_hops_say(
        (plan, work, mut machine) in any_step(),
    ) {
        machine.wires.clear();
        let Network { outer, inner, .. } = &mut machine.network;
        let links =
            [&mut outer.scatter, &mut outer.gather, &mut inner.scatter, &mut inner.gather];
        for link in links {
            link.algorithm = Algorithm::Ring;
        }
        let step = simulate(&plan, &work, &machine).unwrap();
        let mesh = plan.mesh();
        let (shard, replica) = (mesh.size(Group::Shard), mesh.size(Group::Replica));
        prop_assume!(replica == 1 && mesh.size(Group::Outer) == 1);
        let passes =
            if plan.rules().reduces_every_micro_batch() { work.micro_batches.max(1) } else { 1 };
        let legs = 1 + u64::from(plan.rules().gathers_gradient());
        let part = |bucket: &zerort_core::Bucket| {
            let numel = plan.partition(bucket.id).unwrap().numel();
            numel / u64::from(shard) * u64::from(shard - 1) * bucket.dtype.size()
        };
        let trained = plan.buckets().iter().filter(|bucket| bucket.is_trained());
        let once: u64 = trained.clone().map(part).sum();
        prop_assert_eq!(step.reduce.sent_bytes, u64::from(passes) * legs * once);
        let published = trained.filter(|bucket| {
            bucket.parameter() == Placement::Replicated
                && plan.rules().optimizer == Placement::Sharded
        });
        prop_assert_eq!(step.publish.sent_bytes, published.map(part).sum::<u64>());
    }
}
