//! Plans and state machines of a gradient communication runtime.

#![forbid(unsafe_code)]

pub mod bucket;
pub mod command;
pub mod error;
pub mod ids;
pub mod kernels;
pub mod life;
pub mod partition;
pub mod plan;
pub mod reducer;
pub mod reshard;
pub mod scaler;
pub mod schedule;
pub mod stage;
pub mod trace;

pub use bucket::{Bucket, Cap, Param};
pub use command::{Command, Op};
pub use error::{Phase, PlanError, StepError};
pub use ids::{BucketId, Dtype, GroupId, ParamId, Rank};
pub use life::Life;
pub use partition::{Fragment, Partition};
pub use plan::{Plan, PlanSpec};
pub use reducer::{Explanation, Finished, Reducer};
pub use reshard::{Segment, reshard};
pub use schedule::Schedule;
pub use stage::{Placement, Rules, Stage};
