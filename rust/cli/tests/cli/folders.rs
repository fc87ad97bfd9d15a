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
                 a FLUX or HunyuanVideo LoRA (it has
                 `transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight`)
      left out   4 tensors: another model's
        e.g.     transformer.transformer_blocks.0.attn.to_q.lora_A.weight

      model      not supported
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
fn both_endings_are_listed() {
    let folder = Folder::new();
    for name in ["one.sft", "two.safetensors", "Three.SFT", "two.sft"] {
        lora_file::clean().write(folder.join(name));
    }
    let outcome = folder.run([folder.path()]);
    // The short ending is shown: it may be all that tells two files apart.
    assert_snapshot!(outcome.text(), @"
    exit 0
    --- stdout
    VERDICT  FILE       SIZE  KIND  RANK  SCALE  TRAINS, OR WHY NOT
    APPLY    one.sft    2.4M  LoRA    16    0.5  attn mod 2/60
    APPLY    Three.SFT  2.4M  LoRA    16    0.5  attn mod 2/60
    APPLY    two        2.4M  LoRA    16    0.5  attn mod 2/60
    APPLY    two.sft    2.4M  LoRA    16    0.5  attn mod 2/60
    --- stderr
    4 files in `[dir]`: 4 apply
    ");
    fs::remove_file(folder.join("two.safetensors")).unwrap();
    fs::remove_file(folder.join("Three.SFT")).unwrap();
    fs::remove_file(folder.join("two.sft")).unwrap();
    assert_snapshot!(folder.run([folder.path()]).stdout, @"
    APPLY        [dir]/one.sft
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
    ");
}

#[test]
fn a_peft_folder_may_have_the_short_ending() {
    let folder = Folder::new();
    let module = "base_model.model.transformer_blocks.40.attn.to_q";
    let pair = LoraFile::new().peft_pair(module, 8, SQUARE);
    fs::create_dir(folder.join("peft")).unwrap();
    fs::write(
        folder.join("peft/adapter_config.json"),
        r#"{"lora_alpha": 4}"#,
    )
    .unwrap();
    pair.write(folder.join("peft/adapter_model.sft"));
    let screen = folder.run([folder.join("peft")]).stdout;
    assert!(
        screen.contains("APPLY        [dir]/peft\n") && screen.contains("scales     0.5"),
        "{screen}"
    );
    // Beside the usual name it is a file of its own, which has the same configuration.
    pair.write(folder.join("peft/adapter_model.safetensors"));
    assert_snapshot!(folder.run([folder.join("peft")]).stdout, @"
    VERDICT  FILE                    SIZE  KIND  RANK  SCALE  TRAINS, OR WHY NOT
    APPLY    peft/                    96K  LoRA     8    0.5  attn 1/60
    APPLY    peft/adapter_model.sft   96K  LoRA     8    0.5  attn 1/60
    ");
}

/// How `torch.save` began files for years.
const PICKLE: &[u8] = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.";

#[test]
fn what_is_not_read_is_counted() {
    let folder = Folder::new();
    fs::create_dir_all(folder.join("runs/first")).unwrap();
    lora_file::clean().write(folder.join("style.safetensors"));
    for name in ["runs/first/adapter_model.bin", "runs/old.PT", "old.ckpt"] {
        fs::write(folder.join(name), PICKLE).unwrap();
    }
    // Not LoRAs: what a program trains on with, and what only ends alike.
    for name in [
        "runs/first/optimizer.pt",
        "runs/first/rng_state_0.pth",
        "x.txt",
    ] {
        fs::write(folder.join(name), PICKLE).unwrap();
    }
    fs::write(folder.join("firmware.bin"), b"\x7fELF and so on").unwrap();
    for name in [
        "pack.zip",
        "b.safetensors.part",
        "Unconfirmed 12.crdownload",
    ] {
        fs::write(folder.join(name), b"PK").unwrap();
    }
    assert_snapshot!(folder.run([folder.path()]).text(), @r#"
    exit 0
    --- stdout
    APPLY        [dir]/style.safetensors
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
    --- stderr
    note: 3 PyTorch pickles passed over, e.g. `[dir]/old.ckpt`
    hint: a LoRA in such a file is read once it is converted: `python -c "import torch, safetensors.torch as st; st.save_file(torch.load('lora.pt', weights_only=True), 'lora.safetensors')"`
    note: 1 archive passed over, e.g. `[dir]/pack.zip`
    hint: a LoRA in such a file is read once it is unpacked
    note: 2 unfinished downloads passed over, e.g. `[dir]/b.safetensors.part`
    hint: get such a file again, or wait for its end
    "#);
    assert_snapshot!(folder.run([folder.join("runs")]).text(), @r#"
    exit 3
    --- stderr
    error: `[dir]/runs`: no .safetensors or .sft file is in this folder or below it
    note: 2 PyTorch pickles passed over, e.g. `[dir]/runs/first/adapter_model.bin`
    hint: a LoRA in such a file is read once it is converted: `python -c "import torch, safetensors.torch as st; st.save_file(torch.load('lora.pt', weights_only=True), 'lora.safetensors')"`
    "#);
    assert_snapshot!(folder.run([folder.join("runs/first")]).text(), @r#"
    exit 3
    --- stderr
    error: `[dir]/runs/first`: no .safetensors or .sft file is in this folder or below it
    note: 1 PyTorch pickle passed over, e.g. `[dir]/runs/first/adapter_model.bin`
    hint: a LoRA in such a file is read once it is converted: `python -c "import torch, safetensors.torch as st; st.save_file(torch.load('lora.pt', weights_only=True), 'lora.safetensors')"`
    "#);
}

#[test]
fn an_empty_folder() {
    let folder = Folder::new();
    assert_snapshot!(folder.run([folder.path()]).text(), @"
    exit 3
    --- stderr
    error: `[dir]`: no .safetensors or .sft file is in this folder or below it
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
    error: `[dir]/loras`: no .safetensors or .sft file is in this folder or below it
    note: 1 link out of the folder left unread, e.g. `[dir]/loras/out.safetensors`
    hint: name what they lead to
    ");
}
