//! Files that cannot be read, and arguments that make no sense.

use std::fs;

use insta::assert_snapshot;

use crate::Folder;
use crate::lora_file;

fn text_of(name: &str, content: &[u8]) -> String {
    let folder = Folder::new();
    fs::write(folder.join(name), content).unwrap();
    folder.run([folder.join(name)]).text()
}

#[test]
fn a_malformed_file() {
    assert_snapshot!(text_of("cut.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00{\"a\":"), @"
    exit 3
    --- stderr
    error: `[dir]/cut.safetensors`: the header ends beyond the file: 16 bytes from byte 8 on, in a file of 13 bytes
    hint: the file is cut short or is not safetensors; get the file again
    ");
    assert_snapshot!(text_of("zero.safetensors", b""), @"
    exit 3
    --- stderr
    error: `[dir]/zero.safetensors`: the file is empty
    hint: a download or a save did not finish; get the file again
    ");
    let header = br#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#;
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend([0; 4]);
    assert_snapshot!(text_of("lying.safetensors", &file), @"
    exit 3
    --- stderr
    error: `[dir]/lying.safetensors`: tensor `a`: the data is 4 bytes, but F32 [2] needs 8
    ");
}

#[test]
fn a_pickle() {
    assert_snapshot!(text_of("style.pt", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."), @r#"
    exit 3
    --- stderr
    error: `[dir]/style.pt`: the file is a PyTorch pickle, not safetensors; a pickle can run any code while it loads
    hint: convert it once: `python -c "import torch, safetensors.torch as st; st.save_file(torch.load('lora.pt', weights_only=True), 'lora.safetensors')"`
    "#);
}

#[test]
fn a_missing_file() {
    let folder = Folder::new();
    let outcome = folder.run([folder.join("missing.safetensors")]);
    assert_eq!((outcome.exit.code(), outcome.stdout.as_str()), (3, ""));
    // What the system says differs between systems.
    let start = "error: `[dir]/missing.safetensors`: cannot read the file: ";
    assert!(outcome.stderr.starts_with(start), "{}", outcome.stderr);
}

#[test]
fn a_scale_that_is_no_number() {
    let folder = Folder::new();
    let module = "lora_unet_transformer_blocks_0_attn_to_q";
    let path = lora_file::LoraFile::new()
        .pair(module, 4, lora_file::SQUARE)
        .alpha(module, f32::NAN)
        .write(folder.join("nan.safetensors"));
    assert_snapshot!(folder.run([path]).text(), @"
    exit 3
    --- stderr
    error: `[dir]/nan.safetensors`: `lora_unet_transformer_blocks_0_attn_to_q.alpha` gives a scale of NaN: it must be finite
    ");
}

fn usage(args: &[&str]) -> String {
    Folder::new().run(args).text()
}

#[test]
fn usage_errors() {
    assert_snapshot!(usage(&[]), @"
    exit 64
    --- stderr
    error: no file is named
    hint: `qwenlora-keys --help` shows how to call it
    ");
    assert_snapshot!(usage(&["--jsno", "x"]), @"
    exit 64
    --- stderr
    error: unknown option: `--jsno`
    hint: did you mean `--json`?
    ");
    assert_snapshot!(usage(&["--rank", "x"]), @"
    exit 64
    --- stderr
    error: unknown option: `--rank`
    hint: a file of this name is written `./--rank`
    ");
    assert_snapshot!(usage(&["x", "--explain"]), @"
    exit 64
    --- stderr
    error: `--explain` needs a value: KEY
    ");
    assert_snapshot!(usage(&["x", "--explain", "k", "--all"]), @"
    exit 64
    --- stderr
    error: `--explain` and `--all` cannot be used together
    ");
    assert_snapshot!(usage(&["x", "--map", "--json"]), @"
    exit 64
    --- stderr
    error: `--map` and `--json` cannot be used together
    ");
    assert_snapshot!(usage(&["x", "--map"]), @"
    exit 64
    --- stderr
    error: `--map` reads the weights, which takes PyTorch
    hint: `pip install qwenlora` brings a `qwenlora-keys` that draws maps
    ");
    assert_snapshot!(usage(&["--completions", "tcsh"]), @"
    exit 64
    --- stderr
    error: `--completions` does not know `tcsh`
    hint: it takes bash, elvish, fish, powershell or zsh
    ");
    assert_snapshot!(usage(&["--completions"]), @"
    exit 64
    --- stderr
    error: `--completions` needs a value: bash, elvish, fish, powershell or zsh
    ");
    assert_snapshot!(usage(&["-x"]), @"
    exit 64
    --- stderr
    error: unknown option: `-x`
    hint: a file of this name is written `./-x`
    ");
    assert_snapshot!(usage(&["--json=yes", "x"]), @"
    exit 64
    --- stderr
    error: `--json` takes no value: `yes`
    ");
    assert_snapshot!(usage(&["x", "--color"]), @"
    exit 64
    --- stderr
    error: `--color` needs a value: auto, always or never
    ");
    assert_snapshot!(usage(&["--color", "blue", "x"]), @"
    exit 64
    --- stderr
    error: `--color` does not know `blue`
    hint: it takes auto, always or never
    ");
    assert_snapshot!(usage(&["--\u{1b}[2J\n"]), @r"
    exit 64
    --- stderr
    error: unknown option: `--\u{1b}[2J\u{a}`
    hint: a file of this name is written `./--\u{1b}[2J\u{a}`
    ");
}

#[test]
fn help() {
    assert_snapshot!(usage(&["--help"]), @r#"
    exit 0
    --- stdout
    Says what LoRA files for Qwen-Image and Z-Image contain, and what qwenlora would
    do with them on a 4-bit model. Needs no torch, no GPU and no model: it reads
    names, shapes and single values only.

    Usage: qwenlora-keys [OPTIONS] FILE...
           qwenlora-keys [OPTIONS] --explain KEY [FILE...]
           qwenlora-keys --completions SHELL

    Arguments:
      [FILE]...  a .safetensors or .sft file, a PEFT folder (its weights in
                 adapter_model.safetensors, beside them adapter_config.json),
                 or any folder of such

    Options:
          --all                  also list every tensor, and what it is taken for
          --explain <KEY>        why a key maps there: prefix, path, suffix, scale
          --map                  also draw where the file acts, and how strongly
          --json                 one JSON object per file, one per line (schema 1)
          --color <WHEN>         auto (a terminal without NO_COLOR), always or never
          --completions <SHELL>  completions: bash, elvish, fish, powershell or zsh
      -h, --help                 this text
      -V, --version              the version

    One file gives one screen. A folder, or more than three files, give a table
    with one line each: of a folder all .safetensors and .sft files in it and below
    it, in order of their names. Links that lead out of it are not followed, and
    pickles, archives and unfinished downloads are counted. The report goes to
    standard output; errors, notes and the summary to standard error.

    Examples:
      qwenlora-keys style.safetensors          what is in it, what would be applied
      qwenlora-keys ComfyUI/models/loras       which of my LoRAs work, a line each
      qwenlora-keys --json loras/ | jq -r 'select(.verdict != "apply") | .path'
      qwenlora-keys --explain lora_unet_img_in.alpha style.safetensors

    Verdicts, and the exit status (of several files the worst decides):
      APPLY    0   all that the file trains is applied
      PARTIAL  1   a part is applied; the rest is listed with the reason
      REJECT   2   nothing is applied: an adapter kind that is not supported, or
                   another model's file
      ERROR    3   the file cannot be read, or is no valid safetensors file
               1   --explain: no such key in some file
              64   the arguments make no sense
              74   the report cannot be written

    What a screen says:
      lost         modules that are not applied, and why
      left out     other tensors that are not applied, and why
      producer     the program that wrote the file; `probably` when its keys tell,
                   `unknown` when several programs write such keys
      ranks        stored ranks; `up to` where only a bound can be told
      scales       factors at strength 1 (alpha / rank and its kin)
      slots        the model's layers that are reached: q, k and v share one
      attention …  what is trained, and in how many of the model's blocks
      ignored      tensors without effect on the image

    More: docs/keys.md in qwenlora's repository
    "#);
    assert_eq!(usage(&["-h"]), usage(&["--help", "--nonsense"]));
    assert!(
        usage(&["-h"])
            .lines()
            .all(|line| line.chars().count() <= 80)
    );
}

#[test]
fn version() {
    let version = format!(
        "exit 0\n--- stdout\nqwenlora-keys {}\n",
        env!("CARGO_PKG_VERSION")
    );
    assert_eq!(usage(&["--version"]), version);
    assert_eq!(usage(&["-V"]), version);
}
