//! The files of a LoRA: the weights of a PEFT folder and its configuration, which may also be
//! embedded in a file's metadata.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use crate::adapter::peft::{self, AdapterConfig};
use crate::header::{HeaderError, Quoted};
use crate::plan::PlanError;
use crate::source::{FileIdentity, SourceError, SourceFile};

/// The weights of a PEFT folder.
pub const PEFT_WEIGHTS: &str = "adapter_model.safetensors";
/// The same weights under the short ending, and as a pickle.
const PEFT_WEIGHTS_SFT: &str = "adapter_model.sft";
pub(crate) const PEFT_PICKLE: &str = "adapter_model.bin";
/// Endings of safetensors files, in lower case.
const ENDINGS: [&str; 2] = ["safetensors", "sft"];
/// The configuration beside them.
pub const PEFT_CONFIG: &str = "adapter_config.json";
/// A configuration beyond this size is not one.
const MAX_CONFIG_BYTES: u64 = 4 * 1024 * 1024;

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

/// Whether a path ends as safetensors files do, in either case.
pub fn is_safetensors(path: &Path) -> bool {
    let ends_in = |ending: &str| ENDINGS.iter().any(|own| ending.eq_ignore_ascii_case(own));
    path.extension()
        .is_some_and(|ending| ending.to_str().is_some_and(ends_in))
}

/// Whether a file is called as the weights of a PEFT folder are.
pub fn is_peft_weights(path: &Path) -> bool {
    let own = |name: &OsStr| name == PEFT_WEIGHTS || name == PEFT_WEIGHTS_SFT;
    path.file_name().is_some_and(own)
}

/// The file with the weights: the path itself, or the one in a PEFT folder.
pub fn weights_path(path: &Path) -> Result<PathBuf, PlanError> {
    if !path.is_dir() {
        return Ok(path.to_owned());
    }
    let weights = [PEFT_WEIGHTS, PEFT_WEIGHTS_SFT].map(|name| path.join(name));
    let found = weights.into_iter().find(|weights| weights.is_file());
    found.ok_or_else(|| no_weights(path))
}

/// Why a folder is no source.
fn no_weights(path: &Path) -> PlanError {
    let folder = Quoted::path(path);
    if is_pickle(&path.join(PEFT_PICKLE)) {
        return PlanError::PickledPeftFolder { folder };
    }
    let files = fs::read_dir(path).into_iter().flatten().flatten();
    let mut names: Vec<_> = files
        .filter(|row| is_safetensors(&row.path()))
        .map(|row| row.file_name())
        .collect();
    names.sort();
    let lora = names.first().map(|name| Quoted::path(Path::new(name)));
    PlanError::NotAPeftFolder { folder, lora }
}

/// Whether a file is a pickle, by its content.
pub fn is_pickle(path: &Path) -> bool {
    let header = SourceFile::open(path).and_then(|source| source.read_header());
    matches!(
        header,
        Err(SourceError::Header {
            source: HeaderError::Pickle,
            ..
        })
    )
}

/// The configuration in the metadata, else the one beside a PEFT file.
pub(crate) fn config_of(
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
    if !is_peft_weights(weights) || !beside.is_file() {
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

pub(crate) fn embedded_config(
    metadata: &[(String, String)],
    origin: &Quoted,
) -> Result<Option<AdapterConfig>, PlanError> {
    metadata
        .iter()
        .find(|(key, _)| key == peft::METADATA_KEY)
        .map(|(key, json)| AdapterConfig::parse_embedded(key, json))
        .transpose()
        .map(Option::flatten)
        .map_err(|source| PlanError::ConfigContent {
            origin: origin.to_owned(),
            source,
        })
}
