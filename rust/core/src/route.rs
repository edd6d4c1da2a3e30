//! Which units a pass needed, in which order; and the lists that are made from that.
//!
//! A pass that follows no list asks for every unit, and so writes down a [`Route`]: the sequence of
//! sets that were needed, each a [`Stop`] with the units that were *held* then, that is, could still
//! be read. In a backward also where each bucket was full. From routes, in the order in which their
//! passes ran, [`Plan::routed`](crate::Plan::routed) makes [`List`]s.
//!
//! ```text
//! forward   Need 0 · Gather u0 · Gather u1 │ Need 1 · Gather u2 · Free u0 │ Need 2 ...
//! backward  Need 0 │ Need 1 · Gather u1 · Launch b3 │ Need 2 · Free u3 · Gather u0 · Launch b2 │ ...
//! ```
//!
//! What stands behind a marker runs while its stop is in use. All of the future is known there, so
//! what is needed last is freed first (Belady), and what comes is gathered *depth* stops ahead as
//! far as the room allows. What nobody needs any more is freed at once. A forward's future goes on
//! into its backward, so that what the backward begins with stays by itself. Gathering ahead takes
//! room from what is in use, so that where there is little of it a unit may go that is needed again.
//!
//! - A Free stands behind the marker of a stop that neither needs nor holds the unit.
//! - A Launch stands behind the marker of the stop that follows the one in which its bucket was
//!   full, and behind the gathers there: no need waits for it, and it has one stop to be on time.
//!   Launches follow the plan's one order, at most `window` of them unretired (SCH-1, SCH-2).
//! - **GAT-4** Never do whole units, and those on their way, take more than `room` elements, but
//!   where the units that one stop needs and holds are longer: those then are alone.
//! - **GAT-5** A list is a function of plan, routes, room and depth.

use crate::command::Command;
use crate::error::PlanError;
use crate::ids::{BucketId, UnitId};
use crate::schedule::Schedule;

mod belady;
mod words;

pub(crate) use belady::Bounds;

/// What is run in a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PassKind {
    /// A forward whose backward follows.
    Forward,
    /// A backward whose gradients are reduced.
    Backward,
    /// A backward whose gradients stay in `.grad`.
    LocalBackward,
    /// A forward without a backward.
    Evaluation,
}

/// What passes have in common that take the same route: kind, what was called, and what before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(pub u64);

/// One set of units that a pass needed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stop {
    /// Needed, by id, each once.
    pub units: Vec<UnitId>,
    /// Others that could still be read then.
    pub held: Vec<UnitId>,
}

/// The sequence of sets that a pass needed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// What was run.
    pub kind: PassKind,
    /// Which pass it was.
    pub key: Key,
    /// The pass that followed a forward, where one did.
    pub then: Option<Key>,
    /// What it needed.
    pub stops: Vec<Stop>,
    /// The stop in which each bucket of a backward was full; those that never were are left out.
    pub fills: Vec<(BucketId, u32)>,
}

/// The static list of one pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct List {
    /// What it is for.
    pub kind: PassKind,
    /// Which pass it is for.
    pub key: Key,
    /// Units that must be whole when it begins, by id.
    pub start: Vec<UnitId>,
    /// Units that it leaves whole, by id.
    pub end: Vec<UnitId>,
    /// The sets it needs, by the number of their marker, each sorted.
    pub stops: Vec<Vec<UnitId>>,
    /// Its commands.
    pub schedule: Schedule,
}

/// The lists for `routes`.
pub(crate) fn lists(bounds: &Bounds<'_>, routes: &[Route]) -> Result<Vec<List>, PlanError> {
    routes.iter().try_for_each(|route| bounds.check(route))?;
    let known = |key: Key, kind: PassKind| {
        routes.iter().any(|other| other.key == key && other.kind == kind)
    };
    let mut lists: Vec<List> = Vec::with_capacity(routes.len());
    for route in routes {
        let before = routes.iter().find(|other| leads_to(other, route));
        let end = |before: &Route| {
            lists.iter().find(|list| list.key == before.key && list.kind == before.kind)
        };
        let start = before.and_then(end).map_or_else(Vec::new, |list| list.end.clone());
        let future = future(routes, route);
        let list = bounds.list(route, &start, &future);
        if route.kind == PassKind::Backward && !known(route.key, PassKind::LocalBackward) {
            let local = Route { kind: PassKind::LocalBackward, ..route.clone() };
            lists.push(bounds.list(&local, &start, &future));
        }
        lists.push(list);
    }
    Ok(lists)
}

/// Whether what `one` leaves whole is what `next` finds.
fn leads_to(one: &Route, next: &Route) -> bool {
    one.kind == PassKind::Forward && one.then == Some(next.key) && next.kind != PassKind::Evaluation
}

/// What follows a forward, up to its backward.
fn future<'a>(routes: &'a [Route], route: &'a Route) -> Vec<&'a Stop> {
    let mut stops = Vec::new();
    let mut last = route;
    for _ in routes {
        let Some(next) = routes.iter().find(|next| leads_to(last, next)) else { break };
        stops.extend(&next.stops);
        last = next;
    }
    stops
}

impl List {
    /// Every command, and the marker of each stop among them.
    pub fn commands(&self) -> &[Command] {
        self.schedule.commands()
    }
}
