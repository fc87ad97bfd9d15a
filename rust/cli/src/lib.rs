//! `qwenlora-keys`: says what LoRA files for Qwen-Image and Z-Image contain and what would be applied.
//!
//! Reached through [`run`], by `main.rs` and by the wheel's `qwenlora-keys`. The diagnosis is
//! [`qwenlora_core::plan::FilePlan`]'s, the same that the loader executes; here it is only put into
//! words.

#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod args;
mod brief;
mod color;
mod console;
mod coverage;
mod escape;
mod exit;
mod explanation;
mod json;
mod listing;
mod losses;
mod natural;
mod ordered;
mod producer;
mod report;
mod run;
mod screen;
mod sources;
mod table;
mod talk;
mod tally;

use std::ffi::OsString;
use std::io::{self, ErrorKind, Write};

use clap_complete::Shell;
use qwenlora_core::plan::FilePlan;
use qwenlora_core::plan::explain::Reading;

use crate::args::{Format, Request};
pub use crate::color::Palette;
pub use crate::console::Console;
pub use crate::exit::Exit;
use crate::run::Run;
use crate::talk::Talk;

/// Which program wrote a file, in a few words, with the ground for saying so.
pub fn producer(plan: &FilePlan) -> String {
    producer::describe(plan)
}

/// Runs the program with its arguments, without its name.
///
/// Data goes to `stdout`, talk to `stderr`; both are taken for the process's own.
pub fn run(
    args: impl IntoIterator<Item = impl Into<OsString>>,
    stdout: &mut dyn Write,
    stderr: &mut dyn Write,
) -> Exit {
    run_on(Console::of_process(), args, stdout, stderr)
}

/// The same, on streams that are as `console` says.
pub fn run_on(
    console: Console,
    args: impl IntoIterator<Item = impl Into<OsString>>,
    stdout: &mut dyn Write,
    stderr: &mut dyn Write,
) -> Exit {
    let written = match args::parse(args.into_iter().map(Into::into).collect()) {
        Ok(request) => answer(&request, console, stdout, stderr),
        Err(error) => {
            say_error(console, stderr, &error.to_string());
            Ok(Exit::Usage)
        }
    };
    match written.and_then(|exit| stdout.flush().map(|()| exit)) {
        Ok(exit) => exit,
        // Whoever read has seen enough: `| head` is no failure.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Exit::Applies,
        Err(error) => {
            let message = format!("cannot write the report: {error}");
            say_error(console, stderr, &message);
            Exit::Unwritable
        }
    }
}

fn answer(
    request: &Request,
    console: Console,
    stdout: &mut dyn Write,
    stderr: &mut dyn Write,
) -> io::Result<Exit> {
    let text = match request {
        Request::ReadFiles(options) => {
            return Run::new(options, console, stdout, stderr).read_all();
        }
        Request::ReadKey(key, format, color) => {
            let palette = Palette::choose(*color, console.palette);
            return read_key(key, *format, palette, stdout);
        }
        Request::Help => args::help().into_bytes(),
        Request::Version => {
            format!("{} {}\n", args::PROGRAM, env!("CARGO_PKG_VERSION")).into_bytes()
        }
        Request::Completions(shell) => completions(*shell),
    };
    stdout.write_all(&text).map(|()| Exit::Applies)
}

fn read_key(
    key: &str,
    format: Format,
    palette: Palette,
    stdout: &mut dyn Write,
) -> io::Result<Exit> {
    let reading = Reading::of(key);
    let text = match format {
        Format::Json => format!("{}\n", explanation::reading_document(key, reading.as_ref())),
        Format::Text | Format::TextWithTensors => {
            explanation::reading_screen(key, reading.as_ref()).paint(palette)
        }
    };
    stdout.write_all(text.as_bytes())?;
    Ok(reading.map_or(Exit::NoSuchKey, |_| Exit::Applies))
}

/// The script, made in memory: its generator panics where it cannot write.
fn completions(shell: Shell) -> Vec<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut args::command(), args::PROGRAM, &mut script);
    if shell == Shell::Bash {
        return files_first(&String::from_utf8_lossy(&script)).into_bytes();
    }
    script
}

/// The generator's script for bash offers options for an empty word. Without an offer of the script's
/// bash completes the name of a file, which is what is meant there.
fn files_first(script: &str) -> String {
    const OFFER: &str = "COMPREPLY=( $(compgen -W \"${opts}\" -- \"${cur}\") )\n";
    const ESAC: &str = "            esac\n            ";
    script
        .replace("${cur} == -* || ${COMP_CWORD} -eq 1 ]]", "${cur} == -* ]]")
        .replace(&format!("{ESAC}{OFFER}"), "            esac\n")
}

fn say_error(console: Console, stderr: &mut dyn Write, message: &str) {
    Talk::new(stderr, console.progress_after, console.columns).say("error", message);
}
