//! Which units are whole, who may still read them, and which go first.

use crate::command::Action;
use crate::ids::UnitId;
use crate::units::Unit;

/// Where a unit's values are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Residence {
    /// Every rank has its shard.
    Sharded,
    /// On their way here.
    Gathering,
    /// Here.
    Whole {
        /// Uses that have begun and not ended.
        users: u32,
    },
}

/// A unit in memory.
#[derive(Clone, Copy, Debug)]
struct Place {
    numel: u64,
    residence: Residence,
    /// torch's sequence number at its first use since the oldest graph that is still to be run.
    first: Option<u64>,
    /// Needed in this backward, which may still read it.
    begun: bool,
    /// Gathered, and not needed since.
    unused: bool,
    /// The cursor has passed its Free.
    lingers: bool,
    /// When it was needed last.
    needed: u64,
}

/// All units of a plan.
#[derive(Clone, Debug)]
pub(super) struct Memory {
    places: Vec<Place>,
    /// Units with users, or begun.
    held: Vec<UnitId>,
    /// Units that linger.
    lingering: Vec<UnitId>,
    live: u64,
    /// Needs so far.
    clock: u64,
    /// Sequence number at which the graphs begin that `first` speaks of.
    epoch: u64,
}

impl Memory {
    pub(super) fn new(units: &[Unit]) -> Self {
        let place = |unit: &Unit| Place {
            numel: unit.numel,
            residence: Residence::Sharded,
            first: None,
            begun: false,
            unused: false,
            lingers: false,
            needed: 0,
        };
        let places = units.iter().map(place).collect();
        Self { places, held: Vec::new(), lingering: Vec::new(), live: 0, clock: 0, epoch: 0 }
    }

    pub(super) fn residence(&self, unit: UnitId) -> Option<Residence> {
        self.places.get(unit.index()).map(|place| place.residence)
    }

    pub(super) fn live(&self) -> u64 {
        self.live
    }

    pub(super) fn held(&self) -> &[UnitId] {
        &self.held
    }

    /// Whether any has users.
    pub(super) fn in_use(&self) -> bool {
        self.held.iter().any(|unit| self.places[unit.index()].users() > 0)
    }

    /// Whether it is whole or on its way.
    pub(super) fn is_here(&self, unit: UnitId) -> bool {
        self.places[unit.index()].residence != Residence::Sharded
    }

    /// Units that are whole or on their way, by id.
    pub(super) fn here(&self) -> Vec<UnitId> {
        (0..self.places.len() as u32).map(UnitId).filter(|&unit| self.is_here(unit)).collect()
    }

    pub(super) fn is_whole(&self, unit: UnitId) -> bool {
        match self.places[unit.index()].residence {
            Residence::Whole { .. } => true,
            Residence::Sharded | Residence::Gathering => false,
        }
    }

    /// Its gather has been waited for.
    pub(super) fn arrived(&mut self, unit: UnitId) {
        let residence = &mut self.places[unit.index()].residence;
        *residence = match *residence {
            Residence::Gathering => Residence::Whole { users: 0 },
            Residence::Sharded => Residence::Sharded,
            Residence::Whole { users } => Residence::Whole { users },
        };
    }

    // Who may still read.

    /// Somebody is about to read it; in a backward at `node`, until a need at an older one.
    pub(super) fn needed(&mut self, unit: UnitId, backward: bool) {
        self.clock += 1;
        let place = &mut self.places[unit.index()];
        place.needed = self.clock;
        if backward && !place.begun {
            place.begun = true;
            if !self.held.contains(&unit) {
                self.held.push(unit);
            }
        }
    }

    /// It has been asked for since it was gathered.
    pub(super) fn asked_for(&mut self, unit: UnitId) {
        self.places[unit.index()].unused = false;
    }

    /// A backward has come to `node`: lets go of what older nodes cannot read.
    pub(super) fn come_to(&mut self, node: u64) {
        let (places, epoch) = (&mut self.places, self.epoch);
        self.held.retain(|unit| {
            let place = &mut places[unit.index()];
            let over = node >= epoch && place.first.is_some_and(|first| node < first);
            place.begun &= !over;
            place.begun || place.users() > 0
        });
    }

    /// A use begins, at torch's sequence number `seq` where it enters a graph. The unit is whole.
    pub(super) fn acquire(&mut self, unit: UnitId, seq: Option<u64>) {
        let place = &mut self.places[unit.index()];
        if let Some(seq) = seq {
            place.first = Some(place.first.map_or(seq, |first| first.min(seq)));
        }
        let users = place.users();
        if users == 0 && !place.begun {
            self.held.push(unit);
        }
        self.places[unit.index()].set_users(users.saturating_add(1));
    }

    /// Whether it is known where its first use stands in the graphs that are still to be run.
    pub(super) fn is_placed(&self, unit: UnitId) -> bool {
        self.places[unit.index()].first.is_some()
    }

    /// A use ends.
    pub(super) fn release(&mut self, unit: UnitId) {
        let place = &mut self.places[unit.index()];
        let users = place.users().saturating_sub(1);
        place.set_users(users);
        if users == 0 && !place.begun {
            self.held.retain(|&held| held != unit);
        }
    }

    /// Nothing is read any more.
    pub(super) fn let_go(&mut self) {
        for unit in std::mem::take(&mut self.held) {
            let place = &mut self.places[unit.index()];
            place.begun = false;
            place.set_users(0);
        }
    }

    /// Graphs of before `seq` are not going to be run, as far as is known.
    pub(super) fn forget_graphs(&mut self, seq: u64) {
        self.epoch = seq;
        for place in &mut self.places {
            place.first = None;
        }
    }

    // What comes and what goes.

    /// Its gather is handed out, needed now or later. What is here already is gathered once more,
    /// over equal values: peers pair with that.
    pub(super) fn gather(&mut self, unit: UnitId, actions: &mut Vec<Action>) {
        let place = &mut self.places[unit.index()];
        match place.residence {
            Residence::Sharded => {
                place.residence = Residence::Gathering;
                place.unused = true;
                self.live = self.live.saturating_add(place.numel);
            }
            Residence::Gathering | Residence::Whole { .. } => {}
        }
        place.lingers = false;
        actions.push(Action::Gather(unit));
    }

    /// The cursor passes its Free: it goes, unless it must or may stay.
    pub(super) fn pass_free(
        &mut self,
        unit: UnitId,
        wanted: &[UnitId],
        room: u64,
        actions: &mut Vec<Action>,
    ) {
        let place = &mut self.places[unit.index()];
        if place.residence == Residence::Sharded {
            return;
        }
        place.lingers = true;
        if !self.lingering.contains(&unit) {
            self.lingering.push(unit);
        }
        if !self.stays(unit, wanted) && (!self.places[unit.index()].unused || self.live > room) {
            self.free(unit, actions);
        }
    }

    /// Frees what lingers and is not held, so that `coming` more elements have room; what was not
    /// asked for only as far as that takes.
    pub(super) fn sweep(
        &mut self,
        coming: u64,
        wanted: &[UnitId],
        room: u64,
        actions: &mut Vec<Action>,
    ) {
        for unit in std::mem::take(&mut self.lingering) {
            let place = self.places[unit.index()];
            if !place.lingers {
                continue;
            }
            let fits = place.unused && self.live.saturating_add(coming) <= room;
            if fits || self.stays(unit, wanted) {
                self.lingering.push(unit);
            } else {
                self.free(unit, actions);
            }
        }
    }

    /// Frees what was needed longest ago and is not held, until `coming` more elements have room.
    pub(super) fn evict(
        &mut self,
        coming: u64,
        wanted: &[UnitId],
        room: u64,
        actions: &mut Vec<Action>,
    ) {
        if self.live.saturating_add(coming) <= room {
            return;
        }
        let mut going = self.here();
        going.retain(|&unit| !self.stays(unit, wanted));
        going.sort_by_key(|unit| self.places[unit.index()].needed);
        for unit in going {
            if self.live.saturating_add(coming) > room {
                self.free(unit, actions);
            }
        }
    }

    /// Frees those of `units` that nobody holds, from the last, as far as the room is exceeded.
    pub(super) fn shrink(&mut self, units: &[UnitId], room: u64, actions: &mut Vec<Action>) {
        for &unit in units.iter().rev() {
            if self.live > room && !self.stays(unit, &[]) {
                self.free(unit, actions);
            }
        }
    }

    pub(super) fn free(&mut self, unit: UnitId, actions: &mut Vec<Action>) {
        let place = &mut self.places[unit.index()];
        if place.residence != Residence::Sharded {
            place.residence = Residence::Sharded;
            (place.lingers, place.unused) = (false, false);
            self.live = self.live.saturating_sub(place.numel);
            actions.push(Action::Free(unit));
        }
    }

    /// Frees all but `kept`, which is sorted.
    pub(super) fn free_all_but(&mut self, kept: &[UnitId], actions: &mut Vec<Action>) {
        for unit in self.here() {
            if kept.binary_search(&unit).is_err() {
                self.free(unit, actions);
            }
        }
    }

    /// Elements that its gather adds.
    pub(super) fn coming(&self, unit: UnitId) -> u64 {
        if self.is_here(unit) { 0 } else { self.places[unit.index()].numel }
    }

    pub(super) fn numel(&self, units: &[UnitId]) -> u64 {
        let lengths = units.iter().map(|unit| self.places[unit.index()].numel);
        lengths.fold(0, u64::saturating_add)
    }

    /// Whether it must not be freed.
    fn stays(&self, unit: UnitId, wanted: &[UnitId]) -> bool {
        let place = &self.places[unit.index()];
        place.begun || place.users() > 0 || wanted.contains(&unit)
    }
}

impl Place {
    fn users(&self) -> u32 {
        match self.residence {
            Residence::Whole { users } => users,
            Residence::Sharded | Residence::Gathering => 0,
        }
    }

    fn set_users(&mut self, users: u32) {
        self.residence = match self.residence {
            Residence::Whole { .. } => Residence::Whole { users },
            Residence::Sharded => Residence::Sharded,
            Residence::Gathering => Residence::Gathering,
        };
    }
}
