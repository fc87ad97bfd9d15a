//! `plan_stack`: file plans and the slots of a model to a StackPlan.

use std::collections::HashSet;
use std::sync::Arc;

use pyo3::prelude::*;
use qwenlora_core::known;
use qwenlora_core::slot::Slot;
use qwenlora_core::stack::{StackItem, StackOptions, StackPlan};

use crate::error;
use crate::file_plan::FilePlan;

/// The slots of Qwen-Image as Nunchaku quantizes it, each with the modules in it, as JSON.
#[pyfunction]
pub(crate) fn known_slots(py: Python<'_>) -> PyResult<String> {
    py.detach(|| serde_json::to_string(&known::qwen_image_slots()))
        .map_err(|e| error::from_json(py, "the table of known slots", &e))
}

/// A slot as Python knows it: the attributes of `targets.SlotRow`.
#[derive(FromPyObject)]
struct Row {
    path: String,
    kind: String,
    in_features: u64,
    out_features: u64,
    base_rank: u64,
    element_bytes: u64,
    offloaded: bool,
    pattern: String,
    has_bias: bool,
}

impl Row {
    fn slot(self, py: Python<'_>) -> PyResult<Slot> {
        let kind = serde_json::from_value(self.kind.into());
        Ok(Slot {
            kind: kind.map_err(|e| error::from_json(py, "the kind of a slot", &e))?,
            path: self.path,
            in_features: self.in_features,
            out_features: self.out_features,
            base_rank: self.base_rank,
            element_bytes: self.element_bytes,
            offloaded: self.offloaded,
            pattern: self.pattern,
            has_bias: self.has_bias,
        })
    }
}

/// The slots of a model, in model order: plans are made for them.
#[pyclass(frozen, module = "qwenlora._core")]
pub(crate) struct SlotMap {
    slots: Arc<[Slot]>,
}

#[pymethods]
impl SlotMap {
    /// Takes the slots' rows.
    #[new]
    fn new(py: Python<'_>, rows: Vec<Row>) -> PyResult<Self> {
        let slots = rows.into_iter().map(|row| row.slot(py));
        Ok(Self {
            slots: slots.collect::<PyResult<_>>()?,
        })
    }

    /// How many there are.
    fn __len__(&self) -> usize {
        self.slots.len()
    }
}

/// A planned stack; its documents are JSON.
#[pyclass(frozen, module = "qwenlora._core")]
pub(crate) struct PlannedStack {
    plan: StackPlan,
    slots: Arc<[Slot]>,
}

#[pymethods]
impl PlannedStack {
    /// The whole plan.
    fn to_json(&self, py: Python<'_>) -> String {
        py.detach(|| self.plan.to_json())
    }

    /// The slots, those that are alike together: far shorter, where trainers treat all blocks alike.
    fn grouped_json(&self, py: Python<'_>) -> String {
        // Strings and numbers always serialise.
        py.detach(|| serde_json::to_string(&self.plan.grouped(&self.slots)).unwrap_or_default())
    }

    /// The plans of some slots, in model order.
    fn slots_json(&self, py: Python<'_>, paths: HashSet<String>) -> String {
        py.detach(|| {
            let own = self.plan.slots.iter().filter(|s| paths.contains(&s.path));
            serde_json::to_string(&own.collect::<Vec<_>>()).unwrap_or_default()
        })
    }

    /// What is left out.
    fn skipped_json(&self, py: Python<'_>) -> String {
        py.detach(|| serde_json::to_string(&self.plan.skipped).unwrap_or_default())
    }

    /// Modules applied, LoRA by LoRA.
    #[getter]
    fn applied_modules(&self) -> Vec<usize> {
        self.plan.applied_modules.clone()
    }

    /// Upper bound of the bytes that the stack adds to the model.
    #[getter]
    fn added_bytes(&self) -> u64 {
        self.plan.added_bytes
    }
}

/// Plans a stack of `(name, plan, strength, modulation)` onto the slots of a model; the options are
/// JSON.
#[pyfunction]
pub(crate) fn plan_stack(
    py: Python<'_>,
    items: Vec<(String, PyRef<'_, FilePlan>, f64, bool)>,
    slots: PyRef<'_, SlotMap>,
    options: &str,
) -> PyResult<PlannedStack> {
    let slots = Arc::clone(&slots.slots);
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
    py.detach(|| StackPlan::new(&stack, &slots, options))
        .map(|plan| PlannedStack { plan, slots })
        .map_err(|e| error::from_stack(py, &e))
}
