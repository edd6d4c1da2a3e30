//! What can be wrong, as enums with fields.
//!
//! Errors hold identifiers, never names: the core does not know what a parameter is called. Whoever
//! does words the final message; the texts here are for readers of the core alone.

use crate::ids::{BucketId, ParamId, Rank, UnitId};

/// A plan that cannot be made, or a question about one that has no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// More parameters than identifiers.
    #[error("{count} parameters are more than a 32-bit id can number")]
    TooManyParameters {
        /// How many were given.
        count: usize,
    },
    /// A job has at least one rank.
    #[error("the world must have at least one rank")]
    BadWorld,
    /// Copies of the model state, and their hosts, do not share the ranks evenly.
    #[error("{world} ranks cannot be {replicas} copies over {hosts} hosts, all equal in size")]
    BadHosts {
        /// Number of ranks.
        world: u32,
        /// Copies of the model state.
        replicas: u32,
        /// Hosts of each copy.
        hosts: u32,
    },
    /// The groups of a mesh differ in size.
    #[error("every copy of the model state must have {hosts} hosts of {inner} ranks")]
    UnevenMesh {
        /// Hosts of the first copy.
        hosts: usize,
        /// Ranks of its first host.
        inner: usize,
    },
    /// A mesh lists a rank twice, or one beyond the number of ranks that it lists.
    #[error("rank {} is listed twice, or not below the number of ranks listed", .rank.0)]
    RankNotOnce {
        /// The rank.
        rank: Rank,
    },
    /// A bucket must be allowed to hold something.
    #[error("the cap of a bucket must be positive")]
    BadCap,
    /// At least one bucket must be allowed to be in flight.
    #[error("the window must be at least one bucket")]
    BadWindow,
    /// A module is listed before the one that it is registered in.
    #[error("module {module} does not stand behind its parent")]
    BadModule {
        /// Index of the module.
        module: usize,
    },
    /// A unit's number is not below the number of parameters.
    #[error("parameter {} is in unit {}, beyond the number of parameters", .param.0, .unit.0)]
    UnknownUnit {
        /// The parameter.
        param: ParamId,
        /// The number given.
        unit: UnitId,
    },
    /// Only sharded parameters are gathered and freed.
    #[error("parameter {} is in a unit, but at this stage parameters are replicated", .param.0)]
    UnitNotSharded {
        /// The parameter.
        param: ParamId,
    },
    /// A route that is not one of this plan's.
    #[error("a route names a unit or a bucket that the plan has not, or is no route")]
    BadRoute,
    /// ZeRO has the stages 0 to 3.
    #[error("stage {stage} does not exist: expected 0, 1, 2 or 3")]
    BadStage {
        /// The number given.
        stage: u8,
    },
    /// A bucket's buffer would not be addressable.
    #[error("parameter {} makes its bucket longer than 2^63 - 1 bytes", .param.0)]
    TooLarge {
        /// The parameter at which the bucket passes the limit.
        param: ParamId,
    },
    /// The plan has no such parameter.
    #[error("unknown parameter {}: the plan has {params}", .param.0)]
    UnknownParam {
        /// The identifier given.
        param: ParamId,
        /// How many parameters the plan has.
        params: usize,
    },
    /// The plan has no such bucket.
    #[error("unknown bucket {}: the plan has {buckets}", .bucket.0)]
    UnknownBucket {
        /// The identifier given.
        bucket: BucketId,
        /// How many buckets the plan has.
        buckets: usize,
    },
    /// The plan has no such rank.
    #[error("unknown rank {}: the plan is for a world of {world}", .rank.0)]
    UnknownRank {
        /// The rank given.
        rank: Rank,
        /// How many ranks the plan is for.
        world: u32,
    },
    /// A list with one entry per parameter has another length.
    #[error("expected one entry for each of {params} parameters, got {got}")]
    WrongLength {
        /// How many parameters the plan has.
        params: usize,
        /// How many entries were given.
        got: usize,
    },
    /// A written-down layout leaves a parameter out or has it twice.
    #[error("parameter {} does not lie in exactly one bucket", .param.0)]
    NotOnce {
        /// The parameter.
        param: ParamId,
    },
    /// A written-down bucket without a parameter.
    #[error("bucket {} holds no parameter", .bucket.0)]
    EmptyBucket {
        /// The bucket.
        bucket: BucketId,
    },
    /// A written-down bucket of several dtypes, optimizer groups, wire formats or grains.
    #[error(
        "parameter {} has another dtype, group, wire format or grain than the first of bucket {}",
        .param.0,
        .bucket.0
    )]
    MixedBucket {
        /// The bucket.
        bucket: BucketId,
        /// The parameter that differs.
        param: ParamId,
    },
    /// A written-down parameter that reaches into its neighbour or out of its bucket.
    #[error(
        "parameter {} starts before its predecessor's end or ends behind bucket {}",
        .param.0,
        .bucket.0
    )]
    Overlap {
        /// The bucket.
        bucket: BucketId,
        /// The parameter.
        param: ParamId,
    },
    /// A written-down bucket in which a border between shards cuts a block.
    #[error("a border between shards of bucket {} cuts a block of parameter {}", .bucket.0, .param.0)]
    CutBlock {
        /// The bucket.
        bucket: BucketId,
        /// The parameter.
        param: ParamId,
    },
    /// A written-down bucket that is not one equal, addressable shard for each rank.
    #[error("bucket {} of {numel} elements is not {world} equal shards", .bucket.0)]
    UnevenBucket {
        /// The bucket.
        bucket: BucketId,
        /// Its padded length.
        numel: u64,
        /// How many ranks share it.
        world: u32,
    },
    /// Two plans disagree about a parameter's length.
    #[error("parameter {} has {expected} elements, its source has {got}", .param.0)]
    Mismatch {
        /// The parameter, in the plan that is to be filled.
        param: ParamId,
        /// Its number of elements there.
        expected: u64,
        /// Its number of elements in the plan that it comes from.
        got: u64,
    },
}

/// A call that does not fit the state of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StepError {
    /// The call belongs to the other phase.
    #[error("called {have}, but only allowed {want}")]
    OutOfPhase {
        /// The phase at the time of the call.
        have: Phase,
        /// The phase in which the call is allowed.
        want: Phase,
    },
    /// The plan has no such parameter.
    #[error("unknown parameter {}: the plan has {params}", .param.0)]
    UnknownParam {
        /// The identifier given.
        param: ParamId,
        /// How many parameters the plan has.
        params: usize,
    },
    /// A list with one entry per parameter has another length.
    #[error("expected one entry for each of {params} parameters, got {got}")]
    WrongLength {
        /// How many parameters the plan has.
        params: usize,
        /// How many entries were given.
        got: usize,
    },
    /// The plan has no such list.
    #[error("unknown list {list}: the plan has {lists}")]
    UnknownList {
        /// The index given.
        list: usize,
        /// How many lists the plan has.
        lists: usize,
    },
    /// The plan has no such unit.
    #[error("unknown unit {}: the plan has {units}", .unit.0)]
    UnknownUnit {
        /// The identifier given.
        unit: UnitId,
        /// How many units the plan has.
        units: usize,
    },
    /// No such set of units has been made.
    #[error("unknown set {set}: there are {sets}")]
    UnknownSet {
        /// The number given.
        set: u32,
        /// How many sets there are.
        sets: usize,
    },
    /// Units are needed only in a pass.
    #[error("a unit is needed, but no pass is under way")]
    NoPass,
    /// A pass is under way and has not been closed.
    #[error("a pass is under way: close it first")]
    PassUnderWay,
    /// No pass is being opened, or the roll has not come to a decision.
    #[error("no roll is under way that this belongs to")]
    NotRolling,
    /// A unit is said to have arrived that nobody has gathered.
    #[error("unit {} has not been gathered", .unit.0)]
    NotGathered {
        /// The unit.
        unit: UnitId,
    },
    /// Rows that no rank has written, or as many as there are not ranks.
    #[error("these are not the rows of all ranks")]
    BadRows,
    /// Only the launch order may change, never the layout.
    #[error("the new plan has another layout: {got:016x} instead of {expected:016x}")]
    OtherLayout {
        /// Layout digest of the plan in use.
        expected: u64,
        /// Layout digest of the plan given.
        got: u64,
    },
}

/// Where a reducer stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Between two passes.
    Idle,
    /// In a pass, while backward runs.
    Backward,
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Idle => "between passes",
            Self::Backward => "during a pass",
        })
    }
}
