//! Runs commands against a clock: what has run, behind what is allowed to.
//!
//! A twin of the executor that has tensors. `host` is the clock of what computes: the host where
//! waiting blocks it, the device's stream of kernels where not. `sums` is the stream of sums then.

use self::publication::Arriving;
use super::account::{BucketTimes, Prediction, Traffic};
use super::machine::{Machine, Price};
use super::prices::{Leg, Prices};
use super::wire::Wire;
use crate::command::Command;
use crate::ids::{BucketId, UnitId};
use crate::plan::Plan;

mod publication;

/// A bucket on its way.
#[derive(Clone, Copy, Debug, Default)]
struct Flight {
    /// Its hops before this one have been taken.
    hop: usize,
    /// When that hop started, if it has.
    issued: Option<u64>,
    /// When it ends.
    end: u64,
    /// Behind the last hop, or never launched in this pass.
    over: bool,
    /// When its memory was free again.
    free: u64,
    full: u64,
    launched: u64,
    landed: u64,
    reduce: Traffic,
}

/// A unit's values.
#[derive(Clone, Copy, Debug, Default)]
struct Values {
    whole: bool,
    /// When what was gathered last was there.
    end: u64,
}

pub(super) struct Executor<'a> {
    plan: &'a Plan,
    prices: &'a Prices,
    blocks: bool,
    pub(super) host: u64,
    sums: u64,
    wires: [Wire; 2],
    flights: Vec<Flight>,
    values: Vec<Values>,
    whole: u64,
    in_flight: u64,
    /// Index of the next command.
    at: usize,
    /// Of the last pass, not run yet.
    rest: Vec<Command>,
    /// Buckets in the order of this pass's launches.
    launched: Vec<BucketId>,
    /// Of these, how many have been followed up.
    followed: usize,
    /// Retires that were passed over.
    late: Vec<BucketId>,
    /// A Retire that is under way is passed over.
    passes_over: bool,
    /// Updated parameters, by bucket.
    arriving: Vec<Arriving>,
    /// When the first forward began.
    begun: u64,
    pub(super) account: Prediction,
}

impl<'a> Executor<'a> {
    pub(super) fn new(plan: &'a Plan, prices: &'a Prices, machine: &Machine) -> Self {
        let network = &machine.network;
        Self {
            plan,
            prices,
            blocks: machine.blocks,
            host: 0,
            sums: 0,
            wires: [Wire::new(network.outer.lanes), Wire::new(network.inner.lanes)],
            flights: vec![Flight { over: true, ..Flight::default() }; plan.buckets().len()],
            values: vec![Values::default(); plan.units().len()],
            whole: 0,
            in_flight: 0,
            at: 0,
            rest: Vec::new(),
            launched: Vec::new(),
            followed: 0,
            late: Vec::new(),
            passes_over: !plan.units().is_empty(),
            arriving: vec![Arriving::default(); plan.buckets().len()],
            begun: 0,
            account: Prediction::default(),
        }
    }

    /// The first forward begins.
    pub(super) fn start(&mut self) {
        self.begun = self.host;
    }

    /// Computes for so long.
    pub(super) fn compute(&mut self, ns: u64) {
        self.host = self.host.saturating_add(ns);
    }

    /// A bucket's last gradient has come.
    pub(super) fn filled(&mut self, bucket: BucketId) {
        self.flights[bucket.index()].full = self.host;
    }

    /// Starts at the head of a list; where it `launches` nothing is under way.
    pub(super) fn begin(&mut self, launches: bool) {
        self.at = 0;
        if launches {
            self.launched.clear();
            self.followed = 0;
        }
    }

    /// Runs what is below `hi`; without `wait` as far as it goes without blocking.
    pub(super) fn advance(&mut self, commands: &[Command], hi: usize, wait: bool) {
        let polls = self.blocks && !wait;
        self.follow_up();
        while self.at < hi {
            self.settle(false);
            match commands[self.at] {
                Command::Launch(bucket) => {
                    let before = self.before();
                    if polls && before.is_some_and(|before| self.is_under_way(before)) {
                        return;
                    }
                    self.launch(bucket, before);
                }
                Command::Retire(bucket) if polls && self.is_under_way(bucket) => {
                    if !self.passes_over {
                        return;
                    }
                    self.late.push(bucket);
                }
                Command::Retire(bucket) => self.retire(bucket),
                Command::Gather(unit) => self.gather(unit),
                Command::Free(unit) => self.free(unit),
                Command::Need(_) => {}
            }
            self.at += 1;
            self.follow_up();
        }
    }

    /// Starts second hops whose first is complete, in the order of the launches; waits for nothing.
    fn follow_up(&mut self) {
        if !self.blocks || self.passes_over {
            return; // on streams a Retire does not wait for its turn; lists with units poll theirs
        }
        while let Some(&bucket) = self.launched.get(self.followed) {
            let flight = self.flights[bucket.index()];
            let several = self.prices.buckets[bucket.index()].reduce.len() > 1;
            if several && flight.hop == 0 && !flight.over {
                if self.is_under_way(bucket) {
                    return;
                }
                self.retire(bucket);
            }
            self.followed += 1;
        }
    }

    /// A pass is over: what it has not run yet is run by `drain`.
    pub(super) fn end(&mut self, commands: &[Command]) {
        self.rest = commands[self.at..].to_vec();
    }

    /// Waits for the values of units.
    pub(super) fn land(&mut self, units: &[UnitId]) {
        for unit in units {
            let end = self.values[unit.index()].end;
            let waited = self.stand(end);
            self.account.gather.exposed_ns += waited;
            self.account.gather_ns = self.account.gather_ns.saturating_add(waited);
        }
    }

    /// Waits for all that has been launched, and runs what is left of the list.
    pub(super) fn drain(&mut self) {
        let rest = std::mem::take(&mut self.rest);
        self.at = 0;
        self.advance(&rest, rest.len(), true);
        self.settle(true);
        let launched = std::mem::take(&mut self.launched);
        for &bucket in &launched {
            self.finish(bucket);
        }
        for &bucket in &launched {
            self.wait_for(bucket, self.flights[bucket.index()].free);
        }
        self.launched = launched;
    }

    /// Ranks vote.
    pub(super) fn vote(&mut self) {
        self.account.vote_ns = self.prices.vote;
        self.compute(self.prices.vote);
    }

    /// What is predicted.
    pub(super) fn prediction(mut self) -> Prediction {
        let launched = self.launched.iter().map(|&bucket| {
            let flight = &self.flights[bucket.index()];
            BucketTimes {
                bucket,
                full_ns: flight.full.saturating_sub(self.begun),
                launched_ns: flight.launched.saturating_sub(self.begun),
                landed_ns: flight.landed.saturating_sub(self.begun),
                nbytes: self.prices.buckets[bucket.index()].nbytes,
                reduce: flight.reduce,
            }
        });
        self.account.buckets = launched.collect();
        for times in &self.account.buckets {
            self.account.reduce.add(times.reduce);
        }
        self.account.total_ns = self.host;
        self.account
    }

    // Buckets.

    /// Who uses the memory of the next launch.
    fn before(&self) -> Option<BucketId> {
        let window = self.plan.window() as usize;
        self.launched.len().checked_sub(window).map(|place| self.launched[place])
    }

    fn is_under_way(&self, bucket: BucketId) -> bool {
        let flight = &self.flights[bucket.index()];
        !flight.over && flight.issued.is_some() && flight.end > self.host
    }

    fn launch(&mut self, bucket: BucketId, before: Option<BucketId>) {
        if let Some(before) = before {
            if self.late.contains(&before) {
                self.late.retain(|&late| late != before);
                self.retire(before);
            }
            self.finish(before);
            self.wait_for(before, self.flights[before.index()].free);
        }
        let prices = &self.prices.buckets[bucket.index()];
        self.compute(prices.pack);
        self.account.pack_ns = self.account.pack_ns.saturating_add(prices.pack);
        self.in_flight = self.in_flight.saturating_add(prices.nbytes);
        self.account.peak_in_flight = self.account.peak_in_flight.max(self.in_flight);
        self.launched.push(bucket);
        let flight = &mut self.flights[bucket.index()];
        let kept = Flight { full: flight.full, reduce: flight.reduce, ..Flight::default() };
        *flight = Flight { launched: self.host, ..kept };
        self.follow(bucket, self.host);
    }

    /// Takes the result of the first hop and starts the second, where there is one.
    fn retire(&mut self, bucket: BucketId) {
        if self.flights[bucket.index()].hop == 0 {
            self.complete(bucket);
        }
        self.follow(bucket, self.now());
    }

    /// Makes the hops that are left.
    fn finish(&mut self, bucket: BucketId) {
        while !self.flights[bucket.index()].over {
            self.follow(bucket, self.now());
            self.complete(bucket);
        }
    }

    /// Of what takes results.
    fn now(&self) -> u64 {
        if self.blocks { self.host } else { self.sums }
    }

    /// Starts the hop that a bucket is at, unless that has been done.
    fn follow(&mut self, bucket: BucketId, now: u64) {
        let flight = self.flights[bucket.index()];
        if flight.over || flight.issued.is_some() {
            return;
        }
        let Some(leg) = self.prices.buckets[bucket.index()].reduce.get(flight.hop) else {
            return self.is_over(bucket, now);
        };
        let end = send(&mut self.wires, leg, now);
        let flight = &mut self.flights[bucket.index()];
        (flight.issued, flight.end) = (Some(now), end);
        flight.reduce.sent(leg.price);
    }

    /// Waits for the hop that is under way, and takes its result.
    fn complete(&mut self, bucket: BucketId) {
        let index = bucket.index();
        let Flight { hop, issued, end, over, .. } = self.flights[index];
        let Some(issued) = issued.filter(|_| !over) else { return };
        let take = self.prices.buckets[index].reduce[hop].take;
        let done = if self.blocks {
            self.wait_for(bucket, end);
            self.compute(take);
            self.account.sum_ns = self.account.sum_ns.saturating_add(take);
            self.host
        } else {
            self.sums = self.sums.max(end).saturating_add(take);
            self.sums
        };
        // On a stream of their own sums belong to the flight: nobody else waits for them.
        let landed = if self.blocks { end } else { done };
        let flight = &mut self.flights[index];
        flight.reduce.flight_ns =
            flight.reduce.flight_ns.saturating_add(landed.saturating_sub(issued));
        (flight.hop, flight.issued, flight.landed, flight.free) = (hop + 1, None, landed, done);
        if hop + 1 == self.prices.buckets[index].reduce.len() {
            self.is_over(bucket, done);
        }
    }

    fn is_over(&mut self, bucket: BucketId, now: u64) {
        let flight = &mut self.flights[bucket.index()];
        flight.over = true;
        flight.free = now;
        self.in_flight = self.in_flight.saturating_sub(self.prices.buckets[bucket.index()].nbytes);
    }

    /// Takes the results of Retires that were passed over; without `wait` the complete ones.
    fn settle(&mut self, wait: bool) {
        for bucket in std::mem::take(&mut self.late) {
            if wait || !self.is_under_way(bucket) {
                self.retire(bucket);
            } else {
                self.late.push(bucket);
            }
        }
    }

    fn wait_for(&mut self, bucket: BucketId, until: u64) {
        let waited = self.stand(until);
        let reduce = &mut self.flights[bucket.index()].reduce;
        reduce.exposed_ns = reduce.exposed_ns.saturating_add(waited);
        self.account.exposed_ns = self.account.exposed_ns.saturating_add(waited);
    }

    fn stand(&mut self, until: u64) -> u64 {
        let waited = until.saturating_sub(self.host);
        self.host = self.host.max(until);
        waited
    }

    // Units.

    fn gather(&mut self, unit: UnitId) {
        let buckets = &self.plan.units()[unit.index()].buckets;
        let mut landed = self.host;
        for bucket in buckets {
            let legs = &self.prices.buckets[bucket.index()].gather;
            landed = landed.max(hops(&mut self.wires, legs, self.host, &mut self.account.gather));
        }
        let numel = self.plan.units()[unit.index()].numel;
        let values = &mut self.values[unit.index()];
        values.end = landed;
        if !std::mem::replace(&mut values.whole, true) {
            self.whole = self.whole.saturating_add(numel);
            self.account.peak_whole = self.account.peak_whole.max(self.whole);
        }
    }

    fn free(&mut self, unit: UnitId) {
        if std::mem::replace(&mut self.values[unit.index()].whole, false) {
            self.whole = self.whole.saturating_sub(self.plan.units()[unit.index()].numel);
        }
    }
}

impl Traffic {
    fn sent(&mut self, price: Price) {
        self.sent_bytes = self.sent_bytes.saturating_add(price.sent);
        let wire = price.latency_ns.saturating_add(price.transfer_ns);
        self.wire_ns = self.wire_ns.saturating_add(wire);
    }

    fn add(&mut self, other: Self) {
        self.sent_bytes = self.sent_bytes.saturating_add(other.sent_bytes);
        self.wire_ns = self.wire_ns.saturating_add(other.wire_ns);
        self.flight_ns = self.flight_ns.saturating_add(other.flight_ns);
        self.exposed_ns = self.exposed_ns.saturating_add(other.exposed_ns);
    }
}

fn send(wires: &mut [Wire; 2], leg: &Leg, now: u64) -> u64 {
    wires[leg.wire].send(now, leg.price)
}

/// One hop behind the other: when the last ends.
fn hops(wires: &mut [Wire; 2], legs: &[Leg], now: u64, traffic: &mut Traffic) -> u64 {
    let mut end = now;
    for leg in legs {
        end = send(wires, leg, end);
        traffic.sent(leg.price);
    }
    traffic.flight_ns = traffic.flight_ns.saturating_add(end.saturating_sub(now));
    end
}
