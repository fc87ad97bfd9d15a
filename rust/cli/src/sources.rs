//! The files that an argument stands for.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use qwenlora_core::config::{self, PEFT_WEIGHTS};

use crate::natural;

/// What an argument stands for.
#[derive(Debug, Default)]
pub(crate) struct Sources {
    /// Files and PEFT folders, sorted.
    pub(crate) paths: Vec<PathBuf>,
    /// Folders that gave nothing, each with the reason.
    pub(crate) faults: Vec<(PathBuf, FolderError)>,
    /// Links that lead out of the folder, left unread.
    pub(crate) links_out: Vec<PathBuf>,
}

/// Why a folder gave nothing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FolderError {
    /// The system refused.
    #[error("cannot list the folder: {0}")]
    Unlisted(io::Error),
    /// It holds nothing of ours.
    #[error("no .safetensors file is in this folder or below it")]
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
        if !is_safetensors(&path) {
            return;
        }
        // The weights of a PEFT folder stand for the folder.
        match path.parent() {
            Some(folder) if path.ends_with(PEFT_WEIGHTS) => self.paths.push(folder.to_owned()),
            _ => self.paths.push(path),
        }
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
                let is_weights_of_a_source = path.ends_with(PEFT_WEIGHTS)
                    && path
                        .parent()
                        .is_some_and(|folder| self.paths.iter().any(|p| p == folder));
                if (end.is_dir() || is_safetensors(&path)) && !is_weights_of_a_source {
                    self.links_out.push(path);
                }
            }
            // Reading it will say what is wrong.
            Err(_) => self.add_file(path),
        }
    }
}

fn is_safetensors(path: &Path) -> bool {
    path.extension()
        .is_some_and(|ending| ending.eq_ignore_ascii_case("safetensors"))
}
