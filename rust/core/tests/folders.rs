//! Folders as sources: which weights they stand for, and what is said of those that hold none.

#![expect(clippy::unwrap_used, reason = "the helpers belong to the tests")]

use std::fs;
use std::path::Path;

use insta::assert_snapshot;
use qwenlora_core::plan::config;
use tempfile::TempDir;

/// The message for a folder, without what stands before its name.
fn refusal(folder: &TempDir) -> String {
    let message = config::weights_path(folder.path()).unwrap_err().to_string();
    message.replace(folder.path().to_str().unwrap(), "[dir]")
}

#[test]
fn weights_have_either_ending() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["adapter_model.sft", "adapter_model.safetensors"] {
        fs::write(folder.path().join(name), b"").unwrap();
        let weights = config::weights_path(folder.path()).unwrap();
        assert_eq!(weights, folder.path().join(name));
    }
    for (name, expected) in [
        ("a.safetensors", true),
        ("a.SFT", true),
        ("a.b.sft", true),
        ("sft", false),
        ("a.safetensors.part", false),
        ("a.sfts", false),
    ] {
        assert_eq!(config::is_safetensors(Path::new(name)), expected, "{name}");
    }
}

#[test]
fn a_folder_without_weights_says_what_is_there() {
    let folder = tempfile::tempdir().unwrap();
    assert_snapshot!(refusal(&folder), @"
    `[dir]` is a folder without `adapter_model.safetensors`
    hint: name the LoRA file itself
    ");
    for name in ["z.safetensors", "pytorch_lora_weights.sft"] {
        fs::write(folder.path().join(name), b"").unwrap();
    }
    assert_snapshot!(refusal(&folder), @"
    `[dir]` is a folder without `adapter_model.safetensors`
    hint: name the LoRA file itself, as `pytorch_lora_weights.sft` in it
    ");
    // Only what is a pickle is called one.
    fs::write(folder.path().join("adapter_model.bin"), b"something").unwrap();
    assert!(!refusal(&folder).contains("pickle"));
    let pickle = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.";
    fs::write(folder.path().join("adapter_model.bin"), pickle).unwrap();
    assert_snapshot!(refusal(&folder), @r#"
    `[dir]` holds a PyTorch pickle, `adapter_model.bin`, and no `adapter_model.safetensors`; a pickle can run any code while it loads
    hint: convert it once, in the folder: `python -c "import torch, safetensors.torch as st; st.save_file(torch.load('adapter_model.bin', weights_only=True), 'adapter_model.safetensors')"`
    "#);
}
