//! The static list of commands of one pass.
//!
//! With a window of 2 and the launch order b0, b1, b2, b3:
//!
//! ```text
//! Launch b0 · Launch b1 · Retire b0 · Launch b2 · Retire b1 · Launch b3 · Retire b2 · Retire b3
//! └──── window fills ────┘└──────── one leaves before one enters ──────┘└─── it drains ───┘
//! ```
//!
//! - **SCH-1** Every bucket that is trained has exactly one `Launch` and one later `Retire`; one
//!   that is only held has none.
//! - **SCH-2** Never are more than `window` buckets launched and unretired, whichever prefix of the
//!   list has been run: the memory of a pass is bounded by its plan.
//! - **SCH-3** The list is a function of the order and the window. Ranks with the same plan run the
//!   same list, so that no collective can pair with another bucket's, whatever order gradients
//!   arrive in.
//!
//! - **SCH-4** Retires stand in the order of the Launches. Where a bucket has a second collective it
//!   starts at its Retire at the latest, and ahead of it once the first is complete; never before
//!   that of the bucket launched before it. So second collectives start in one order on all ranks,
//!   whichever Launches each rank starts them between: they are on groups of their own.
//!
//! At stage 3 a pass has a list of its own, in which parameters stand too: see [`crate::route`].
//!
//! A schedule does not say *when* a command may run. That is the [`Reducer`](crate::Reducer)'s
//! answer.

use std::fmt;

use crate::command::Command;
use crate::ids::BucketId;

/// The list of commands of one pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    commands: Vec<Command>,
}

impl Schedule {
    /// Launches in `order`, at most `window` unretired at a time. A window of 0 is taken as 1.
    pub fn new(order: &[BucketId], window: u32) -> Self {
        let window = (window.max(1) as usize).min(order.len());
        let (head, rest) = order.split_at(window);
        let (leaving, tail) = order.split_at(rest.len());
        let mut commands = Vec::with_capacity(2 * order.len());
        commands.extend(head.iter().copied().map(Command::Launch));
        for (&out, &next) in leaving.iter().zip(rest) {
            commands.extend([Command::Retire(out), Command::Launch(next)]);
        }
        commands.extend(tail.iter().copied().map(Command::Retire));
        Self { commands }
    }

    /// A list that has been made elsewhere.
    pub(crate) fn of(commands: Vec<Command>) -> Self {
        Self { commands }
    }

    /// The commands, in the order in which they run.
    pub fn commands(&self) -> &[Command] {
        &self.commands
    }

    /// The order in which buckets are launched.
    pub fn launches(&self) -> impl Iterator<Item = BucketId> + '_ {
        self.commands.iter().filter_map(|command| match *command {
            Command::Launch(bucket) => Some(bucket),
            Command::Retire(_) | Command::Need(_) | Command::Gather(_) | Command::Free(_) => None,
        })
    }
}

/// One command a line, with its index: two schedules can be compared with `diff`.
impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.commands
            .iter()
            .enumerate()
            .try_for_each(|(index, command)| writeln!(f, "{index:>6} {command}"))
    }
}
