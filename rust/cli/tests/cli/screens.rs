//! What a readable file looks like.

use insta::assert_snapshot;

use crate::Folder;
use crate::lora_file::{self, LoraFile, SQUARE};

fn screen(file: &LoraFile, flags: &[&str]) -> String {
    let folder = Folder::new();
    let path = file.write(folder.join("style.safetensors"));
    let flags = flags.iter().map(std::ffi::OsString::from);
    let outcome = folder.run(flags.chain([path.into_os_string()]));
    assert_eq!(outcome.stderr, "");
    outcome.text()
}

#[test]
fn a_clean_file() {
    assert_snapshot!(screen(&lora_file::clean(), &[]), @"
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
    ");
}

#[test]
fn a_partial_file() {
    assert_snapshot!(screen(&lora_file::partial(), &[]), @"
    exit 1
    --- stdout
    PARTIAL      [dir]/style.safetensors
                 2 of 4 modules are applied
      lost       1 module: AdaLoRA is not supported: only PEFT knows what its
                 tensors make up
        e.g.     diffusion_model.transformer_blocks.7.attn.to_v.lora_A.weight
                 1 module: has down but no up
        e.g.     diffusion_model.transformer_blocks.7.attn.to_out.0.lora_A.weight
      left out   1 tensor: text encoder `text_encoder`
        e.g.     text_encoder.layers.0.q.lora_A.weight

      model      Qwen-Image
      producer   unknown (ComfyUI keys, as diffusion-pipe and many trainers write)
      file       879.1 KiB, 10 tensors, BF16 (8), F32 (1)
      adapters   LoRA (2), AdaLoRA (1)
      ranks      16 (1), 32 (1)
      scales     1
      slots      1, rank at most 48 (`transformer_blocks.7.attn.to_qkv`)
      attention  1/60 blocks (7): attn.to_q attn.to_k attn.to_v attn.to_out.0
      ignored    1 tensor: bookkeeping `_aux`
        e.g.     _aux.step
      note       only attention layers of the first 20 blocks: a FLUX or
                 HunyuanVideo LoRA could look the same
    ");
}

#[test]
fn a_file_of_another_model() {
    assert_snapshot!(screen(&lora_file::flux(), &[]), @"
    exit 2
    --- stdout
    REJECT       [dir]/style.safetensors
                 a FLUX or HunyuanVideo LoRA (it has
                 `transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight`)
      left out   4 tensors: another model's
        e.g.     transformer.transformer_blocks.0.attn.to_q.lora_A.weight

      model      not supported
      producer   unknown (diffusers keys)
      file       384.5 KiB, 4 tensors, BF16
    ");
}

#[test]
fn a_kind_that_is_not_supported() {
    let file = LoraFile::new()
        .tensor(
            "transformer.transformer_blocks.0.attn.to_q.hira_A.weight",
            "BF16",
            &[16, 3072],
        )
        .tensor(
            "transformer.transformer_blocks.1.attn.to_k.hira_A.weight",
            "BF16",
            &[16, 3072],
        );
    assert_snapshot!(screen(&file, &[]), @"
    exit 2
    --- stdout
    REJECT       [dir]/style.safetensors
                 none of its 2 modules is applied
      lost       2 modules: HiRA is not supported: only PEFT knows what its tensors
                 make up
        e.g.     transformer.transformer_blocks.0.attn.to_q.hira_A.weight

      model      Qwen-Image
      producer   unknown
      file       192.2 KiB, 2 tensors, BF16
      adapters   HiRA (2)
      attention  1/60 blocks (0): attn.to_q
                 1/60 blocks (1): attn.to_k
      note       only attention layers of the first 20 blocks: a FLUX or
                 HunyuanVideo LoRA could look the same
    ");
}

#[test]
fn classes_of_exactness_are_said() {
    let module = "diffusion_model.transformer_blocks.30.img_mlp.net.2";
    let magnitude = format!("{module}.dora_scale");
    let file = LoraFile::new()
        .pair(module, 16, (3072, 12288))
        .tensor(&magnitude, "BF16", &[1, 12288])
        .pair(
            "diffusion_model.transformer_blocks.30.img_mlp.net.0.proj",
            16,
            (12288, 3072),
        );
    assert_snapshot!(screen(&file, &[]), @"
    exit 0
    --- stdout
    APPLY        [dir]/style.safetensors
                 all 2 modules are applied

      model      Qwen-Image
      producer   unknown (ComfyUI keys, as its nodes and LightX2V's extractor write)
      file       984.6 KiB, 5 tensors, BF16
      adapters   LoRA (1), DoRA (1)
      ranks      16
      scales     1
      exactness  exact (1), norms estimated (1)
      slots      2, rank at most 16 each
      mlp        1/60 blocks (30): img_mlp.net.0.proj img_mlp.net.2
    ");
}

#[test]
fn a_part_inside_a_kernel_that_is_opened() {
    let mut file = LoraFile::new();
    for name in ["to_q", "to_out.0"] {
        let module = format!("diffusion_model.layers.3.attention.{name}");
        let magnitude = format!("{module}.dora_scale");
        file = file
            .pair(&module, 16, (3840, 3840))
            .tensor(&magnitude, "BF16", &[3840, 1]);
    }
    assert_snapshot!(screen(&file, &[]), @"
    exit 0
    --- stdout
    APPLY        [dir]/style.safetensors
                 all 2 modules are applied

      model      Z-Image
      producer   unknown (ComfyUI keys, as its nodes and LightX2V's extractor write)
      file       495.7 KiB, 6 tensors, BF16
      adapters   DoRA (2)
      ranks      16
      scales     1
      exactness  norms estimated (2)
      slots      2, rank at most 16 each
      attention  1/30 layers (3): attention.to_q attention.to_out.0
    ");
}

#[test]
fn kronecker_products() {
    assert_snapshot!(screen(&lora_file::lokr(), &[]), @"
    exit 0
    --- stdout
    APPLY        [dir]/style.safetensors
                 all 60 modules are applied

      model      Qwen-Image
      producer   ai-toolkit (metadata `software`)
      file       4.2 MiB, 180 tensors, BF16
      adapters   LoKr (60)
      ranks      up to 3072
      scales     1
      slots      60
      attention  60/60 blocks: attn.to_q
    ");
}

#[test]
fn a_file_for_z_image() {
    let file = LoraFile::new().pair("lora_unet_layers_0_attention_to_q", 8, (3840, 3840));
    assert_snapshot!(screen(&file, &[]), @"
    exit 0
    --- stdout
    APPLY        [dir]/style.safetensors
                 its one module is applied

      model      Z-Image
      producer   unknown (kohya keys, as musubi-tuner and Civitai's trainer write)
      file       120.2 KiB, 2 tensors, BF16
      adapters   LoRA (1)
      ranks      8
      scales     1
      slots      1, rank at most 8 (`layers.0.attention.to_qkv`)
      attention  1/30 layers (0): attention.to_q
    ");
}

/// The work of its layers, the refiners, and what stands outside of blocks, under the names of ComfyUI.
#[test]
fn every_kind_of_layer_of_z_image() {
    assert_snapshot!(screen(&lora_file::z_image(), &[]), @"
    exit 0
    --- stdout
    APPLY        [dir]/style.safetensors
                 all 194 modules are applied

      model      Z-Image
      producer   unknown (ComfyUI keys, as its nodes and LightX2V's extractor write)
      file       25.9 MiB, 324 tensors, BF16
      adapters   LoRA (129), norm delta (65)
      ranks      8
      scales     1
      slots      194
      attention  30/30 layers: attention.to_out.0 attention.to_qkv
                 1/2 noise_refiner (1): attention.to_out.0 attention.to_qkv
                 1/2 context_refiner (0): attention.to_out.0 attention.to_qkv
      mlp        30/30 layers: feed_forward.w2
                 1/2 noise_refiner (1): feed_forward.w2
                 1/2 context_refiner (0): feed_forward.w2
      modulation 30/30 layers: adaLN_modulation.0
                 1/2 noise_refiner (1): adaLN_modulation.0
      norms      30/30 layers: attention.norm_q ffn_norm2
                 1/2 noise_refiner (1): attention.norm_q ffn_norm2
                 1/2 context_refiner (0): attention.norm_q ffn_norm2
      top level  all_x_embedder.2-1 all_final_layer.2-1.linear cap_embedder.0
      ignored    1 tensor: a module that the model never uses
        e.g.     diffusion_model.norm_final.diff
    ");
}

#[test]
fn kronecker_products_in_z_image_s_fused_attention() {
    let mut file = LoraFile::new();
    for name in ["to_q", "to_out.0"] {
        let module = format!("diffusion_model.layers.3.attention.{name}");
        file = file
            .alpha(&module, 1e10)
            .tensor(&format!("{module}.lokr_w1"), "BF16", &[4, 4])
            .tensor(&format!("{module}.lokr_w2"), "BF16", &[960, 960]);
    }
    assert_snapshot!(screen(&file, &[]), @"
    exit 0
    --- stdout
    APPLY        [dir]/style.safetensors
                 all 2 modules are applied

      model      Z-Image
      producer   unknown (ComfyUI keys, as diffusion-pipe and many trainers write)
      file       3.5 MiB, 6 tensors, BF16
      adapters   LoKr (2)
      ranks      up to 3840
      scales     1
      slots      2
      attention  1/30 layers (3): attention.to_q attention.to_out.0
    ");
}

/// Lumina-Image 2.0 has Z-Image's names, and as many rows in its fused projection as Z-Image is wide.
#[test]
fn a_look_alike_of_z_image() {
    let file = LoraFile::new()
        .pair("lora_unet_layers_0_attention_qkv", 8, (3840, 2304))
        .pair("lora_unet_layers_0_adaLN_modulation_1", 8, (9216, 1024));
    assert_snapshot!(screen(&file, &[]), @"
    exit 2
    --- stdout
    REJECT       [dir]/style.safetensors
                 a LoRA of another model, probably Lumina-Image 2.0 or NewBie:
                 `layers.0.attention.to_qkv` is 3840x2304 where z-image has
                 11520x3840
      left out   4 tensors: another model's
        e.g.     lora_unet_layers_0_attention_qkv.lora_down.weight

      model      not supported
      producer   unknown (kohya keys, as musubi-tuner and Civitai's trainer write)
      file       256.4 KiB, 4 tensors, BF16
    ");
}

#[test]
fn a_file_that_is_no_lora() {
    let file = LoraFile::new().tensor("decoder.conv_in.weight", "F32", &[4, 4]);
    assert_snapshot!(screen(&file, &[]), @"
    exit 2
    --- stdout
    REJECT       [dir]/style.safetensors
                 a checkpoint of a VAE, not a LoRA: it holds whole weights, as
                 `decoder.conv_in.weight`
      left out   1 tensor: VAE `decoder`
        e.g.     decoder.conv_in.weight

      model      unknown
      producer   unknown
      file       150 bytes, 1 tensor, F32
    ");
}

#[test]
fn an_empty_file() {
    assert_snapshot!(screen(&LoraFile::new(), &[]), @"
    exit 2
    --- stdout
    REJECT       [dir]/style.safetensors
                 the file holds no tensor

      model      unknown
      producer   unknown
      file       10 bytes, 0 tensors
    ");
}

#[test]
fn many_ranks_and_shapes_that_do_not_fit() {
    let mut file = LoraFile::new();
    for block in 0..6 {
        let module = format!(
            "transformer.transformer_blocks.{}.attn.add_q_proj",
            10 * block
        );
        file = file.peft_pair(&module, 4 << block, SQUARE);
    }
    let file = file.peft_pair("transformer.img_in", 4, (3072, 128));
    assert_snapshot!(screen(&file, &[]), @"
    exit 1
    --- stdout
    PARTIAL      [dir]/style.safetensors
                 6 of 7 modules are applied
      lost       1 module: is 3072x128 where qwen-image has 3072x64
        e.g.     transformer.img_in.lora_A.weight

      model      Qwen-Image
      producer   unknown (diffusers keys)
      file       2.9 MiB, 14 tensors, BF16
      adapters   LoRA (7)
      ranks      4 to 128, most often 4 (2)
      scales     1
      slots      6, rank at most 128 each
      attention  6/60 blocks (0, 10, 20, 30, 40, 50): attn.add_q_proj
      top level  img_in
    ");
}

#[test]
fn a_note_on_what_cannot_be_told() {
    let file = LoraFile::new()
        .metadata(
            "lora_adapter_metadata",
            r#"{"transformer.r": 8, "transformer.lora_alpha": 4}"#,
        )
        .peft_pair("transformer.transformer_blocks.3.attn.to_q", 16, SQUARE);
    assert_snapshot!(screen(&file, &[]), @"
    exit 0
    --- stdout
    APPLY        [dir]/style.safetensors
                 its one module is applied

      model      Qwen-Image
      producer   diffusers with PEFT (metadata `lora_adapter_metadata`)
      file       192.3 KiB, 2 tensors, BF16
      adapters   LoRA (1)
      ranks      16
      scales     0.25
      slots      1, rank at most 16 (`transformer_blocks.3.attn.to_qkv`)
      attention  1/60 blocks (3): attn.to_q
      note       only attention layers of the first 20 blocks: a FLUX or
                 HunyuanVideo LoRA could look the same
      note       `transformer_blocks.3.attn.to_q` has rank 16, the metadata says 8:
                 the tensors win
    ");
}

#[test]
fn all_tensors() {
    assert_snapshot!(screen(&lora_file::partial(), &["--all"]), @"
    exit 1
    --- stdout
    PARTIAL      [dir]/style.safetensors
                 2 of 4 modules are applied
      lost       1 module: AdaLoRA is not supported: only PEFT knows what its
                 tensors make up
        e.g.     diffusion_model.transformer_blocks.7.attn.to_v.lora_A.weight
                 1 module: has down but no up
        e.g.     diffusion_model.transformer_blocks.7.attn.to_out.0.lora_A.weight
      left out   1 tensor: text encoder `text_encoder`
        e.g.     text_encoder.layers.0.q.lora_A.weight

      model      Qwen-Image
      producer   unknown (ComfyUI keys, as diffusion-pipe and many trainers write)
      file       879.1 KiB, 10 tensors, BF16 (8), F32 (1)
      adapters   LoRA (2), AdaLoRA (1)
      ranks      16 (1), 32 (1)
      scales     1
      slots      1, rank at most 48 (`transformer_blocks.7.attn.to_qkv`)
      attention  1/60 blocks (7): attn.to_q attn.to_k attn.to_v attn.to_out.0
      ignored    1 tensor: bookkeeping `_aux`
        e.g.     _aux.step
      note       only attention layers of the first 20 blocks: a FLUX or
                 HunyuanVideo LoRA could look the same

      diffusion_model.transformer_blocks.7.attn.to_q.lora_A.weight  BF16 16x3072  -> transformer_blocks.7.attn.to_q down
      diffusion_model.transformer_blocks.7.attn.to_q.lora_B.weight  BF16 3072x16  -> transformer_blocks.7.attn.to_q up
      diffusion_model.transformer_blocks.7.attn.to_k.lora_A.weight  BF16 32x3072  -> transformer_blocks.7.attn.to_k down
      diffusion_model.transformer_blocks.7.attn.to_k.lora_B.weight  BF16 3072x32  -> transformer_blocks.7.attn.to_k up
      diffusion_model.transformer_blocks.7.attn.to_v.lora_A.weight  BF16 16x3072  -> transformer_blocks.7.attn.to_v down, not applied: AdaLoRA is not supported: only PEFT knows what its tensors make up
      diffusion_model.transformer_blocks.7.attn.to_v.lora_B.weight  BF16 3072x16  -> transformer_blocks.7.attn.to_v up, not applied: AdaLoRA is not supported: only PEFT knows what its tensors make up
      diffusion_model.transformer_blocks.7.attn.to_v.lora_E  F32 3072  -> transformer_blocks.7.attn.to_v peft_only, not applied: AdaLoRA is not supported: only PEFT knows what its tensors make up
      diffusion_model.transformer_blocks.7.attn.to_out.0.lora_A.weight  BF16 16x3072  -> transformer_blocks.7.attn.to_out.0 down, not applied: has down but no up
      text_encoder.layers.0.q.lora_A.weight  BF16 16x64  -> ignored: text encoder
      _aux.step  I64 scalar  -> ignored: bookkeeping
    ");
}

#[test]
fn colour_only_where_it_is_wanted() {
    let folder = Folder::new();
    let path = lora_file::partial().write(folder.join("style.safetensors"));
    lora_file::clean().write(folder.join("clean.safetensors"));
    is_painted_alike(&folder, folder.path().to_str().unwrap(), "\x1b[2mVERDICT");
    is_painted_alike(
        &folder,
        path.to_str().unwrap(),
        "\x1b[1;33mPARTIAL\x1b[0m      ",
    );
}

fn is_painted_alike(folder: &Folder, path: &str, start: &str) {
    let plain = folder.run(["--color", "never", path]);
    assert!(!plain.stdout.contains('\x1b'));
    assert_eq!(folder.run(["--color=auto", path]).stdout, plain.stdout);
    let painted = folder.run(["--color=always", path]).stdout;
    assert!(painted.starts_with(start), "{painted:?}");
    // Colour changes no letter.
    let parts = painted
        .split('\x1b')
        .map(|part| match part.strip_prefix('[') {
            Some(rest) => rest.split_once('m').unwrap().1,
            None => part,
        });
    assert_eq!(parts.collect::<String>(), plain.stdout);
}

#[test]
fn a_screen_fits_eighty_columns() {
    for file in [lora_file::clean(), lora_file::partial(), lora_file::lokr()] {
        let text = screen(&file, &[]);
        let widest = text.lines().skip(2).filter(|line| !line.contains("[dir]"));
        assert!(
            widest.map(|line| line.chars().count()).max() <= Some(80),
            "{text}"
        );
    }
}

#[test]
fn more_reasons_than_a_screen_holds() {
    let module = "transformer_blocks.20.attn.to_q";
    let mut file = LoraFile::new().peft_pair(module, 4, SQUARE);
    for name in 'a'..='j' {
        file = file.tensor(
            &format!("{module}.lora_A.{name}.weight"),
            "BF16",
            &[4, 3072],
        );
    }
    let text = screen(&file, &[]);
    let rows: Vec<&str> = text
        .lines()
        .skip_while(|line| !line.contains(" `h` "))
        .take(3)
        .collect();
    assert_snapshot!(rows.join("\n"), @"
             1 tensor: second adapter `h` of this module
    e.g.     transformer_blocks.20.attn.to_q.lora_A.h.weight
             2 tensors for 2 more reasons: `--all` lists them
    ");
}
