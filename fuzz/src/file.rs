//! Whole files through the file system: the plan of a file is the plan of its tensors.

use std::fs;
use std::path::Path;
use std::sync::LazyLock;

use qwenlora_core::header::{Header, TensorInfo};
use qwenlora_core::key::reason::Reason;
use qwenlora_core::key::table::RawTensor;
use qwenlora_core::plan::FilePlan;
use tempfile::TempDir;

use crate::{assert_speakable, plan};

/// Where the file under test lies: one per process, written anew each time.
static FOLDER: LazyLock<TempDir> =
    LazyLock::new(|| tempfile::tempdir().expect("there is room for a folder"));

/// Checks a file with these bytes.
pub fn check(bytes: &[u8]) {
    let path = FOLDER.path().join("lora.safetensors");
    fs::write(&path, bytes).expect("the file can be written");
    match (FilePlan::read(&path), FilePlan::read(&path)) {
        (Ok(first), Ok(second)) => {
            assert_eq!(first.to_json(), second.to_json());
            check_read(&first, bytes, &path);
        }
        (Err(first), Err(second)) => {
            assert_eq!(first.to_string(), second.to_string());
            assert_speakable(&first.to_string());
        }
        _ => panic!("the same file is taken and refused"),
    }
}

fn check_read(read: &FilePlan, bytes: &[u8], path: &Path) {
    let len_bytes = bytes.len() as u64;
    let header = Header::read(&mut &*bytes, len_bytes).expect("a plan has a header");
    let names = header.tensors().iter().map(TensorInfo::name);
    let from_file = plan::check(read, names);
    assert_eq!(read.size_bytes(), len_bytes);
    assert_eq!(read.path(), Some(path));
    for entry in read.table().entries() {
        let end = entry
            .tensor
            .offset_bytes
            .checked_add(entry.tensor.len_bytes);
        assert!(
            end.is_some_and(|end| end <= len_bytes),
            "{}",
            entry.tensor.key
        );
    }
    // Of duplicates a file shows the bytes, a state dict only single values.
    let is_duplicate =
        |reason: &Reason| matches!(reason, Reason::DuplicateOf(_) | Reason::UnequalDuplicate(_));
    if read
        .table()
        .entries()
        .iter()
        .any(|e| e.reason.as_ref().is_some_and(is_duplicate))
    {
        return;
    }
    let tensors: Vec<RawTensor> = read
        .table()
        .entries()
        .iter()
        .map(|e| e.tensor.clone())
        .collect();
    let scalars: Vec<Option<f64>> = read.table().entries().iter().map(|e| e.value).collect();
    let metadata = read.metadata().to_vec();
    let in_memory = FilePlan::from_tensors("memory", tensors, &scalars, metadata)
        .expect("what a file may hold, a state dict may, too");
    let in_memory: serde_json::Value =
        serde_json::from_str(&in_memory.to_json()).expect("the document is JSON");
    for part in [
        "model", "verdict", "reason", "notes", "tensors", "modules", "slots",
    ] {
        assert_eq!(in_memory[part], from_file[part], "{part}");
    }
}
