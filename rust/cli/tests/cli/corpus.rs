//! The screens of all real key layouts: who wrote them, and that each fits.

use std::fs;
use std::path::Path;

use insta::assert_snapshot;
use serde_json::Value;

use crate::Folder;
use crate::lora_file::LoraFile;

/// The corpus, in order of names.
pub(crate) fn files() -> Vec<(String, LoraFile)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/keys");
    let mut files: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|row| row.unwrap().path())
        .filter(|path| path.extension().is_some_and(|ending| ending == "json"))
        .map(|path| {
            let file: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
            (file["name"].as_str().unwrap().to_owned(), lora_file(&file))
        })
        .collect();
    files.sort_by(|a, b| a.0.cmp(&b.0));
    files
}

fn lora_file(file: &Value) -> LoraFile {
    let mut lora = LoraFile::new();
    for (key, value) in file["metadata"].as_object().unwrap() {
        lora = lora.metadata(key, value.as_str().unwrap());
    }
    for row in file["tensors"].as_array().unwrap() {
        let text = |field: &str| row[field].as_str().unwrap();
        let (key, dtype) = (text("key"), text("dtype"));
        let shape: Vec<u64> = row["shape"]
            .as_array()
            .unwrap()
            .iter()
            .map(|side| side.as_u64().unwrap())
            .collect();
        lora = match bytes(&row["value"], dtype) {
            Some(bytes) => lora.value(key, dtype, &shape, &bytes),
            None => lora.tensor(key, dtype, &shape),
        };
    }
    lora
}

/// A scalar's bytes; half precision is left at zero but where infinity matters.
fn bytes(value: &Value, dtype: &str) -> Option<Vec<u8>> {
    if value == "inf" {
        return Some(vec![0x00, 0x7c]);
    }
    let number = value.as_f64()?;
    Some(match dtype {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "the corpus has small alphas"
        )]
        "I64" => (number as i64).to_le_bytes().to_vec(),
        "F64" => number.to_le_bytes().to_vec(),
        #[expect(clippy::cast_possible_truncation, reason = "as the file was saved")]
        "F32" => (number as f32).to_le_bytes().to_vec(),
        #[expect(clippy::cast_possible_truncation, reason = "as the file was saved")]
        "BF16" => (number as f32).to_le_bytes()[2..].to_vec(),
        _ => return None,
    })
}

#[test]
#[expect(clippy::too_many_lines, reason = "a row for each layout of the corpus")]
fn producers() {
    let folder = Folder::new();
    let mut rows = Vec::new();
    for (name, file) in files() {
        let path = file.write(folder.join("file.safetensors"));
        let outcome = folder.run([path]);
        let line = outcome
            .stdout
            .lines()
            .find_map(|line| line.strip_prefix("  producer   "));
        rows.push(format!("{name:36} {}", line.unwrap()));
    }
    assert_snapshot!(rows.join("\n"), @"
    ai_toolkit_all_layers                ai-toolkit (metadata `software`)
    ai_toolkit_dora                      ai-toolkit (metadata `software`)
    ai_toolkit_full_layers               ai-toolkit (metadata `software`)
    ai_toolkit_fullrank                  ai-toolkit (metadata `software`)
    ai_toolkit_lokr_full_bf16            ai-toolkit (metadata `software`)
    ai_toolkit_lokr_full_f16_inf_alpha   ai-toolkit (metadata `software`)
    ai_toolkit_lokr_lowrank              ai-toolkit (metadata `software`)
    ai_toolkit_lokr_old_prefix           ai-toolkit (metadata `software`)
    ai_toolkit_lora_full60               ai-toolkit (metadata `software`)
    ai_toolkit_lora_transformer_prefix   ai-toolkit (metadata `software`)
    alpha_shape_1                        unknown (kohya keys, as musubi-tuner and Civitai's trainer write)
    bare_lora_a_no_weight                unknown (ComfyUI keys, as diffusion-pipe and many trainers write)
    comfyui_lorasave                     unknown (ComfyUI keys, as its nodes and LightX2V's extractor write)
    comfyui_lorasave_full_diff           unknown (ComfyUI keys, as diffusion-pipe and many trainers write)
    comfyui_train_lora                   unknown (ComfyUI keys, as its nodes and LightX2V's extractor write)
    compiled_blocks                      unknown (diffusers keys)
    compiled_flat                        musubi-tuner (metadata `ss_network_module`)
    control_lora_img_in                  unknown (ComfyUI keys, as diffusion-pipe and many trainers write)
    diffsynth_full60                     probably DiffSynth-Studio (by its keys)
    diffsynth_merged_qkv                 probably DiffSynth-Studio (by its keys)
    diffusers_dot_down_up                unknown (diffusers keys, as FlyMyAI's trainer writes)
    diffusers_mixed_rank_no_alpha        unknown (diffusers keys)
    diffusers_peft_attn4                 diffusers with PEFT (metadata `lora_adapter_metadata`)
    diffusers_peft_dora                  diffusers with PEFT (metadata `lora_adapter_metadata`)
    diffusers_peft_lora_bias             diffusers with PEFT (metadata `lora_adapter_metadata`)
    diffusers_peft_no_metadata           unknown (diffusers keys)
    diffusers_peft_patterns              diffusers with PEFT (metadata `lora_adapter_metadata`)
    diffusers_peft_rslora                diffusers with PEFT (metadata `lora_adapter_metadata`)
    diffusion_pipe_lokr                  unknown (ComfyUI keys, as diffusion-pipe and many trainers write)
    diffusion_pipe_lora                  unknown (ComfyUI keys, as diffusion-pipe and many trainers write)
    dot_a_b                              unknown (ComfyUI keys, as diffusion-pipe and many trainers write)
    foreign_keys_mixed_in                unknown (diffusers keys)
    fp8_plain                            unknown (ComfyUI keys, as diffusion-pipe and many trainers write)
    fsdp_checkpoint_wrapped              unknown
    fused_to_added_qkv                   unknown (plain keys, as VideoX-Fun and converters write)
    kohya_conv4d                         unknown (kohya keys, as musubi-tuner and Civitai's trainer write)
    kohya_resize_mixed_rank              musubi-tuner (metadata `ss_network_module`)
    layered_extract_embedding            unknown (ComfyUI keys, as its nodes and LightX2V's extractor write)
    lightning_bf16                       probably lightx2v's Qwen-Image-Lightning (by its keys)
    lightning_f32_full60                 probably lightx2v's Qwen-Image-Lightning (by its keys)
    lightx2v_extractor                   unknown (ComfyUI keys, as its nodes and LightX2V's extractor write)
    lightx2v_two_spellings               unknown (diffusers keys, as FlyMyAI's trainer writes)
    lora_linear_layer                    unknown (old diffusers keys)
    lycoris_boft                         unknown (LyCORIS keys, as SimpleTuner writes)
    lycoris_diag_oft                     unknown (LyCORIS keys, as SimpleTuner writes)
    lycoris_full                         unknown (LyCORIS keys, as SimpleTuner writes)
    lycoris_glora                        unknown (LyCORIS keys, as SimpleTuner writes)
    lycoris_ia3                          unknown (LyCORIS keys, as SimpleTuner writes)
    lycoris_locon_dora                   unknown (LyCORIS keys, as SimpleTuner writes)
    lycoris_loha_rslora                  unknown (LyCORIS keys, as SimpleTuner writes)
    lycoris_lokr_both                    unknown (LyCORIS keys, as SimpleTuner writes)
    lycoris_norms                        unknown (LyCORIS keys, as SimpleTuner writes)
    model_diffusion_model_prefix         unknown (a checkpoint's keys)
    musubi_convert_default_i64_alpha     unknown (kohya keys, as musubi-tuner and Civitai's trainer write)
    musubi_convert_other_transformer     musubi-tuner (metadata `ss_network_module`)
    musubi_extract                       unknown (kohya keys, as musubi-tuner and Civitai's trainer write)
    musubi_loha                          a kohya trainer (metadata `ss_network_module`)
    musubi_lokr                          a kohya trainer (metadata `ss_network_module`)
    musubi_lokr_full_matrix              a kohya trainer (metadata `ss_network_module`)
    musubi_lora_f32_attn_mlp             musubi-tuner (metadata `ss_network_module`)
    musubi_lora_full60                   musubi-tuner (metadata `ss_network_module`)
    musubi_overdotted                    musubi-tuner (metadata `ss_network_module`)
    nunchaku_packed_lowrank              probably Nunchaku's converter (by its keys)
    onetrainer_comfy                     probably OneTrainer (metadata `modelspec.implementation`)
    onetrainer_diffusers_dora            probably OneTrainer (metadata `modelspec.implementation`)
    onetrainer_loha                      probably OneTrainer (metadata `modelspec.implementation`)
    onetrainer_lokr                      probably OneTrainer (metadata `modelspec.implementation`)
    onetrainer_lokr_dora                 probably OneTrainer (metadata `modelspec.implementation`)
    onetrainer_lokr_kohya                probably OneTrainer (metadata `modelspec.implementation`)
    onetrainer_mixture_lora_transformer  probably OneTrainer (by its keys)
    onetrainer_oft                       probably OneTrainer (metadata `modelspec.implementation`)
    onetrainer_original                  probably OneTrainer (metadata `modelspec.implementation`)
    peft_adapter_model_base_model        probably PEFT (by its keys)
    peft_base_model_default              probably PEFT (by its keys)
    peft_double_slot                     probably DiffSynth-Studio, saved again (by its keys)
    peft_slot_lora_edit                  probably qwen-image-finetune (by its keys)
    prefused_qkv                         unknown (plain keys, as VideoX-Fun and converters write)
    processor_old_diffusers              unknown (old diffusers keys)
    reject_flux_like                     unknown (diffusers keys)
    reject_ideogram4                     unknown (ComfyUI keys, as diffusion-pipe and many trainers write)
    reject_lumina2                       unknown (kohya keys, as musubi-tuner and Civitai's trainer write)
    reject_qwen_image_2_1                unknown (diffusers keys)
    simpletuner_base_model_prefix        probably SimpleTuner (by its keys)
    simpletuner_comfyui_export           probably SimpleTuner (metadata `lora_adapter_metadata`)
    simpletuner_lycoris_fused_lokr       unknown (LyCORIS keys, as SimpleTuner writes)
    simpletuner_lycoris_lokr             unknown (LyCORIS keys, as SimpleTuner writes)
    simpletuner_peft                     diffusers with PEFT (metadata `lora_adapter_metadata`)
    videox_fun_double_underscore         probably VideoX-Fun (by its keys)
    videox_fun_peft_bare                 unknown (plain keys, as VideoX-Fun and converters write)
    z_image_ai_toolkit_lokr              ai-toolkit (metadata `software`)
    z_image_ai_toolkit_lora              ai-toolkit (metadata `software`)
    z_image_comfyui_full_diff            unknown (ComfyUI keys, as diffusion-pipe and many trainers write)
    z_image_comfyui_lorasave             unknown (ComfyUI keys, as its nodes and LightX2V's extractor write)
    z_image_comfyui_train_lora           unknown (ComfyUI keys, as its nodes and LightX2V's extractor write)
    z_image_diffsynth                    probably DiffSynth-Studio (by its keys)
    z_image_diffsynth_pipe_dit           probably a fork of DiffSynth-Studio (by its keys)
    z_image_diffusers_peft               diffusers with PEFT (metadata `lora_adapter_metadata`)
    z_image_dora                         unknown (ComfyUI keys, as its nodes and LightX2V's extractor write)
    z_image_kohya_qkv                    a kohya trainer (metadata `ss_network_module`)
    z_image_musubi                       musubi-tuner (metadata `ss_network_module`)
    z_image_musubi_comfy_qkv             musubi-tuner (metadata `ss_network_module`)
    z_image_onetrainer                   probably OneTrainer (metadata `modelspec.implementation`)
    z_image_onetrainer_loha              probably OneTrainer (metadata `modelspec.implementation`)
    z_image_onetrainer_lokr              probably OneTrainer (metadata `modelspec.implementation`)
    z_image_peft_base_model              probably PEFT (by its keys)
    z_image_simpletuner_lokr             unknown (LyCORIS keys, as SimpleTuner writes)
    z_image_simpletuner_peft             diffusers with PEFT (metadata `lora_adapter_metadata`)
    z_image_two_readers                  unknown (kohya keys, as musubi-tuner and Civitai's trainer write)
    z_image_videox_fun                   probably VideoX-Fun (by its keys)
    ");
}

#[test]
fn every_screen_fits_and_every_tensor_is_listed() {
    let folder = Folder::new();
    for (name, file) in files() {
        let path = file.write(folder.join("file.safetensors"));
        let path = path.to_str().unwrap();
        let screen = folder.run([path]);
        assert_eq!(screen.stderr, "", "{name}");
        // A key that decided the verdict is quoted whole.
        for line in screen.stdout.lines().filter(|line| !line.contains("[dir]")) {
            assert!(line.chars().count() <= 81, "{name}: {line}");
        }
        let listed = folder.run(["--all", path]).stdout.matches("  -> ").count();
        let document: Value = serde_json::from_str(&folder.run(["--json", path]).stdout).unwrap();
        assert_eq!(
            listed,
            document["tensors"].as_array().unwrap().len(),
            "{name}"
        );
    }
}
