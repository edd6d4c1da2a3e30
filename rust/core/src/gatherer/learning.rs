//! What passes have needed: the route of the one under way, those that are known, and those that
//! do not keep to their list.

use std::collections::BTreeMap;
use std::sync::Arc;

use xxhash_rust::xxh3::xxh3_64;

use super::{Gatherer, Opening, Pass, SetId};
use crate::ids::{BucketId, UnitId};
use crate::reducer::Reducer;
use crate::roll::At;
use crate::route::{Key, PassKind, Route, Stop};

/// After so many listed passes in a row that needed more than their list a pass stays free.
const PATIENCE: u32 = 3;
/// Routes behind more forwards than these are not kept: their backward may never come.
const FORWARDS: usize = 8;

/// What has been seen.
#[derive(Clone, Debug, Default)]
pub(super) struct Learning {
    /// What the forwards since the last backward called.
    since: Vec<u32>,
    /// Forwards less backwards since the boundary: graphs that may still be run.
    open: i64,
    /// The route of the pass under way.
    trail: Trail,
    routes: Vec<Route>,
    /// The last forward, if nothing has followed it.
    before: Option<Key>,
    news: bool,
    strays: BTreeMap<(PassKind, Key), Stray>,
}

#[derive(Clone, Debug, Default)]
struct Trail {
    /// What was called.
    entry: u32,
    last: Option<SetId>,
    stops: Vec<Passed>,
}

/// A stop of the pass under way.
#[derive(Clone, Debug)]
struct Passed {
    units: Arc<[UnitId]>,
    held: Vec<UnitId>,
    /// Gradients that had come by then.
    arrivals: u64,
}

/// A pass that has needed what its list has not.
#[derive(Clone, Copy, Debug, Default)]
struct Stray {
    entry: u32,
    /// In a row.
    strikes: u32,
    /// It is free the next time.
    again: bool,
    /// How often its route was another, and no pass has kept to the list since.
    changes: u32,
}

impl Learning {
    /// The key of a pass that calls `entry` now.
    pub(super) fn key(&self, kind: PassKind, entry: u32) -> Key {
        let mut words = match kind {
            PassKind::Forward => vec![1, entry],
            PassKind::Backward | PassKind::LocalBackward => vec![2],
            PassKind::Evaluation => vec![4, entry],
        };
        match kind {
            PassKind::Forward | PassKind::Backward | PassKind::LocalBackward => {
                words.extend(&self.since);
            }
            PassKind::Evaluation => {}
        }
        let bytes: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
        Key(xxh3_64(&bytes))
    }

    /// Whether a pass may follow its list.
    pub(super) fn trusts(&self, kind: PassKind, key: Key) -> bool {
        let stray = self.strays.get(&(kind, key));
        stray.is_none_or(|stray| stray.strikes < PATIENCE && !stray.again)
    }

    /// A pass begins. True where the graphs of the forwards before it are not going to be run.
    pub(super) fn begin(&mut self, kind: PassKind, key: Key, entry: u32) -> bool {
        self.trail = Trail { entry, ..Trail::default() };
        let fresh = self.open <= 0;
        match kind {
            PassKind::Evaluation => return false,
            PassKind::Forward => {
                self.follow(key);
                self.since.push(entry);
                self.before = Some(key);
                self.open += 1;
            }
            PassKind::Backward | PassKind::LocalBackward => {
                self.follow(key);
                self.since.clear();
                self.open -= 1;
            }
        }
        kind == PassKind::Forward && fresh
    }

    /// The forward before was followed by `key`; the first that did stays.
    fn follow(&mut self, key: Key) {
        let before = self.before.take();
        let known = |route: &&mut Route| {
            route.kind == PassKind::Forward && Some(route.key) == before && route.then.is_none()
        };
        if let Some(route) = self.routes.iter_mut().find(known) {
            route.then = Some(key);
            self.news = true;
        }
    }

    /// The pass under way needs `set`.
    pub(super) fn stop(
        &mut self,
        set: SetId,
        units: &Arc<[UnitId]>,
        held: &[UnitId],
        arrivals: u64,
    ) {
        if self.since.len() > FORWARDS || self.trail.last.replace(set) == Some(set) {
            return;
        }
        let mut held: Vec<UnitId> =
            held.iter().copied().filter(|unit| !units.contains(unit)).collect();
        held.sort_unstable();
        self.trail.stops.push(Passed { units: Arc::clone(units), held, arrivals });
    }

    /// A pass is over that came to its end, along its list or without.
    pub(super) fn end(&mut self, kind: PassKind, key: Key, how: How, reducer: &Reducer) {
        let trail = std::mem::take(&mut self.trail);
        match how {
            How::Listed => _ = self.strays.remove(&(kind, key)),
            How::Off => {
                let stray = self.strays.entry((kind, key)).or_default();
                stray.entry = trail.entry;
                stray.strikes = stray.strikes.saturating_add(1);
                stray.again = true;
            }
            How::Free => {
                if let Some(stray) = self.strays.get_mut(&(kind, key)) {
                    stray.again = false;
                }
                if self.since.len() <= FORWARDS && !trail.stops.is_empty() {
                    let fills = fills(kind, &trail, reducer);
                    let stops = trail.stops.into_iter();
                    let stop = |stop: Passed| Stop { units: stop.units.to_vec(), held: stop.held };
                    let stops = stops.map(stop).collect();
                    self.learn(Route { kind, key, then: None, stops, fills });
                }
            }
        }
    }

    fn learn(&mut self, mut route: Route) {
        let stray = self.strays.get(&(route.kind, route.key)).copied().unwrap_or_default();
        let known = |other: &&mut Route| other.kind == route.kind && other.key == route.key;
        match self.routes.iter_mut().find(known) {
            // A pass that left something out needs no other list.
            Some(known) if is_part(&route.stops, &known.stops) => return,
            // One that is another every time is not worth a list.
            Some(_) if stray.changes >= PATIENCE => return,
            Some(known) => {
                route.then = known.then;
                let changes = stray.changes.saturating_add(1);
                self.strays.insert((route.kind, route.key), Stray { changes, ..stray });
                *known = route;
            }
            None => self.routes.push(route),
        }
        self.news = true;
    }

    /// The window is over.
    pub(super) fn reset(&mut self) {
        self.since.clear();
        (self.open, self.before) = (0, None);
    }
}

/// How a pass went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum How {
    /// Along its list.
    Listed,
    /// Along its list as far as that went.
    Off,
    /// Without a list.
    Free,
}

/// Whether `some` is `all` with stops left out.
fn is_part(some: &[Stop], all: &[Stop]) -> bool {
    let mut all = all.iter();
    some.iter().all(|stop| all.any(|other| other.units == stop.units))
}

/// The stop in which each bucket was full.
fn fills(kind: PassKind, trail: &Trail, reducer: &Reducer) -> Vec<(BucketId, u32)> {
    if kind != PassKind::Backward {
        return Vec::new();
    }
    let stop = |place: u64| {
        let before = trail.stops.partition_point(|stop| stop.arrivals < place);
        before.saturating_sub(1) as u32
    };
    reducer.filled().into_iter().map(|(bucket, place)| (bucket, stop(place))).collect()
}

impl Gatherer {
    /// Whether this rank has seen routes that have not been broadcast.
    pub fn news(&self) -> bool {
        self.learning.news
    }

    /// All routes that are known, in the order in which their passes ran first.
    pub fn routes(&self) -> &[Route] {
        &self.learning.routes
    }

    /// The routes have been broadcast.
    pub fn told(&mut self) {
        self.learning.news = false;
    }

    /// Passes that stay free on this rank, with what they call: too many of them in a row have
    /// needed what their list had not.
    pub fn strays(&self) -> impl Iterator<Item = (PassKind, u32)> + '_ {
        let lost = self.learning.strays.iter().filter(|(_, stray)| stray.strikes >= PATIENCE);
        lost.map(|(&(kind, _), stray)| (kind, stray.entry))
    }

    /// The list for what is about to begin, where this rank could follow it.
    pub(super) fn list_for(&self, opening: Opening, reducer: &Reducer) -> Option<usize> {
        let At::Pass(kind) = opening.at else { return None };
        let list = self.find_list(kind, opening.key)?;
        let start = self.plan.lists().get(list).map(|list| list.start.as_slice())?;
        let ready = start.iter().all(|&unit| self.memory.is_here(unit))
            && self.learning.trusts(kind, opening.key)
            && !Self::observes(kind, reducer);
        ready.then_some(list)
    }

    pub(super) fn find_list(&self, kind: PassKind, key: Key) -> Option<usize> {
        self.plan.lists().iter().position(|list| list.kind == kind && list.key == key)
    }

    /// The pass under way has come to its end.
    pub(super) fn note_end(&mut self, reducer: &Reducer) {
        match self.pass {
            Pass::Listed { kind, key, .. } => self.learning.end(kind, key, How::Listed, reducer),
            Pass::Free { kind, key, off: true, .. } => {
                self.learning.end(kind, key, How::Off, reducer);
            }
            Pass::Free { kind, key, off: false, .. } => {
                self.learning.end(kind, key, How::Free, reducer);
            }
            Pass::Idle | Pass::Rolling { .. } => {}
        }
    }
}
