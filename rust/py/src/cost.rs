//! The cost model: what it is given and what it says, as plain numbers.

use pyo3::prelude::*;
use zerort_core::cost::{
    self, Algorithm, Bound, BucketTimes, Choice, CostError, Fabric, Network, Overlap, Prediction,
    Rates,
};
use zerort_core::{Cap, Op, PlanSpec, WHOLE_PADDING};

use crate::errors::PlanError;
use crate::plan::{Plan, Spec, parameters, rules};

/// What a kind of collective costs.
#[pyclass(frozen, module = "zerort._core", from_py_object)]
#[derive(Clone, Copy)]
pub struct Link(cost::Link);

#[pymethods]
impl Link {
    #[new]
    #[pyo3(signature = (alpha_ns, byte_ns, algorithm="best", message_ns=None))]
    fn new(
        alpha_ns: f64,
        byte_ns: f64,
        algorithm: &str,
        message_ns: Option<f64>,
    ) -> PyResult<Self> {
        let known = Algorithm::NAMES.iter().find(|(name, _)| *name == algorithm);
        let Some(&(_, algorithm)) = known else {
            let names: Vec<&str> = Algorithm::NAMES.iter().map(|&(name, _)| name).collect();
            let names = names.join(", ");
            return Err(PlanError::new_err(format!(
                "algorithm {algorithm:?} does not exist: expected one of {names}"
            )));
        };
        let link = cost::Link { algorithm, alpha_ns, byte_ns, message_ns };
        link.check().map_err(refused)?;
        Ok(Self(link))
    }

    /// ns of one collective over `nbytes`, those of the whole, among `ranks`.
    fn duration_ns(&self, op: &str, ranks: u32, nbytes: u64) -> PyResult<u64> {
        let op = match op {
            "reduce_scatter" => Op::ReduceScatter,
            "all_gather" => Op::AllGather,
            "all_reduce" => Op::AllReduce,
            _ => {
                return Err(PlanError::new_err(format!(
                    "collective {op:?} does not exist: expected reduce_scatter, all_gather or \
                     all_reduce"
                )));
            }
        };
        Ok(self.0.duration_ns(op, ranks, nbytes as f64))
    }
}

/// What a step runs on.
#[pyclass(frozen, module = "zerort._core")]
pub struct Machine(cost::Machine);

#[pymethods]
impl Machine {
    #[new]
    #[allow(clippy::too_many_arguments)] // keywords in Python
    #[pyo3(signature = (
        scatter, gather=None, *, lanes=1, inner=None, inner_gather=None, inner_lanes=1, hosts=0,
        control=None, launch_ns=0.0, pack_byte_ns=0.0, sum_byte_ns=0.0, update_element_ns=0.0,
        update_ns=0.0, sum_ns=0.0, vote_ns=0.0, blocks=false, sums_pieces=false, overlap=None, wires=vec![],
        room=u64::MAX, depth=1
    ))]
    fn new(
        scatter: Link,
        gather: Option<Link>,
        lanes: u32,
        inner: Option<Link>,
        inner_gather: Option<Link>,
        inner_lanes: u32,
        hosts: u32,
        control: Option<Link>,
        launch_ns: f64,
        pack_byte_ns: f64,
        sum_byte_ns: f64,
        update_element_ns: f64,
        update_ns: f64,
        sum_ns: f64,
        vote_ns: f64,
        blocks: bool,
        sums_pieces: bool,
        overlap: Option<(f64, f64)>,
        wires: Vec<f64>,
        room: u64,
        depth: u32,
    ) -> PyResult<Self> {
        let fabric = |scatter: Link, gather: Option<Link>, lanes| Fabric {
            scatter: scatter.0,
            gather: gather.unwrap_or(scatter).0,
            lanes,
        };
        let within = inner.unwrap_or(scatter);
        let network = Network {
            outer: fabric(scatter, gather, lanes),
            inner: fabric(within, inner_gather.or(inner).or(gather), inner_lanes),
            control: control.unwrap_or(scatter).0,
            hosts,
        };
        let rates = Rates {
            launch_ns,
            pack_byte_ns,
            sum_byte_ns,
            sum_ns,
            update_element_ns,
            update_ns,
            vote_ns,
        };
        let overlap = overlap.map(|(least_ns, share)| Overlap { least_ns, share });
        let machine =
            cost::Machine { network, rates, blocks, sums_pieces, overlap, wires, room, depth };
        machine.check().map_err(refused)?;
        Ok(Self(machine))
    }
}

/// What a rank computes in a step.
#[pyclass(frozen, module = "zerort._core")]
pub struct Workload(cost::Workload);

#[pymethods]
impl Workload {
    #[new]
    #[pyo3(signature = (forward_ns, backward_ns, arrivals, *, micro_batches=1, other_ns=0))]
    fn new(
        forward_ns: u64,
        backward_ns: u64,
        arrivals: Vec<u64>,
        micro_batches: u32,
        other_ns: u64,
    ) -> Self {
        Self(cost::Workload { forward_ns, backward_ns, arrivals, micro_batches, other_ns })
    }

    /// Parameters in the order in which their gradients come, for `Plan.reordered`.
    #[getter]
    fn observed(&self) -> Vec<u32> {
        self.0.observed().iter().map(|param| param.0).collect()
    }
}

/// A kind of collective over a step.
#[pyclass(frozen, get_all, module = "zerort._core")]
#[derive(Clone, Copy)]
pub struct Traffic {
    sent_bytes: u64,
    wire_ns: u64,
    flight_ns: u64,
    exposed_ns: u64,
    hidden_ns: u64,
}

impl From<cost::Traffic> for Traffic {
    fn from(traffic: cost::Traffic) -> Self {
        let cost::Traffic { sent_bytes, wire_ns, flight_ns, exposed_ns } = traffic;
        Self { sent_bytes, wire_ns, flight_ns, exposed_ns, hidden_ns: traffic.hidden_ns() }
    }
}

/// A bucket in a predicted step.
#[pyclass(frozen, get_all, module = "zerort._core", name = "BucketTimes")]
#[derive(Clone, Copy)]
pub struct PyBucketTimes {
    bucket: u32,
    full_ns: u64,
    launched_ns: u64,
    landed_ns: u64,
    nbytes: u64,
    reduce: Traffic,
}

impl From<&BucketTimes> for PyBucketTimes {
    fn from(times: &BucketTimes) -> Self {
        let &BucketTimes { bucket, full_ns, launched_ns, landed_ns, nbytes, reduce } = times;
        let (bucket, reduce) = (bucket.0, reduce.into());
        Self { bucket, full_ns, launched_ns, landed_ns, nbytes, reduce }
    }
}

/// A predicted step of one rank.
#[pyclass(frozen, module = "zerort._core", name = "Prediction")]
pub struct PyPrediction(Prediction);

macro_rules! read_only {
    ($($name:ident),+) => {
        #[pymethods]
        impl PyPrediction {
            $(#[getter]
            fn $name(&self) -> u64 {
                self.0.$name
            })+

            #[getter]
            fn overlapped(&self) -> bool {
                self.0.overlapped
            }

            #[getter]
            fn communication_ns(&self) -> u64 {
                self.0.communication_ns()
            }

            #[getter]
            fn sent_bytes(&self) -> u64 {
                self.0.sent_bytes()
            }

            #[getter]
            fn reduce(&self) -> Traffic {
                self.0.reduce.into()
            }

            #[getter]
            fn gather(&self) -> Traffic {
                self.0.gather.into()
            }

            #[getter]
            fn publish(&self) -> Traffic {
                self.0.publish.into()
            }

            #[getter]
            fn buckets(&self) -> Vec<PyBucketTimes> {
                self.0.buckets.iter().map(PyBucketTimes::from).collect()
            }
        }
    };
}
read_only!(
    total_ns,
    forward_ns,
    backward_ns,
    pack_ns,
    sum_ns,
    exposed_ns,
    gather_ns,
    vote_ns,
    update_ns,
    publish_ns,
    other_ns,
    peak_in_flight,
    peak_whole
);

/// The step of one rank, predicted.
#[pyfunction]
pub fn simulate(
    py: Python<'_>,
    plan: &Plan,
    workload: &Workload,
    machine: &Machine,
) -> PyResult<PyPrediction> {
    let (plan, workload, machine) = (plan.inner(), &workload.0, &machine.0);
    let predicted = py.detach(|| cost::simulate(plan, workload, machine));
    predicted.map(PyPrediction).map_err(refused)
}

/// A bucket size and a window, and what they come to: (cap in bytes, cap in elements, window,
/// prediction).
type Chosen = (Option<u64>, Option<u64>, Option<u32>, PyPrediction);

/// The bucket size and window with which the plan's parameters are fastest.
#[pyfunction]
#[allow(clippy::needless_pass_by_value)] // a Python list can not be borrowed as a slice
#[pyo3(signature = (
    plan, workload, machine, *, cap_bytes=None, cap_elements=None, windows=vec![None]
))]
pub fn choose_buckets(
    py: Python<'_>,
    plan: &Plan,
    workload: &Workload,
    machine: &Machine,
    cap_bytes: Option<u64>,
    cap_elements: Option<u64>,
    windows: Vec<Option<u32>>,
) -> PyResult<Chosen> {
    let given = cap_bytes.map(Cap::Bytes).into_iter().chain(cap_elements.map(Cap::Elements));
    let given: Vec<Cap> = given.collect();
    let plan = plan.inner();
    let spec = PlanSpec {
        params: plan.params().to_vec(),
        mesh: plan.mesh().clone(),
        rules: plan.rules(),
        cap: plan.cap(),
        window: Some(plan.window()).filter(|&window| window > 0),
        whole_padding: WHOLE_PADDING,
    };
    let (workload, machine) = (&workload.0, &machine.0);
    let chosen = py.detach(|| cost::choose(&spec, workload, machine, &windows, &given));
    let Choice { cap, window, prediction } = chosen.map_err(refused)?;
    let (bytes, elements) = match cap {
        Cap::Bytes(bytes) => (Some(bytes), None),
        Cap::Elements(elements) => (None, Some(elements)),
    };
    Ok((bytes, elements, window, PyPrediction(prediction)))
}

/// The closed form: bytes of a bucket.
#[pyfunction]
pub fn guess_bucket_bytes(alpha_ns: f64, byte_ns: f64, rate: f64, total: f64) -> f64 {
    cost::guess(alpha_ns, byte_ns, rate, total)
}

/// Bytes of a bucket where nothing is measured and nobody has said how long one may become, and what
/// decided it.
#[pyfunction]
#[pyo3(signature = (params, *, world, stage))]
pub fn default_bucket_bytes(
    params: Vec<Spec>,
    world: u32,
    stage: i64,
) -> PyResult<(u64, &'static str)> {
    let (nbytes, bound) = cost::unmeasured(&parameters(params)?, world, rules(stage)?);
    let name = match bound {
        Bound::Share => "share",
        Bound::Least => "least",
        Bound::Message => "message",
        Bound::Most => "most",
        Bound::Unit => "unit",
    };
    Ok((nbytes, name))
}

// A map_err adaptor takes its error by value.
#[allow(clippy::needless_pass_by_value)]
fn refused(error: CostError) -> PyErr {
    PlanError::new_err(error.to_string())
}
