//! `TensorReader`: a file's bytes into a buffer that Python owns.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use numpy::{PyArray1, PyArrayMethods};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use qwenlora_core::config::{self, SourceIdentity};
use qwenlora_core::plan::PlanError;
use qwenlora_core::source::{ByteRange, SourceFile};

use crate::error;
use crate::file_plan::{SourceTuple, source_tuple};

/// An open file whose identity is checked before and after reading.
#[pyclass(frozen, module = "qwenlora._core")]
pub(crate) struct TensorReader {
    source: Mutex<Option<Arc<SourceFile>>>,
}

impl TensorReader {
    fn source(&self) -> PyResult<Arc<SourceFile>> {
        let guard = self.source.lock().unwrap_or_else(PoisonError::into_inner);
        guard
            .clone()
            .ok_or_else(|| PyValueError::new_err("the reader is closed"))
    }
}

#[pymethods]
impl TensorReader {
    /// Opens the weights at `path`; `current` tells whether they are still the planned ones.
    #[new]
    fn new(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        let source = py.detach(|| {
            let weights = config::weights_path(&path)?;
            Ok(SourceFile::open(&weights)?)
        });
        let source = source.map_err(|e: PlanError| error::from_plan(py, &e))?;
        Ok(Self {
            source: Mutex::new(Some(Arc::new(source))),
        })
    }

    /// Identity of the open file, without that of a configuration beside it.
    #[getter]
    fn identity(&self) -> PyResult<SourceTuple> {
        let weights = self.source()?.identity().clone();
        Ok(source_tuple(&SourceIdentity {
            weights,
            config: None,
        }))
    }

    /// Fills `dest` from `(offset in the file, length, offset in dest)`, all in bytes.
    ///
    /// Safety note, the one place where raw bytes cross: `dest` is borrowed exclusively from NumPy
    /// for the call, so the GIL can be released while Rust writes into it; the caller must not
    /// touch it from another thread until the call returns.
    #[pyo3(signature = (ranges, dest, *, threads))]
    fn read_into(
        &self,
        py: Python<'_>,
        ranges: Vec<(u64, u64, usize)>,
        dest: &Bound<'_, PyArray1<u8>>,
        threads: NonZeroUsize,
    ) -> PyResult<()> {
        let source = self.source()?;
        let ranges: Vec<ByteRange> = ranges
            .into_iter()
            .map(|(offset_bytes, len_bytes, dest_offset)| ByteRange {
                offset_bytes,
                len_bytes,
                dest_offset,
            })
            .collect();
        let mut dest = dest
            .try_readwrite()
            .map_err(|e| PyValueError::new_err(format!("the buffer cannot be written: {e}")))?;
        let bytes = dest
            .as_slice_mut()
            .map_err(|e| PyValueError::new_err(format!("the buffer is not contiguous: {e}")))?;
        py.detach(|| source.read_ranges(&ranges, bytes, threads))
            .map_err(|e| error::from_source(py, &e))
    }

    /// Raises where the file changed since it was opened.
    fn verify_unchanged(&self, py: Python<'_>) -> PyResult<()> {
        let source = self.source()?;
        py.detach(|| source.verify_unchanged())
            .map_err(|e| error::from_source(py, &e))
    }

    /// Closes the file; reading afterwards raises.
    fn close(&self) {
        *self.source.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}
