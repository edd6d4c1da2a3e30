//! How far along a list one has come: one cursor, moved by full buckets and by needs.
//!
//! A marker is passed when its stop has been asked for, a Launch when its bucket is full. A stop
//! that is asked for overtakes every Launch before it (**GAT-6**): a need never waits for a
//! gradient.

use crate::command::Command;

/// A position in a list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cursor {
    /// Index of the next command.
    pub(crate) at: usize,
    /// Markers below this number may be passed.
    asked: u32,
}

/// What must be passed, whatever is not full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Overtake {
    /// Nothing.
    Nothing,
    /// All before the marker of this stop, and the marker.
    Until(u32),
    /// The rest of the list.
    All,
}

impl Cursor {
    /// Moves as far as one may; the new position when it moved. `passes` answers for a Launch or a
    /// Retire, which it must pass when its second argument says so.
    pub(crate) fn advance(
        &mut self,
        commands: &[Command],
        mut overtake: Overtake,
        mut passes: impl FnMut(Command, bool) -> bool,
    ) -> Option<usize> {
        let start = self.at;
        match overtake {
            Overtake::Until(stop) => self.asked = self.asked.max(stop.saturating_add(1)),
            Overtake::All => self.asked = u32::MAX,
            Overtake::Nothing => {}
        }
        for &command in commands.iter().skip(start) {
            match command {
                Command::Need(stop) if stop >= self.asked => break,
                Command::Need(stop) => {
                    if overtake == Overtake::Until(stop) {
                        overtake = Overtake::Nothing;
                    }
                }
                Command::Gather(_) | Command::Free(_) => {}
                Command::Launch(_) | Command::Retire(_) => {
                    if !passes(command, overtake != Overtake::Nothing) {
                        break;
                    }
                }
            }
            self.at += 1;
        }
        (self.at > start).then_some(self.at)
    }
}
