//! Makes the list of one route: Belady's rule under a bound.

use std::collections::{BTreeSet, VecDeque};

use super::{List, PassKind, Route, Stop};
use crate::bucket::Bucket;
use crate::command::Command;
use crate::error::PlanError;
use crate::ids::{BucketId, UnitId};
use crate::schedule::Schedule;
use crate::units::Unit;

/// What lists are made under.
pub(crate) struct Bounds<'a> {
    /// All buckets of the plan, by id.
    pub(crate) buckets: &'a [Bucket],
    /// All units of the plan, by id.
    pub(crate) units: &'a [Unit],
    /// The order of launches.
    pub(crate) order: &'a [BucketId],
    /// How many launched buckets may be unretired.
    pub(crate) window: u32,
    /// Elements that may be whole or gathering at once.
    pub(crate) room: u64,
    /// How many stops ahead units are gathered.
    pub(crate) depth: u32,
}

impl Bounds<'_> {
    /// Whether `route` is one of this plan's.
    pub(super) fn check(&self, route: &Route) -> Result<(), PlanError> {
        let known = |unit: &UnitId| unit.index() < self.units.len();
        let sorted = |stop: &Stop| stop.units.is_sorted_by(|a, b| a < b);
        let fits = |stop: &Stop| sorted(stop) && stop.units.iter().chain(&stop.held).all(known);
        let filled = |(bucket, _): &(BucketId, u32)| bucket.index() < self.buckets.len();
        if route.stops.iter().all(fits) && route.fills.iter().all(filled) {
            Ok(())
        } else {
            Err(PlanError::BadRoute)
        }
    }

    /// The list of `route`, which finds the units of `start` whole and is followed by `future`.
    pub(super) fn list(&self, route: &Route, start: &[UnitId], future: &[&Stop]) -> List {
        let mut whole = Whole::new(self, route, future);
        for &unit in start {
            whole.take(unit);
        }
        let mut launches = Launches::new(self, route);
        let mut commands = Vec::with_capacity(3 * route.stops.len());
        for (at, stop) in (0..).zip(&route.stops) {
            commands.push(Command::Need(at));
            whole.come_to(at, stop, &mut commands);
            whole.look_ahead(at, &route.stops, &mut commands);
            launches.come_to(at, &mut commands);
        }
        launches.end(&mut commands);
        let end = whole.end(route.kind, &mut commands);
        List {
            kind: route.kind,
            key: route.key,
            start: start.to_vec(),
            end,
            stops: route.stops.iter().map(|stop| stop.units.clone()).collect(),
            schedule: Schedule::of(commands),
        }
    }
}

/// No further use.
const NEVER: u32 = u32::MAX;

/// What is whole or gathering while a list is made.
struct Whole<'a> {
    bounds: &'a Bounds<'a>,
    /// Stops that need each unit and are not behind the present one.
    uses: Vec<VecDeque<u32>>,
    /// Units that are whole by their next use, as entered.
    live: BTreeSet<(u32, UnitId)>,
    /// Next use under which a unit is entered, if it is whole.
    entry: Vec<Option<u32>>,
    /// Units that the present stop needs or holds.
    pinned: Vec<UnitId>,
    total: u64,
}

impl<'a> Whole<'a> {
    fn new(bounds: &'a Bounds<'a>, route: &Route, future: &[&Stop]) -> Self {
        let mut uses = vec![VecDeque::new(); bounds.units.len()];
        for (at, stop) in (0..).zip(route.stops.iter().chain(future.iter().copied())) {
            for unit in &stop.units {
                uses[unit.index()].push_back(at);
            }
        }
        let entry = vec![None; bounds.units.len()];
        Self { bounds, uses, live: BTreeSet::new(), entry, pinned: Vec::new(), total: 0 }
    }

    fn numel(&self, unit: UnitId) -> u64 {
        self.bounds.units[unit.index()].numel
    }

    fn next(&self, unit: UnitId) -> u32 {
        self.uses[unit.index()].front().copied().unwrap_or(NEVER)
    }

    fn is_whole(&self, unit: UnitId) -> bool {
        self.entry[unit.index()].is_some()
    }

    fn take(&mut self, unit: UnitId) {
        let next = self.next(unit);
        if self.entry[unit.index()].replace(next).is_none() {
            self.live.insert((next, unit));
            self.total = self.total.saturating_add(self.numel(unit));
        }
    }

    fn drop(&mut self, unit: UnitId) {
        if let Some(next) = self.entry[unit.index()].take() {
            self.live.remove(&(next, unit));
            self.total = self.total.saturating_sub(self.numel(unit));
        }
    }

    /// Stop `at` is asked for: what it needs has its next use behind it; what nobody will need
    /// goes, and what it lacks comes.
    fn come_to(&mut self, at: u32, stop: &Stop, commands: &mut Vec<Command>) {
        for &unit in &stop.units {
            let uses = &mut self.uses[unit.index()];
            while uses.front().is_some_and(|&next| next <= at) {
                uses.pop_front();
            }
            if self.is_whole(unit) {
                self.drop(unit);
                self.take(unit);
            }
        }
        self.pinned.clear();
        self.pinned.extend(stop.units.iter().chain(&stop.held));
        self.let_go(commands);
        for &unit in &stop.units {
            if !self.is_whole(unit) {
                self.make_room(unit, at, commands);
                self.take(unit);
                commands.push(Command::Gather(unit));
            }
        }
    }

    /// Frees what nobody will need.
    fn let_go(&mut self, commands: &mut Vec<Command>) {
        let useless = self.live.range((NEVER, UnitId(0))..);
        let useless = useless.map(|&(_, unit)| unit).filter(|unit| !self.pinned.contains(unit));
        for unit in useless.collect::<Vec<_>>() {
            self.drop(unit);
            commands.push(Command::Free(unit));
        }
    }

    /// Gathers for the stops that follow `at`, as far as the room allows.
    fn look_ahead(&mut self, at: u32, stops: &[Stop], commands: &mut Vec<Command>) {
        let coming = (at + 1..).zip(stops.iter().skip(at as usize + 1));
        for (ahead, stop) in coming.take(self.bounds.depth as usize) {
            for &unit in &stop.units {
                if !self.is_whole(unit) {
                    if !self.make_room(unit, ahead, commands) {
                        return;
                    }
                    self.take(unit);
                    commands.push(Command::Gather(unit));
                }
            }
        }
    }

    /// Frees what is needed last, if that is behind stop `until`; whether `unit` has room then.
    fn make_room(&mut self, unit: UnitId, until: u32, commands: &mut Vec<Command>) -> bool {
        while self.total.saturating_add(self.numel(unit)) > self.bounds.room {
            let free = |&&(_, unit): &&(u32, UnitId)| !self.pinned.contains(&unit);
            match self.live.iter().rev().find(free) {
                Some(&(next, last)) if next > until => {
                    self.drop(last);
                    commands.push(Command::Free(last));
                }
                Some(_) | None => return false,
            }
        }
        true
    }

    /// What stays, by id. Only a forward leaves something, and nothing that will not be needed.
    fn end(mut self, kind: PassKind, commands: &mut Vec<Command>) -> Vec<UnitId> {
        self.pinned.clear();
        let mut stays: Vec<UnitId> = Vec::new();
        for &(next, unit) in &self.live {
            match kind {
                PassKind::Forward if next != NEVER => stays.push(unit),
                PassKind::Forward
                | PassKind::Backward
                | PassKind::LocalBackward
                | PassKind::Evaluation => commands.push(Command::Free(unit)),
            }
        }
        stays.sort_unstable();
        stays
    }
}

/// Where launches stand, in the plan's order.
struct Launches<'a> {
    order: std::iter::Peekable<std::slice::Iter<'a, BucketId>>,
    /// Stop behind whose marker each bucket stands; NEVER where it was not full.
    places: Vec<u32>,
    window: usize,
    flying: VecDeque<BucketId>,
}

impl<'a> Launches<'a> {
    fn new(bounds: &Bounds<'a>, route: &Route) -> Self {
        let launches: &[BucketId] = match route.kind {
            PassKind::Backward => bounds.order,
            PassKind::Forward | PassKind::LocalBackward | PassKind::Evaluation => &[],
        };
        let last = (route.stops.len() as u32).saturating_sub(1);
        let mut places = vec![NEVER; bounds.buckets.len()];
        for &(bucket, stop) in &route.fills {
            places[bucket.index()] = stop.saturating_add(1).min(last);
        }
        let window = bounds.window.max(1) as usize;
        Self { order: launches.iter().peekable(), places, window, flying: VecDeque::new() }
    }

    fn come_to(&mut self, at: u32, commands: &mut Vec<Command>) {
        while let Some(&&bucket) = self.order.peek() {
            if self.places[bucket.index()] > at {
                break;
            }
            self.order.next();
            self.launch(bucket, commands);
        }
    }

    fn end(&mut self, commands: &mut Vec<Command>) {
        while let Some(&bucket) = self.order.next() {
            self.launch(bucket, commands);
        }
        commands.extend(self.flying.drain(..).map(Command::Retire));
    }

    fn launch(&mut self, bucket: BucketId, commands: &mut Vec<Command>) {
        if self.flying.len() >= self.window {
            commands.extend(self.flying.pop_front().map(Command::Retire));
        }
        self.flying.push_back(bucket);
        commands.push(Command::Launch(bucket));
    }
}
