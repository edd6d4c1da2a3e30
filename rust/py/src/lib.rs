//! Python border of `zerort-core`: thin classes over the core's nouns, and memory shared by DLPack.
//!
//! This file exports and does nothing else. Only integers cross the border on the hot path; memory
//! crosses once, at setup. State-machine calls keep the GIL, kernels release it. A panic of the
//! core arrives as a Python exception. `unsafe` is allowed in [`dlpack`], [`mapping`],
//! [`futex`], [`streaming`] and [`wide`] alone.

#![deny(unsafe_code)]

use pyo3::prelude::*;

mod abi;
mod borrow;
mod bucket;
mod buffer;
mod channel;
mod cost;
mod descriptor;
#[allow(unsafe_code)]
mod dlpack;
mod errors;
mod exchange;
#[allow(unsafe_code)]
mod futex;
mod gatherer;
mod grain;
mod ids;
mod kernels;
mod list;
#[allow(unsafe_code)]
mod mapping;
mod names;
mod plan;
mod quantize;
mod reducer;
mod reshard;
mod roll;
mod scaler;
mod segment;
#[allow(unsafe_code)]
mod streaming;
mod trace;
mod units;
#[allow(unsafe_code)]
mod wide;

/// The compiled core.
#[pymodule]
mod _core {
    #[pymodule_export]
    use super::bucket::Bucket;
    #[pymodule_export]
    use super::bucket::Fragment;
    #[pymodule_export]
    use super::bucket::Hop;
    #[pymodule_export]
    use super::buffer::Buffer;
    #[pymodule_export]
    use super::channel::Channel;
    #[pymodule_export]
    use super::cost::Link;
    #[pymodule_export]
    use super::cost::Machine;
    #[pymodule_export]
    use super::cost::PyBucketTimes;
    #[pymodule_export]
    use super::cost::PyPrediction;
    #[pymodule_export]
    use super::cost::Traffic;
    #[pymodule_export]
    use super::cost::Workload;
    #[pymodule_export]
    use super::cost::choose_buckets;
    #[pymodule_export]
    use super::cost::default_bucket_bytes;
    #[pymodule_export]
    use super::cost::guess_bucket_bytes;
    #[pymodule_export]
    use super::cost::simulate;
    #[pymodule_export]
    use super::exchange::Exchange;
    #[pymodule_export]
    use super::gatherer::Gatherer;
    #[pymodule_export]
    use super::kernels::copy;
    #[pymodule_export]
    use super::kernels::first_nonfinite;
    #[pymodule_export]
    use super::kernels::reduce;
    #[pymodule_export]
    use super::kernels::squared_norm;
    #[pymodule_export]
    use super::kernels::take_writes;
    #[pymodule_export]
    use super::list::List;
    #[pymodule_export]
    use super::plan::Plan;
    #[pymodule_export]
    use super::quantize::dequantize;
    #[pymodule_export]
    use super::quantize::quantize;
    #[pymodule_export]
    use super::quantize::sum_quantized;
    #[pymodule_export]
    use super::reducer::Finished;
    #[pymodule_export]
    use super::reducer::Reducer;
    #[pymodule_export]
    use super::reshard::reshard;
    #[pymodule_export]
    use super::roll::PyReading;
    #[pymodule_export]
    use super::scaler::LossScale;
    #[pymodule_export]
    use super::segment::Segment;
    #[pymodule_export]
    use super::trace::PySnapshot;
    #[pymodule_export]
    use super::trace::PyTrace;
    #[pymodule_export]
    use super::units::Unit;
    #[pymodule_export]
    use super::units::cut_units;

    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
