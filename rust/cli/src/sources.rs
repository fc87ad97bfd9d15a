//! The files that an argument stands for.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use qwenlora_core::plan::config;

use crate::natural;

/// The files that an argument stands for.
#[derive(Debug, Default)]
pub(crate) struct Sources {
    /// Files and PEFT folders, sorted.
    pub(crate) paths: Vec<PathBuf>,
    /// Folders that gave nothing, each with the reason.
    pub(crate) faults: Vec<(PathBuf, FolderError)>,
    /// Links that lead out of the folder, left unread.
    pub(crate) links_out: Vec<PathBuf>,
    /// Files that may hold LoRAs, in a form that is not read.
    pub(crate) passed_over: Vec<(Form, PathBuf)>,
}

/// A form in which LoRAs lie in folders, but are not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// A pickle that `torch.save` writes.
    Pickle,
    /// A file to unpack.
    Archive,
    /// A download that has not come to its end.
    Unfinished,
}

/// Endings of such files, in lower case.
const PICKLES: [&str; 7] = ["bin", "ckpt", "pickle", "pkl", "pt", "pt2", "pth"];
const ARCHIVES: [&str; 6] = ["7z", "gz", "rar", "tar", "tgz", "zip"];
const UNFINISHED: [&str; 7] = [
    "aria2",
    "crdownload",
    "download",
    "incomplete",
    "opdownload",
    "part",
    "partial",
];
/// Names of files that training programs pickle beside a LoRA: their beginnings.
const TRAINING_STATE: [&str; 6] = [
    "optimizer",
    "random_states",
    "rng_state",
    "scaler",
    "scheduler",
    "training_args",
];

impl Form {
    /// All of them, in the order in which they are told.
    pub(crate) const ALL: [Self; 3] = [Self::Pickle, Self::Archive, Self::Unfinished];

    /// The form of a file by its name, and of pickles by their content, since other programs'
    /// files end like them.
    fn of(path: &Path) -> Option<Self> {
        let ending = path.extension()?.to_str()?.to_ascii_lowercase();
        let ends_in = |endings: &[&str]| endings.contains(&ending.as_str());
        if ends_in(&UNFINISHED) {
            Some(Self::Unfinished)
        } else if ends_in(&ARCHIVES) {
            Some(Self::Archive)
        } else if ends_in(&PICKLES) && !is_training_state(path) && config::is_pickle(path) {
            Some(Self::Pickle)
        } else {
            None
        }
    }

    /// Its name.
    pub(crate) fn noun(self) -> &'static str {
        match self {
            Self::Pickle => "PyTorch pickle",
            Self::Archive => "archive",
            Self::Unfinished => "unfinished download",
        }
    }

    /// The way out.
    pub(crate) fn hint(self) -> &'static str {
        match self {
            Self::Pickle => {
                "a LoRA in such a file is read once it is converted: `python -c \"import torch, \
                 safetensors.torch as st; st.save_file(torch.load('lora.pt', weights_only=True), \
                 'lora.safetensors')\"`"
            }
            Self::Archive => "a LoRA in such a file is read once it is unpacked",
            Self::Unfinished => "get such a file again, or wait for its end",
        }
    }
}

fn is_training_state(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    name.is_some_and(|name| TRAINING_STATE.iter().any(|start| name.starts_with(start)))
}

/// Why a folder gave nothing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FolderError {
    /// The system refused.
    #[error("cannot list the folder: {0}")]
    Unlisted(io::Error),
    /// It holds nothing of ours.
    #[error("no .safetensors or .sft file is in this folder or below it")]
    Empty,
}

impl Sources {
    /// Expands an argument: a folder to what is below it, anything else to itself.
    ///
    /// `progress` is told, now and then, how many files have been found.
    pub(crate) fn of(path: &Path, mut progress: impl FnMut(usize)) -> Self {
        let mut sources = Self::default();
        if !path.is_dir() {
            sources.paths.push(path.to_owned());
            return sources;
        }
        // A PEFT folder that is named counts wherever its weights really lie: caches link them.
        if config::weights_path(path).is_ok() {
            sources.paths.push(path.to_owned());
        }
        sources.walk(path, &mut progress);
        sources.paths.sort_by(|a, b| natural::compare(a, b));
        sources.paths.dedup();
        sources.links_out.sort_by(|a, b| natural::compare(a, b));
        sources
            .passed_over
            .sort_by(|(_, a), (_, b)| natural::compare(a, b));
        if sources.paths.is_empty() && sources.faults.is_empty() {
            sources.faults.push((path.to_owned(), FolderError::Empty));
        }
        sources
    }

    /// Folders are entered only when they are no links, so that the walk ends.
    fn walk(&mut self, root: &Path, progress: &mut impl FnMut(usize)) {
        let home = fs::canonicalize(root).ok();
        let mut folders = vec![root.to_owned()];
        while let Some(folder) = folders.pop() {
            progress(self.paths.len());
            let rows = match fs::read_dir(&folder).and_then(Iterator::collect::<io::Result<Vec<_>>>)
            {
                Ok(rows) => rows,
                Err(error) => {
                    self.faults.push((folder, FolderError::Unlisted(error)));
                    continue;
                }
            };
            for row in rows {
                let path = row.path();
                match row.file_type() {
                    Ok(kind) if kind.is_dir() => folders.push(path),
                    Ok(kind) if kind.is_symlink() => self.add_link(path, home.as_deref()),
                    Ok(_) => self.add_file(path),
                    Err(error) => self.faults.push((path, FolderError::Unlisted(error))),
                }
            }
        }
    }

    fn add_file(&mut self, path: PathBuf) {
        if !config::is_safetensors(&path) {
            let form = Form::of(&path);
            self.passed_over.extend(form.map(|form| (form, path)));
            return;
        }
        self.paths.push(source_of(path));
    }

    fn add_link(&mut self, path: PathBuf, home: Option<&Path>) {
        match fs::canonicalize(&path) {
            Ok(end) if home.is_some_and(|home| end.starts_with(home)) => {
                // A folder inside is visited as itself.
                if !end.is_dir() {
                    self.add_file(path);
                }
            }
            Ok(end) => {
                let source = source_of(path.clone());
                let is_weights_of_a_source = source != path && self.paths.contains(&source);
                let is_source = end.is_dir() || config::is_safetensors(&path);
                if is_source && !is_weights_of_a_source {
                    self.links_out.push(path);
                }
            }
            // Reading it will say what is wrong.
            Err(_) => self.add_file(path),
        }
    }
}

/// The weights of a PEFT folder stand for the folder, any other file for itself.
fn source_of(path: PathBuf) -> PathBuf {
    match path.parent().filter(|_| config::is_peft_weights(&path)) {
        Some(folder) if config::weights_path(folder).is_ok_and(|weights| weights == path) => {
            folder.to_owned()
        }
        _ => path,
    }
}
