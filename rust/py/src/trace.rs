//! `Trace` for Python: checks what comes in, and puts the file in place.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyInt, PyString};
use zerort_core::ids::Rank;
use zerort_core::trace::{Arg, Args, Trace, TrackId};

/// A ring of events and its writer in Chrome's trace format. Times are nanoseconds, passed in.
#[pyclass(name = "Trace", module = "zerort._core")]
#[derive(Debug)]
pub struct PyTrace {
    trace: Trace,
}

#[pymethods]
impl PyTrace {
    #[new]
    fn new(rank: u32, capacity: usize) -> PyResult<Self> {
        let capacity = NonZeroUsize::new(capacity)
            .ok_or_else(|| PyValueError::new_err("capacity: expected at least 1 event, got 0"))?;
        let trace = Trace::new(Rank(rank), capacity);
        Ok(Self { trace })
    }

    /// Something that is true of the whole run; a name that was given again has its new value.
    #[allow(clippy::needless_pass_by_value, reason = "Python's objects come by value")]
    fn state(&mut self, name: &str, value: Bound<'_, PyAny>) -> PyResult<()> {
        self.trace.state(name, arg(&value)?);
        Ok(())
    }

    /// A named row (a thread in Chrome's terms); the same name gives the same id.
    fn track(&mut self, name: &str) -> u32 {
        self.trace.track(name).get()
    }

    #[pyo3(signature = (track, name, start_ns, end_ns, args=None))]
    fn span(
        &mut self,
        track: u32,
        name: &str,
        start_ns: i64,
        end_ns: i64,
        args: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<()> {
        let track = self.known(track)?;
        self.trace.span(track, name, start_ns, end_ns, taken(args)?);
        Ok(())
    }

    #[pyo3(signature = (track, name, at_ns, args=None))]
    fn instant(
        &mut self,
        track: u32,
        name: &str,
        at_ns: i64,
        args: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<()> {
        let track = self.known(track)?;
        self.trace.instant(track, name, at_ns, taken(args)?);
        Ok(())
    }

    fn counter(&mut self, name: &str, at_ns: i64, value: f64) {
        self.trace.counter(name, at_ns, value);
    }

    /// A span that may overlap others of its track: one bucket's life.
    #[pyo3(signature = (track, name, key, start_ns, end_ns, args=None))]
    fn async_span(
        &mut self,
        track: u32,
        name: &str,
        key: u64,
        start_ns: i64,
        end_ns: i64,
        args: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<()> {
        let track = self.known(track)?;
        self.trace.async_span(track, name, key, (start_ns, end_ns), taken(args)?);
        Ok(())
    }

    /// Events that the ring has overwritten.
    #[getter]
    fn dropped(&self) -> u64 {
        self.trace.dropped()
    }

    fn __len__(&self) -> usize {
        self.trace.len()
    }

    /// Writes the whole ring as Chrome trace JSON, by a temporary file and a rename. Raises
    /// `OSError`.
    // The GIL is kept: another thread that recorded meanwhile would find the ring borrowed, and
    // fail.
    #[allow(clippy::needless_pass_by_value, reason = "Python's path becomes a value")]
    fn write(&self, path: PathBuf) -> PyResult<()> {
        Ok(put(&self.trace, &path)?)
    }

    /// What has been recorded by now, to be written while more is.
    fn snapshot(&self) -> PySnapshot {
        PySnapshot { trace: self.trace.clone() }
    }
}

/// A trace as it was at one moment.
#[pyclass(name = "TraceSnapshot", module = "zerort._core", frozen)]
#[derive(Debug)]
pub struct PySnapshot {
    trace: Trace,
}

#[pymethods]
impl PySnapshot {
    /// As `Trace.write`, without the GIL.
    #[allow(clippy::needless_pass_by_value, reason = "Python's path becomes a value")]
    fn write(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        Ok(py.detach(|| put(&self.trace, &path))?)
    }
}

impl PyTrace {
    fn known(&self, track: u32) -> PyResult<TrackId> {
        self.trace.track_numbered(track).ok_or_else(|| {
            PyValueError::new_err(format!("track {track}: not one that `track` gave"))
        })
    }
}

/// Writes a trace into a file beside, which then takes the place of `path`.
fn put(trace: &Trace, path: &Path) -> std::io::Result<()> {
    let partial = partial(path);
    let written = fill(trace, &partial).and_then(|()| fs::rename(&partial, path));
    if written.is_err() {
        // Nothing more can be done about a file that cannot be removed either; the first error is
        // the one to report.
        let _ = fs::remove_file(&partial);
    }
    written
}

fn fill(trace: &Trace, path: &Path) -> std::io::Result<()> {
    let mut out = BufWriter::new(File::create(path)?);
    trace.write(&mut out)?;
    out.flush()
}

/// Beside the file, so that the rename stays on one file system, and under a name of this process's
/// own.
fn partial(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.partial", std::process::id()));
    name.into()
}

fn taken(args: Option<&Bound<'_, PyDict>>) -> PyResult<Args> {
    let Some(args) = args else {
        return Ok(Args::new());
    };
    args.iter().map(|(name, value)| Ok((name.extract::<&str>()?.into(), arg(&value)?))).collect()
}

fn arg(value: &Bound<'_, PyAny>) -> PyResult<Arg> {
    if let Ok(text) = value.cast::<PyString>() {
        return Ok(Arg::Text(text.to_str()?.into()));
    }
    // An integer beyond 64 bits is shown as a float.
    match value.cast::<PyInt>().map(|count| count.extract()) {
        Ok(Ok(count)) => Ok(Arg::Int(count)),
        Ok(Err(_)) | Err(_) => Ok(Arg::Float(value.extract()?)),
    }
}
