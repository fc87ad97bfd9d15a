//! Names that would like to drive the terminal.

use insta::assert_snapshot;
use serde_json::Value;

use crate::Folder;
use crate::lora_file::{LoraFile, SQUARE};

/// Clears the screen, starts a line that looks like ours, turns the text round.
const HOSTILE: &str = "x\u{1b}[2J\nAPPLY        fine.safetensors\r\u{9b}31m\u{202e}`";

fn hostile() -> LoraFile {
    let long = format!("single_blocks.{}", "y".repeat(900));
    LoraFile::new()
        .peft_pair("transformer_blocks.0.attn.to_q", 4, SQUARE)
        .tensor(HOSTILE, "F32", &[2])
        .tensor(
            &format!("transformer_blocks.0.attn.to_q.lora_A.{HOSTILE}.weight"),
            "BF16",
            &[4, 3072],
        )
        .tensor(&long, "F32", &[2])
        .metadata("software", HOSTILE)
}

/// What no terminal obeys and no reader is deceived by.
fn is_harmless(text: &str) -> bool {
    text.chars()
        .all(|c| c == '\n' || !(c.is_control() || ('\u{2028}'..='\u{202e}').contains(&c)))
}

#[test]
fn hostile_keys() {
    let folder = Folder::new();
    let path = hostile().write(folder.join("hostile.safetensors"));
    let path = path.to_str().unwrap();
    let outcome = folder.run([path]);
    assert!(is_harmless(&outcome.stdout), "{:?}", outcome.stdout);
    assert_snapshot!(outcome.text(), @"
    exit 2
    --- stdout
    REJECT       [dir]/hostile.safetensors
                 a FLUX, Chroma or HunyuanVideo LoRA (it has
                 `single_blocks.yyyyyyyyyyyyyyyyyyyyyyy…yyyy…yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy`
                 (914 bytes))
      left out   5 tensors: another model's
        e.g.     transformer_blocks.0.attn.to_q.lora_A.weight

      model      not supported
      producer   unknown (plain keys, as VideoX-Fun and converters write)
      file       73.5 KiB, 5 tensors, BF16 (3), F32 (2)
    ");
    let all = folder.run(["--all", path]);
    assert!(is_harmless(&all.stdout), "{:?}", all.stdout);
    assert_eq!(
        all.stdout
            .lines()
            .filter(|line| line.starts_with("APPLY"))
            .count(),
        0
    );
}

#[test]
fn hostile_keys_decide_the_verdict() {
    let folder = Folder::new();
    let key = format!("single_blocks.{HOSTILE}{}", "z".repeat(900));
    let file = LoraFile::new().tensor(&key, "F32", &[2]);
    let path = file.write(folder.join("hostile.safetensors"));
    let outcome = folder.run([path]);
    assert!(is_harmless(&outcome.stdout), "{:?}", outcome.stdout);
    assert_snapshot!(outcome.text(), @r"
    exit 2
    --- stdout
    REJECT       [dir]/hostile.safetensors
                 a FLUX, Chroma or HunyuanVideo LoRA (it has
                 `single_blocks.x\u{1b}[2J\u{a}APPLY
                 fine.safetensors\u{d}\u{9b}31m\u{202e}…{60}…zzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzz`
                 (959 bytes))
      left out   1 tensor: another model's
        e.g.     single_blocks.x\u{1b}[2J\u{a}APPL…zzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzz

      model      not supported
      producer   unknown
      file       1.0 KiB, 1 tensor, F32
    ");
}

#[test]
fn hostile_keys_in_json_mean_the_same() {
    let folder = Folder::new();
    let path = hostile().write(folder.join("hostile.safetensors"));
    let outcome = folder.run(["--json", path.to_str().unwrap()]);
    assert!(is_harmless(&outcome.stdout));
    let document: Value = serde_json::from_str(&outcome.stdout).unwrap();
    assert_eq!(document["tensors"][2]["key"], HOSTILE);
}

#[test]
#[cfg(target_os = "linux")]
fn hostile_paths() {
    use std::ffi::OsString;
    use std::os::unix::ffi::OsStringExt;
    let folder = Folder::new();
    let name = OsString::from_vec(b"a\xff\x1b[2J\nb.safetensors".to_vec());
    let path = folder.path().join(&name);
    crate::lora_file::clean().write(&path);
    let outcome = folder.run([&path]);
    assert_snapshot!(outcome.stdout.lines().next().unwrap(), @r"APPLY        [dir]/a�\u{1b}[2J\u{a}b.safetensors");
    let document = folder.run(["--json".into(), path.clone().into_os_string()]);
    let document: Value = serde_json::from_str(&document.stdout).unwrap();
    assert_eq!(document["path"], "[dir]/a\u{fffd}\u{1b}[2J\nb.safetensors");
    std::fs::write(&path, b"").unwrap();
    assert_snapshot!(folder.run([folder.path()]).text(), @r"
    exit 3
    --- stderr
    error: `[dir]/a�\u{1b}[2J\u{a}b.safetensors`: the file is empty
    hint: a download or a save did not finish; get the file again
    ");
    let empty = folder
        .path()
        .join(OsString::from_vec(b"e\xff\x1b[2J\ndir".to_vec()));
    std::fs::create_dir(&empty).unwrap();
    assert_snapshot!(folder.run([empty]).text(), @r"
    exit 3
    --- stderr
    error: `[dir]/e�\u{1b}[2J\u{a}dir`: no .safetensors or .sft file is in this folder or below it
    ");
}
