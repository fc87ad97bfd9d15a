//! `--json`: a line per file, whatever becomes of it.

use std::fs;

use insta::assert_snapshot;
use serde_json::Value;

use crate::Folder;
use crate::lora_file::{self, LoraFile, SQUARE};

#[test]
fn a_small_file() {
    let folder = Folder::new();
    let module = "lora_unet_transformer_blocks_59_attn_add_k_proj";
    let path = LoraFile::new()
        .metadata("ss_network_module", "networks.lora_qwen_image")
        .pair(module, 4, SQUARE)
        .alpha(module, 1.0)
        .write(folder.join("a.safetensors"));
    let outcome = folder.run(["--json".into(), path]);
    assert_eq!(outcome.stderr, "");
    assert_snapshot!(outcome.stdout, @r#"{"schema":1,"path":"[dir]/a.safetensors","size_bytes":49595,"model":"qwen-image","verdict":"apply","reason":null,"notes":[],"metadata":{"ss_network_module":"networks.lora_qwen_image"},"tensors":[{"key":"lora_unet_transformer_blocks_59_attn_add_k_proj.lora_down.weight","dtype":"BF16","shape":[4,3072],"target":"transformer_blocks.59.attn.add_k_proj","role":"down","reason":null},{"key":"lora_unet_transformer_blocks_59_attn_add_k_proj.lora_up.weight","dtype":"BF16","shape":[3072,4],"target":"transformer_blocks.59.attn.add_k_proj","role":"up","reason":null},{"key":"lora_unet_transformer_blocks_59_attn_add_k_proj.alpha","dtype":"F32","shape":[],"target":"transformer_blocks.59.attn.add_k_proj","role":"alpha","reason":null,"value":1.0}],"modules":[{"target":"transformer_blocks.59.attn.add_k_proj","adapter":"lora","rank":4,"scale":0.25,"supported":true,"exactness":"exact","reason":null,"pieces":[{"kind":"LowRank","adapter":"lora","rank":4,"scale":0.25}]}],"slots":[{"slot":"transformer_blocks.59.attn.add_qkv_proj","rank":4,"parts":["transformer_blocks.59.attn.add_k_proj"]}],"components":[]}"#);
}

#[test]
fn a_line_per_file_even_where_one_cannot_be_read() {
    let folder = Folder::new();
    fs::create_dir(folder.join("empty")).unwrap();
    fs::write(folder.join("zero.safetensors"), b"").unwrap();
    let clean = lora_file::clean().write(folder.join("clean.safetensors"));
    let zero = folder.join("zero.safetensors");
    let outcome = folder.run(["--json".into(), zero, folder.join("empty"), clean]);
    let lines: Vec<&str> = outcome.stdout.lines().collect();
    assert_eq!((outcome.exit.code(), lines.len()), (3, 3));
    assert_snapshot!(lines[..2].join("\n"), @r#"
    {"schema":1,"path":"[dir]/zero.safetensors","error":"`[dir]/zero.safetensors`: the file is empty\nhint: a download or a save did not finish; get the file again"}
    {"schema":1,"path":"[dir]/empty","error":"`[dir]/empty`: no .safetensors or .sft file is in this folder or below it"}
    "#);
    assert_snapshot!(outcome.stderr, @"
    error: `[dir]/zero.safetensors`: the file is empty
    hint: a download or a save did not finish; get the file again
    error: `[dir]/empty`: no .safetensors or .sft file is in this folder or below it
    ");
    let last: Value = serde_json::from_str(lines[2]).unwrap();
    assert_eq!(
        (&last["schema"], &last["verdict"]),
        (&1.into(), &"apply".into())
    );
}
