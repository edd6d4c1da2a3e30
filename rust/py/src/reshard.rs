//! `reshard`: what fills a shard of one plan from the shards of another.

use pyo3::prelude::*;
use zerort_core::{BucketId, ParamId, Rank, Segment};

use crate::errors::{PlanError, refused};
use crate::ids::number;
use crate::plan::Plan;

/// (start in the shard, source rank, source bucket, start in the source's shard, length), in
/// elements.
type Row = (u64, u32, u32, u64, u64);

/// What fills `rank`'s shard of `bucket` in `target`, from the shards of `source`.
#[pyfunction]
#[pyo3(signature = (source, target, *, bucket, rank, came_from))]
pub fn reshard(
    source: &Plan,
    target: &Plan,
    bucket: i64,
    rank: i64,
    came_from: Vec<i64>,
) -> PyResult<Vec<Row>> {
    let bucket = BucketId(number("bucket", bucket).map_err(PlanError::new_err)?);
    let rank = Rank(number("rank", rank).map_err(PlanError::new_err)?);
    let came_from = came_from.into_iter().map(origin).collect::<PyResult<Vec<_>>>()?;
    let segments = zerort_core::reshard(source.inner(), target.inner(), bucket, rank, &came_from)
        .map_err(refused)?;
    Ok(segments.into_iter().map(row).collect())
}

/// -1 stands for a parameter that the source does not have.
fn origin(param: i64) -> PyResult<Option<ParamId>> {
    if param == -1 {
        return Ok(None);
    }
    number("parameter", param).map(|id| Some(ParamId(id))).map_err(PlanError::new_err)
}

fn row(segment: Segment) -> Row {
    let Segment { start, source_rank, source_bucket, source_start, length } = segment;
    (start, source_rank.0, source_bucket.0, source_start, length)
}
