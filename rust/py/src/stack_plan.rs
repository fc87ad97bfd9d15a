//! `plan_stack`: file plans and the slots of a model to a StackPlan.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyMemoryView, PyTuple};
use qwenlora_core::model::slot::{RowOrder, Slot};
use qwenlora_core::model::{self, Model, known};
use qwenlora_core::plan::FilePlan as CorePlan;
use qwenlora_core::stack::{
    Group, Located, Member, PlacedStack, Share, SlotIndex, StackItem, StackOptions,
};

use crate::error;
use crate::file_plan::FilePlan;

/// The slots of every known model as Nunchaku quantizes it, in order and each with the modules in
/// it, by the names of the models, as JSON.
#[pyfunction]
pub(crate) fn known_slots(py: Python<'_>) -> PyResult<String> {
    let slots = || Model::ALL.map(|model| (model.name(), known::known_slots(model)));
    py.detach(|| serde_json::to_string(&BTreeMap::from(slots())))
        .map_err(|e| error::from_json(py, "the table of known slots", &e))
}

/// The number of a module's block, where the model's blocks are counted by it, and the kinds of layer
/// that it is of; nothing for a module that no model has.
#[pyfunction]
pub(crate) fn layer_kinds(path: &str) -> Option<(Option<u32>, Vec<&'static str>)> {
    let table = model::table();
    let module = table.module(table.find(path).or_else(|| table.find_built(path))?);
    Some((module.number(), module.kinds().collect()))
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
    build: String,
    opens: bool,
}

impl Row {
    fn slot(self, py: Python<'_>) -> PyResult<Slot> {
        let kind = serde_json::from_value(self.kind.into());
        let build = serde_json::from_value(self.build.into());
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
            build: build.map_err(|e| error::from_json(py, "the build of a block", &e))?,
            opens: self.opens,
        })
    }
}

/// The slots of a model, in model order: plans are made for them.
#[pyclass(frozen, module = "qwenlora._core")]
pub(crate) struct SlotMap {
    map: Arc<Map>,
}

struct Map {
    slots: Vec<Slot>,
    index: SlotIndex,
}

#[pymethods]
impl SlotMap {
    /// Takes the slots' rows.
    #[new]
    fn new(py: Python<'_>, rows: Vec<Row>) -> PyResult<Self> {
        let slots = rows.into_iter().map(|row| row.slot(py));
        let slots = slots.collect::<PyResult<Vec<_>>>()?;
        let map = py.detach(|| {
            let index = SlotIndex::new(&slots);
            Arc::new(Map { slots, index })
        });
        Ok(Self { map })
    }

    /// How many there are.
    fn __len__(&self) -> usize {
        self.map.slots.len()
    }
}

/// A planned stack; its documents are JSON.
#[pyclass(frozen, module = "qwenlora._core")]
pub(crate) struct PlannedStack {
    stack: PlacedStack,
    plans: Vec<Arc<CorePlan>>,
    map: Arc<Map>,
}

impl PlannedStack {
    fn plans(&self) -> Vec<&CorePlan> {
        self.plans.iter().map(Arc::as_ref).collect()
    }
}

#[pymethods]
impl PlannedStack {
    /// The whole plan.
    fn to_json(&self, py: Python<'_>) -> String {
        py.detach(|| self.stack.told(&self.plans(), &self.map.slots).to_json())
    }

    /// The slots that are alike, together: `(slots, row order, [(lora, [(rank, scale, row begin,
    /// row count, dtype, down, up), ...]), ...])`, `down` and `up` as `(bytes, offsets, indices)`;
    /// and the plans of the other slots by index as JSON, nothing where there are none.
    fn grouped<'py>(
        &self,
        py: Python<'py>,
    ) -> PyResult<(Vec<Bound<'py, PyTuple>>, Option<String>)> {
        let map = &self.map;
        let (grouped, single) = py.detach(|| {
            let found = self.stack.grouped(&self.plans(), &map.slots, &map.index);
            let single = (!found.single.is_empty())
                // Strings and numbers always serialise.
                .then(|| serde_json::to_string(&found.single).unwrap_or_default());
            (found.groups, single)
        });
        let groups = grouped.iter().map(|group| group_tuple(py, group));
        Ok((groups.collect::<PyResult<_>>()?, single))
    }

    /// The plans of some slots, in model order.
    fn slots_json(&self, py: Python<'_>, paths: HashSet<String>) -> String {
        py.detach(|| {
            let is_chosen = |slot: &Slot| paths.contains(&slot.path);
            let plans = self
                .stack
                .slot_plans(&self.plans(), &self.map.slots, is_chosen);
            serde_json::to_string(&plans).unwrap_or_default()
        })
    }

    /// Modules and tensors that are left out, as JSON.
    fn skipped_json(&self, py: Python<'_>) -> String {
        py.detach(|| serde_json::to_string(&self.stack.skipped).unwrap_or_default())
    }

    /// Modules applied, LoRA by LoRA.
    #[getter]
    fn applied_modules(&self) -> Vec<usize> {
        self.stack.applied_modules.clone()
    }

    /// Upper bound of the bytes that the stack adds to the model.
    #[getter]
    fn added_bytes(&self) -> u64 {
        self.stack.added_bytes
    }
}

fn group_tuple<'py>(py: Python<'py>, group: &Group) -> PyResult<Bound<'py, PyTuple>> {
    let indices = PyTuple::new(py, &group.slots)?;
    let shares = group.shares.iter().map(|share| share_tuple(py, share));
    let shares = PyTuple::new(py, shares.collect::<PyResult<Vec<_>>>()?)?;
    (indices, row_order(group.row_order), shares).into_pyobject(py)
}

fn share_tuple<'py>(py: Python<'py>, share: &Share) -> PyResult<Bound<'py, PyTuple>> {
    let members = share.members.iter().map(|member| member_tuple(py, member));
    let members = PyTuple::new(py, members.collect::<PyResult<Vec<_>>>()?)?;
    (share.lora, members).into_pyobject(py)
}

fn member_tuple<'py>(py: Python<'py>, member: &Member) -> PyResult<Bound<'py, PyTuple>> {
    let (down, up) = (
        located_tuple(py, &member.down)?,
        located_tuple(py, &member.up)?,
    );
    (
        member.rank,
        member.scale,
        member.row_begin,
        member.row_count,
        member.dtype,
        down,
        up,
    )
        .into_pyobject(py)
}

fn located_tuple<'py>(py: Python<'py>, tensor: &Located) -> PyResult<Bound<'py, PyTuple>> {
    let offsets = numbers(py, &tensor.offsets_bytes)?;
    let indices = numbers(py, &tensor.indices)?;
    (tensor.len_bytes, offsets, indices).into_pyobject(py)
}

/// Numbers as a view of bytes: thousands of them are objects only where they are looked at.
fn numbers<'py>(py: Python<'py>, numbers: &[u64]) -> PyResult<Bound<'py, PyAny>> {
    let bytes = PyBytes::new_with(py, 8 * numbers.len(), |into| {
        for (to, number) in into.as_chunks_mut::<8>().0.iter_mut().zip(numbers) {
            *to = number.to_ne_bytes();
        }
        Ok(())
    })?;
    PyMemoryView::from(&bytes)?.call_method1(pyo3::intern!(py, "cast"), (pyo3::intern!(py, "Q"),))
}

fn row_order(order: RowOrder) -> &'static str {
    match order {
        RowOrder::Planar => "planar",
        RowOrder::Interleaved => "interleaved",
    }
}

/// A LoRA as Python knows it, `documents.StackItem`: name, plan, strength, modulation, and the slots that
/// are off, ascending.
type Item<'py> = (String, PyRef<'py, FilePlan>, f64, bool, Vec<usize>);

/// Plans a stack onto the slots of a model; the options are JSON.
#[pyfunction]
pub(crate) fn plan_stack(
    py: Python<'_>,
    items: Vec<Item<'_>>,
    slots: PyRef<'_, SlotMap>,
    options: &str,
) -> PyResult<PlannedStack> {
    let map = Arc::clone(&slots.map);
    let options: StackOptions =
        serde_json::from_str(options).map_err(|e| error::from_json(py, "the options", &e))?;
    let stack: Vec<StackItem<'_>> = items
        .iter()
        .map(|(name, plan, strength, modulation, off)| StackItem {
            name,
            plan: &plan.core,
            strength: *strength,
            modulation: *modulation,
            off,
        })
        .collect();
    let plans = items.iter().map(|(_, plan, ..)| Arc::clone(&plan.core));
    let plans = plans.collect();
    py.detach(|| PlacedStack::new(&stack, &map.slots, &map.index, options))
        .map(|stack| PlannedStack { stack, plans, map })
        .map_err(|e| error::from_stack(py, &e))
}
