//! What a pass keeps: a slot for each parameter, a state for each bucket, and the rule by which the
//! cursor moves.

use crate::command::Command;
use crate::cursor::{Cursor, Overtake};
use crate::ids::BucketId;

/// A parameter in the current pass, and what is known of it from others.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    pub(super) bucket: BucketId,
    /// Arrivals in this pass; saturates.
    pub(super) fired: u32,
    /// Arrivals waited for in this pass: `fires`, or 0 when not watched.
    pub(super) expected: u32,
    /// How often it fires in a pass, as learnt.
    pub(super) fires: u32,
    /// Place of its last arrival in the last observing pass; 0 if it did not come there.
    pub(super) last: u64,
    pub(super) role: Role,
    /// An observing pass has had it active.
    pub(super) known: bool,
    pub(super) late: bool,
}

/// What a parameter is to its bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// No optimizer has it: nothing of it is ever reduced.
    Held,
    /// It does not require grad.
    Frozen,
    /// It requires grad, and the bucket's [sentinel](super#sentinels) stands for it.
    Relieved,
    /// It requires grad and is waited for.
    Watched,
}

impl Slot {
    pub(super) fn new(bucket: BucketId, role: Role) -> Self {
        Self { bucket, fired: 0, expected: 0, fires: 1, last: 0, role, known: false, late: false }
    }

    pub(super) fn is_active(&self) -> bool {
        match self.role {
            Role::Held | Role::Frozen => false,
            Role::Relieved | Role::Watched => true,
        }
    }

    pub(super) fn is_watched(&self) -> bool {
        self.role == Role::Watched
    }

    pub(super) fn begin(&mut self, learns: bool) {
        self.fired = 0;
        self.late = false;
        self.expected = if self.is_watched() { self.fires } else { 0 };
        if learns {
            self.last = 0;
        }
    }

    /// One arrival; true when it fills the bucket.
    pub(super) fn fire(&mut self, bucket: &mut State) -> bool {
        self.fired = self.fired.saturating_add(1);
        self.late |= bucket.has_left();
        self.fired == self.expected && bucket.fill()
    }
}

/// A bucket in the current pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Filling { missing: u32 },
    Full,
    InFlight,
    Reduced,
}

impl State {
    /// One more parameter to wait for, at the start of a pass.
    pub(super) fn await_one(&mut self) {
        *self = match *self {
            Self::Filling { missing } => Self::Filling { missing: missing + 1 },
            Self::Full | Self::InFlight | Self::Reduced => Self::Filling { missing: 1 },
        };
    }

    /// A parameter is complete; true when it was the last.
    pub(super) fn fill(&mut self) -> bool {
        match *self {
            Self::Filling { missing } if missing > 1 => {
                *self = Self::Filling { missing: missing - 1 };
                false
            }
            Self::Filling { .. } => {
                *self = Self::Full;
                true
            }
            Self::Full | Self::InFlight | Self::Reduced => false,
        }
    }

    pub(super) fn has_left(self) -> bool {
        match self {
            Self::Filling { .. } | Self::Full => false,
            Self::InFlight | Self::Reduced => true,
        }
    }

    /// Passes `command` if it may, or if it must; false when the cursor must stop before it.
    fn pass(&mut self, command: Command, must: bool) -> bool {
        let next = match (command, *self) {
            (Command::Launch(_), Self::Full) => Self::InFlight,
            (Command::Launch(_), Self::Filling { .. }) if must => Self::InFlight,
            (Command::Retire(_), Self::InFlight) => Self::Reduced,
            (Command::Launch(_), Self::Filling { .. } | Self::InFlight | Self::Reduced)
            | (Command::Retire(_), Self::Filling { .. } | Self::Full | Self::Reduced)
            | (Command::Need(_) | Command::Gather(_) | Command::Free(_), _) => return false,
        };
        *self = next;
        true
    }
}

/// Who is watched of a bucket.
#[derive(Clone, Copy, Debug)]
enum Guard {
    /// Nobody: nothing of it is active.
    Nobody,
    /// Place of the last arrival in the observing pass, and index of the parameter that it was.
    Sentinel(u64, usize),
    /// All that are active: it is not known which of them comes last.
    All,
}

/// Gives active slots their roles: with `sentinels` one is watched of each bucket whose active ones
/// all came in the last observing pass.
pub(super) fn watch(slots: &mut [Slot], buckets: usize, sentinels: bool) {
    let mut guards = vec![if sentinels { Guard::Nobody } else { Guard::All }; buckets];
    for (index, slot) in slots.iter().enumerate().filter(|(_, slot)| slot.is_active()) {
        let guard = &mut guards[slot.bucket.index()];
        *guard = match (*guard, slot.last) {
            (Guard::All, _) | (_, 0) => Guard::All,
            (Guard::Sentinel(last, sentinel), place) if last > place => {
                Guard::Sentinel(last, sentinel)
            }
            (Guard::Nobody | Guard::Sentinel(..), place) => Guard::Sentinel(place, index),
        };
    }
    for (index, slot) in slots.iter_mut().enumerate().filter(|(_, slot)| slot.is_active()) {
        slot.role = match guards[slot.bucket.index()] {
            Guard::Sentinel(_, sentinel) if index != sentinel => Role::Relieved,
            Guard::Sentinel(..) | Guard::All | Guard::Nobody => Role::Watched,
        };
    }
}

/// Moves the cursor as far as the buckets allow; the new position when it moved.
pub(super) fn advance(
    commands: &[Command],
    buckets: &mut [State],
    cursor: &mut Cursor,
    overtake: Overtake,
) -> Option<usize> {
    cursor.advance(commands, overtake, |command, must| {
        let bucket = command.bucket().and_then(|bucket| buckets.get_mut(bucket.index()));
        bucket.is_some_and(|bucket| bucket.pass(command, must))
    })
}
