//! Plans and state machines of a gradient communication runtime.
//!
//! When several processes train one model, each sees its own part of the data and computes its own
//! gradients. Before a step these must be summed over all processes: gigabytes, over a network,
//! while the clock runs. Three ideas make that bearable.
//!
//! **Bucketed.** A collective has a fixed price, so gradients are not sent one by one. A [`Bucket`]
//! is a set of parameters that share one flat buffer and one collective. Backward makes gradients
//! roughly in reverse registration order, so buckets are filled in that order.
//!
//! **Overlapped.** A bucket leaves as soon as its last gradient has come, while backward still
//! computes the others.
//!
//! **Sharded.** No process needs the whole sum if each updates only its part of the parameters. A
//! [`Partition`] cuts every bucket into equal [shards](Partition::shard_numel), one a [`Rank`];
//! what of a parameter lies in a shard is a [`Fragment`]. How much is sharded, of optimizer state,
//! gradients and parameters, is a ZeRO [`Stage`], in other words three [`Rules`].
//!
//! Some optimizers look at a whole matrix. What of a parameter may not be cut is its [`Grain`], and
//! no border between shards cuts one: matrices are packed whole into equal shards, or where that
//! would take too much padding, brought to one owner each by an [`Exchange`].
//!
//! # One order, written down
//!
//! A collective pairs with whatever its peers start at the same position. If one process launched
//! buckets as they fill, and another did, the order would hang on timing and on which parameters a
//! batch used; two buckets of equal size would be summed into each other without a word. Here the
//! order is data. A [`Plan`] holds a [`Schedule`], the one list of [`Command`]s of a pass: `Launch
//! b0`, `Launch b1`, `Retire b0`, ... It is the same on every rank, and [`Plan::digest`] proves it.
//!
//! The [`Reducer`] is a cursor into that list. It is called for each gradient and answers how far
//! along one may go now. So the order of arrival decides *when* a bucket leaves, and never *which*
//! is next. What a `Launch` starts is a list too: the [`Hops`] of the bucket, each a collective over
//! a named [`Group`] of the [`Mesh`].
//!
//! Where parameters are sharded too, at stage 3, they are whole only while they are used. They are
//! gathered and freed by the [`Unit`], and a pass has a [`List`] of its own, in which stands what is
//! needed, gathered and freed among the launches. The [`Gatherer`] is the cursor for that; what no
//! list brings, ranks ask for in a [`roll`] call, which all of them read alike.
//!
//! # One step
//!
//! ```
//! use std::sync::Arc;
//! use zerort_core::{
//!     Cap, Dtype, Grain, GroupId, Mesh, Param, ParamId, Plan, PlanSpec, Reducer, Stage,
//!     WHOLE_PADDING, WireId,
//! };
//!
//! // Four parameters, two ranks, at most 1024 elements a bucket: b0 = {p3, p2}, b1 = {p1, p0}.
//! let (dtype, group, wire) = (Dtype::F32, Some(GroupId(0)), WireId(0));
//! let grain = Grain::Element;
//! let param = Param { numel: 512, dtype, group, wire, unit: None, grain, cost: 0 };
//! let plan = Arc::new(Plan::new(PlanSpec {
//!     params: vec![param; 4],
//!     mesh: Mesh::flat(2)?,
//!     rules: Stage::new(2)?.rules(),
//!     cap: Cap::Elements(1024),
//!     window: Some(1),
//!     whole_padding: WHOLE_PADDING,
//! })?);
//! let mut reducer = Reducer::new(Arc::clone(&plan));
//!
//! // The first pass observes: everything is handed out at its end.
//! reducer.begin()?;
//! for id in [3, 2, 1, 0] {
//!     assert_eq!(reducer.grad_ready(ParamId(id))?, None);
//! }
//! assert_eq!(reducer.finish()?.hi, 4);
//!
//! // From then on communication overlaps: b0 leaves while b1's gradients are computed. p1 comes
//! // early, but b0 is first in the list on every rank.
//! reducer.begin()?;
//! let answers = [3, 1, 2, 0].map(|id| reducer.grad_ready(ParamId(id)));
//! assert_eq!(answers, [Ok(None), Ok(None), Ok(Some(2)), Ok(Some(4))]);
//! let run = plan.schedule().commands()[..2].iter().map(ToString::to_string);
//! assert!(run.eq(["Launch b0", "Retire b0"]));
//! assert!(reducer.finish()?.absent.is_empty());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What is not here
//!
//! No tensor, no thread, no clock, no input or output, and no knowledge of torch or Python. All
//! lengths are in elements and all times are passed in. What the crate computes depends on its
//! arguments alone, so that every rank computes the same.

#![forbid(unsafe_code)]

pub mod bucket;
pub mod command;
pub mod cost;
mod cursor;
pub mod error;
pub mod exchange;
pub mod gatherer;
pub mod grain;
pub mod hop;
pub mod ids;
pub mod kernels;
pub mod life;
pub mod mesh;
pub mod packing;
pub mod partition;
pub mod plan;
pub mod reducer;
pub mod reshard;
pub mod roll;
pub mod route;
pub mod scaler;
pub mod schedule;
pub mod stage;
pub mod trace;
pub mod turns;
pub mod units;

pub use bucket::{Bucket, Cap, Kind, Param};
pub use command::{Action, Command, Op};
pub use error::{Phase, PlanError, StepError};
pub use exchange::{Exchange, Piece, Way};
pub use gatherer::{Answer, Gatherer, Residence, SetId};
pub use grain::Grain;
pub use hop::{Hop, Hops};
pub use ids::{BucketId, Dtype, GroupId, ParamId, Rank, UnitId, WireId};
pub use life::Life;
pub use mesh::{Group, Mesh};
pub use partition::{BucketLayout, Fragment, Partition};
pub use plan::{Plan, PlanSpec, WHOLE_PADDING};
pub use reducer::{Explanation, Finished, Reducer};
pub use reshard::{Segment, reshard};
pub use roll::{Apart, At, Reading, Row};
pub use route::{Key, List, PassKind, Route, Stop};
pub use schedule::Schedule;
pub use stage::{Placement, Rules, Stage};
pub use turns::{Line, Turns};
pub use units::{Module, Unit};
