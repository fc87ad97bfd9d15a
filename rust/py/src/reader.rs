//! `TensorReader` and `Readers`: a file's bytes into buffers that Python owns.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use qwenlora_core::dtype::Dtype;
use qwenlora_core::packed::magnitude::Magnitudes;
use qwenlora_core::plan::PlanError;
use qwenlora_core::plan::config::{self, SourceIdentity};
use qwenlora_core::source::{
    ByteRange, Readers as CoreReaders, Reading as CoreReading, SourceFile,
};

use crate::bytes::Dest;
use crate::error;
use crate::file_plan::{SourceTuple, source_tuple};
use crate::signals::wait_until;

/// Tensors and metadata of a header.
type HeaderTuple = (
    Vec<(String, String, Vec<u64>, u64, u64)>,
    Vec<(String, String)>,
);

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

    /// What the header says: `(name, dtype, shape, offset in the file, length)` of each tensor,
    /// offset and length in bytes, and the entries of the metadata.
    fn header(&self, py: Python<'_>) -> PyResult<HeaderTuple> {
        let source = self.source()?;
        let header = py.detach(|| source.read_header());
        let header = header.map_err(|e| error::from_source(py, &e))?;
        let tensors = header.tensors().iter().map(|own| {
            let (name, dtype) = (own.name().to_owned(), own.dtype().to_string());
            let shape = own.shape().to_vec();
            (name, dtype, shape, own.offset_bytes(), own.len_bytes())
        });
        Ok((tensors.collect(), header.metadata().to_vec()))
    }

    /// Fills `dest` from `(offset in the file, length, offset in dest)`, all in bytes.
    ///
    /// `dest` is borrowed exclusively from NumPy for the call, so the GIL can be released while Rust
    /// writes into it; the caller must not touch it from another thread until the call returns.
    #[pyo3(signature = (ranges, dest, *, threads))]
    fn read_into(
        &self,
        py: Python<'_>,
        ranges: Vec<(u64, u64, usize)>,
        dest: &Bound<'_, PyAny>,
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
        let mut dest = Dest::of(dest)?;
        let bytes = dest.bytes()?;
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

/// Tensors of one size: where each begins in the file, how many bytes it has, and where the first
/// one goes in the buffer; the others follow it.
type Run = (Vec<u64>, u64, usize);

/// Threads that read one buffer after another, in the order in which that was asked for.
#[pyclass(frozen, module = "qwenlora._core")]
pub(crate) struct Readers {
    readers: Mutex<Option<CoreReaders>>,
}

#[pymethods]
impl Readers {
    /// Starts up to `threads` threads.
    #[new]
    #[pyo3(signature = (*, threads))]
    fn new(threads: NonZeroUsize) -> Self {
        Self {
            readers: Mutex::new(Some(CoreReaders::new(threads))),
        }
    }

    /// Begins to read tensors into `dest`, whose bytes between them stay as they are.
    ///
    /// Nobody may touch `dest` until `Reading.wait` has returned or raised, or the reading is gone.
    /// `measure` is the dtype of all tensors, where the largest magnitude is wanted, too: F16, BF16
    /// or F32.
    #[pyo3(signature = (file, runs, dest, *, measure = None))]
    #[expect(unsafe_code, reason = "bytes are lent beyond a call")]
    fn read(
        &self,
        file: &TensorReader,
        runs: Vec<Run>,
        dest: Bound<'_, PyAny>,
        measure: Option<&str>,
    ) -> PyResult<Reading> {
        let py = dest.py();
        let source = file.source()?;
        let ranges = ranges_of(&runs)?;
        let measured = measure.map(magnitudes_of).transpose()?;
        let mut memory = Dest::of(&dest)?;
        // SAFETY: `Reading` keeps the array, and settles before it lets it go; Python keeps away from
        // the memory until then, as it does for one call of `read_into`.
        let bytes = unsafe { memory.lent() }?;
        // Locked without the GIL only: whoever waits for one never holds the other.
        let begun = py.detach(|| {
            let readers = self.readers.lock().unwrap_or_else(PoisonError::into_inner);
            let readers = readers.as_ref();
            readers.map(|readers| readers.read(&source, &ranges, bytes, measured))
        });
        let reading = begun
            .ok_or_else(|| PyValueError::new_err("the readers are closed"))?
            .map_err(|e| error::from_source(py, &e))?;
        Ok(Reading {
            reading,
            _dest: dest.unbind(),
        })
    }

    /// Stops reading, and waits until no thread writes to any buffer.
    fn close(&self, py: Python<'_>) {
        py.detach(|| {
            let mut readers = self.readers.lock().unwrap_or_else(PoisonError::into_inner);
            // Dropped under the lock: whoever closes them, too, waits as well.
            drop(readers.take());
        });
    }
}

/// A buffer that is being filled; it is kept alive, and no thread writes to it when this is gone.
#[pyclass(frozen, module = "qwenlora._core")]
pub(crate) struct Reading {
    reading: CoreReading,
    // Dropped after the reading, in the order of fields.
    _dest: Py<PyAny>,
}

#[pymethods]
impl Reading {
    /// Waits until the buffer is filled; raises what reading it came upon. Returns the largest
    /// magnitude (NaN where there is one), where that was asked for.
    fn wait(&self, py: Python<'_>) -> PyResult<Option<f64>> {
        wait_until(py, |timeout| self.reading.wait(timeout))?
            .map_err(|e| error::from_source(py, &e))?;
        Ok(self.reading.peak())
    }
}

fn magnitudes_of(dtype: &str) -> PyResult<Magnitudes> {
    Dtype::parse(dtype).and_then(Magnitudes::of).ok_or_else(|| {
        PyValueError::new_err(format!("only F16, BF16 and F32 are measured, got {dtype}"))
    })
}

fn ranges_of(runs: &[Run]) -> PyResult<Vec<ByteRange>> {
    let mut ranges = Vec::with_capacity(runs.iter().map(|(offsets, ..)| offsets.len()).sum());
    for (offsets, len_bytes, begin) in runs {
        let mut dest_offset = Some(*begin);
        for &offset_bytes in offsets {
            let here = dest_offset.ok_or_else(|| PyValueError::new_err("a run is too long"))?;
            ranges.push(ByteRange {
                offset_bytes,
                len_bytes: *len_bytes,
                dest_offset: here,
            });
            let size = usize::try_from(*len_bytes).ok();
            dest_offset = size.and_then(|size| here.checked_add(size));
        }
    }
    Ok(ranges)
}
