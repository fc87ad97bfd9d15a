//! All keys of a file, classified: the second stage.
//!
//! What one key cannot tell is settled here: duplicates, fused beside split, a second adapter, a
//! lone `.weight`, packed pairs, biases of modules that have none.

use std::collections::{HashMap, HashSet};

use crate::dtype::Dtype;
use crate::header::Quoted;
use crate::key::{self, Foreign, ParsedKey};
use crate::model::{self, ModuleKind, TargetId};
use crate::role::Role;
use crate::suffix::Half;

/// A tensor as a file or a state dict lists it.
#[derive(Debug, Clone, PartialEq)]
pub struct RawTensor {
    /// Its key.
    pub key: String,
    /// Its dtype.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<u64>,
    /// Where its bytes lie in the file; 0 in a state dict.
    pub offset_bytes: u64,
    /// How many bytes it has.
    pub len_bytes: u64,
}

/// Why a tensor is left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// It belongs to no module of the model.
    Foreign(Foreign),
    /// Another key names the same tensor of the same module.
    DuplicateOf(String),
    /// The file holds the fused and the split form; the split one is used.
    SplitPreferred,
    /// A second adapter for a module; the first is used.
    SecondAdapter(String),
    /// A bias delta for a module without bias.
    NoBias,
}

impl Reason {
    /// The reason in reports.
    pub fn text(&self) -> String {
        match self {
            Self::Foreign(_) | Self::SplitPreferred | Self::NoBias => self.kind().to_owned(),
            Self::DuplicateOf(key) => format!("the same tensor as {}", Quoted::new(key)),
            Self::SecondAdapter(slot) => {
                format!("second adapter {} of this module", Quoted::new(slot))
            }
        }
    }

    /// The reason without the names in it.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Foreign(foreign) => foreign.reason(),
            Self::DuplicateOf(_) => "the same tensor under another key",
            Self::SplitPreferred => "the file holds this module's parts as well",
            Self::SecondAdapter(_) => "a second adapter of its module",
            Self::NoBias => "module has no bias",
        }
    }

    /// Whether it is part of an adapter of the model, unlike another component's tensors.
    pub fn is_of_model(&self) -> bool {
        matches!(
            self,
            Self::SecondAdapter(_) | Self::Foreign(Foreign::UnknownForm)
        )
    }

    /// Whether leaving it out changes nothing of what the file does.
    pub fn is_harmless(&self) -> bool {
        match self {
            Self::Foreign(foreign) => foreign.is_harmless(),
            Self::DuplicateOf(_) | Self::SplitPreferred => true,
            Self::SecondAdapter(_) | Self::NoBias => false,
        }
    }
}

/// A classified tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// The tensor.
    pub tensor: RawTensor,
    /// The module it belongs to, if any.
    pub target: Option<TargetId>,
    /// What it is to that module.
    pub role: Role,
    /// For a float8 scale, the half.
    pub half: Option<Half>,
    /// Why it is left out, if it is.
    pub reason: Option<Reason>,
    /// The value of a stored scalar.
    pub value: Option<f64>,
}

impl Entry {
    fn ignore(&mut self, reason: Reason) {
        self.target = None;
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
        self.tensor
            .shape
            .iter()
            .fold(1u64, |product, d| product.saturating_mul(*d))
    }
}

/// The classified keys, in file order.
#[derive(Debug, Clone, PartialEq)]
pub struct KeyTable {
    entries: Vec<Entry>,
}

impl KeyTable {
    /// Classifies a file's tensors.
    pub fn new(tensors: Vec<RawTensor>) -> Self {
        let mut slots = Vec::with_capacity(tensors.len());
        let mut bare = Vec::with_capacity(tensors.len());
        let entries = tensors
            .into_iter()
            .map(|tensor| {
                let (entry, slot, is_bare) = classify(tensor);
                slots.push(slot);
                bare.push(is_bare);
                entry
            })
            .collect();
        let mut table = Self { entries };
        table.settle_plain_weights();
        table.drop_second_adapters(&slots);
        table.drop_duplicates();
        table.prefer_split();
        table.mark_packed(&bare);
        table.mark_lone_deltas();
        table.drop_missing_biases();
        table
    }

    /// The entries, in file order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Stores the value of a scalar.
    pub(crate) fn set_value(&mut self, index: usize, value: f64) {
        if let Some(entry) = self.entries.get_mut(index) {
            entry.value = Some(value);
        }
    }

    fn modules_with(&self, role: Role) -> HashSet<TargetId> {
        self.entries
            .iter()
            .filter(|e| e.role == role)
            .filter_map(|e| e.target)
            .collect()
    }

    /// `.weight` is IA3's only beside `.on_input`.
    fn settle_plain_weights(&mut self) {
        let ia3 = self.modules_with(Role::Ia3OnInput);
        for entry in self.entries.iter_mut().filter(|e| e.role == Role::Ia3) {
            if entry.target.is_some_and(|target| !ia3.contains(&target)) {
                entry.ignore(Reason::Foreign(Foreign::PlainWeight));
            }
        }
    }

    fn drop_second_adapters(&mut self, slots: &[String]) {
        let mut first: HashMap<TargetId, &String> = HashMap::new();
        for (entry, slot) in self.entries.iter_mut().zip(slots) {
            let Some(target) = entry.target else { continue };
            if !matches!(
                entry.role,
                Role::Down | Role::Up | Role::UpBias | Role::DoraScale
            ) {
                continue;
            }
            if *first.entry(target).or_insert(slot) != slot {
                entry.ignore(Reason::SecondAdapter(slot.clone()));
            }
        }
    }

    fn drop_duplicates(&mut self) {
        let mut first: HashMap<(TargetId, Role, bool), String> = HashMap::new();
        for entry in &mut self.entries {
            let Some(target) = entry.target else { continue };
            let place = (target, entry.role, entry.half == Some(Half::Up));
            match first.get(&place) {
                Some(key) => entry.ignore(Reason::DuplicateOf(key.clone())),
                None => {
                    first.insert(place, entry.tensor.key.clone());
                }
            }
        }
    }

    /// A fused module beside its parts is the same delta written twice.
    fn prefer_split(&mut self) {
        let present: HashSet<TargetId> = self.entries.iter().filter_map(|e| e.target).collect();
        for entry in &mut self.entries {
            let Some(target) = entry.target else { continue };
            if model::table()
                .target(target)
                .split
                .iter()
                .any(|part| present.contains(part))
            {
                entry.ignore(Reason::SplitPreferred);
            }
        }
    }

    /// Nunchaku's packed tensors are a bare pair whose `down` has a row per input channel.
    fn mark_packed(&mut self, bare: &[bool]) {
        let packed: HashSet<TargetId> = self
            .entries
            .iter()
            .zip(bare)
            .filter(|(e, bare)| **bare && e.role == Role::Down)
            .filter_map(|(e, _)| {
                let target = e.target?;
                let (rows, columns) = e.matrix()?;
                match model::table().target(target).kind {
                    ModuleKind::Linear { in_features, .. } => {
                        (rows == in_features && columns != in_features).then_some(target)
                    }
                    _ => None,
                }
            })
            .collect();
        for entry in &mut self.entries {
            if entry.target.is_some_and(|target| packed.contains(&target)) {
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
            let Some(target) = entry.target else { continue };
            let weight = model::table().target(target).kind.weight_shape();
            if !with_up.contains(&target) && entry.tensor.shape == weight {
                entry.role = Role::Diff;
            }
        }
    }

    fn drop_missing_biases(&mut self) {
        for entry in &mut self.entries {
            let Some(target) = entry.target else { continue };
            let is_norm = matches!(model::table().target(target).kind, ModuleKind::Norm { .. });
            if is_norm && matches!(entry.role, Role::BNorm | Role::DiffB | Role::UpBias) {
                entry.ignore(Reason::NoBias);
            }
        }
    }
}

fn classify(tensor: RawTensor) -> (Entry, String, bool) {
    let parsed = key::parse(&tensor.key);
    match parsed {
        ParsedKey::Module {
            target,
            role,
            slot,
            half,
            bare,
        } => {
            let slot = slot.to_owned();
            let entry = Entry {
                tensor,
                target: Some(target),
                role,
                half,
                reason: None,
                value: None,
            };
            (entry, slot, bare)
        }
        ParsedKey::Foreign(foreign) => {
            let reason = Some(Reason::Foreign(foreign));
            let entry = Entry {
                tensor,
                target: None,
                role: Role::Ignored,
                half: None,
                reason,
                value: None,
            };
            (entry, String::new(), false)
        }
    }
}
