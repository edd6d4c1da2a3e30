//! Who steps a parameter that may not be cut, and what ranks send one another where its elements lie
//! elsewhere.
//!
//! A parameter of grain [`Whole`](crate::Grain::Whole) has an *owner*, the rank that steps it. There
//! are two ways to bring it there, and the plan chooses one for each bucket:
//!
//! - [`Way::Owned`] The bucket's shards hold whole parameters, so the reduced gradient arrives where
//!   it is needed and the updated parameter is published from there. It costs padding.
//! - [`Way::Exchanged`] The bucket is sharded evenly, as others are. At the boundary every rank sends
//!   what it holds of a reduced gradient to the owner, and the owner, which alone has master and
//!   state, sends the updated parameter's parts back the same way.
//!
//! Owners of exchanged parameters are chosen over the whole model by what their updates cost: the
//! costliest first, each to the rank that has least to do, ranks' owned parameters counted; among
//! such ranks to the one that holds most of it, and then to the first. Those of one length and cost
//! then trade owners, so that less is sent.
//!
//! An owner's exchanged parameters of one dtype lie in a *room*, one behind the other, each whole and
//! each on 64 bytes. An [`Exchange`] is one rank's view of one dtype: [`Piece`]s that lie in one shard
//! and in one room.
//!
//! - **EXC-1** An exchanged parameter lies in the room of one rank, whole, and apart from all others.
//! - **EXC-2** An element that does not lie on its owner is sent exactly once each way, and nothing
//!   else is: `send` and `kept` of a rank tile what its shards hold of exchanged parameters, `receive`
//!   and `kept` tile its rooms' parameters.
//! - **EXC-3** What one rank sends to another is, piece by piece, what that receives from it.
//! - **EXC-4** The costliest rank costs at most the mean and the costliest parameter more, or what it
//!   owns without an exchange.
//! - **EXC-5** Only ranks of one shard group exchange: a copy of the model state serves itself.

mod owners;

use crate::bucket::Bucket;
use crate::ids::{BucketId, Dtype, ParamId};
use crate::partition::Partition;

pub(crate) use self::owners::{Owners, spend, way};

/// How the whole gradient of a parameter reaches its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Way {
    /// Its bucket's shards hold whole parameters.
    Owned,
    /// Its bucket's shards cut parameters; ranks exchange their parts.
    Exchanged,
}

/// A run of elements of an exchanged parameter that lies in one shard, and in its owner's room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Piece {
    /// Number of the shard at the other end: of the owner for a piece that is sent to it, of the
    /// holder for one that is received from it.
    pub peer: u32,
    /// The bucket.
    pub bucket: BucketId,
    /// The parameter.
    pub param: ParamId,
    /// Where it starts in the holder's shard.
    pub shard_start: u64,
    /// Where it starts in the owner's room.
    pub room_start: u64,
    /// How long it is; never 0.
    pub length: u64,
}

/// One rank's part in bringing gradients of one dtype to their owners. Parameters come back along the
/// same pieces the other way round. All figures are in elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exchange {
    /// Element type of the parameters.
    pub dtype: Dtype,
    /// Length of this rank's room; 0 where it owns nothing.
    pub room: u64,
    /// The parameters that it owns, and where each starts in its room.
    pub places: Vec<(ParamId, u64)>,
    /// What it holds and another owns, by peer; then as it lies in the shards.
    pub send: Vec<Piece>,
    /// What it owns and another holds, by peer; then as it lies in the peer's shards.
    pub receive: Vec<Piece>,
    /// What it holds and owns: it only moves from shard to room.
    pub kept: Vec<Piece>,
}

impl Exchange {
    /// How many elements go to each of `shards` peers.
    pub fn send_splits(&self, shards: u32) -> Vec<u64> {
        splits(&self.send, shards)
    }

    /// How many elements come from each of `shards` peers.
    pub fn receive_splits(&self, shards: u32) -> Vec<u64> {
        splits(&self.receive, shards)
    }
}

fn splits(pieces: &[Piece], shards: u32) -> Vec<u64> {
    let mut lengths = vec![0; shards as usize];
    for piece in pieces {
        lengths[piece.peer as usize] += piece.length;
    }
    lengths
}

impl Owners {
    /// What the rank of this shard exchanges, for each dtype that any rank does.
    pub(crate) fn exchanges(
        &self,
        buckets: &[Bucket],
        partitions: &[Partition],
        shard: u32,
    ) -> Vec<Exchange> {
        let exchange = |(&dtype, rooms): (&Dtype, &Vec<u64>)| {
            let mut found = Exchange {
                dtype,
                room: rooms[shard as usize],
                places: Vec::new(),
                send: Vec::new(),
                receive: Vec::new(),
                kept: Vec::new(),
            };
            let all = buckets.iter().zip(partitions);
            for (bucket, partition) in all.filter(|(b, _)| b.dtype == dtype) {
                if self.way(bucket.id) == Some(Way::Exchanged) {
                    self.held(&mut found, bucket, partition, shard);
                    self.owned(&mut found, bucket, partition, shard);
                }
            }
            // Stable, so that both ends of a pair list its pieces in one order.
            found.send.sort_by_key(|piece| piece.peer);
            found.receive.sort_by_key(|piece| piece.peer);
            found
        };
        self.rooms.iter().map(exchange).collect()
    }

    /// What lies in the shard.
    fn held(&self, found: &mut Exchange, bucket: &Bucket, partition: &Partition, shard: u32) {
        for fragment in partition.fragments(bucket, shard) {
            let Some(peer) = self.of(fragment.param) else { continue };
            let piece = Piece {
                peer,
                bucket: bucket.id,
                param: fragment.param,
                shard_start: fragment.shard_start,
                room_start: self.places[fragment.param.index()] + fragment.param_start,
                length: fragment.length,
            };
            if peer == shard { found.kept.push(piece) } else { found.send.push(piece) }
        }
    }

    /// What lies in the room of the shard's rank.
    fn owned(&self, found: &mut Exchange, bucket: &Bucket, partition: &Partition, shard: u32) {
        for (position, &param) in bucket.params.iter().enumerate() {
            if self.of(param) != Some(shard) {
                continue;
            }
            let place = self.places[param.index()];
            found.places.push((param, place));
            let pieces = partition.cuts(position).filter(|cut| cut.shard != shard);
            found.receive.extend(pieces.map(|cut| Piece {
                peer: cut.shard,
                bucket: bucket.id,
                param,
                shard_start: cut.shard_start,
                room_start: place + cut.param_start,
                length: cut.length,
            }));
        }
    }
}
