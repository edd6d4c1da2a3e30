//! The passes of a step: what comes when in a forward and a backward, and how far the list may run.

use std::cmp::Reverse;

use super::CostError;
use super::account::Prediction;
use super::executor::Executor;
use super::machine::{Machine, Workload};
use super::prices::Prices;
use crate::command::Command;
use crate::cursor::{Cursor, Overtake};
use crate::ids::{BucketId, ParamId, UnitId};
use crate::plan::Plan;
use crate::route::{Key, List, PassKind, Route, Stop};

/// What happens in a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// A bucket's last gradient has come.
    Full(BucketId),
    /// A stop of the route is asked for.
    Need(u32),
}

/// One pass: its commands, and its events by ns of computing.
struct Pass<'a> {
    commands: &'a [Command],
    stops: &'a [Vec<UnitId>],
    events: Vec<(u64, Event)>,
    length: u64,
}

/// One step, from one vote to the next where it `overlaps`: then it begins with the update, whose
/// parameters the first forward waits for. Else it ends with them.
pub(super) fn step(
    plan: &Plan,
    workload: &Workload,
    machine: &Machine,
    prices: &Prices,
    overlaps: bool,
) -> Prediction {
    let mut executor = Executor::new(plan, prices, machine);
    let clock = Clock::new(plan, workload);
    let (forward, backward) = (clock.forward(), clock.backward());
    let needs = clock.needs();
    let order: Vec<BucketId> = needs.iter().map(|&(_, bucket)| bucket).collect();
    if overlaps {
        executor.update(&order, true);
        executor.compute(workload.other_ns);
    }
    executor.start();
    let micro_batches = workload.micro_batches.max(1);
    let every = plan.rules().reduces_every_micro_batch();
    for micro_batch in 1..=micro_batches {
        if overlaps && micro_batch == 1 {
            receive(&mut executor, &needs, workload.forward_ns);
        } else {
            run(&mut executor, &forward, None);
        }
        if every || micro_batch == micro_batches {
            executor.drain(); // what the pass before has under way lies in the memory of this one
            run(&mut executor, &backward, Some(plan));
        } else {
            executor.compute(workload.backward_ns);
        }
    }
    executor.drain();
    let account = &mut executor.account;
    let times = u64::from(micro_batches);
    account.forward_ns = workload.forward_ns.saturating_mul(times);
    account.backward_ns = workload.backward_ns.saturating_mul(times);
    account.other_ns = workload.other_ns;
    account.overlapped = overlaps;
    executor.vote();
    if !overlaps {
        executor.update(&order, false);
        for &bucket in &order {
            executor.need(bucket);
        }
        executor.compute(workload.other_ns);
    }
    executor.prediction()
}

/// Computes a forward of so long, which waits for updated parameters where it `needs` them.
fn receive(executor: &mut Executor<'_>, needs: &[(u64, BucketId)], length: u64) {
    let mut computed = 0;
    for &(at, bucket) in needs {
        executor.compute(at - computed);
        computed = at;
        executor.need(bucket);
    }
    executor.compute(length - computed);
}

/// Computes a pass; `launches` is the plan where gradients are reduced in it.
fn run(executor: &mut Executor<'_>, pass: &Pass<'_>, launches: Option<&Plan>) {
    let buckets = launches.map_or(0, |plan| plan.buckets().len());
    let mut full = vec![false; buckets];
    let mut cursor = Cursor::default();
    let mut computed = 0;
    if pass.commands.is_empty() {
        return executor.compute(pass.length);
    }
    executor.begin(launches.is_some());
    for &(at, event) in &pass.events {
        executor.compute(at - computed);
        computed = at;
        let overtake = match event {
            Event::Full(bucket) => {
                full[bucket.index()] = true;
                executor.filled(bucket);
                Overtake::Nothing
            }
            Event::Need(stop) => Overtake::Until(stop),
        };
        let passes = |command: Command, must: bool| match command {
            Command::Launch(bucket) => must || full[bucket.index()],
            Command::Retire(_) | Command::Need(_) | Command::Gather(_) | Command::Free(_) => true,
        };
        cursor.advance(pass.commands, overtake, passes);
        executor.advance(pass.commands, cursor.at, false);
        if let Event::Need(stop) = event {
            executor.advance(pass.commands, cursor.at, true);
            executor.land(&pass.stops[stop as usize]);
        }
    }
    executor.compute(pass.length - computed);
    // What is left is launched; a Retire that is under way waits until somebody needs its result.
    let end = pass.commands.iter().rposition(|command| !matches!(command, Command::Retire(_)));
    executor.advance(pass.commands, end.map_or(0, |last| last + 1), true);
    executor.advance(pass.commands, pass.commands.len(), false);
    executor.end(pass.commands);
}

/// When what is needed, and when what is full, in a forward and a backward.
struct Clock<'a> {
    plan: &'a Plan,
    workload: &'a Workload,
    /// By bucket, ns behind the start of a backward.
    full: Vec<u64>,
}

impl<'a> Clock<'a> {
    fn new(plan: &'a Plan, workload: &'a Workload) -> Self {
        let came = |param: &ParamId| workload.arrivals[param.index()].min(workload.backward_ns);
        let full = plan.buckets().iter().map(|b| b.params.iter().map(came).max().unwrap_or(0));
        Self { plan, workload, full: full.collect() }
    }

    fn list(&self, kind: PassKind) -> Option<&'a List> {
        self.plan.lists().iter().find(|list| list.kind == kind)
    }

    fn backward(&self) -> Pass<'a> {
        let length = self.workload.backward_ns;
        let list = self.list(PassKind::Backward);
        let trained = self.plan.buckets().iter().filter(|bucket| bucket.is_trained());
        let fulls = trained.map(|bucket| (self.full[bucket.id.index()], Event::Full(bucket.id)));
        let stops = list.map_or(&[][..], |list| &list.stops);
        let needs = self.starts(stops).into_iter().zip(0..);
        let mut events: Vec<_> =
            fulls.chain(needs.map(|(at, stop)| (at, Event::Need(stop)))).collect();
        events.sort_unstable();
        let commands = list.map_or(self.plan.schedule().commands(), List::commands);
        Pass { commands, stops, events, length }
    }

    /// A forward takes its time where its backward does.
    fn forward(&self) -> Pass<'a> {
        let length = self.workload.forward_ns;
        let Some(list) = self.list(PassKind::Forward) else {
            return Pass { commands: &[], stops: &[], events: Vec::new(), length };
        };
        let weights = self.weights(&list.stops);
        let total: u128 = weights.iter().map(|&weight| u128::from(weight)).sum();
        let mut past = 0_u128;
        let mut events = Vec::with_capacity(weights.len());
        for (stop, weight) in (0..).zip(weights) {
            let at = (past * u128::from(length)).checked_div(total).unwrap_or(0);
            events.push((at as u64, Event::Need(stop)));
            past += u128::from(weight);
        }
        Pass { commands: list.commands(), stops: &list.stops, events, length }
    }

    /// Buckets in the order in which a forward needs them, each with ns of computing before it does:
    /// what a backward comes to last is needed first.
    fn needs(&self) -> Vec<(u64, BucketId)> {
        let Workload { forward_ns, backward_ns, .. } = *self.workload;
        let need = |bucket: &crate::bucket::Bucket| {
            let left = u128::from(backward_ns - self.full[bucket.id.index()]);
            let at = (u128::from(forward_ns) * left).checked_div(u128::from(backward_ns));
            (at.unwrap_or(0) as u64, bucket.id)
        };
        let mut needs: Vec<_> = self.plan.buckets().iter().map(need).collect();
        needs.sort_unstable_by_key(|&(_, bucket)| {
            (Reverse(self.full[bucket.index()]), Reverse(bucket))
        });
        needs
    }

    /// When a unit's last gradient came.
    fn unit(&self, unit: UnitId) -> u64 {
        let buckets = &self.plan.units()[unit.index()].buckets;
        let trained = buckets
            .iter()
            .filter(|&&id| self.plan.bucket(id).is_ok_and(crate::bucket::Bucket::is_trained));
        trained.map(|bucket| self.full[bucket.index()]).max().unwrap_or(0)
    }

    /// A backward's stop begins where all gradients have come of units that nothing behind it needs.
    fn starts(&self, stops: &[Vec<UnitId>]) -> Vec<u64> {
        let mut last = vec![0; self.plan.units().len()];
        for (at, stop) in stops.iter().enumerate() {
            for unit in stop {
                last[unit.index()] = at;
            }
        }
        let mut past = 0;
        let start = |(at, stop): (usize, &Vec<UnitId>)| {
            let start = past;
            let over = stop.iter().filter(|unit| last[unit.index()] == at);
            past = over.map(|&unit| self.unit(unit)).fold(past, u64::max);
            start
        };
        stops.iter().enumerate().map(start).collect()
    }

    /// What of a forward each of its stops takes: what its units' backward takes, shared out among
    /// their stops.
    fn weights(&self, stops: &[Vec<UnitId>]) -> Vec<u64> {
        let mut uses = vec![0_u64; self.plan.units().len()];
        for unit in stops.iter().flatten() {
            uses[unit.index()] += 1;
        }
        let took = self.took();
        let share = |unit: &UnitId| took[unit.index()] / uses[unit.index()];
        stops.iter().map(|stop| stop.iter().map(share).fold(0, u64::saturating_add)).collect()
    }

    /// ns of the backward of each unit.
    fn took(&self) -> Vec<u64> {
        let mut ends: Vec<(u64, UnitId)> =
            self.plan.units().iter().map(|unit| (self.unit(unit.id), unit.id)).collect();
        ends.sort_unstable();
        let mut took = vec![0; ends.len()];
        let mut past = 0;
        for (end, unit) in ends {
            took[unit.index()] = end - past;
            past = end;
        }
        took
    }
}

/// The plan with lists, where it has units and none; units are used one after the other, and back.
pub(super) fn routed(
    plan: &Plan,
    workload: &Workload,
    machine: &Machine,
) -> Result<Option<Plan>, CostError> {
    if plan.units().is_empty() || !plan.lists().is_empty() {
        return Ok(None);
    }
    let used = plan.units().iter().filter(|unit| !unit.buckets.is_empty());
    let units: Vec<UnitId> = used.map(|unit| unit.id).collect();
    let stop = |&unit: &UnitId| Stop { units: vec![unit], held: Vec::new() };
    let stops: Vec<Stop> = units.iter().map(stop).collect();
    let clock = Clock::new(plan, workload);
    let mut back = units;
    back.sort_by_key(|&unit| (clock.unit(unit), Reverse(unit)));
    let places: Vec<u32> = {
        let mut places = vec![0; plan.units().len()];
        for (place, unit) in (0..).zip(&back) {
            places[unit.index()] = place;
        }
        places
    };
    let last = (back.len() as u32).saturating_sub(1);
    let fill = |bucket: &crate::bucket::Bucket| {
        (bucket.id, bucket.unit.map_or(last, |unit| places[unit.index()]))
    };
    let fills = plan.buckets().iter().filter(|bucket| bucket.is_trained()).map(fill).collect();
    let (forth, back_key) = (Key(0), Key(1));
    let routes = [
        Route {
            kind: PassKind::Forward,
            key: forth,
            then: Some(back_key),
            stops,
            fills: Vec::new(),
        },
        Route {
            kind: PassKind::Backward,
            key: back_key,
            then: None,
            stops: back.iter().map(stop).collect(),
            fills,
        },
    ];
    Ok(Some(plan.routed(&routes, machine.room, machine.depth)?))
}
