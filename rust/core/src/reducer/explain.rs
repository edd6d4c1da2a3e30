//! Why a cursor stands where it stands.

use std::fmt;

use super::{Pass, Reducer, Slot};
use crate::command::Command;
use crate::ids::ParamId;

/// Why the cursor stands where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// Index of the command in the schedule.
    pub index: usize,
    /// The command that is next.
    pub command: Command,
    /// Parameters that its bucket still waits for.
    pub lacking: Vec<ParamId>,
}

impl Reducer {
    /// The command the cursor stands at and what its bucket lacks. None outside a pass, and when
    /// all has been handed out.
    ///
    /// In an observing pass the cursor stands at the first command until the end, even if its
    /// bucket lacks nothing.
    pub fn explain(&self) -> Option<Explanation> {
        let index = match self.pass {
            Pass::Idle | Pass::Armed => return None,
            Pass::Observing { .. } => 0,
            Pass::Backward { cursor, .. } => cursor.at,
        };
        let command = *self.plan.commands(self.list()).get(index)?;
        let lacks =
            |slot: &Slot| Some(slot.bucket) == command.bucket() && slot.fired < slot.expected;
        let lacking = self.ids_where(lacks).collect();
        Some(Explanation { index, command, lacking })
    }
}

/// As one would say it: `command 14 = Launch b3; b3 lacks 7, 8`.
impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "command {} = {}; ", self.index, self.command)?;
        let Some(bucket) = self.command.bucket() else {
            return f.write_str("nobody has asked for it");
        };
        write!(f, "b{} lacks ", bucket.0)?;
        let Some((first, rest)) = self.lacking.split_first() else { return f.write_str("nothing") };
        write!(f, "{}", first.0)?;
        rest.iter().try_for_each(|param| write!(f, ", {}", param.0))
    }
}
