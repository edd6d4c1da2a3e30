//! Which parameters are gathered and freed together.
//!
//! A unit is whole buckets, so that a gather needs no copy and every collective is balanced. Units
//! are cut from the tree of modules, and nobody wraps anything: a module's parameters are needed
//! together, and those of its neighbours soon after.
//!
//! The tree is walked in registration order. A subtree that fits below the cap is not torn; of a
//! larger one the root's own parameters stay together, and its children are looked at one by one.
//! A unit is a run of such pieces. A parameter that several modules share belongs to the first.
//!
//! Parameters that an optimizer has and such that are only held are in one unit where they are
//! neighbours, in buckets of their own.
//!
//! What a unit does not say is *when* it is needed: see [`crate::route`].

use crate::bucket::Bucket;
use crate::error::PlanError;
use crate::ids::{BucketId, ParamId, UnitId};
use crate::partition::Partition;

/// Parameters that are gathered and freed together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit {
    /// Its number.
    pub id: UnitId,
    /// The buckets that it is, by id; none where the number is not used.
    pub buckets: Vec<BucketId>,
    /// Their padded length together: what it takes of the room for whole parameters.
    pub numel: u64,
}

/// A module, as planning sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Index of the module that it is registered in, which stands before it; None for a root.
    pub parent: Option<usize>,
    /// The parameters that are registered in it itself.
    pub params: Vec<ParamId>,
}

/// The unit of each parameter. `modules` are in registration order, a parent before its children;
/// `numels` has an entry for each parameter, None for one that every rank keeps whole.
///
/// Where a module's own parameters are longer than `cap` they are a unit all the same. Parameters
/// that no module lists have no unit.
///
/// # Errors
/// [`PlanError::BadModule`] where a module's parent does not stand before it,
/// [`PlanError::UnknownParam`], [`PlanError::BadCap`] for a cap of 0.
pub fn cut(
    modules: &[Module],
    numels: &[Option<u64>],
    cap: u64,
) -> Result<Vec<Option<UnitId>>, PlanError> {
    if cap == 0 {
        return Err(PlanError::BadCap);
    }
    let own = owned(modules, numels)?;
    let sizes = subtree_sizes(modules, &own, numels)?;
    let mut units = vec![None; numels.len()];
    let mut next = UnitId(0);
    let mut fill = 0_u64;
    for piece in pieces(modules, own, &sizes, cap) {
        let length = total(&piece, numels);
        if fill > 0 && fill.saturating_add(length) > cap {
            next.0 += 1;
            fill = 0;
        }
        fill = fill.saturating_add(length);
        for param in piece {
            units[param.index()] = Some(next);
        }
    }
    Ok(units)
}

/// The units of a plan: every bucket of a unit, by unit.
pub(crate) fn units(buckets: &[Bucket], partitions: &[Partition]) -> Vec<Unit> {
    let count = buckets.iter().filter_map(|bucket| bucket.unit).max().map_or(0, |last| last.0 + 1);
    let unit = |id| Unit { id: UnitId(id), buckets: Vec::new(), numel: 0 };
    let mut units: Vec<Unit> = (0..count).map(unit).collect();
    for (bucket, partition) in buckets.iter().zip(partitions) {
        if let Some(id) = bucket.unit {
            let unit = &mut units[id.index()];
            unit.buckets.push(bucket.id);
            unit.numel = unit.numel.saturating_add(partition.numel());
        }
    }
    units
}

/// Each module's own parameters that are in units, without those that an earlier module has.
fn owned(modules: &[Module], numels: &[Option<u64>]) -> Result<Vec<Vec<ParamId>>, PlanError> {
    let params = numels.len();
    let mut taken = vec![false; params];
    let mut own = Vec::with_capacity(modules.len());
    for module in modules {
        let mut kept = Vec::new();
        for &param in &module.params {
            let seen =
                taken.get_mut(param.index()).ok_or(PlanError::UnknownParam { param, params })?;
            if !std::mem::replace(seen, true) && numels[param.index()].is_some() {
                kept.push(param);
            }
        }
        own.push(kept);
    }
    Ok(own)
}

/// Elements below each module, itself included.
fn subtree_sizes(
    modules: &[Module],
    own: &[Vec<ParamId>],
    numels: &[Option<u64>],
) -> Result<Vec<u64>, PlanError> {
    let mut sizes: Vec<u64> = own.iter().map(|params| total(params, numels)).collect();
    for (index, module) in modules.iter().enumerate().rev() {
        match module.parent {
            Some(parent) if parent >= index => return Err(PlanError::BadModule { module: index }),
            Some(parent) => sizes[parent] = sizes[parent].saturating_add(sizes[index]),
            None => {}
        }
    }
    Ok(sizes)
}

/// What is not torn: subtrees that fit, and the own parameters of those that do not.
fn pieces(
    modules: &[Module],
    own: Vec<Vec<ParamId>>,
    sizes: &[u64],
    cap: u64,
) -> Vec<Vec<ParamId>> {
    let mut pieces: Vec<Vec<ParamId>> = Vec::new();
    // The piece that takes in everything below a module, where the module's subtree fits.
    let mut inside: Vec<Option<usize>> = Vec::with_capacity(modules.len());
    for ((module, params), &size) in modules.iter().zip(own).zip(sizes) {
        let above = module.parent.and_then(|parent| inside[parent]);
        let piece = above.unwrap_or(pieces.len());
        inside.push((above.is_some() || size <= cap).then_some(piece));
        match pieces.get_mut(piece) {
            Some(whole) => whole.extend(params),
            None => pieces.push(params),
        }
    }
    pieces
}

fn total(params: &[ParamId], numels: &[Option<u64>]) -> u64 {
    let lengths = params.iter().filter_map(|param| numels[param.index()]);
    lengths.fold(0, u64::saturating_add)
}
