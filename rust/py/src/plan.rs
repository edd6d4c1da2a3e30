//! `Plan`: the immutable result of planning.

use std::sync::Arc;

use pyo3::prelude::*;
use zerort_core::{
    Action, BucketId, BucketLayout, Cap, Dtype, Group, GroupId, Mesh, Param, ParamId, Placement,
    PlanSpec, Rank, Route, Rules, Stage, UnitId, WireId,
};

use crate::bucket::{Bucket, Fragment};
use crate::errors::{PlanError, refused};
use crate::exchange::Exchange;
use crate::grain::Grain;
use crate::ids::number;
use crate::list::List;
use crate::names::{dtype_name, kind};
use crate::units::Unit;

/// The immutable result of planning. Every rank computes the same one; `digest` proves it.
#[pyclass(frozen, module = "zerort._core")]
pub struct Plan {
    inner: Arc<zerort_core::Plan>,
}

impl Plan {
    /// The core's plan.
    pub fn inner(&self) -> &Arc<zerort_core::Plan> {
        &self.inner
    }

    fn wrap(plan: zerort_core::Plan) -> Self {
        Self { inner: Arc::new(plan) }
    }
}

#[pymethods]
impl Plan {
    #[new]
    #[allow(clippy::too_many_arguments)] // keywords in Python
    #[pyo3(signature = (
        params, *, world, stage, cap_bytes=None, cap_elements=None, window=None, units=None,
        grains=None, costs=None, whole_padding=0.1, hosts=1, replicas=1
    ))]
    fn new(
        params: Vec<Spec>,
        world: i64,
        stage: i64,
        cap_bytes: Option<u64>,
        cap_elements: Option<u64>,
        window: Option<i64>,
        units: Option<Vec<Option<i64>>>,
        grains: Option<Vec<Grain>>,
        costs: Option<Vec<u64>>,
        whole_padding: f64,
        hosts: i64,
        replicas: i64,
    ) -> PyResult<Self> {
        let rules = rules(stage)?;
        let cap = match (cap_bytes, cap_elements) {
            (Some(bytes), None) => Cap::Bytes(bytes),
            (None, Some(elements)) => Cap::Elements(elements),
            (None, None) => {
                return Err(PlanError::new_err(
                    "a bucket needs a cap: give cap_bytes or cap_elements",
                ));
            }
            (Some(_), Some(_)) => {
                return Err(PlanError::new_err(
                    "a bucket has one cap: give cap_bytes or cap_elements",
                ));
            }
        };
        let world = number("world", world).map_err(PlanError::new_err)?;
        let hosts = number("hosts", hosts).map_err(PlanError::new_err)?;
        let replicas = number("replicas", replicas).map_err(PlanError::new_err)?;
        let spec = PlanSpec {
            params: with_grains(with_units(params, units)?, grains, costs)?,
            mesh: Mesh::even(world, replicas, hosts).map_err(refused)?,
            rules,
            cap,
            window: window
                .map(|window| number("window", window))
                .transpose()
                .map_err(PlanError::new_err)?,
            whole_padding: millionths(whole_padding)?,
        };
        zerort_core::Plan::new(spec).map(Self::wrap).map_err(refused)
    }

    /// The plan whose layout was written down: per bucket its parameters, their starts, and its
    /// padded length.
    #[staticmethod]
    #[pyo3(signature = (params, buckets, *, world, stage))]
    fn restore(
        params: Vec<Spec>,
        buckets: Vec<(Vec<i64>, Vec<u64>, u64)>,
        world: i64,
        stage: i64,
    ) -> PyResult<Self> {
        let params = with_units(params, None)?;
        let layouts = buckets.into_iter().map(layout).collect::<PyResult<_>>()?;
        let world = number("world", world).map_err(PlanError::new_err)?;
        zerort_core::Plan::restore(params, layouts, world, rules(stage)?)
            .map(Self::wrap)
            .map_err(refused)
    }

    #[getter]
    fn world(&self) -> u32 {
        self.inner.world()
    }

    /// Ranks that hold different shards of one model state.
    #[getter]
    fn shards(&self) -> u32 {
        self.inner.mesh().size(Group::Shard)
    }

    /// How long a bucket might become, in bytes; None where it was given in elements.
    #[getter]
    fn cap_bytes(&self) -> Option<u64> {
        match self.inner.cap() {
            Cap::Bytes(bytes) => Some(bytes),
            Cap::Elements(_) => None,
        }
    }

    /// The same in elements; None where it was given in bytes.
    #[getter]
    fn cap_elements(&self) -> Option<u64> {
        match self.inner.cap() {
            Cap::Bytes(_) => None,
            Cap::Elements(elements) => Some(elements),
        }
    }

    #[getter]
    fn window(&self) -> u32 {
        self.inner.window()
    }

    #[getter]
    fn num_params(&self) -> usize {
        self.inner.params().len()
    }

    #[getter]
    fn shards_optimizer(&self) -> bool {
        self.inner.rules().optimizer == Placement::Sharded
    }

    #[getter]
    fn reduces_every_micro_batch(&self) -> bool {
        self.inner.rules().reduces_every_micro_batch()
    }

    #[getter]
    fn shards_gradient(&self) -> bool {
        self.inner.rules().gradient == Placement::Sharded
    }

    #[getter]
    fn shards_parameter(&self) -> bool {
        self.inner.rules().parameter == Placement::Sharded
    }

    /// 64-bit hash of layout, rules and schedule.
    #[getter]
    fn digest(&self) -> u64 {
        self.inner.digest()
    }

    #[getter]
    fn buckets(&self) -> PyResult<Vec<Bucket>> {
        self.inner.buckets().iter().map(|bucket| Bucket::of(&self.inner, bucket.id)).collect()
    }

    /// The static list: `("launch" | "retire", bucket id)`.
    #[getter]
    fn schedule(&self) -> Vec<(&'static str, u32)> {
        self.inner
            .schedule()
            .commands()
            .iter()
            .map(|&command| (kind(command), command.number()))
            .collect()
    }

    /// The schedule as codes of actions: every Launch and Retire.
    #[getter]
    fn program(&self) -> Vec<u64> {
        let actions = self.inner.schedule().commands().iter().filter_map(|c| c.action());
        actions.map(Action::code).collect()
    }

    /// The lists of passes whose routes are known.
    #[getter]
    fn lists(&self) -> Vec<List> {
        (0..self.inner.lists().len()).map(|index| List::of(&self.inner, index)).collect()
    }

    /// The same layout and order of launches, with lists for `routes`, each a route in integers.
    #[allow(clippy::needless_pass_by_value)] // a Python list can not be borrowed as a slice
    #[pyo3(signature = (routes, *, room, depth))]
    fn routed(&self, routes: Vec<Vec<i64>>, room: u64, depth: u32) -> PyResult<Self> {
        let routes = routes.iter().map(|words| Route::from_words(words));
        let routes = routes.collect::<Result<Vec<_>, _>>().map_err(refused)?;
        self.inner.routed(&routes, room, depth).map(Self::wrap).map_err(refused)
    }

    /// What is gathered and freed together, by id.
    #[getter]
    fn units(&self) -> Vec<Unit> {
        let params = |unit: &zerort_core::Unit| {
            let buckets = unit.buckets.iter().filter_map(|&id| self.inner.bucket(id).ok());
            buckets.flat_map(|bucket| bucket.params.iter().map(|param| param.0)).collect()
        };
        let unit = |unit: &zerort_core::Unit| Unit { inner: unit.clone(), params: params(unit) };
        self.inner.units().iter().map(unit).collect()
    }

    fn fragments(&self, bucket: i64, rank: i64) -> PyResult<Vec<Fragment>> {
        let bucket = BucketId(number("bucket", bucket).map_err(PlanError::new_err)?);
        let rank = Rank(number("rank", rank).map_err(PlanError::new_err)?);
        Ok(self.inner.fragments(bucket, rank).map_err(refused)?.map(Fragment).collect())
    }

    /// The rank that steps a parameter; None for one that may be cut.
    fn owner(&self, param: i64) -> PyResult<Option<u32>> {
        let param = ParamId(number("parameter", param).map_err(PlanError::new_err)?);
        self.inner.owner(param).map_err(refused)
    }

    /// What the updates of parameters that may not be cut cost, by rank.
    #[getter]
    fn costs(&self) -> Vec<u128> {
        self.inner.costs().to_vec()
    }

    /// What `rank` sends and receives at the boundary, one entry for each dtype.
    fn exchanges(&self, rank: i64) -> PyResult<Vec<Exchange>> {
        let rank = Rank(number("rank", rank).map_err(PlanError::new_err)?);
        let shards = self.inner.mesh().size(Group::Shard);
        let exchanges = self.inner.exchanges(rank).map_err(refused)?;
        Ok(exchanges.into_iter().map(|inner| Exchange { inner, shards }).collect())
    }

    /// The same layout, launched in the order in which `observed` (parameter ids by arrival) fills
    /// the buckets.
    fn reordered(&self, observed: Vec<i64>) -> PyResult<Self> {
        let observed = observed.into_iter().map(|param| number("parameter", param).map(ParamId));
        let observed = observed.collect::<Result<Vec<_>, _>>().map_err(PlanError::new_err)?;
        self.inner.reordered(&observed).map(Self::wrap).map_err(refused)
    }
}

/// Where things live at a stage.
pub fn rules(stage: i64) -> PyResult<Rules> {
    u8::try_from(stage)
        .map_err(|_| {
            PlanError::new_err(format!("stage {stage} does not exist: expected 0, 1, 2 or 3"))
        })
        .and_then(|stage| Stage::new(stage).map_err(refused))
        .map(Stage::rules)
}

/// One bucket of a layout: its parameters, their starts, its padded length.
fn layout((params, offsets, numel): (Vec<i64>, Vec<u64>, u64)) -> PyResult<BucketLayout> {
    if params.len() != offsets.len() {
        let (params, offsets) = (params.len(), offsets.len());
        return Err(PlanError::new_err(format!(
            "a bucket of {params} parameters has {offsets} offsets"
        )));
    }
    let place = |(param, start)| number("parameter", param).map(|id| (ParamId(id), start));
    let params = params
        .into_iter()
        .zip(offsets)
        .map(place)
        .collect::<Result<_, _>>()
        .map_err(PlanError::new_err)?;
    Ok(BucketLayout { params, numel })
}

/// What Python says of a parameter: elements, dtype, optimizer group or None, wire format.
pub type Spec = (i64, String, Option<i64>, i64);

/// One parameter of a specification, with its id.
fn param((id, (numel, dtype, group, wire)): (usize, Spec)) -> PyResult<Param> {
    let numel = u64::try_from(numel)
        .map_err(|_| PlanError::new_err(format!("parameter {id} can not have {numel} elements")))?;
    let dtype = dtype_named(&dtype).ok_or_else(|| {
        PlanError::new_err(format!(
            "parameter {id} has dtype {dtype:?}: expected f32, f16, bf16 or f64"
        ))
    })?;
    let group = group.map(|group| number("optimizer group", group)).transpose();
    let group = group.map_err(PlanError::new_err)?.map(GroupId);
    let wire = WireId(number("wire format", wire).map_err(PlanError::new_err)?);
    let (unit, grain) = (None, zerort_core::Grain::Element);
    Ok(Param { numel, dtype, group, wire, unit, grain, cost: numel })
}

/// All parameters of a specification, none in a unit.
pub fn parameters(params: Vec<Spec>) -> PyResult<Vec<Param>> {
    params.into_iter().enumerate().map(param).collect()
}

/// All parameters of a specification, each in its unit.
fn with_units(params: Vec<Spec>, units: Option<Vec<Option<i64>>>) -> PyResult<Vec<Param>> {
    let mut params = parameters(params)?;
    let Some(units) = units else { return Ok(params) };
    if units.len() != params.len() {
        let (params, got) = (params.len(), units.len());
        return Err(refused(zerort_core::PlanError::WrongLength { params, got }));
    }
    for (param, unit) in params.iter_mut().zip(units) {
        let id = unit.map(|unit| number("unit", unit)).transpose().map_err(PlanError::new_err)?;
        param.unit = id.map(UnitId);
    }
    Ok(params)
}

/// The same parameters with what of them may not be cut, and what their updates cost; their length
/// where nothing else is said.
fn with_grains(
    mut params: Vec<Param>,
    grains: Option<Vec<Grain>>,
    costs: Option<Vec<u64>>,
) -> PyResult<Vec<Param>> {
    let lengths = [grains.as_ref().map(Vec::len), costs.as_ref().map(Vec::len)];
    if let Some(got) = lengths.into_iter().flatten().find(|&got| got != params.len()) {
        let params = params.len();
        return Err(refused(zerort_core::PlanError::WrongLength { params, got }));
    }
    for (param, grain) in params.iter_mut().zip(grains.unwrap_or_default()) {
        param.grain = grain.read()?;
    }
    for (param, cost) in params.iter_mut().zip(costs.unwrap_or_default()) {
        param.cost = cost;
    }
    Ok(params)
}

/// A share in millionths, as the core counts it; more than it can count is as much as it can.
fn millionths(share: f64) -> PyResult<u32> {
    if share.is_nan() || share < 0.0 {
        return Err(PlanError::new_err(format!(
            "whole_padding can not be {share}: expected a share from 0 on"
        )));
    }
    #[allow(clippy::cast_sign_loss)] // it is not negative, and a cast saturates
    Ok((share * 1e6).round() as u32)
}

fn dtype_named(name: &str) -> Option<Dtype> {
    [Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::F64]
        .into_iter()
        .find(|&dtype| dtype_name(dtype) == name)
}
