//! One file, no model: the FilePlan.

use std::convert::Infallible;
use std::path::{Path, PathBuf};

use crate::adapter::module::{self, Module};
use crate::adapter::peft::AdapterConfig;
use crate::header::{MAX_NAME_BYTES, MAX_TENSORS, Quoted};
use crate::key::table::{KeyTable, RawTensor};
use crate::model::{self, Model};
use crate::plan::check::{self, ModelCheck};
use crate::plan::config::{self, SourceIdentity};
use crate::plan::error::PlanError;
use crate::plan::notes;
use crate::plan::tally::most_common;
use crate::source::SourceFile;

/// Duplicates whose first bytes agree, up to this many, are taken for equal.
const COMPARED_BYTES: usize = 4096;

/// The verdict of this version on a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// All of it applies.
    Apply,
    /// Some of it applies.
    Partial,
    /// None of it applies.
    Reject,
}

impl Verdict {
    /// The name in reports and in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Apply => "apply",
            Self::Partial => "partial",
            Self::Reject => "reject",
        }
    }
}

/// One file, understood.
#[derive(Debug, Clone)]
pub struct FilePlan {
    pub(crate) path: Option<PathBuf>,
    pub(crate) size_bytes: u64,
    pub(crate) metadata: Vec<(String, String)>,
    pub(crate) table: KeyTable,
    pub(crate) modules: Vec<Module>,
    pub(crate) check: ModelCheck,
    pub(crate) notes: Vec<String>,
    identity: Option<SourceIdentity>,
}

impl FilePlan {
    /// Reads a safetensors file or a PEFT folder: its header and its stored scalars.
    pub fn read(path: &Path) -> Result<Self, PlanError> {
        let file_path = config::weights_path(path)?;
        let source = SourceFile::open(&file_path)?;
        let (tensors, metadata) = source.read_header()?.into_parts();
        let origin = Quoted::path(&file_path);
        let (config, config_identity) = config::config_of(&file_path, &metadata, &origin)?;
        let mut table = KeyTable::new(tensors.into_iter().map(RawTensor::from).collect());
        let (indices, scalars): (Vec<usize>, Vec<&RawTensor>) = table
            .entries()
            .iter()
            .enumerate()
            .filter(|(_, entry)| module::is_scalar_role(entry.role) && entry.elements() == 1)
            .map(|(index, entry)| (index, &entry.tensor))
            .unzip();
        let values = source.read_scalars(&scalars)?;
        for (index, value) in indices.into_iter().zip(values) {
            table.set_value(index, value);
        }
        table.settle_duplicates(|(_, tensor), (_, original)| {
            source.begin_alike(tensor, original, COMPARED_BYTES)
        })?;
        source.verify_unchanged()?;
        let mut plan = Self::build(&origin, table, metadata, config.as_ref())?;
        plan.size_bytes = source.identity().size_bytes();
        let weights = source.identity().clone();
        plan.identity = Some(SourceIdentity {
            weights,
            config: config_identity,
        });
        plan.path = Some(path.to_owned());
        Ok(plan)
    }

    /// Plans tensors that are in memory already.
    ///
    /// `scalars[i]` is the value of tensor `i` where it has exactly one element. Names and their
    /// number are bound by the limits of a file's header. Two tensors of more elements, dtype and
    /// shape alike, count as equal.
    pub fn from_tensors(
        name: &str,
        tensors: Vec<RawTensor>,
        scalars: &[Option<f64>],
        metadata: Vec<(String, String)>,
    ) -> Result<Self, PlanError> {
        let value = |index: usize| scalars.get(index).copied().flatten();
        let same = |index, original| value(index) == value(original);
        Self::from_compared_tensors(name, tensors, scalars, metadata, same)
    }

    /// The same; `same` tells if two tensors of one dtype and shape, by their indices, are equal.
    pub fn from_compared_tensors(
        name: &str,
        tensors: Vec<RawTensor>,
        scalars: &[Option<f64>],
        metadata: Vec<(String, String)>,
        mut same: impl FnMut(usize, usize) -> bool,
    ) -> Result<Self, PlanError> {
        let origin = Quoted::new(name);
        check_names(&origin, &tensors)?;
        let size_bytes = tensors
            .iter()
            .map(|t| t.len_bytes)
            .fold(0, u64::saturating_add);
        let config = config::embedded_config(&metadata, &origin)?;
        let mut table = KeyTable::new(tensors);
        for (index, value) in scalars.iter().enumerate() {
            let needed = table
                .entries()
                .get(index)
                .is_some_and(|e| module::is_scalar_role(e.role));
            if let Some(value) = value
                && needed
            {
                table.set_value(index, *value);
            }
        }
        let Ok(()) = table.settle_duplicates(|(index, _), (original, _)| {
            Ok::<_, Infallible>(same(index, original))
        });
        let mut plan = Self::build(&origin, table, metadata, config.as_ref())?;
        plan.size_bytes = size_bytes;
        Ok(plan)
    }

    fn build(
        origin: &Quoted,
        mut table: KeyTable,
        metadata: Vec<(String, String)>,
        config: Option<&AdapterConfig>,
    ) -> Result<Self, PlanError> {
        if config.is_some_and(AdapterConfig::trains_biases) {
            table.mark_trained_biases();
        }
        let mut modules =
            module::modules_of(&table, config).map_err(|source| PlanError::Module {
                origin: origin.to_owned(),
                source,
            })?;
        let check = check::check_model(&mut modules, &table);
        let mut plan = Self {
            path: None,
            size_bytes: 0,
            metadata,
            table,
            modules,
            check,
            notes: Vec::new(),
            identity: None,
        };
        plan.notes = notes::take(&plan, config);
        Ok(plan)
    }

    /// The classified tensors.
    pub fn table(&self) -> &KeyTable {
        &self.table
    }

    /// The modules that the file trains.
    pub fn modules(&self) -> &[Module] {
        &self.modules
    }

    /// The finding on whose file it is.
    pub fn check(&self) -> &ModelCheck {
        &self.check
    }

    /// The file's metadata, in order.
    pub fn metadata(&self) -> &[(String, String)] {
        &self.metadata
    }

    /// Remarks that change no verdict.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The path as it was given.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// Size of the file or of the tensors.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Identity of what was read; none for tensors in memory.
    pub fn identity(&self) -> Option<&SourceIdentity> {
        self.identity.as_ref()
    }

    /// The model, where the file is one's.
    pub fn model(&self) -> Option<Model> {
        match self.check {
            ModelCheck::Known(model) => Some(model),
            _ => None,
        }
    }

    /// `ss_network_alpha` / `ss_network_dim`, where the metadata has both.
    ///
    /// No rule of scale uses them: some tools leave them in files whose alpha is multiplied in.
    pub fn network_scale(&self) -> Option<f64> {
        let number = |name: &str| {
            let (_, text) = self.metadata.iter().find(|(key, _)| key == name)?;
            let value: f64 = text.trim().parse().ok()?;
            (value.is_finite() && value > 0.0).then_some(value)
        };
        let scale = number("ss_network_alpha")? / number("ss_network_dim")?;
        (scale.is_finite() && scale > 0.0).then_some(scale)
    }

    /// The verdict on the file for a released model.
    pub fn verdict(&self) -> Verdict {
        let applied = self.applied_modules().count();
        if applied == 0 {
            Verdict::Reject
        } else if applied < self.modules.len() || self.leaves_out() {
            Verdict::Partial
        } else {
            Verdict::Apply
        }
    }

    /// Why the file is not applied whole.
    pub fn reason(&self) -> Option<String> {
        match (&self.check, self.verdict()) {
            (_, Verdict::Apply) => None,
            (
                ModelCheck::Other(text) | ModelCheck::OtherShapes(text) | ModelCheck::Nothing(text),
                _,
            ) => Some(text.clone()),
            (ModelCheck::Known(_), _) => self.main_reason(),
        }
    }

    /// The modules that are applied on a released model.
    pub fn applied_modules(&self) -> impl Iterator<Item = &Module> {
        let known = self.model().is_some();
        self.modules
            .iter()
            .filter(move |m| known && m.is_supported() && m.misfit.is_none())
    }

    fn leaves_out(&self) -> bool {
        let ignored = self
            .table
            .entries()
            .iter()
            .filter_map(|e| e.reason.as_ref());
        self.modules.iter().any(|m| !m.left_out.is_empty())
            || ignored.into_iter().any(|reason| !reason.is_harmless())
    }

    /// The reason that concerns the most modules, else the most tensors.
    fn main_reason(&self) -> Option<String> {
        let path = |module: &Module| Quoted::new(&model::table().module(module.id).path);
        let whole = self.modules.iter().filter_map(|m| {
            let text = m
                .fault
                .as_ref()
                .map(module::Fault::text)
                .or(m.misfit.as_deref())?;
            Some((text.to_owned(), path(m).to_string()))
        });
        if let Some((text, tally)) = most_common(whole) {
            let (count, all) = (tally.count, self.modules.len());
            return Some(format!(
                "{count} of {all} modules, e.g. {}: {text}",
                tally.example
            ));
        }
        let parts = self.modules.iter().flat_map(|m| {
            m.left_out
                .iter()
                .map(move |(_, text)| (text.clone(), path(m).to_string()))
        });
        let ignored = self.table.entries().iter().filter_map(|entry| {
            let reason = entry
                .reason
                .as_ref()
                .filter(|reason| !reason.is_harmless())?;
            Some((
                reason.kind().to_owned(),
                Quoted::new(&entry.tensor.key).to_string(),
            ))
        });
        let (text, tally) = most_common(parts).or_else(|| most_common(ignored))?;
        Some(format!(
            "{} tensors, e.g. {}: {text}",
            tally.count, tally.example
        ))
    }
}

/// Holds a state dict's names to the limits of a file's.
fn check_names(origin: &Quoted, tensors: &[RawTensor]) -> Result<(), PlanError> {
    if tensors.len() > MAX_TENSORS {
        return Err(PlanError::TooManyTensors {
            origin: origin.clone(),
            count: tensors.len(),
            max: MAX_TENSORS,
        });
    }
    match tensors.iter().find(|t| t.key.len() > MAX_NAME_BYTES) {
        Some(long) => Err(PlanError::NameTooLong {
            origin: origin.clone(),
            tensor: Quoted::new(&long.key),
            max_bytes: MAX_NAME_BYTES,
        }),
        None => Ok(()),
    }
}
