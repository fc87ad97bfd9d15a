//! Whether the text is coloured: the flag, the terminal, and `NO_COLOR`.

use std::env;
use std::io::{self, IsTerminal};

use clap::ValueEnum;
use clap::builder::PossibleValue;

use crate::screen::Tone;

/// The choice of `--color`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ColorChoice {
    /// As standard output can take it.
    Auto,
    /// In any case.
    Always,
    /// In no case.
    Never,
}

impl ValueEnum for ColorChoice {
    fn value_variants<'a>() -> &'a [Self] {
        &[Self::Auto, Self::Always, Self::Never]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(match self {
            Self::Auto => "auto",
            Self::Always => "always",
            Self::Never => "never",
        }))
    }
}

/// The colours of text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Palette {
    /// Nothing: the same text without a single escape sequence.
    Plain,
    /// ANSI colours.
    Ansi,
}

impl Palette {
    /// The choice for the process's standard output, by what it can show and its user wants.
    pub fn of_stdout() -> Self {
        let set = |name| env::var_os(name).is_some_and(|value| !value.is_empty());
        let is_dumb = env::var_os("TERM").is_some_and(|term| term == "dumb");
        // https://no-color.org: any value but the empty one counts.
        if set("NO_COLOR") || is_dumb || !io::stdout().is_terminal() || !console_takes_ansi() {
            Self::Plain
        } else {
            Self::Ansi
        }
    }

    /// `text` in its tone; the padding around it is the caller's.
    pub(crate) fn paint(self, tone: Tone, text: &str) -> String {
        let sequence = tone.sequence();
        match self {
            Self::Ansi if !sequence.is_empty() && !text.is_empty() => {
                format!("{sequence}{text}\x1b[0m")
            }
            _ => text.to_owned(),
        }
    }

    /// The choice that the flag makes of `auto`.
    pub(crate) fn choose(choice: ColorChoice, auto: Self) -> Self {
        match choice {
            ColorChoice::Auto => auto,
            ColorChoice::Always => Self::Ansi,
            ColorChoice::Never => Self::Plain,
        }
    }
}

/// A Windows console prints escape sequences as they are until it is asked to obey them.
#[cfg(windows)]
fn console_takes_ansi() -> bool {
    winapi_util::console::Console::stdout()
        .and_then(|mut console| console.set_virtual_terminal_processing(true))
        .is_ok()
}

#[cfg(not(windows))]
fn console_takes_ansi() -> bool {
    true
}
