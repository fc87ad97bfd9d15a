//! Many files: a line each.
#![allow(
    clippy::unicode_not_nfc,
    reason = "file names come in every normal form"
)]

use std::fs;
use std::time::Duration;

use insta::assert_snapshot;
use qwenlora_keys::{Console, Exit};

use crate::Folder;
use crate::corpus;
use crate::lora_file::{self, LoraFile, SQUARE};

/// A folder with one file of every fate.
fn fates() -> Folder {
    let folder = Folder::new();
    fs::create_dir_all(folder.join("loras/peft")).unwrap();
    lora_file::clean().write(folder.join("loras/style-v10.safetensors"));
    lora_file::clean().write(folder.join("loras/style-v9.safetensors"));
    lora_file::partial().write(folder.join("loras/partial.safetensors"));
    lora_file::flux().write(folder.join("loras/flux.safetensors"));
    lora_file::lokr().write(folder.join("loras/lokr.safetensors"));
    LoraFile::new()
        .peft_pair("base_model.model.transformer_blocks.3.attn.to_q", 8, SQUARE)
        .write(folder.join("loras/peft/adapter_model.safetensors"));
    LoraFile::new()
        .pair("lora_unet_layers_0_attention_to_q", 8, (3840, 3840))
        .write(folder.join("loras/z.safetensors"));
    fs::write(folder.join("loras/cut.safetensors"), b"\x10").unwrap();
    fs::write(folder.join("loras/preview.png"), b"no tensor").unwrap();
    let long = "画像のスタイル-a-rather-long-name-as-trainers-write-it-000002500.safetensors";
    lora_file::clean().write(folder.join(&format!("loras/{long}")));
    folder
}

#[test]
fn a_folder() {
    let folder = fates();
    assert_snapshot!(folder.run([folder.join("loras")]).text(), @"
    exit 3
    --- stdout
    VERDICT  FILE                     SIZE  KIND    RANK  SCALE  TRAINS, OR WHY NOT
    ERROR    cut                            the file is too short for a safetensors…
    REJECT   flux                     384K  a FLUX or HunyuanVideo LoRA
    APPLY    lokr                     4.2M  LoKr    full         attn
    PARTIAL  partial                  879K  LoRA+  16-32         2 of 4 lost: AdaLo…
    APPLY    peft/                     96K  LoRA       8         attn 1/60, 1 note
    APPLY    style-v9                 2.4M  LoRA      16    0.5  attn mod 2/60
    APPLY    style-v10                2.4M  LoRA      16    0.5  attn mod 2/60
    APPLY    z                        120K  LoRA       8         attn 1/30
    APPLY    画像のスタ…it-000002500  2.4M  LoRA      16    0.5  attn mod 2/60
    --- stderr
    error: `[dir]/loras/cut.safetensors`: the file is too short for a safetensors header: 1 bytes
    hint: a download or a save did not finish; get the file again
    9 files in `[dir]/loras`: 6 apply, 1 partial, 1 reject, 1 unreadable
    ");
}

#[test]
fn a_wider_terminal() {
    let folder = fates();
    let console = Console {
        columns: 110,
        ..Console::UNWATCHED
    };
    let outcome = folder.run_on(console, [folder.join("loras")]);
    assert_snapshot!(outcome.stdout, @"
    VERDICT  FILE                                      SIZE  KIND    RANK  SCALE  TRAINS, OR WHY NOT
    ERROR    cut                                             the file is too short for a safetensors header: 1 by…
    REJECT   flux                                      384K  a FLUX or HunyuanVideo LoRA
    APPLY    lokr                                      4.2M  LoKr    full         attn
    PARTIAL  partial                                   879K  LoRA+  16-32         2 of 4 lost: AdaLoRA is not sup…
    APPLY    peft/                                      96K  LoRA       8         attn 1/60, 1 note
    APPLY    style-v9                                  2.4M  LoRA      16    0.5  attn mod 2/60
    APPLY    style-v10                                 2.4M  LoRA      16    0.5  attn mod 2/60
    APPLY    z                                         120K  LoRA       8         attn 1/30
    APPLY    画像のスタイル-a-ra…s-write-it-000002500  2.4M  LoRA      16    0.5  attn mod 2/60
    ");
}

#[test]
fn more_than_three_named_files() {
    let folder = Folder::new();
    let clean = lora_file::clean().write(folder.join("clean.safetensors"));
    let pickle = folder.join("style.pt");
    fs::write(&pickle, b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.").unwrap();
    let missing = folder.join("missing.safetensors");
    let outcome = folder.run([&pickle, &clean, &clean]);
    assert_eq!(outcome.stdout.matches("APPLY").count(), 2);
    assert!(!outcome.stdout.contains("VERDICT"));
    // Named files keep their order, and all are reported on.
    let outcome = folder.run([&pickle, &clean, &missing, &clean]);
    let marks: Vec<&str> = outcome
        .stdout
        .lines()
        .map(|line| line.split(' ').next().unwrap())
        .collect();
    assert_eq!(marks, ["VERDICT", "ERROR", "APPLY", "ERROR", "APPLY"]);
    assert!(
        outcome
            .stderr
            .ends_with("4 files in `[dir]`: 2 apply, 2 unreadable\n")
    );
    assert_eq!(outcome.exit, Exit::Unreadable);
}

#[test]
fn the_corpus_fits_and_no_two_runs_differ() {
    let folder = Folder::new();
    for (name, file) in corpus::files() {
        file.write(folder.join(&format!("{name}.safetensors")));
    }
    let first = folder.run([folder.path()]);
    assert_eq!(first.stdout.lines().count(), corpus::files().len() + 1);
    for line in first.stdout.lines() {
        assert!(line.chars().count() <= 80, "{line}");
    }
    for _ in 0..3 {
        assert_eq!(folder.run([folder.path()]).text(), first.text());
    }
}

#[test]
fn hundreds_of_files() {
    let folder = Folder::new();
    for number in 1..=200 {
        lora_file::clean().write(folder.join(&format!("style-{number}.safetensors")));
    }
    let outcome = folder.run([folder.path()]);
    let names: Vec<&str> = outcome
        .stdout
        .lines()
        .skip(1)
        .map(|line| line.split_whitespace().nth(1).unwrap())
        .collect();
    let expected: Vec<String> = (1..=200).map(|number| format!("style-{number}")).collect();
    assert_eq!(names, expected);
    assert_eq!(outcome.stderr, "200 files in `[dir]`: 200 apply\n");
    // JSON comes in the same order.
    let lines = folder
        .run(["--json".into(), folder.path().to_owned()])
        .stdout;
    for (line, number) in lines.lines().zip(1..=200) {
        assert!(
            line.contains(&format!("/style-{number}.safetensors\"")),
            "{line}"
        );
    }
    assert_eq!(lines.lines().count(), 200);
}

#[test]
fn progress_is_shown_to_who_waits_and_leaves_nothing_behind() {
    let folder = fates();
    let console = Console {
        progress_after: Some(Duration::ZERO),
        ..Console::UNWATCHED
    };
    let watched = folder.run_on(console, [folder.join("loras")]);
    let silent = folder.run([folder.join("loras")]);
    assert_eq!(watched.stdout, silent.stdout);
    assert!(
        watched.stderr.starts_with("0 files found\r             \r"),
        "{:?}",
        watched.stderr
    );
    assert!(
        watched.stderr.contains(" of 9 files read\r"),
        "{:?}",
        watched.stderr
    );
    // What remains of each line is what was written after the last return.
    let remains: String = watched
        .stderr
        .split_inclusive('\n')
        .map(|line| line.rsplit('\r').next().unwrap())
        .collect();
    assert_eq!(remains, silent.stderr);
}

#[test]
fn a_file_for_itself_is_a_screen_even_in_a_folder() {
    let folder = Folder::new();
    let path = lora_file::clean().write(folder.join("clean.safetensors"));
    assert_eq!(
        folder.run([folder.path()]).text(),
        folder.run([path]).text()
    );
}

#[test]
fn all_tensors_of_a_folder_are_screens() {
    let folder = fates();
    let outcome = folder.run(["--all".into(), folder.join("loras")]);
    assert!(!outcome.stdout.contains("VERDICT"));
    assert_eq!(outcome.stdout.matches("\n  file       ").count(), 8);
}

#[test]
#[cfg(target_os = "linux")]
fn hostile_names() {
    use std::ffi::OsString;
    use std::os::unix::ffi::OsStringExt;
    let folder = Folder::new();
    for name in [
        &b"a\x1b[2J\nAPPLY    fine.safetensors"[..],
        b"b\xff\xfe.safetensors",
        "c\u{202e}gnp.safetensors".as_bytes(),
        "d\u{200b}e\u{301}.safetensors".as_bytes(),
        b"-rf.safetensors",
    ] {
        let name = OsString::from_vec(name.to_vec());
        lora_file::clean().write(folder.path().join(name));
    }
    assert_snapshot!(folder.run([folder.path()]).text(), @r"
    exit 0
    --- stdout
    VERDICT  FILE                        SIZE  KIND  RANK  SCALE  TRAINS, OR WHY NOT
    APPLY    -rf                         2.4M  LoRA    16    0.5  attn mod 2/60
    APPLY    a\u{1b}[2J\u…APPLY    fine  2.4M  LoRA    16    0.5  attn mod 2/60
    APPLY    b��                         2.4M  LoRA    16    0.5  attn mod 2/60
    APPLY    c\u{202e}gnp                2.4M  LoRA    16    0.5  attn mod 2/60
    APPLY    d\u{200b}é                  2.4M  LoRA    16    0.5  attn mod 2/60
    --- stderr
    5 files in `[dir]`: 5 apply
    ");
}

#[test]
#[cfg(unix)]
fn what_is_no_file_does_not_hang() {
    let folder = fates();
    let fifo = folder.join("loras/a.safetensors");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status();
    assert!(made.unwrap().success());
    let outcome = folder.run([folder.join("loras")]);
    assert_snapshot!(outcome.stdout.lines().nth(1).unwrap(), @"ERROR    a                              is not a regular file");
}
