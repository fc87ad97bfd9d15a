//! All keys of a file, classified: the second stage.
//!
//! It settles the questions that one key cannot: duplicates, fused beside split, a second adapter,
//! a lone `.weight`, packed pairs, biases of modules that have none.

mod spelling;

use std::collections::{HashMap, HashSet};

use crate::dtype::Dtype;
use crate::header::TensorInfo;
use crate::key::reason::Reason;
use crate::key::role::Role;
use crate::key::{self, Foreign, ParsedKey};
use crate::model::{self, ModuleId, ModuleKind};
use crate::source::Stored;
use spelling::{Extent, Spelling};

/// A tensor as a file or a state dict lists it.
#[derive(Debug, Clone, PartialEq)]
pub struct RawTensor {
    /// Its key.
    pub key: String,
    /// Its dtype.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<u64>,
    /// The place of its bytes in the file; 0 in a state dict.
    pub offset_bytes: u64,
    /// How many bytes it has.
    pub len_bytes: u64,
}

impl From<TensorInfo> for RawTensor {
    fn from(info: TensorInfo) -> Self {
        let (dtype, offset_bytes) = (info.dtype(), info.offset_bytes());
        let len_bytes = info.len_bytes();
        let (key, shape) = info.into_name_and_shape();
        Self {
            key,
            dtype,
            shape,
            offset_bytes,
            len_bytes,
        }
    }
}

impl Stored for RawTensor {
    fn name(&self) -> &str {
        &self.key
    }

    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[u64] {
        &self.shape
    }

    /// Saturating.
    fn elements(&self) -> u64 {
        let sides = self.shape.iter();
        sides.fold(1u64, |product, side| product.saturating_mul(*side))
    }

    fn offset_bytes(&self) -> u64 {
        self.offset_bytes
    }

    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }
}

/// A classified tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// The tensor.
    pub tensor: RawTensor,
    /// The module it belongs to, if any.
    pub module: Option<ModuleId>,
    /// Its part in that module.
    pub role: Role,
    /// For a float8 scale, the role of the tensor that it scales.
    pub scales: Option<Role>,
    /// Why it is left out, if it is.
    pub reason: Option<Reason>,
    /// For a tensor of unknown kind, the module that its key names.
    pub beside: Option<ModuleId>,
    /// The value of a stored scalar.
    pub value: Option<f64>,
}

impl Entry {
    fn ignore(&mut self, reason: Reason) {
        self.module = None;
        self.role = Role::Ignored;
        self.reason = Some(reason);
    }

    /// The shape as a matrix: dimensions after the first are multiplied out, as readers treat
    /// linears stored as 1x1 convolutions. `None` for fewer than two dimensions or an overflow.
    pub fn matrix(&self) -> Option<(u64, u64)> {
        let (first, rest) = self.tensor.shape.split_first()?;
        if rest.is_empty() {
            return None;
        }
        let columns = rest
            .iter()
            .try_fold(1u64, |product, d| product.checked_mul(*d))?;
        Some((*first, columns))
    }

    /// Number of elements, saturating.
    pub fn elements(&self) -> u64 {
        self.tensor.elements()
    }
}

/// The classified keys, in file order.
#[derive(Debug, Clone, PartialEq)]
pub struct KeyTable {
    entries: Vec<Entry>,
    /// (duplicate, original) whose content has not been compared.
    duplicates: Vec<(usize, usize)>,
}

impl KeyTable {
    /// Classifies a file's tensors.
    pub fn new(tensors: Vec<RawTensor>) -> Self {
        let mut entries: Vec<Entry> = Vec::with_capacity(tensors.len());
        let mut spellings: Vec<Spelling> = Vec::with_capacity(tensors.len());
        for tensor in tensors {
            let last = entries.last().zip(spellings.last());
            let known =
                last.and_then(|(e, s)| Some((e.tensor.key.get(..s.stem_bytes)?, e.module?)));
            let (entry, spelling) = classify(tensor, known);
            entries.push(entry);
            spellings.push(spelling);
        }
        let mut table = Self {
            entries,
            duplicates: Vec::new(),
        };
        table.settle_plain_weights();
        table.keep_one_adapter(&spellings);
        table.mark_packed(&spellings);
        table.mark_lone_deltas();
        table.prefer_split();
        table.drop_missing_biases();
        table
    }

    /// The entries, in file order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Whether base weights are saved along: then the file is a dump of a whole wrapped model.
    pub fn has_base_weights(&self) -> bool {
        let base = Reason::Foreign(Foreign::BaseWeight);
        self.entries
            .iter()
            .any(|e| e.reason.as_ref() == Some(&base))
    }

    /// Tells biases that were trained from the base's own.
    pub(crate) fn mark_trained_biases(&mut self) {
        let base = Reason::Foreign(Foreign::BaseWeight);
        for entry in &mut self.entries {
            let is_bias = entry.tensor.key.rsplit('.').next() == Some("bias");
            if is_bias && entry.reason.as_ref() == Some(&base) {
                entry.reason = Some(Reason::Foreign(Foreign::TrainedBias));
            }
        }
    }

    /// Stores the value of a scalar.
    pub(crate) fn set_value(&mut self, index: usize, value: f64) {
        if let Some(entry) = self.entries.get_mut(index) {
            entry.value = Some(value);
        }
    }

    /// For each module, whether it has a tensor of a role.
    fn modules_with(&self, role: Role) -> Vec<bool> {
        let mut with = vec![false; model::table().modules().len()];
        for entry in self.entries.iter().filter(|e| e.role == role) {
            if let Some(own) = entry.module.and_then(|id| with.get_mut(id)) {
                *own = true;
            }
        }
        with
    }

    /// `.weight` is IA3's only beside `.on_input`.
    fn settle_plain_weights(&mut self) {
        let ia3 = self.modules_with(Role::Ia3OnInput);
        for entry in self.entries.iter_mut().filter(|e| e.role == Role::Ia3) {
            if entry.module.is_some_and(|id| ia3.get(id) != Some(&true)) {
                entry.ignore(Reason::Foreign(Foreign::PlainWeight));
            }
        }
    }

    /// A fused module beside all of its parts is the same delta written twice; beside some of them
    /// it says more than they do.
    fn prefer_split(&mut self) {
        let modules = model::table().modules();
        let mut extents = vec![Extent::default(); modules.len()];
        for entry in &self.entries {
            if let Some(extent) = entry.module.and_then(|id| extents.get_mut(id)) {
                extent.add(entry.role);
            }
        }
        let is_whole = |id: &ModuleId| extents.get(*id).is_some_and(|e| e.is_whole());
        let mut fused: HashSet<ModuleId> = HashSet::new();
        let mut parts: HashSet<ModuleId> = HashSet::new();
        for (id, module) in modules.iter().enumerate().filter(|(_, t)| t.is_fused()) {
            if module.split.iter().all(is_whole) {
                fused.insert(id);
            } else if is_whole(&id) {
                parts.extend(&module.split);
            }
        }
        for entry in &mut self.entries {
            let Some(id) = entry.module else { continue };
            if fused.contains(&id) {
                entry.ignore(Reason::SplitPreferred);
            } else if parts.contains(&id) {
                entry.ignore(Reason::FusedPreferred);
            }
        }
    }

    /// Nunchaku's packed tensors are a bare pair whose `down` has a row per input channel.
    ///
    /// On a model of another size than the released ones only the halves tell: they do not fit
    /// together as a pair, and have the same number of columns.
    fn mark_packed(&mut self, spellings: &[Spelling]) {
        if !spellings.iter().any(|spelling| spelling.bare) {
            return;
        }
        let ups: HashMap<ModuleId, (u64, u64)> = self
            .entries
            .iter()
            .filter(|e| e.role == Role::Up)
            .filter_map(|e| Some((e.module?, e.matrix()?)))
            .collect();
        let packed: HashSet<ModuleId> = self
            .entries
            .iter()
            .zip(spellings)
            .filter(|(e, spelling)| spelling.bare && e.role == Role::Down)
            .filter_map(|(e, _)| {
                let id = e.module?;
                let (rows, columns) = e.matrix()?;
                let ModuleKind::Linear { in_features, .. } = model::table().module(id).kind else {
                    return None;
                };
                let by_channels = rows == in_features && columns != in_features;
                let by_halves = ups
                    .get(&id)
                    .is_some_and(|(_, up_columns)| rows != *up_columns && columns == *up_columns);
                (by_channels || by_halves).then_some(id)
            })
            .collect();
        for entry in &mut self.entries {
            if entry.module.is_some_and(|id| packed.contains(&id)) {
                entry.role = match entry.role {
                    Role::Down => Role::PackedDown,
                    Role::Up => Role::PackedUp,
                    other => other,
                };
            }
        }
    }

    /// A `down` of the weight's own shape without `up` is the delta itself.
    fn mark_lone_deltas(&mut self) {
        let with_up = self.modules_with(Role::Up);
        for entry in self.entries.iter_mut().filter(|e| e.role == Role::Down) {
            let Some(id) = entry.module else { continue };
            if with_up.get(id) == Some(&true) {
                continue;
            }
            if entry.tensor.shape == model::table().module(id).kind.weight_shape() {
                entry.role = Role::Diff;
            }
        }
    }

    fn drop_missing_biases(&mut self) {
        for entry in &mut self.entries {
            let Some(id) = entry.module else { continue };
            let is_linear = matches!(model::table().module(id).kind, ModuleKind::Linear { .. });
            if !is_linear && matches!(entry.role, Role::BNorm | Role::DiffB | Role::UpBias) {
                entry.ignore(Reason::NoBias);
            }
        }
    }
}

fn classify(tensor: RawTensor, known: Option<(&str, ModuleId)>) -> (Entry, Spelling) {
    let mut entry = Entry {
        tensor,
        module: None,
        role: Role::Ignored,
        scales: None,
        reason: None,
        beside: None,
        value: None,
    };
    let mut spelling = Spelling::default();
    match key::parse_beside(&entry.tensor.key, known) {
        ParsedKey::Module {
            module,
            stem,
            role,
            adapter_name,
            scales,
            bare,
        } => {
            spelling = Spelling {
                stem_bytes: stem.len(),
                adapter_name: adapter_name.to_owned(),
                bare,
            };
            (entry.module, entry.role, entry.scales) = (Some(module), role, scales);
        }
        ParsedKey::Foreign { reason, beside } => {
            entry.reason = Some(Reason::Foreign(reason));
            entry.beside = beside;
        }
    }
    (entry, spelling)
}
