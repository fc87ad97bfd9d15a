//! `qwenlora-keys`: says what LoRA files for Qwen-Image contain and what would be applied.
//!
//! Reached through [`run`], by `main.rs` and by the wheel's `qwenlora-keys`. The diagnosis is
//! [`FilePlan`]'s, the same that the loader executes; here it is only put into words.

#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod args;
mod color;
mod coverage;
mod escape;
mod exit;
mod json;
mod listing;
mod losses;
mod producer;
mod report;
mod screen;
mod sources;
mod tally;

use std::ffi::OsString;
use std::io::{self, ErrorKind, Write};
use std::path::Path;

use qwenlora_core::header::Quoted;
use qwenlora_core::plan::{FilePlan, Verdict};

use crate::args::{Format, Options, Request};
pub use crate::color::Palette;
pub use crate::exit::Exit;
use crate::sources::Sources;
use crate::tally::count;

/// What a message's second line begins with.
const HINT: &str = "\nhint: ";

/// Runs the program with its arguments, without its name.
///
/// Data goes to `stdout`, talk to `stderr`. `--color auto` looks at the process's own output.
pub fn run(
    args: impl IntoIterator<Item = impl Into<OsString>>,
    stdout: &mut dyn Write,
    stderr: &mut dyn Write,
) -> Exit {
    run_with(Palette::of_stdout(), args, stdout, stderr)
}

/// The same, where `--color auto` means `auto`: for a `stdout` that is not the process's.
pub fn run_with(
    auto: Palette,
    args: impl IntoIterator<Item = impl Into<OsString>>,
    stdout: &mut dyn Write,
    stderr: &mut dyn Write,
) -> Exit {
    let written = match args::parse(args.into_iter().map(Into::into).collect()) {
        Ok(Request::Help) => stdout
            .write_all(args::HELP.as_bytes())
            .map(|()| Exit::Applies),
        Ok(Request::Version) => {
            writeln!(stdout, "qwenlora-keys {}", env!("CARGO_PKG_VERSION")).map(|()| Exit::Applies)
        }
        Ok(Request::Read(options)) => Run::new(&options, auto, stdout, stderr).read_all(),
        Err(error) => {
            talk(stderr, "error", &error.to_string());
            Ok(Exit::Usage)
        }
    };
    match written.and_then(|exit| stdout.flush().map(|()| exit)) {
        Ok(exit) => exit,
        // Whoever read has seen enough: `| head` is no failure.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Exit::Applies,
        Err(error) => {
            talk(
                stderr,
                "error",
                &format!("cannot write the report: {error}"),
            );
            Exit::Unwritable
        }
    }
}

/// Says something beside the data; nobody can be told that it failed.
fn talk(stderr: &mut dyn Write, kind: &str, message: &str) {
    // The break before a hint is ours; any other came in with a name.
    let parts: Vec<String> = message.split(HINT).map(escape::line).collect();
    let _ = writeln!(stderr, "{kind}: {}", parts.join(HINT)).and_then(|()| stderr.flush());
}

/// The files of one call, one after the other.
struct Run<'r> {
    options: &'r Options,
    palette: Palette,
    stdout: &'r mut dyn Write,
    stderr: &'r mut dyn Write,
    exits: Vec<Exit>,
}

impl<'r> Run<'r> {
    fn new(
        options: &'r Options,
        auto: Palette,
        stdout: &'r mut dyn Write,
        stderr: &'r mut dyn Write,
    ) -> Self {
        let palette = Palette::choose(options.color, auto);
        Self {
            options,
            palette,
            stdout,
            stderr,
            exits: Vec::new(),
        }
    }

    fn read_all(mut self) -> io::Result<Exit> {
        for path in &self.options.paths {
            let sources = Sources::of(path);
            for (folder, fault) in &sources.faults {
                self.fail(folder, &format!("{}: {fault}", Quoted::path(folder)))?;
            }
            for source in &sources.paths {
                self.read(source)?;
            }
            if let Some(first) = sources.links_out.first() {
                let (links, first) = (count(sources.links_out.len(), "link"), Quoted::path(first));
                let text = format!("{links} out of the folder left unread, e.g. {first}");
                talk(
                    self.stderr,
                    "note",
                    &format!("{text}{HINT}name what they lead to"),
                );
            }
        }
        self.sum_up()?;
        Ok(self.exits.into_iter().max().unwrap_or(Exit::Applies))
    }

    fn read(&mut self, path: &Path) -> io::Result<()> {
        let plan = match FilePlan::read(path) {
            Ok(plan) => plan,
            Err(error) => return self.fail(path, &error.to_string()),
        };
        match self.options.format {
            Format::Json => writeln!(self.stdout, "{}", json::document(&plan))?,
            Format::Screen => self.show(path, &plan, false)?,
            Format::ScreenAndTensors => self.show(path, &plan, true)?,
        }
        self.exits.push(match plan.verdict() {
            Verdict::Apply => Exit::Applies,
            Verdict::Partial => Exit::Partial,
            Verdict::Reject => Exit::Rejected,
        });
        Ok(())
    }

    fn show(&mut self, path: &Path, plan: &FilePlan, with_tensors: bool) -> io::Result<()> {
        if self.exits.iter().any(|exit| *exit != Exit::Unreadable) {
            writeln!(self.stdout)?;
        }
        let text = report::screen(path, plan, with_tensors).paint(self.palette);
        self.stdout.write_all(text.as_bytes())
    }

    fn fail(&mut self, path: &Path, error: &str) -> io::Result<()> {
        // What was said before this stays before it, where both reach one terminal.
        self.stdout.flush()?;
        talk(self.stderr, "error", error);
        self.exits.push(Exit::Unreadable);
        match self.options.format {
            Format::Json => writeln!(self.stdout, "{}", json::failure(path, error)),
            Format::Screen | Format::ScreenAndTensors => Ok(()),
        }
    }

    /// The last line of a call on several files.
    fn sum_up(&mut self) -> io::Result<()> {
        if self.options.format == Format::Json || self.exits.len() < 2 {
            return Ok(());
        }
        let kinds = [
            (Exit::Applies, "apply"),
            (Exit::Partial, "partial"),
            (Exit::Rejected, "reject"),
            (Exit::Unreadable, "unreadable"),
        ];
        let parts: Vec<String> = kinds
            .iter()
            .map(|(kind, name)| (self.exits.iter().filter(|exit| *exit == kind).count(), name))
            .filter(|(count, _)| *count > 0)
            .map(|(count, name)| format!("{count} {name}"))
            .collect();
        writeln!(
            self.stdout,
            "\n{}: {}",
            count(self.exits.len(), "file"),
            parts.join(", ")
        )
    }
}
