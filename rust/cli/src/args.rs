//! Flags to [`Request`]; the same definition gives the help and the shell completions.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::builder::EnumValueParser;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgAction, ArgMatches, Command, ValueHint, value_parser};
use clap_complete::Shell;

use crate::color::ColorChoice;
use crate::escape;

/// The program's name, as the shell knows it: the binary's and the wheel's console script's.
pub(crate) const PROGRAM: &str = "qwenlora-keys";
/// Longest argument that a message shows.
const SHOWN_COLUMNS: usize = 60;

const TEMPLATE: &str = "{about}\n\nUsage: {usage}\n\n{all-args}{after-help}\n";

const ABOUT: &str = "\
Says what LoRA files for Qwen-Image and Z-Image contain, and what qwenlora would
do with them on a 4-bit model. Needs no torch, no GPU and no model: it reads
names, shapes and single values only.";

const USAGE: &str = "\
qwenlora-keys [OPTIONS] FILE...
       qwenlora-keys [OPTIONS] --explain KEY [FILE...]
       qwenlora-keys --completions SHELL";

const AFTER_HELP: &str = "\
One file gives one screen. A folder, or more than three files, give a table
with one line each: of a folder all .safetensors and .sft files in it and below
it, in order of their names. Links that lead out of it are not followed, and
pickles, archives and unfinished downloads are counted. The report goes to
standard output; errors, notes and the summary to standard error.

Examples:
  qwenlora-keys style.safetensors          what is in it, what would be applied
  qwenlora-keys ComfyUI/models/loras       which of my LoRAs work, a line each
  qwenlora-keys --json loras/ | jq -r 'select(.verdict != \"apply\") | .path'
  qwenlora-keys --explain lora_unet_img_in.alpha style.safetensors

Verdicts, and the exit status (of several files the worst decides):
  APPLY    0   all that the file trains is applied
  PARTIAL  1   a part is applied; the rest is listed with the reason
  REJECT   2   nothing is applied: an adapter kind that is not supported, or
               another model's file
  ERROR    3   the file cannot be read, or is no valid safetensors file
           1   --explain: no such key in some file
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

More: docs/keys.md in qwenlora's repository";

/// The request.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// The help text.
    Help,
    /// The version.
    Version,
    /// A script that completes the arguments in this shell.
    Completions(Shell),
    /// How a key is read, whatever file it is of.
    ReadKey(String, Format, ColorChoice),
    /// Files to look at.
    ReadFiles(Options),
}

/// How the report is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// For people: screens or a table.
    Text,
    /// For people: screens with every tensor.
    TextWithTensors,
    /// For programs: a line of JSON per file.
    Json,
}

/// The files and how they are reported.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Options {
    /// Files and folders.
    pub(crate) paths: Vec<PathBuf>,
    /// The key to explain, instead of the whole file.
    pub(crate) key: Option<String>,
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
    /// A flag that is spelled much like one that exists.
    #[error("unknown option: `{option}`\nhint: did you mean `{near}`?")]
    MistypedOption {
        /// The flag.
        option: String,
        /// The other.
        near: String,
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
    #[error("`{option}` needs a value: {expected}")]
    ValueMissing {
        /// The flag.
        option: String,
        /// Its values.
        expected: String,
    },
    /// A value that a flag does not know.
    #[error("`{option}` does not know `{value}`\nhint: it takes {expected}")]
    ValueUnknown {
        /// The flag.
        option: String,
        /// The value.
        value: String,
        /// Its values.
        expected: String,
    },
    /// Two flags that exclude each other.
    #[error("`{option}` and `{other}` cannot be used together")]
    Conflict {
        /// One.
        option: String,
        /// The other.
        other: String,
    },
    /// A flag for which the package for Python is needed.
    #[error(
        "`--map` reads the weights, which takes PyTorch\nhint: `pip install qwenlora` brings a \
         `qwenlora-keys` that draws maps"
    )]
    MapWithoutPython,
    /// Anything else that the parser says.
    #[error("{message}")]
    Other {
        /// Its words.
        message: String,
    },
}

/// Every argument, once: for parsing, for the help, for completions.
pub(crate) fn command() -> Command {
    let flag = |name: &'static str| Arg::new(name).long(name).action(ArgAction::SetTrue);
    Command::new(PROGRAM)
        .version(env!("CARGO_PKG_VERSION"))
        .about(ABOUT)
        .override_usage(USAGE)
        .help_template(TEMPLATE)
        .after_help(AFTER_HELP)
        .args_override_self(true)
        .disable_help_flag(true)
        .disable_version_flag(true)
        .arg(file())
        .arg(
            flag("all")
                .conflicts_with("explain")
                .help("also list every tensor, and what it is taken for"),
        )
        .arg(
            Arg::new("explain")
                .long("explain")
                .value_name("KEY")
                .value_hint(ValueHint::Other)
                .help("why a key maps there: prefix, path, suffix, scale"),
        )
        .arg(
            flag("map")
                .conflicts_with_all(["explain", "json"])
                .help("also draw where the file acts, and how strongly"),
        )
        .arg(flag("json").help("one JSON object per file, one per line (schema 1)"))
        .arg(
            Arg::new("color")
                .long("color")
                .value_name("WHEN")
                .value_parser(EnumValueParser::<ColorChoice>::new())
                .default_value("auto")
                .hide_default_value(true)
                .hide_possible_values(true)
                .help("auto (a terminal without NO_COLOR), always or never"),
        )
        .arg(
            Arg::new("completions")
                .long("completions")
                .value_name("SHELL")
                .value_parser(EnumValueParser::<Shell>::new())
                .hide_possible_values(true)
                .help("completions: bash, elvish, fish, powershell or zsh"),
        )
        .arg(
            Arg::new("help")
                .short('h')
                .long("help")
                .action(ArgAction::Help)
                .help("this text"),
        )
        .arg(
            Arg::new("version")
                .short('V')
                .long("version")
                .action(ArgAction::Version)
                .help("the version"),
        )
}

fn file() -> Arg {
    Arg::new("file")
        .value_name("FILE")
        .num_args(1..)
        .value_parser(value_parser!(PathBuf))
        .value_hint(ValueHint::AnyPath)
        .required_unless_present_any(["completions", "explain"])
        .help(
            "a .safetensors or .sft file, a PEFT folder (its weights in\n\
             adapter_model.safetensors, beside them adapter_config.json),\n\
             or any folder of such",
        )
}

/// The text of `--help`.
pub(crate) fn help() -> String {
    command().render_help().to_string()
}

/// Parses the arguments, without the program's name.
pub(crate) fn parse(args: Vec<OsString>) -> Result<Request, UsageError> {
    let args = std::iter::once(OsString::from(PROGRAM)).chain(args);
    match command().try_get_matches_from(args) {
        // The package draws the map itself, and hands on what else is asked for.
        Ok(matches) if matches.get_flag("map") => Err(UsageError::MapWithoutPython),
        Ok(matches) => Ok(request(matches)),
        Err(error) => match error.kind() {
            ErrorKind::DisplayHelp => Ok(Request::Help),
            ErrorKind::DisplayVersion => Ok(Request::Version),
            _ => Err(usage_error(&error)),
        },
    }
}

fn request(mut matches: ArgMatches) -> Request {
    if let Some(shell) = matches.remove_one("completions") {
        return Request::Completions(shell);
    }
    let format = match (matches.get_flag("json"), matches.get_flag("all")) {
        // JSON lists every tensor as it is.
        (true, _) => Format::Json,
        (false, true) => Format::TextWithTensors,
        (false, false) => Format::Text,
    };
    let paths: Vec<PathBuf> = matches.remove_many("file").into_iter().flatten().collect();
    let color = matches.remove_one("color").unwrap_or(ColorChoice::Auto);
    match matches.remove_one("explain") {
        Some(key) if paths.is_empty() => Request::ReadKey(key, format, color),
        key => Request::ReadFiles(Options {
            paths,
            key,
            format,
            color,
        }),
    }
}

fn usage_error(error: &clap::Error) -> UsageError {
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        Some(ContextValue::Strings(texts)) => texts.first().map(String::as_str),
        _ => None,
    };
    // clap names an option with its value: `--color <WHEN>`.
    let invalid = text(ContextKind::InvalidArg).unwrap_or_default();
    let option = || shown(invalid.split(" <").next().unwrap_or_default());
    let value = text(ContextKind::InvalidValue).unwrap_or_default();
    match error.kind() {
        ErrorKind::MissingRequiredArgument => UsageError::NoFile,
        ErrorKind::UnknownArgument => match text(ContextKind::SuggestedArg) {
            Some(near) => UsageError::MistypedOption {
                option: option(),
                near: near.to_owned(),
            },
            None => UsageError::UnknownOption { option: option() },
        },
        ErrorKind::TooManyValues => UsageError::UnexpectedValue {
            option: option(),
            value: shown(value),
        },
        ErrorKind::InvalidValue if value.is_empty() => UsageError::ValueMissing {
            option: option(),
            expected: expected(error, invalid),
        },
        ErrorKind::InvalidValue => UsageError::ValueUnknown {
            option: option(),
            value: shown(value),
            expected: expected(error, invalid),
        },
        ErrorKind::ArgumentConflict => UsageError::Conflict {
            option: option(),
            other: text(ContextKind::PriorArg)
                .and_then(|prior| prior.split(" <").next())
                .unwrap_or_default()
                .to_owned(),
        },
        ErrorKind::InvalidUtf8 => UsageError::Other {
            message: "an argument is not valid UTF-8, and is no file's name".to_owned(),
        },
        _ => UsageError::Other {
            message: shown(&error.to_string()),
        },
    }
}

/// `auto, always or never`; the value's name where it is free.
fn expected(error: &clap::Error, invalid: &str) -> String {
    let Some(ContextValue::Strings(values)) = error.get(ContextKind::ValidValue) else {
        return free_value(invalid);
    };
    match values.as_slice() {
        [rest @ .., last] if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        _ => free_value(invalid),
    }
}

fn free_value(invalid: &str) -> String {
    let name = invalid.split_once('<').map_or(invalid, |(_, name)| name);
    name.trim_end_matches('>').to_owned()
}

fn shown(text: &str) -> String {
    escape::short(text, SHOWN_COLUMNS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_sound() {
        command().debug_assert();
    }
}
