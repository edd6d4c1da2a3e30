//! One network: bytes pass it one collective after the other.
//!
//! A collective waits its turn among at most `lanes` that are under way at once, then pays for its
//! messages, then has the wire for itself. So with two lanes the messages of one pass beside the
//! bytes of another, and with one nothing overlaps. Turns are taken in the order of starting, which
//! is that of a list, so all of it is sums and maxima.

use super::machine::Price;

#[derive(Clone, Debug)]
pub(super) struct Wire {
    /// When each of the last `lanes` collectives ended; the next takes the place of the oldest.
    ends: Vec<u64>,
    next: usize,
    free: u64,
}

impl Wire {
    pub(super) fn new(lanes: u32) -> Self {
        Self { ends: vec![0; lanes.clamp(1, MOST_LANES) as usize], next: 0, free: 0 }
    }

    /// Starts one at `now`: when it ends.
    pub(super) fn send(&mut self, now: u64, price: Price) -> u64 {
        let lanes = self.ends.len();
        let start = now.max(self.ends[self.next]);
        let has_wire = start.saturating_add(price.latency_ns).max(self.free);
        let end = has_wire.saturating_add(price.transfer_ns);
        self.free = end;
        self.ends[self.next] = end;
        self.next = (self.next + 1) % lanes;
        end
    }
}

/// More have no effect on anything that is real.
const MOST_LANES: u32 = 1024;
