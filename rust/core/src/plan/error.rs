//! Faults that make a file, or a state dict, unusable as a whole.

use crate::adapter::module::ModuleError;
use crate::adapter::peft::ConfigError;
use crate::header::Quoted;
use crate::plan::config::{PEFT_PICKLE, PEFT_WEIGHTS};
use crate::source::SourceError;

/// Faults that make a file unusable.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The file cannot be read, or is not a safetensors file.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// A folder without PEFT's weights.
    #[error(
        "{folder} is a folder without `{PEFT_WEIGHTS}`\nhint: name the LoRA file itself{}",
        .lora.as_ref().map(|name| format!(", as {name} in it")).unwrap_or_default()
    )]
    NotAPeftFolder {
        /// The folder.
        folder: Quoted,
        /// The first LoRA file in it.
        lora: Option<Quoted>,
    },
    /// A folder whose weights PEFT saved as a pickle.
    #[error(
        "{folder} holds a PyTorch pickle, `{PEFT_PICKLE}`, and no `{PEFT_WEIGHTS}`; a pickle can \
         run any code while it loads\n\
         hint: convert it once, in the folder: `python -c \"import torch, safetensors.torch as st; \
         st.save_file(torch.load('{PEFT_PICKLE}', weights_only=True), '{PEFT_WEIGHTS}')\"`"
    )]
    PickledPeftFolder {
        /// The folder.
        folder: Quoted,
    },
    /// PEFT's configuration cannot be read.
    #[error("cannot read {path}: {detail}")]
    Config {
        /// Its path.
        path: Quoted,
        /// The system's message.
        detail: String,
    },
    /// PEFT's configuration makes no sense.
    #[error("{origin}: {source}")]
    ConfigContent {
        /// The file.
        origin: Quoted,
        /// The fault.
        source: ConfigError,
    },
    /// More tensors than any model has.
    #[error("{origin} has too many tensors, over the limit of {max}: {count}")]
    TooManyTensors {
        /// The state dict.
        origin: Quoted,
        /// How many.
        count: usize,
        /// The limit.
        max: usize,
    },
    /// A key longer than any name.
    #[error("{origin}: tensor {tensor}: the name is over the limit of {max_bytes} bytes")]
    NameTooLong {
        /// The state dict.
        origin: Quoted,
        /// The name, which tells its length.
        tensor: Quoted,
        /// The limit.
        max_bytes: usize,
    },
    /// A module makes no sense.
    #[error("{origin}: {source}")]
    Module {
        /// The file.
        origin: Quoted,
        /// The fault.
        source: ModuleError,
    },
}
