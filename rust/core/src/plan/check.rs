//! What a specification, or a written layout, must be before anything is planned from it.

use super::PlanSpec;
use crate::bucket::Cap;
use crate::error::PlanError;
use crate::grain::Grain;
use crate::ids::ParamId;
use crate::partition::BucketLayout;
use crate::stage::Placement;

/// Whether it makes sense.
pub(super) fn check(spec: &PlanSpec) -> Result<(), PlanError> {
    let count = spec.params.len();
    if u32::try_from(count).is_err() {
        return Err(PlanError::TooManyParameters { count });
    }
    if matches!(spec.cap, Cap::Bytes(0) | Cap::Elements(0)) {
        return Err(PlanError::BadCap);
    }
    if spec.window == Some(0) {
        return Err(PlanError::BadWindow);
    }
    (0..).map(ParamId).zip(&spec.params).try_for_each(|(param, one)| {
        let Some(unit) = one.unit else { return Ok(()) };
        if spec.rules.parameter == Placement::Replicated {
            return Err(PlanError::UnitNotSharded { param });
        }
        if unit.index() < count { Ok(()) } else { Err(PlanError::UnknownUnit { param, unit }) }
    })
}

/// Whether every parameter lies in exactly one bucket.
pub(super) fn check_once(layouts: &[BucketLayout], params: usize) -> Result<(), PlanError> {
    let mut seen = vec![false; params];
    for &(param, _) in layouts.iter().flat_map(|layout| &layout.params) {
        let slot = seen.get_mut(param.index()).ok_or(PlanError::UnknownParam { param, params })?;
        if std::mem::replace(slot, true) {
            return Err(PlanError::NotOnce { param });
        }
    }
    match seen.iter().position(|seen| !seen) {
        Some(index) => Err(PlanError::NotOnce { param: ParamId(index as u32) }),
        None => Ok(()),
    }
}

/// Grains mean nothing where no optimizer steps a shard.
pub(super) fn drop_grains(spec: &mut PlanSpec) {
    let replicated = spec.rules.optimizer == Placement::Replicated;
    for param in &mut spec.params {
        if replicated || param.group.is_none() {
            param.grain = Grain::Element;
        }
    }
}
