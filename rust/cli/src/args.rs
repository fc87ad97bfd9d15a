//! Flags to [`Request`].

use std::ffi::OsString;
use std::path::PathBuf;

use lexopt::{Arg, Parser};

use crate::color::ColorChoice;
use crate::escape;

/// Longest argument that a message shows.
const SHOWN_CHARS: usize = 60;

/// Shown by `--help`.
pub(crate) const HELP: &str = "\
Says what LoRA files for Qwen-Image contain, and what qwenlora would do with
them on a Nunchaku model. Needs no torch, no GPU and no model: it reads names,
shapes and single values only.

Usage: qwenlora-keys [OPTIONS] FILE...

FILE is a .safetensors file, a PEFT folder (adapter_model.safetensors with its
adapter_config.json), or any folder: then every .safetensors file below it is
read, in order of names, without following links that lead out of it.

Options:
  --all                       also list every tensor: key, type, shape, and the
                              module and part that it is taken for
  --json                      one JSON object per file, one per line (schema 1)
  --color auto|always|never   colour; auto: on a terminal, without NO_COLOR set
  -h, --help                  this text
  -V, --version               the version

Verdicts, and the exit status (of several files the worst decides):
  APPLY    0   all that the file trains is applied
  PARTIAL  1   a part is applied
  REJECT   2   nothing is applied: an adapter kind that is not supported yet, or
               another model's file
  error    3   the file cannot be read, or is no valid safetensors file
          64   the arguments make no sense
          74   the report cannot be written

What a screen says:
  lost         modules that are not applied, and why
  left out     other tensors that are not applied, and why
  producer     the program that wrote the file; `probably` when its keys tell,
               `unknown` when several programs write such keys
  ranks        stored ranks; `up to` where only a bound can be told
  scales       factors at strength 1 (alpha / rank and its kin)
  slots        the model's layers that are reached: q, k and v share one
  attention …  what is trained, and in how many of the model's blocks
  ignored      tensors without effect on the image

Examples:
  qwenlora-keys style.safetensors
  qwenlora-keys --json loras/ | jq -r 'select(.verdict != \"apply\") | .path'
";

/// What is asked for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// The help text.
    Help,
    /// The version.
    Version,
    /// Files to look at.
    Read(Options),
}

/// How the report is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// For people: a screen per file.
    Screen,
    /// The same, with every tensor.
    ScreenAndTensors,
    /// For programs: a line of JSON per file.
    Json,
}

/// The files and how they are reported.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Options {
    pub(crate) paths: Vec<PathBuf>,
    pub(crate) format: Format,
    pub(crate) color: ColorChoice,
}

/// Arguments that make no sense.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum UsageError {
    /// No file is named.
    #[error("no file is named\nhint: `qwenlora-keys --help` shows how to call it")]
    NoFile,
    /// A flag that does not exist.
    #[error("unknown option: `{option}`\nhint: a file of this name is written `./{option}`")]
    UnknownOption {
        /// The flag.
        option: String,
    },
    /// A value after a flag that takes none.
    #[error("`{option}` takes no value: `{value}`")]
    UnexpectedValue {
        /// The flag.
        option: String,
        /// The value.
        value: String,
    },
    /// No value after a flag that takes one.
    #[error("`--color` needs a value: auto, always or never")]
    ColorMissing,
    /// A value that `--color` does not know.
    #[error("`--color` is none of auto, always and never: `{value}`")]
    ColorUnknown {
        /// The value.
        value: String,
    },
    /// Anything else that the parser says.
    #[error("{message}")]
    Other {
        /// Its words.
        message: String,
    },
}

/// Parses the arguments, without the program's name.
pub(crate) fn parse(args: Vec<OsString>) -> Result<Request, UsageError> {
    let mut parser = Parser::from_args(args);
    let mut paths = Vec::new();
    let (mut is_json, mut is_all, mut color) = (false, false, ColorChoice::Auto);
    while let Some(arg) = parser.next().map_err(usage_error)? {
        match arg {
            Arg::Value(path) => paths.push(PathBuf::from(path)),
            Arg::Long("json") => is_json = true,
            Arg::Long("all") => is_all = true,
            Arg::Long("color") => {
                let value = parser.value().map_err(|_| UsageError::ColorMissing)?;
                color = parse_color(&value)?;
            }
            Arg::Short('h') | Arg::Long("help") => return Ok(Request::Help),
            Arg::Short('V') | Arg::Long("version") => return Ok(Request::Version),
            Arg::Short(_) | Arg::Long(_) => return Err(usage_error(arg.unexpected())),
        }
    }
    if paths.is_empty() {
        return Err(UsageError::NoFile);
    }
    let format = match (is_json, is_all) {
        // JSON lists every tensor as it is.
        (true, _) => Format::Json,
        (false, true) => Format::ScreenAndTensors,
        (false, false) => Format::Screen,
    };
    Ok(Request::Read(Options {
        paths,
        format,
        color,
    }))
}

fn parse_color(value: &OsString) -> Result<ColorChoice, UsageError> {
    match value.to_str() {
        Some("auto") => Ok(ColorChoice::Auto),
        Some("always") => Ok(ColorChoice::Always),
        Some("never") => Ok(ColorChoice::Never),
        _ => Err(UsageError::ColorUnknown {
            value: shown(&value.to_string_lossy()),
        }),
    }
}

fn usage_error(error: lexopt::Error) -> UsageError {
    match error {
        lexopt::Error::UnexpectedOption(option) => UsageError::UnknownOption {
            option: shown(&option),
        },
        lexopt::Error::UnexpectedValue { option, value } => UsageError::UnexpectedValue {
            option: shown(&option),
            value: shown(&value.to_string_lossy()),
        },
        other => UsageError::Other {
            message: shown(&other.to_string()),
        },
    }
}

fn shown(text: &str) -> String {
    escape::short(text, SHOWN_CHARS)
}
