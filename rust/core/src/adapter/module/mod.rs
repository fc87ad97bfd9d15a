//! Tensors grouped into modules, each with its adapter, rank, scale and deltas.

mod deltas;
mod refusal;
mod scale;

use std::collections::HashSet;

use crate::adapter::Adapter;
use crate::adapter::delta::Delta;
use crate::adapter::parts::Parts;
use crate::adapter::peft::AdapterConfig;
use crate::header::Quoted;
use crate::key::role::{Role, Roles};
use crate::key::table::KeyTable;
use crate::model::{self, ModuleId};
pub use scale::{Scale, ScaleSource};

/// Why a module is not applied, or not wholly.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// The adapter's kind, or a part of it, is not supported by this version.
    Unsupported(String),
    /// Tensors are missing or contradict each other.
    Broken(String),
}

impl Fault {
    /// The reason in reports.
    pub fn text(&self) -> &str {
        match self {
            Self::Unsupported(text) | Self::Broken(text) => text,
        }
    }
}

/// A module that the file trains.
#[derive(Debug, Clone, PartialEq)]
pub struct Module {
    /// Which one.
    pub id: ModuleId,
    /// Kind of adapter.
    pub adapter: Adapter,
    /// Rank of the delta or an upper bound; none for norms and for lone biases.
    pub rank: Option<u64>,
    /// Factor on the raw product at strength 1 (formats of every trainer: alpha / rank and kin),
    /// with the scales of float8 tensors.
    pub scale: f64,
    /// The ground of the scale.
    pub scale_source: ScaleSource,
    /// (out, in) of the weight's delta as far as its tensors tell, also of an adapter that is not
    /// applied.
    pub shape: Option<(u64, u64)>,
    /// The deltas that are applied: the weight's own first, then those beside it. Empty where
    /// there is a fault.
    pub deltas: Vec<Delta>,
    /// Why it is not applied at all.
    pub fault: Option<Fault>,
    /// Its tensors that are not applied to a released model although the rest is: (tensor, reason).
    pub left_out: Vec<(usize, String)>,
    /// How its shape differs from the released model's, where it does. A model at hand of another
    /// size is compared when a stack is planned.
    pub misfit: Option<String>,
    /// All of its tensors.
    pub tensors: Vec<usize>,
}

impl Module {
    /// Whether this version applies the module (its `left_out` aside).
    pub fn is_supported(&self) -> bool {
        self.fault.is_none()
    }
}

/// Faults that make a file unusable as a whole.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum ModuleError {
    /// An alpha, scale or float8 scale that is NaN or infinite where it is used, or a module whose
    /// scales multiply to that.
    #[error("{key} gives a scale of {value}: it must be finite")]
    NonFiniteScale {
        /// The tensor, or the module's path.
        key: Quoted,
        /// The scale.
        value: f64,
    },
    /// A scalar of more than one element.
    #[error("{key} has {elements} values where one is needed (shape {shape:?})")]
    NotAScalar {
        /// The tensor.
        key: Quoted,
        /// How many it has.
        elements: u64,
        /// Its shape.
        shape: Vec<u64>,
    },
}

/// Groups a table's entries, in order of each module's first tensor.
pub fn modules_of(
    table: &KeyTable,
    config: Option<&AdapterConfig>,
) -> Result<Vec<Module>, ModuleError> {
    let mut order: Vec<ModuleId> = Vec::new();
    let mut members: Vec<Vec<usize>> = vec![Vec::new(); model::table().modules().len()];
    for (index, entry) in table.entries().iter().enumerate() {
        let Some(id) = entry.module else { continue };
        if let Some(tensors) = members.get_mut(id) {
            if tensors.is_empty() {
                order.push(id);
            }
            tensors.push(index);
        }
    }
    let beside_unknown: HashSet<ModuleId> =
        table.entries().iter().filter_map(|e| e.beside).collect();
    order
        .into_iter()
        .map(|id| {
            let tensors = members.get_mut(id).map(std::mem::take);
            let tensors = tensors.unwrap_or_default();
            let mut roles = Roles::default();
            let own = tensors
                .iter()
                .filter_map(|&index| table.entries().get(index));
            own.for_each(|entry| roles.add(entry.role));
            Parts {
                entries: table.entries(),
                id,
                tensors,
                roles,
                beside_unknown: beside_unknown.contains(&id),
            }
            .module(config)
        })
        .collect()
}

impl Parts<'_> {
    fn module(self, config: Option<&AdapterConfig>) -> Result<Module, ModuleError> {
        let Some(adapter) = Adapter::of(&self) else {
            return Ok(self.incomplete());
        };
        let raw = self.raw_scale(adapter, config)?;
        let scale = self.whole_scale(adapter, raw.value)?;
        let built = match self
            .refusal(adapter)
            .or_else(|| changed_base(adapter, config))
            .or_else(|| lost_magnitude(adapter, config))
        {
            Some(fault) => Err(fault),
            None => self.deltas(adapter, raw.value, config)?,
        };
        let (deltas, left_out, fault) = match built {
            Ok((deltas, left_out)) => (deltas, left_out, None),
            // What is not applied at all lacks no part.
            Err(fault) => (Vec::new(), Vec::new(), Some(fault)),
        };
        Ok(Module {
            id: self.id,
            adapter,
            rank: adapter.rank(&self),
            scale,
            scale_source: raw.source,
            shape: adapter.shape(&self),
            deltas,
            fault,
            left_out,
            misfit: None,
            tensors: self.tensors,
        })
    }

    /// A module of which only scalars or leftovers are there.
    fn incomplete(self) -> Module {
        let names: Vec<&str> = self
            .tensors
            .iter()
            .filter_map(|&i| self.entries.get(i))
            .map(|e| e.role.name())
            .collect();
        let broken = || Fault::Broken(format!("has {} but no pair", names.join(", ")));
        let fault = self.reshaped().unwrap_or_else(broken);
        Module {
            id: self.id,
            adapter: Adapter::Lora,
            rank: None,
            scale: 1.0,
            scale_source: ScaleSource::Nothing,
            shape: None,
            deltas: Vec::new(),
            fault: Some(fault),
            left_out: Vec::new(),
            misfit: None,
            tensors: self.tensors,
        }
    }
}

/// A pair that was trained beside a base weight from which a part had been taken first.
fn changed_base(adapter: Adapter, config: Option<&AdapterConfig>) -> Option<Fault> {
    let init = config.filter(|c| c.governs(adapter))?.changed_base()?;
    let init = Quoted::new(init);
    Some(Fault::Unsupported(format!(
        "{init} initialisation is not supported: it changed the base weight before training, and \
         the pair is no delta of the base that Nunchaku quantized (PEFT can save one that is: \
         `path_initial_model_for_weight_conversion`)"
    )))
}

/// A pair that was trained as DoRA, and came without its magnitude.
fn lost_magnitude(adapter: Adapter, config: Option<&AdapterConfig>) -> Option<Fault> {
    let is_lost = adapter == Adapter::Lora && config?.governs(adapter) && config?.use_dora();
    is_lost.then(|| {
        Fault::Broken(
            "the configuration says `use_dora`, and the magnitude is missing: without it the pair \
             would be another LoRA"
                .to_owned(),
        )
    })
}

/// Roles whose single value the plan needs.
pub fn is_scalar_role(role: Role) -> bool {
    matches!(
        role,
        Role::Alpha | Role::Scale | Role::Fp8Scale | Role::Ia3OnInput | Role::OftScaled
    )
}
