//! The core's folders use each other one way: the list in `lib.rs`, from top to bottom.
#![allow(missing_docs)]

use std::fs;
use std::path::{Path, PathBuf};

/// A folder may use itself and those before it.
const ORDER: [&str; 11] = [
    "work", "dtype", "header", "packed", "weight", "source", "model", "key", "adapter", "plan",
    "stack",
];

fn sources(folder: &Path, into: &mut Vec<PathBuf>) {
    for row in fs::read_dir(folder).expect("a folder of sources") {
        let path = row.expect("a readable folder").path();
        if path.is_dir() {
            sources(&path, into);
        } else {
            into.push(path);
        }
    }
}

/// The folders that a text names behind `crate::`.
fn used(text: &str) -> impl Iterator<Item = &str> {
    let behind = text.split("crate::").skip(1);
    behind.filter_map(|rest| {
        rest.split(|c: char| !c.is_alphanumeric() && c != '_')
            .next()
    })
}

#[test]
fn folders_use_only_those_above_them() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let place = |name: &str| ORDER.iter().position(|own| *own == name);
    for (at, folder) in ORDER.into_iter().enumerate() {
        let mut files = Vec::new();
        sources(&root.join(folder), &mut files);
        assert!(!files.is_empty(), "{folder}");
        for file in files {
            let text = fs::read_to_string(&file).unwrap();
            for name in used(&text) {
                let of = place(name).unwrap_or_else(|| panic!("{file:?}: crate::{name}"));
                assert!(of <= at, "{file:?} uses {name}");
            }
        }
    }
}

#[test]
fn the_root_holds_folders_alone() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut names: Vec<String> = fs::read_dir(root)
        .unwrap()
        .map(|row| row.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != "lib.rs")
        .collect();
    names.sort();
    let mut expected = ORDER.map(str::to_owned);
    expected.sort();
    assert_eq!(names, expected);
}
