//! Every screen and every exit status of `qwenlora-keys`, from real files to text.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot prepare its files has to fail"
)]

mod completions;
mod corpus;
mod explain;
mod faults;
mod folders;
mod hostile;
mod json;
mod lora_file;
mod screens;
mod streams;
mod tables;

use std::ffi::OsString;
use std::path::Path;

use qwenlora_keys::{Console, Exit};
use tempfile::TempDir;

/// A folder for one test's files.
pub(crate) struct Folder(TempDir);

/// What a call wrote, with the folder's path replaced by `[dir]`.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) exit: Exit,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Folder {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn join(&self, name: &str) -> std::path::PathBuf {
        self.path().join(name)
    }

    pub(crate) fn run<A: Into<OsString>>(&self, args: impl IntoIterator<Item = A>) -> Outcome {
        self.run_on(Console::UNWATCHED, args)
    }

    pub(crate) fn run_on<A: Into<OsString>>(
        &self,
        console: Console,
        args: impl IntoIterator<Item = A>,
    ) -> Outcome {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let exit = qwenlora_keys::run_on(console, args, &mut stdout, &mut stderr);
        Outcome {
            exit,
            stdout: self.stable(stdout),
            stderr: self.stable(stderr),
        }
    }

    fn stable(&self, bytes: Vec<u8>) -> String {
        let text = String::from_utf8(bytes).unwrap();
        text.replace(self.path().to_str().unwrap(), "[dir]")
            .replace("[dir]\\", "[dir]/")
    }
}

impl Outcome {
    /// Screen and messages as one text, for snapshots.
    pub(crate) fn text(&self) -> String {
        let mut text = format!("exit {}\n", self.exit.code());
        for (name, part) in [("stdout", &self.stdout), ("stderr", &self.stderr)] {
            if !part.is_empty() {
                text = format!("{text}--- {name}\n{part}");
            }
        }
        text
    }
}
