//! One module under several spellings or with several adapters: which tensors are used.
//!
//! Halves and alpha belong together only under one spelling of their module: the alpha of one
//! spelling says nothing about the pair of another, into which it may be folded already.

use std::collections::{HashMap, HashSet};

use super::{Entry, KeyTable, RawTensor};
use crate::key::reason::Reason;
use crate::key::role::{Role, Roles};
use crate::model::{self, ModuleId};

/// How a tensor's key spells its module.
#[derive(Debug, Default)]
pub(super) struct Spelling {
    /// Length of the stem, the key up to its suffix.
    pub(super) stem_bytes: usize,
    /// Adapter names of PEFT's spelling.
    pub(super) adapter_name: String,
    /// Whether it is a pair's half without `.weight`.
    pub(super) bare: bool,
}

/// The parts of an adapter that are there.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Extent {
    down: bool,
    up: bool,
    other: bool,
}

impl Extent {
    pub(super) fn add(&mut self, role: Role) {
        match role {
            Role::Down | Role::PackedDown => self.down = true,
            Role::Up | Role::PackedUp => self.up = true,
            role => self.other |= makes_an_adapter(role),
        }
    }

    /// Both halves of a pair, or a tensor of another kind of adapter.
    pub(super) fn is_whole(self) -> bool {
        self.other || (self.down && self.up)
    }
}

/// Whether a tensor other than a pair's changes a weight; scalars, magnitudes and biases only
/// accompany such a tensor.
fn makes_an_adapter(role: Role) -> bool {
    match role {
        Role::LokrW1
        | Role::LokrW1A
        | Role::LokrW1B
        | Role::LokrW2
        | Role::LokrW2A
        | Role::LokrW2B
        | Role::HadaW1A
        | Role::HadaW1B
        | Role::HadaW2A
        | Role::HadaW2B
        | Role::GloraA1
        | Role::GloraA2
        | Role::GloraB1
        | Role::GloraB2
        | Role::OftBlocks
        | Role::OftR
        | Role::Ia3
        | Role::Ia3L
        | Role::BoftR
        | Role::HraU
        | Role::PeftOnly
        | Role::Diff
        | Role::WNorm
        | Role::SetWeight => true,
        Role::Down
        | Role::Up
        | Role::PackedDown
        | Role::PackedUp
        | Role::Mid
        | Role::UpBias
        | Role::Alpha
        | Role::Scale
        | Role::DoraScale
        | Role::LokrT2
        | Role::HadaT1
        | Role::HadaT2
        | Role::GloraBm
        | Role::OftRescale
        | Role::OftScaled
        | Role::BoftS
        | Role::Ia3OnInput
        | Role::DiffB
        | Role::BNorm
        | Role::Reshape
        | Role::Fp8Scale
        | Role::Ignored => false,
    }
}

/// Whether it is a factor of a LoKr or a LoHa.
fn is_lycoris(role: Role) -> bool {
    role.is_factor()
        && !matches!(
            role,
            Role::Down | Role::Up | Role::Mid | Role::PackedDown | Role::PackedUp | Role::Diff
        )
}

/// The place of a tensor in its module's adapter: two in one place are duplicates.
fn place(entry: &Entry) -> (Role, Option<Role>) {
    (entry.role, entry.scales)
}

impl KeyTable {
    /// Leaves each module one adapter under one spelling.
    pub(super) fn keep_one_adapter(&mut self, spellings: &[Spelling]) {
        let Some(unclear) = self.unclear_modules(spellings) else {
            return;
        };
        let entries = self.entries.iter().enumerate();
        let mut members: Vec<(ModuleId, usize)> = entries
            .filter_map(|(index, entry)| Some((entry.module?, index)))
            .filter(|(id, _)| unclear.contains(id))
            .collect();
        members.sort_unstable();
        for module in members.chunk_by(|a, b| a.0 == b.0) {
            let members: Vec<usize> = module.iter().map(|(_, index)| *index).collect();
            let stem = self.kept_stem(&members, spellings);
            let (kept, others): (Vec<usize>, Vec<usize>) = members
                .into_iter()
                .partition(|&i| self.stem(i, spellings) == stem.as_deref());
            let kept = self.drop_second_adapters(kept, spellings);
            self.drop_duplicates(&kept, &others);
        }
    }

    /// The modules whose tensors are not all of one spelling and name, in places of their own; none
    /// in almost all files. A module that is here by mistake loses nothing.
    fn unclear_modules(&self, spellings: &[Spelling]) -> Option<HashSet<ModuleId>> {
        #[derive(Clone, Default)]
        struct Seen {
            first: Option<usize>,
            roles: Roles,
        }
        let mut seen = vec![Seen::default(); model::table().modules().len()];
        let mut unclear = HashSet::new();
        // In the order of the file: names that are compared are read one after the other.
        for (index, entry) in self.entries.iter().enumerate() {
            let Some(id) = entry.module else { continue };
            let Some(module) = seen.get_mut(id) else {
                continue;
            };
            let first = *module.first.get_or_insert(index);
            let is_clear = entry.scales.is_none()
                && !module.roles.has(entry.role)
                && self.are_spelled_alike(first, index, spellings);
            module.roles.add(entry.role);
            if !is_clear {
                unclear.insert(id);
            }
        }
        (!unclear.is_empty()).then_some(unclear)
    }

    /// Whether two tensors name their module, and their adapter, alike.
    fn are_spelled_alike(&self, a: usize, b: usize, spellings: &[Spelling]) -> bool {
        let adapter_name =
            |index: usize| spellings.get(index).map_or("", |s| s.adapter_name.as_str());
        // The C library takes its time to find that two empty strings are equal.
        let are_nameless = adapter_name(a).is_empty() && adapter_name(b).is_empty();
        a == b
            || ((are_nameless || adapter_name(a) == adapter_name(b))
                && self.stem(a, spellings) == self.stem(b, spellings))
    }

    fn stem(&self, index: usize, spellings: &[Spelling]) -> Option<&str> {
        let bytes = spellings.get(index)?.stem_bytes;
        self.entries.get(index)?.tensor.key.get(..bytes)
    }

    /// The first stem that holds a whole adapter, else the first.
    fn kept_stem(&self, members: &[usize], spellings: &[Spelling]) -> Option<String> {
        let mut stems: Vec<(&str, Extent)> = Vec::new();
        let mut known: HashMap<&str, usize> = HashMap::new();
        for &index in members {
            let (entry, stem) = (self.entries.get(index)?, self.stem(index, spellings)?);
            let at = *known.entry(stem).or_insert_with(|| {
                stems.push((stem, Extent::default()));
                stems.len() - 1
            });
            if let Some((_, extent)) = stems.get_mut(at) {
                extent.add(entry.role);
            }
        }
        let whole = stems.iter().find(|(_, extent)| extent.is_whole());
        whole.or(stems.first()).map(|(stem, _)| (*stem).to_owned())
    }

    /// Drops what belongs to another adapter name than the first; the rest.
    fn drop_second_adapters(&mut self, members: Vec<usize>, spellings: &[Spelling]) -> Vec<usize> {
        let named = |index: usize| spellings.get(index).map_or("", |s| s.adapter_name.as_str());
        let role = |index: usize| self.entries.get(index).map(|e| e.role);
        let is_lycoris = |index: usize| role(index).is_some_and(is_lycoris);
        let lycoris = members.iter().find(|&&i| is_lycoris(i));
        let lycoris = lycoris.map(|&i| named(i));
        let halves = members
            .iter()
            .filter(|&&i| matches!(role(i), Some(Role::Down | Role::Up)));
        let with_halves: HashSet<&str> = halves.clone().map(|&i| named(i)).collect();
        let biases = members.iter().filter(|&&i| role(i) == Some(Role::UpBias));
        let pair = halves.chain(biases).next().map(|&i| named(i));
        let is_second = |index: usize| match (role(index), pair) {
            _ if is_lycoris(index) => lycoris.is_some_and(|kept| named(index) != kept),
            (Some(Role::Down | Role::Up | Role::UpBias), Some(kept)) => named(index) != kept,
            // Without a name, or with that of no pair, these belong to the adapter that is kept:
            // a pair is not what it was without its magnitude or scale.
            (Some(Role::DoraScale | Role::Fp8Scale), Some(kept)) => {
                let name = named(index);
                name != kept && !name.is_empty() && with_halves.contains(name)
            }
            _ => false,
        };
        let (second, first): (Vec<usize>, Vec<usize>) =
            members.into_iter().partition(|&index| is_second(index));
        for index in second {
            if let Some(entry) = self.entries.get_mut(index) {
                entry.ignore(Reason::SecondAdapter(named(index).to_owned()));
            }
        }
        first
    }

    /// Drops repeated places of the adapter that is kept, and all of the module's other spellings.
    fn drop_duplicates(&mut self, kept: &[usize], others: &[usize]) {
        let mut first: HashMap<(Role, Option<Role>), usize> = HashMap::new();
        let mut repeated = Vec::new();
        for &index in kept {
            let Some(entry) = self.entries.get(index) else {
                continue;
            };
            // One role for all tensors of a kind that is refused whole.
            if entry.role == Role::PeftOnly {
                continue;
            }
            match first.get(&place(entry)) {
                Some(&original) => repeated.push((index, original)),
                None => {
                    first.insert(place(entry), index);
                }
            }
        }
        for &index in others {
            let original = self
                .entries
                .get(index)
                .and_then(|entry| first.get(&place(entry)).copied());
            match (original, kept.first()) {
                (Some(original), _) => repeated.push((index, original)),
                (None, Some(&module)) => {
                    self.ignore_as(index, module, Reason::UnequalDuplicate);
                }
                (None, None) => {}
            }
        }
        for &(index, original) in &repeated {
            self.ignore_as(index, original, Reason::DuplicateOf);
        }
        self.duplicates.append(&mut repeated);
    }

    fn ignore_as(&mut self, index: usize, original: usize, reason: fn(String) -> Reason) {
        let key = self.entries.get(original).map(|e| e.tensor.key.clone());
        if let (Some(entry), Some(key)) = (self.entries.get_mut(index), key) {
            entry.ignore(reason(key));
        }
    }

    /// Tells duplicates whose content differs from those that say the same twice.
    ///
    /// `same` compares the content of two tensors of one dtype and shape, told with their indices.
    pub(crate) fn settle_duplicates<E>(
        &mut self,
        mut same: impl FnMut((usize, &RawTensor), (usize, &RawTensor)) -> Result<bool, E>,
    ) -> Result<(), E> {
        for (index, original) in std::mem::take(&mut self.duplicates) {
            let (Some(entry), Some(first)) = (self.entries.get(index), self.entries.get(original))
            else {
                continue;
            };
            let alike = entry.tensor.dtype == first.tensor.dtype
                && entry.tensor.shape == first.tensor.shape;
            let (own, other) = ((index, &entry.tensor), (original, &first.tensor));
            if !(alike && same(own, other)?) {
                self.ignore_as(index, original, Reason::UnequalDuplicate);
            }
        }
        Ok(())
    }
}
