//! What a prediction says.

use crate::ids::BucketId;

/// A kind of collective over a whole step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes that this rank sends.
    pub sent_bytes: u64,
    /// ns that they take on the wire, each by itself.
    pub wire_ns: u64,
    /// ns between start and end, added up: what waits its turn counts.
    pub flight_ns: u64,
    /// ns that the host, or its device, stood still for them.
    pub exposed_ns: u64,
}

impl Traffic {
    /// ns under way beside something else.
    pub const fn hidden_ns(&self) -> u64 {
        self.flight_ns.saturating_sub(self.exposed_ns)
    }
}

/// A bucket in a step. Moments are ns behind the start of the first forward, in the last pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BucketTimes {
    /// The bucket.
    pub bucket: BucketId,
    /// Its last gradient came.
    pub full_ns: u64,
    /// Its first collective started.
    pub launched_ns: u64,
    /// The result of its last collective was there.
    pub landed_ns: u64,
    /// Its gradient as encoded, in bytes.
    pub nbytes: u64,
    /// Its reduce hops in all passes.
    pub reduce: Traffic,
}

/// The step of one rank.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prediction {
    /// All of it.
    pub total_ns: u64,
    /// Computing forwards.
    pub forward_ns: u64,
    /// Computing backwards.
    pub backward_ns: u64,
    /// Starting buckets and packing gradients.
    pub pack_ns: u64,
    /// Sums that hold up the host; those of a stream of their own count where they are waited for.
    pub sum_ns: u64,
    /// Standing still for gradients.
    pub exposed_ns: u64,
    /// Standing still for parameters, at stage 3.
    pub gather_ns: u64,
    /// The vote.
    pub vote_ns: u64,
    /// This rank's updates.
    pub update_ns: u64,
    /// Standing still for updated parameters, within the step or in the next forward.
    pub publish_ns: u64,
    /// Whether they are published beside the next forward.
    pub overlapped: bool,
    /// The rest of the step: the loader, the loop.
    pub other_ns: u64,
    /// Gradients.
    pub reduce: Traffic,
    /// Parameters that are gathered for their use.
    pub gather: Traffic,
    /// Parameters that are published.
    pub publish: Traffic,
    /// Most bytes of gradients that were under way at once.
    pub peak_in_flight: u64,
    /// Most elements that were whole or gathering at once, of those that are sharded.
    pub peak_whole: u64,
    /// Buckets that are trained, in the order in which they were launched last.
    pub buckets: Vec<BucketTimes>,
}

impl Prediction {
    /// ns that communication adds to the step: all standing still, and the vote.
    pub const fn communication_ns(&self) -> u64 {
        self.exposed_ns
            .saturating_add(self.gather_ns)
            .saturating_add(self.vote_ns)
            .saturating_add(self.publish_ns)
    }

    /// Bytes that this rank sends.
    pub const fn sent_bytes(&self) -> u64 {
        self.reduce
            .sent_bytes
            .saturating_add(self.gather.sent_bytes)
            .saturating_add(self.publish.sent_bytes)
    }
}
