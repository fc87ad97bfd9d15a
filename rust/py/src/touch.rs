//! `touch`: another version of a dictionary that stays as it is.

use pyo3::intern;
use pyo3::prelude::*;

/// Gives a module's `_parameters` another version, its entries and their order unchanged.
///
/// Guards of compiled code compare versions. No other thread and no signal's handler runs between
/// the two steps: the GIL is held.
#[pyfunction]
pub(crate) fn touch(parameters: &Bound<'_, PyAny>) -> PyResult<()> {
    // No parameter has it: PyTorch refuses names with a dot.
    let name = intern!(parameters.py(), ".");
    parameters.set_item(name, parameters.py().None())?;
    parameters.del_item(name)
}
