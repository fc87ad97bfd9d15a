//! `look_at`: what the values of a buffer that Python owns tell.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use qwenlora_core::dtype::Dtype;
use qwenlora_core::packed::findings::{Block, Factors, FindingsError};

use crate::bytes::Source;

/// (how each slot shares, slots without a delta, largest magnitude).
type FindingsTuple<'py> = (Vec<Bound<'py, PyTuple>>, Vec<usize>, Option<f64>);

/// Looks at low-rank factors in a buffer.
///
/// `blocks` are `(begin, bytes per slot, dtype)`, alternating `down` and `up`. Returns for each
/// module the index of the first one with an equal `down` (once where all slots share alike, else
/// slot by slot); the slots in which every `down` or every `up` is zero; and, where `measure` asks
/// for it, the largest magnitude (NaN where there is one).
///
/// The buffer is borrowed from NumPy for the call and the GIL is released: the caller must not
/// write to it from another thread until the call returns.
#[pyfunction]
#[pyo3(signature = (buffer, blocks, slots, *, measure))]
pub(crate) fn look_at<'py>(
    py: Python<'py>,
    buffer: Bound<'py, PyAny>,
    blocks: Vec<(usize, usize, String)>,
    slots: usize,
    measure: bool,
) -> PyResult<FindingsTuple<'py>> {
    let blocks = blocks
        .into_iter()
        .map(|(begin, slot_bytes, dtype)| {
            let dtype = Dtype::parse(&dtype)
                .ok_or_else(|| PyValueError::new_err(format!("unknown dtype: {dtype}")))?;
            Ok(Block {
                begin,
                slot_bytes,
                dtype,
            })
        })
        .collect::<PyResult<Vec<_>>>()?;
    let source = Source::of(&buffer)?;
    let bytes = source.bytes()?;
    let looked = py.detach(|| {
        let factors = Factors::new(bytes, &blocks, slots)?;
        Ok((factors.look(), measure.then(|| factors.peak())))
    });
    let (findings, peak) =
        looked.map_err(|e: FindingsError| PyValueError::new_err(e.to_string()))?;
    let sharing = findings.sharing.iter().map(|own| PyTuple::new(py, own));
    Ok((sharing.collect::<PyResult<_>>()?, findings.zero, peak))
}
