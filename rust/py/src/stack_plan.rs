//! `plan_stack`: file plans and the slots of a model to a StackPlan.

use pyo3::prelude::*;
use qwenlora_core::slot::Slot;
use qwenlora_core::stack::{StackItem, StackOptions, StackPlan};

use crate::error;
use crate::file_plan::FilePlan;

/// Plans a stack of `(name, plan, strength, modulation)` onto the slots of a model; both documents are JSON.
#[pyfunction]
pub(crate) fn plan_stack(
    py: Python<'_>,
    items: Vec<(String, PyRef<'_, FilePlan>, f64, bool)>,
    slots: &str,
    options: &str,
) -> PyResult<String> {
    let slots: Vec<Slot> =
        serde_json::from_str(slots).map_err(|e| error::from_json(py, "the slot map", &e))?;
    let options: StackOptions =
        serde_json::from_str(options).map_err(|e| error::from_json(py, "the options", &e))?;
    let stack: Vec<StackItem<'_>> = items
        .iter()
        .map(|(name, plan, strength, modulation)| StackItem {
            name,
            plan: &plan.core,
            strength: *strength,
            modulation: *modulation,
        })
        .collect();
    py.detach(|| StackPlan::new(&stack, &slots, options).map(|plan| plan.to_json()))
        .map_err(|e| error::from_stack(py, &e))
}
