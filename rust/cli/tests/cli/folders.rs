//! Several files, folders, and the exit status of all of them.

use std::fs;

use insta::assert_snapshot;
use qwenlora_keys::Exit;

use crate::Folder;
use crate::lora_file::{self, LoraFile, SQUARE};

#[test]
fn several_files() {
    let folder = Folder::new();
    let clean = lora_file::clean().write(folder.join("clean.safetensors"));
    let flux = lora_file::flux().write(folder.join("flux.safetensors"));
    fs::write(folder.join("zero.safetensors"), b"").unwrap();
    let outcome = folder.run([clean, folder.join("zero.safetensors"), flux]);
    assert_snapshot!(outcome.text(), @"
    exit 3
    --- stdout
    APPLY        [dir]/clean.safetensors
                 all 8 modules are applied

      model      Qwen-Image
      producer   musubi-tuner (metadata `ss_network_module`)
      file       2.4 MiB, 24 tensors, BF16
      adapters   LoRA (8)
      ranks      16
      scales     0.5
      slots      4, rank at most 48 each
      attention  2/60 blocks (0-1): attn.to_q attn.to_k attn.to_v
      modulation 2/60 blocks (0-1): img_mod.1

    REJECT       [dir]/flux.safetensors
                 a FLUX LoRA (it has
                 `transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight`)
      left out   4 tensors: another model's
        e.g.     transformer.transformer_blocks.0.attn.to_q.lora_A.weight

      model      not Qwen-Image
      producer   unknown (diffusers keys)
      file       384.5 KiB, 4 tensors, BF16
    --- stderr
    error: `[dir]/zero.safetensors`: the file is empty
    hint: a download or a save did not finish; get the file again
    3 files: 1 apply, 1 reject, 1 unreadable
    ");
}

#[test]
fn the_worst_file_decides() {
    let folder = Folder::new();
    let clean = lora_file::clean().write(folder.join("clean.safetensors"));
    let partial = lora_file::partial().write(folder.join("partial.safetensors"));
    let flux = lora_file::flux().write(folder.join("flux.safetensors"));
    let missing = folder.join("missing.safetensors");
    let exit = |files: &[&std::path::PathBuf]| folder.run(files.iter().copied()).exit;
    assert_eq!(exit(&[&clean]), Exit::Applies);
    assert_eq!(exit(&[&partial, &clean]), Exit::Partial);
    assert_eq!(exit(&[&clean, &flux, &partial]), Exit::Rejected);
    assert_eq!(exit(&[&missing, &flux, &partial, &clean]), Exit::Unreadable);
    let codes = [
        Exit::Applies,
        Exit::Partial,
        Exit::Rejected,
        Exit::Unreadable,
    ]
    .map(Exit::code);
    assert_eq!(codes, [0, 1, 2, 3]);
    assert_eq!([Exit::Usage.code(), Exit::Unwritable.code()], [64, 74]);
}

#[test]
fn a_folder_is_what_lies_below_it_in_order() {
    let folder = Folder::new();
    fs::create_dir_all(folder.join("loras/b/c")).unwrap();
    for name in [
        "loras/z.safetensors",
        "loras/b/a.SafeTensors",
        "loras/b/c/d.safetensors",
    ] {
        lora_file::clean().write(folder.join(name));
    }
    fs::write(folder.join("loras/b/notes.txt"), "no tensor").unwrap();
    let outcome = folder.run([folder.join("loras")]);
    assert_snapshot!(outcome.stdout, @"
    VERDICT  FILE   SIZE  KIND  RANK  SCALE  TRAINS, OR WHY NOT
    APPLY    b/a    2.4M  LoRA    16    0.5  attn mod 2/60
    APPLY    b/c/d  2.4M  LoRA    16    0.5  attn mod 2/60
    APPLY    z      2.4M  LoRA    16    0.5  attn mod 2/60
    ");
    let summary = "3 files in `[dir]/loras`: 3 apply\n";
    assert_eq!(
        (outcome.exit, outcome.stderr.as_str()),
        (Exit::Applies, summary)
    );
}

#[test]
fn a_peft_folder_is_one_source() {
    let folder = Folder::new();
    fs::create_dir_all(folder.join("runs/peft")).unwrap();
    fs::write(
        folder.join("runs/peft/adapter_config.json"),
        r#"{"r": 8, "lora_alpha": 4}"#,
    )
    .unwrap();
    LoraFile::new()
        .peft_pair(
            "base_model.model.transformer_blocks.40.attn.to_q",
            8,
            SQUARE,
        )
        .write(folder.join("runs/peft/adapter_model.safetensors"));
    let named = folder.run([folder.join("runs/peft")]);
    assert_snapshot!(named.text(), @"
    exit 0
    --- stdout
    APPLY        [dir]/runs/peft
                 its one module is applied

      model      Qwen-Image
      producer   probably PEFT (by its keys)
      file       96.2 KiB, 2 tensors, BF16
      adapters   LoRA (1)
      ranks      8
      scales     0.5
      slots      1, rank at most 8 (`transformer_blocks.40.attn.to_qkv`)
      attention  1/60 blocks (40): attn.to_q
    ");
    // Below a folder it is the same source, under the same name.
    assert_eq!(folder.run([folder.join("runs")]).text(), named.text());
    // What else lies in it is not passed over.
    lora_file::clean().write(folder.join("runs/peft/other.safetensors"));
    let outcome = folder.run([folder.join("runs/peft")]);
    assert_snapshot!(outcome.stdout, @"
    VERDICT  FILE        SIZE  KIND  RANK  SCALE  TRAINS, OR WHY NOT
    APPLY    peft/        96K  LoRA     8    0.5  attn 1/60
    APPLY    peft/other  2.4M  LoRA    16    0.5  attn mod 2/60
    ");
}

#[test]
fn an_empty_folder() {
    let folder = Folder::new();
    assert_snapshot!(folder.run([folder.path()]).text(), @"
    exit 3
    --- stderr
    error: `[dir]`: no .safetensors file is in this folder or below it
    ");
}

#[test]
#[cfg(unix)]
fn links_are_followed_inside_the_folder_only() {
    use std::os::unix::fs::symlink;
    let folder = Folder::new();
    fs::create_dir_all(folder.join("loras/real")).unwrap();
    fs::create_dir_all(folder.join("away")).unwrap();
    lora_file::clean().write(folder.join("loras/real/a.safetensors"));
    lora_file::clean().write(folder.join("away/b.safetensors"));
    symlink(
        folder.join("loras/real/a.safetensors"),
        folder.join("loras/in.safetensors"),
    )
    .unwrap();
    symlink(folder.join("loras"), folder.join("loras/real/loop")).unwrap();
    symlink(folder.join("away"), folder.join("loras/away")).unwrap();
    symlink(
        folder.join("away/b.safetensors"),
        folder.join("loras/out.safetensors"),
    )
    .unwrap();
    let outcome = folder.run([folder.join("loras")]);
    assert_snapshot!(outcome.stdout, @"
    VERDICT  FILE    SIZE  KIND  RANK  SCALE  TRAINS, OR WHY NOT
    APPLY    in      2.4M  LoRA    16    0.5  attn mod 2/60
    APPLY    real/a  2.4M  LoRA    16    0.5  attn mod 2/60
    ");
    assert_snapshot!(outcome.stderr, @"
    note: 2 links out of the folder left unread, e.g. `[dir]/loras/away`
    hint: name what they lead to
    2 files in `[dir]/loras`: 2 apply
    ");
    assert_eq!(outcome.exit, Exit::Applies);
}

#[test]
#[cfg(unix)]
fn a_peft_folder_of_links_is_read_where_it_is_named() {
    let folder = Folder::new();
    fs::create_dir(folder.join("snapshot")).unwrap();
    let blob = lora_file::clean().write(folder.join("blob"));
    std::os::unix::fs::symlink(blob, folder.join("snapshot/adapter_model.safetensors")).unwrap();
    let outcome = folder.run([folder.join("snapshot")]);
    assert!(outcome.stdout.starts_with("APPLY        [dir]/snapshot\n"));
    assert_eq!(outcome.stderr, "");
}

#[test]
#[cfg(unix)]
fn a_folder_of_links_that_lead_out() {
    let folder = Folder::new();
    fs::create_dir(folder.join("loras")).unwrap();
    let away = lora_file::clean().write(folder.join("away.safetensors"));
    std::os::unix::fs::symlink(away, folder.join("loras/out.safetensors")).unwrap();
    assert_snapshot!(folder.run([folder.join("loras")]).text(), @"
    exit 3
    --- stderr
    error: `[dir]/loras`: no .safetensors file is in this folder or below it
    note: 1 link out of the folder left unread, e.g. `[dir]/loras/out.safetensors`
    hint: name what they lead to
    ");
}
