//! Updated parameters on their way to all ranks.

use super::{Executor, send};
use crate::ids::BucketId;

/// A bucket's updated parameters.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Arriving {
    /// Its hops before this one are over.
    hop: usize,
    issued: u64,
    end: u64,
}

impl Executor<'_> {
    /// This rank's updates, and their departure in `order`: each behind its own where that is `at_once`,
    /// else behind all. All but each bucket's last hop is waited for.
    pub(in crate::cost) fn update(&mut self, order: &[BucketId], at_once: bool) {
        if !at_once {
            for &bucket in order {
                self.renew(bucket);
            }
        }
        for &bucket in order {
            if at_once {
                self.renew(bucket);
            }
            self.depart(bucket);
        }
        for &bucket in order {
            while self.arriving[bucket.index()].hop + 1 < self.hops(bucket) {
                self.arrive(bucket);
                self.depart(bucket);
            }
        }
    }

    /// Waits for a bucket's updated parameters.
    pub(in crate::cost) fn need(&mut self, bucket: BucketId) {
        if self.arriving[bucket.index()].hop < self.hops(bucket) {
            self.arrive(bucket);
        }
    }

    fn hops(&self, bucket: BucketId) -> usize {
        self.prices.buckets[bucket.index()].publish.len()
    }

    fn renew(&mut self, bucket: BucketId) {
        let took = self.prices.buckets[bucket.index()].update;
        self.account.update_ns = self.account.update_ns.saturating_add(took);
        self.compute(took);
    }

    /// Starts the hop that a bucket is at, if there is one.
    fn depart(&mut self, bucket: BucketId) {
        let arriving = &mut self.arriving[bucket.index()];
        let Some(leg) = self.prices.buckets[bucket.index()].publish.get(arriving.hop) else {
            return;
        };
        (arriving.issued, arriving.end) = (self.host, send(&mut self.wires, leg, self.host));
        self.account.publish.sent(leg.price);
    }

    fn arrive(&mut self, bucket: BucketId) {
        let arriving = &mut self.arriving[bucket.index()];
        arriving.hop += 1;
        let (end, flight) = (arriving.end, arriving.end.saturating_sub(arriving.issued));
        let waited = self.stand(end);
        self.account.publish_ns = self.account.publish_ns.saturating_add(waited);
        let traffic = &mut self.account.publish;
        traffic.flight_ns = traffic.flight_ns.saturating_add(flight);
        traffic.exposed_ns = traffic.exposed_ns.saturating_add(waited);
    }
}
