//! One file, no model: the FilePlan.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::adapter::Adapter;
use crate::header::Quoted;
use crate::key::Foreign;
use crate::lookalike;
use crate::model::{self, Model};
use crate::module::{self, Fit, Module, ModuleError};
use crate::peft::{self, AdapterConfig, ConfigError};
use crate::role::Role;
use crate::source::{FileIdentity, SourceError, SourceFile};
use crate::table::{KeyTable, RawTensor, Reason};

/// The weights of a PEFT folder.
pub const PEFT_WEIGHTS: &str = "adapter_model.safetensors";
/// The configuration beside them.
pub const PEFT_CONFIG: &str = "adapter_config.json";
/// A configuration beyond this size is not one.
const MAX_CONFIG_BYTES: u64 = 4 * 1024 * 1024;

/// What this version would do with a file.
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

/// Faults that make a file unusable.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The file cannot be read, or is not a safetensors file.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// A folder without PEFT's weights.
    #[error("{folder} is a folder without `{PEFT_WEIGHTS}`\nhint: name the LoRA file itself")]
    NotAPeftFolder {
        /// The folder.
        folder: Quoted,
    },
    /// PEFT's configuration cannot be read.
    #[error("cannot read {path}: {detail}")]
    Config {
        /// Its path.
        path: Quoted,
        /// What the system says.
        detail: String,
    },
    /// PEFT's configuration makes no sense.
    #[error("{origin}: {source}")]
    ConfigContent {
        /// The file.
        origin: Quoted,
        /// What is wrong.
        source: ConfigError,
    },
    /// A module makes no sense.
    #[error("{origin}: {source}")]
    Module {
        /// The file.
        origin: Quoted,
        /// What is wrong.
        source: ModuleError,
    },
}

/// What a file is found to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelCheck {
    /// Its modules are this model's.
    Known(Model),
    /// It names another model's modules.
    Other(String),
    /// Its names fit, its shapes are not the released model's.
    OtherShapes(String),
    /// It names no module at all.
    Nothing(String),
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

/// Identity of everything that a path's plan was made from.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SourceIdentity {
    /// The weights.
    pub weights: FileIdentity,
    /// PEFT's configuration beside them, where there is one.
    pub config: Option<FileIdentity>,
}

impl SourceIdentity {
    /// Takes the identity of a LoRA file or PEFT folder, as it is now.
    pub fn of(path: &Path) -> Result<Self, PlanError> {
        let weights = weights_path(path)?;
        let source = SourceFile::open(&weights)?;
        let config = open_config(&weights)?.map(|(_, identity)| identity);
        Ok(Self {
            weights: source.identity().clone(),
            config,
        })
    }
}

impl FilePlan {
    /// Reads a safetensors file or a PEFT folder: its header and its stored scalars.
    pub fn read(path: &Path) -> Result<Self, PlanError> {
        let file_path = weights_path(path)?;
        let source = SourceFile::open(&file_path)?;
        let header = source.read_header()?;
        let metadata = header.metadata().to_vec();
        let origin = Quoted::path(&file_path);
        let (config, config_identity) = config_of(&file_path, &metadata, &origin)?;
        let raw = header.tensors().iter().map(|tensor| RawTensor {
            key: tensor.name().to_owned(),
            dtype: tensor.dtype(),
            shape: tensor.shape().to_vec(),
            offset_bytes: tensor.offset_bytes(),
            len_bytes: tensor.len_bytes(),
        });
        let mut table = KeyTable::new(raw.collect());
        for (index, tensor) in header.tensors().iter().enumerate() {
            let needed = table
                .entries()
                .get(index)
                .is_some_and(|e| module::is_scalar_role(e.role));
            if needed && tensor.elements() == 1 {
                table.set_value(index, source.read_scalar(tensor)?);
            }
        }
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
    /// `scalars[i]` is the value of tensor `i` where it has exactly one element.
    pub fn from_tensors(
        name: &str,
        tensors: Vec<RawTensor>,
        scalars: &[Option<f64>],
        metadata: Vec<(String, String)>,
    ) -> Result<Self, PlanError> {
        let size_bytes = tensors
            .iter()
            .map(|t| t.len_bytes)
            .fold(0, u64::saturating_add);
        let origin = Quoted::new(name);
        let config = embedded_config(&metadata, &origin)?;
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
        let mut plan = Self::build(&origin, table, metadata, config.as_ref())?;
        plan.size_bytes = size_bytes;
        Ok(plan)
    }

    fn build(
        origin: &Quoted,
        table: KeyTable,
        metadata: Vec<(String, String)>,
        config: Option<&AdapterConfig>,
    ) -> Result<Self, PlanError> {
        let mut modules = module::group(&table, config).map_err(|source| PlanError::Module {
            origin: origin.to_owned(),
            source,
        })?;
        let check = check_model(&mut modules, &table);
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
        plan.notes = plan.take_notes(config);
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

    /// What the file is found to be.
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

    /// What this version would do with the file on a released model.
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
            (ModelCheck::Known(Model::ZImage), _) => {
                Some("a Z-Image LoRA: applying to Z-Image is not supported yet".to_owned())
            }
            (ModelCheck::Known(Model::QwenImage), _) => self.main_reason(),
        }
    }

    /// The modules that are applied on a released model.
    pub fn applied_modules(&self) -> impl Iterator<Item = &Module> {
        let known = self.check == ModelCheck::Known(Model::QwenImage);
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
        let path = |module: &Module| Quoted::new(&model::table().target(module.target).path);
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

    fn take_notes(&self, config: Option<&AdapterConfig>) -> Vec<String> {
        let mut notes = Vec::new();
        if self.check == ModelCheck::Known(Model::QwenImage) && self.could_be_flux() {
            notes.push(
                "only attention layers of the first 19 blocks: a FLUX LoRA could look the same"
                    .to_owned(),
            );
        }
        if let Some(config) = config {
            let has_alpha = self.table.entries().iter().any(|e| e.role == Role::Alpha);
            if has_alpha && config.use_rslora() {
                notes.push(
                    "stored alphas and rsLoRA metadata together: alpha / rank is used".to_owned(),
                );
            }
            notes.extend(self.rank_note(config));
        }
        notes
    }

    fn rank_note(&self, config: &AdapterConfig) -> Option<String> {
        self.modules
            .iter()
            .filter(|m| m.adapter == Adapter::Lora)
            .find_map(|module| {
                let path = &model::table().target(module.target).path;
                let (stored, promised) = (module.rank?, config.promised_rank(path)?);
                (stored != promised).then(|| {
                    format!(
                        "`{path}` has rank {stored}, the metadata says {promised}: the tensors win"
                    )
                })
            })
    }

    /// FLUX has the same names and widths for these modules, and 19 such blocks.
    fn could_be_flux(&self) -> bool {
        self.modules.iter().all(|module| {
            let target = model::table().target(module.target);
            let shared = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"];
            target.block.is_some_and(|block| block <= 18)
                && shared.iter().any(|name| target.path.ends_with(name))
        })
    }
}

/// A reason with how many it concerns and one of them.
struct Tally {
    count: usize,
    example: String,
}

/// The reason that concerns the most, the earliest of equals, so that a file always says the same.
fn most_common(rows: impl Iterator<Item = (String, String)>) -> Option<(String, Tally)> {
    let mut order: Vec<String> = Vec::new();
    let mut tallies: HashMap<String, Tally> = HashMap::new();
    for (reason, example) in rows {
        tallies
            .entry(reason)
            .or_insert_with_key(|reason| {
                order.push(reason.clone());
                Tally { count: 0, example }
            })
            .count += 1;
    }
    let most = tallies.values().map(|tally| tally.count).max()?;
    let reason = order
        .into_iter()
        .find(|r| tallies.get(r).is_some_and(|tally| tally.count == most))?;
    tallies.remove_entry(&reason)
}

/// The file with the weights: the path itself, or the one in a PEFT folder.
pub fn weights_path(path: &Path) -> Result<PathBuf, PlanError> {
    if !path.is_dir() {
        return Ok(path.to_owned());
    }
    let weights = path.join(PEFT_WEIGHTS);
    if weights.is_file() {
        Ok(weights)
    } else {
        Err(PlanError::NotAPeftFolder {
            folder: Quoted::path(path),
        })
    }
}

/// The configuration in the metadata, else the one beside a PEFT file.
fn config_of(
    path: &Path,
    metadata: &[(String, String)],
    origin: &Quoted,
) -> Result<(Option<AdapterConfig>, Option<FileIdentity>), PlanError> {
    let embedded = embedded_config(metadata, origin)?;
    let Some((file, identity)) = open_config(path)? else {
        return Ok((embedded, None));
    };
    if embedded.is_some() {
        return Ok((embedded, Some(identity)));
    }
    let shown = Quoted::path(&path.with_file_name(PEFT_CONFIG));
    let json =
        std::io::read_to_string(std::io::Read::take(file, MAX_CONFIG_BYTES)).map_err(|e| {
            PlanError::Config {
                path: shown.clone(),
                detail: e.to_string(),
            }
        })?;
    let config =
        AdapterConfig::parse(PEFT_CONFIG, &json).map_err(|source| PlanError::ConfigContent {
            origin: shown,
            source,
        })?;
    Ok((Some(config), Some(identity)))
}

/// The configuration beside a PEFT weights file, opened.
fn open_config(weights: &Path) -> Result<Option<(fs::File, FileIdentity)>, PlanError> {
    let beside = weights.with_file_name(PEFT_CONFIG);
    if weights.file_name().is_none_or(|name| name != PEFT_WEIGHTS) || !beside.is_file() {
        return Ok(None);
    }
    let unreadable = |detail: String| PlanError::Config {
        path: Quoted::path(&beside),
        detail,
    };
    let file = fs::File::open(&beside).map_err(|e| unreadable(e.to_string()))?;
    let identity = FileIdentity::of(&file).map_err(|e| unreadable(e.to_string()))?;
    let size = identity.size_bytes();
    if size > MAX_CONFIG_BYTES {
        return Err(unreadable(format!(
            "{size} bytes are more than {MAX_CONFIG_BYTES}"
        )));
    }
    Ok(Some((file, identity)))
}

fn embedded_config(
    metadata: &[(String, String)],
    origin: &Quoted,
) -> Result<Option<AdapterConfig>, PlanError> {
    metadata
        .iter()
        .find(|(key, _)| key == peft::METADATA_KEY)
        .map(|(key, json)| AdapterConfig::parse(key, json))
        .transpose()
        .map_err(|source| PlanError::ConfigContent {
            origin: origin.to_owned(),
            source,
        })
}

/// Decides whose file it is, and marks modules whose shape is not the released model's.
fn check_model(modules: &mut [Module], table: &KeyTable) -> ModelCheck {
    let seen: Vec<_> = table
        .entries()
        .iter()
        .filter_map(|e| Some((lookalike::witness(&e.tensor.key)?, e.tensor.key.as_str())))
        .collect();
    if let Some((other, key)) = seen.iter().find(|(l, _)| l.decides) {
        return ModelCheck::Other(format!(
            "a {} LoRA (it has {})",
            other.model,
            Quoted::new(key)
        ));
    }
    let Some(model) = module::majority_model(modules) else {
        return ModelCheck::Nothing(nothing_found(table, seen.first().map(|(l, _)| l.model)));
    };
    let (mut fitting, mut differing) = (0usize, 0usize);
    let mut example = None;
    for module in modules.iter_mut() {
        let own = model::table().target(module.target).model;
        if own != model {
            module.misfit = Some(format!("is a module of {own}, the file is {model}'s"));
            continue;
        }
        let reshaped = module.tensors.iter().any(|&i| {
            table
                .entries()
                .get(i)
                .is_some_and(|e| e.role == Role::Reshape)
        });
        match module::fit(module, table.entries()) {
            Fit::Fits => fitting += 1,
            Fit::Differs(_) if reshaped => {}
            Fit::Differs(text) => {
                differing += 1;
                example.get_or_insert_with(|| {
                    format!("`{}` {text}", model::table().target(module.target).path)
                });
                module.misfit = Some(text);
            }
            Fit::Unknown => {}
        }
    }
    match example {
        Some(example) if differing >= fitting => {
            ModelCheck::OtherShapes(format!("a LoRA of another model: {example}"))
        }
        _ => ModelCheck::Known(model),
    }
}

fn nothing_found(table: &KeyTable, lookalike: Option<&str>) -> String {
    let plain = table
        .entries()
        .iter()
        .any(|e| e.reason == Some(Reason::Foreign(Foreign::PlainWeight)));
    match lookalike {
        _ if table.entries().is_empty() => "the file holds no tensor".to_owned(),
        _ if plain => "a checkpoint, not a LoRA: it holds whole weights".to_owned(),
        Some(model) => format!("a LoRA of another model, probably {model}"),
        None => {
            let key = table
                .entries()
                .first()
                .map_or("", |e| e.tensor.key.as_str());
            format!(
                "no key names a module of Qwen-Image (the first is {})",
                Quoted::new(key)
            )
        }
    }
}
