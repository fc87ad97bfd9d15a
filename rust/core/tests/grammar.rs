//! Tensors of one module against each other: spellings, adapter names, duplicates, fused and split
//! forms, float8 scales, and what strict planning says of them.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod state_dict;

use std::io::Write;

use qwenlora_core::adapter::Adapter;
use qwenlora_core::dtype::Dtype;
use qwenlora_core::model::slot::{BlockBuild, Slot, SlotKind};
use qwenlora_core::plan::explain::Reading;
use qwenlora_core::plan::{FilePlan, Verdict};
use qwenlora_core::stack::{SkipKind, StackError, StackItem, StackOptions, StackPlan};
use state_dict::{TO_Q, Tensors};

const FLAT_TO_Q: &str = "lora_unet_transformer_blocks_0_attn_to_q";

/// The reasons of all tensors that are left out, in order.
fn reasons(plan: &FilePlan) -> Vec<String> {
    let entries = plan.table().entries().iter();
    entries
        .filter_map(|e| Some(e.reason.as_ref()?.text()))
        .collect()
}

fn scales(plan: &FilePlan) -> Vec<f64> {
    plan.modules().iter().map(|m| m.scale).collect()
}

fn slot(path: &str, kind: SlotKind, out_features: u64) -> Slot {
    Slot {
        path: path.to_owned(),
        kind,
        in_features: 3072,
        out_features,
        base_rank: 32,
        element_bytes: 2,
        offloaded: false,
        pattern: path.replacen(".0.", ".*.", 1),
        has_bias: true,
        build: BlockBuild::Nunchaku,
        opens: false,
    }
}

fn slots() -> Vec<Slot> {
    vec![
        slot("transformer_blocks.0.attn.to_qkv", SlotKind::Svdq, 9216),
        slot("transformer_blocks.0.img_mod.1", SlotKind::Awq, 18432),
    ]
}

fn item(plan: &FilePlan) -> StackItem<'_> {
    StackItem {
        name: "style",
        plan,
        strength: 0.5,
        modulation: false,
        off: &[],
    }
}

fn stack(plan: &FilePlan, strict: bool) -> Result<StackPlan, StackError> {
    let options = StackOptions {
        strict,
        ..StackOptions::default()
    };
    StackPlan::new(&[item(plan)], &slots(), options)
}

fn matters(plan: &FilePlan) -> Vec<String> {
    let skipped = stack(plan, false).unwrap().skipped;
    let mattering = skipped.into_iter().filter(|s| s.matters);
    mattering.map(|s| s.name).collect()
}

// Spellings

/// Spellings met in public code and issues, beyond those of the corpus: each with where.
#[test]
fn spellings_that_were_met_are_read() {
    let to_q = "transformer_blocks.0.attn.to_q";
    for (key, path, met) in [
        (
            "lora_unet_transformer_blocks_0.attn.to_q.lora_down.weight",
            to_q,
            "kijai/ComfyUI-WanVideoWrapper issue 869: flat up to the block, then dotted",
        ),
        (
            "lora_unet_transformer_blocks_0_attn_to_q_.lora_down.weight",
            to_q,
            "Comfy-Org/ComfyUI issue 4347: `_` before the suffix (FLUX, a converter of SimpleTuner's)",
        ),
        (
            "lora_unet_norm_out_linear_.alpha",
            "norm_out.linear",
            "the same issue",
        ),
        (
            "transformer_blocks.0.attn.to_q.lora_A.lightx2v_t1.weight",
            to_q,
            "huggingface/diffusers PR 12040: the name of the adapter in the pipeline",
        ),
        (
            "transformer_blocks.0.attn.to_q.lora_B.lightx2v_t1.bias",
            to_q,
            "the same PR",
        ),
        (
            "transformer_blocks.0.attn.to_q.lora_A.lora_1.weight",
            to_q,
            "black-forest-labs/flux issue 473",
        ),
        (
            "diffusion_model.transformer_blocks.0.attn.to_q.lora_up.weight",
            to_q,
            "a reader's list of patterns for Qwen-Image (an MLX port)",
        ),
        (
            "transformer.transformer_blocks.0.img_mlp.net.0.proj.lora.down.weight",
            "transformer_blocks.0.img_mlp.net.0.proj",
            "SwarmUI's test for Qwen-Image LoRAs",
        ),
        (
            "base_model.model.transformer_blocks.0.attn.to_q.lokr_w1.default",
            to_q,
            "PEFT's `state_dict()`",
        ),
    ] {
        let reading = Reading::of(key);
        assert_eq!(
            reading.as_ref().map(|reading| reading.module),
            Some(path),
            "{key} ({met})"
        );
    }
    // One underscore, and no other letter.
    for key in ["img_in__.alpha", "img_in_x.alpha", "_.alpha"] {
        assert!(
            Reading::of(key).is_none_or(|reading| reading.module != "img_in"),
            "{key}"
        );
    }
}

/// Keys of models that were wrapped when they were saved: each with the wrapper.
#[test]
fn keys_of_wrapped_models_are_read() {
    for (key, wrapper) in [
        (
            "_orig_mod.transformer_blocks.0.attn.to_q.lora_A.weight",
            "torch.compile of a whole model",
        ),
        (
            "diffusion_model.transformer_blocks.0._orig_mod.attn.to_q.lora_B.weight",
            "torch.compile of a block",
        ),
        (
            "lora_unet__orig_mod_transformer_blocks_0_attn_to_q.alpha",
            "the same, flattened",
        ),
        (
            "lora_unet_transformer_blocks_0__orig_mod_attn_to_q.lora_down.weight",
            "the same of a block",
        ),
        (
            "transformer_blocks.0.attn.to_q._orig_mod.lora_A.default.weight",
            "torch.compile of a layer",
        ),
        (
            "base_model.model._fsdp_wrapped_module.transformer_blocks.0._fsdp_wrapped_module.attn.to_q.lora_A.weight",
            "PyTorch's FSDP",
        ),
        (
            "transformer_blocks.0._checkpoint_wrapped_module.attn.to_q.lora_A.weight",
            "PyTorch's activation checkpointing",
        ),
        (
            "_forward_module.module.transformer_blocks.0.attn.to_q.lora_A.weight",
            "Lightning and DDP",
        ),
        (
            "transformer_blocks.0.module.attn.to_q.lora_A.weight",
            "DDP of a block",
        ),
        (
            "_fpw_module.transformer_blocks.0.attn.to_q.lora_A.weight",
            "FairScale's FSDP",
        ),
    ] {
        let module = Reading::of(key).map(|reading| reading.module);
        assert_eq!(module, Some(TO_Q), "{key} ({wrapper})");
    }
}

#[test]
fn the_alpha_of_another_spelling_is_not_used() {
    let plan = Tensors::default()
        .peft(&format!("diffusion_model.{TO_Q}"), 16)
        .kohya(FLAT_TO_Q, 16)
        .scalar(&format!("{FLAT_TO_Q}.alpha"), 4.0)
        .plan();
    assert_eq!(scales(&plan), [1.0]);
    let version = "a second version of its module, unlike";
    assert_eq!(
        reasons(&plan),
        [
            format!("the same tensor as `diffusion_model.{TO_Q}.lora_A.weight`"),
            format!("the same tensor as `diffusion_model.{TO_Q}.lora_B.weight`"),
            format!("{version} `diffusion_model.{TO_Q}.lora_A.weight`"),
        ]
    );
    assert_eq!(plan.verdict(), Verdict::Partial);
    assert_eq!(matters(&plan), [format!("{FLAT_TO_Q}.alpha")]);
}

#[test]
fn the_first_whole_spelling_is_kept_with_its_alpha() {
    let plan = Tensors::default()
        .scalar(&format!("diffusion_model.{TO_Q}.alpha"), 2.0)
        .tensor(&format!("diffusion_model.{TO_Q}.lora_A.weight"), &[8, 3072])
        .kohya(FLAT_TO_Q, 16)
        .scalar(&format!("{FLAT_TO_Q}.alpha"), 4.0)
        .plan();
    assert_eq!(scales(&plan), [0.25]);
    assert_eq!(plan.modules()[0].rank, Some(16));
    assert_eq!(reasons(&plan).len(), 2);
    assert_eq!(plan.verdict(), Verdict::Partial);
}

#[test]
fn another_kind_of_adapter_is_whole_in_one_tensor() {
    let plan = Tensors::default()
        .scalar(&format!("diffusion_model.{TO_Q}.alpha"), 2.0)
        .tensor(&format!("{FLAT_TO_Q}.lokr_w1"), &[16, 16])
        .tensor(&format!("{FLAT_TO_Q}.lokr_w2"), &[192, 192])
        .plan();
    assert_eq!(plan.modules()[0].adapter, Adapter::Lokr);
    assert_eq!(plan.modules()[0].tensors, [1, 2]);
}

#[test]
fn equal_duplicates_are_harmless() {
    let plan = Tensors::default()
        .peft(&format!("diffusion_model.{TO_Q}"), 16)
        .scalar(&format!("diffusion_model.{TO_Q}.alpha"), 8.0)
        .kohya(FLAT_TO_Q, 16)
        .scalar(&format!("{FLAT_TO_Q}.alpha"), 8.0)
        .plan();
    assert_eq!((scales(&plan), plan.verdict()), (vec![0.5], Verdict::Apply));
    stack(&plan, true).unwrap();
}

#[test]
fn duplicates_of_another_shape_dtype_or_value_are_told() {
    for (shape, dtype, value) in [
        ([8, 3072], Dtype::BF16, 8.0),
        ([16, 3072], Dtype::F32, 8.0),
        ([16, 3072], Dtype::BF16, 4.0),
    ] {
        let plan = Tensors::default()
            .peft(TO_Q, 16)
            .scalar(&format!("{TO_Q}.alpha"), 8.0)
            .typed(&format!("{TO_Q}.lora_down.weight"), dtype, &shape)
            .scalar(&format!("{TO_Q}.lora_alpha"), value)
            .plan();
        assert_eq!(scales(&plan), [0.5]);
        assert_eq!(plan.verdict(), Verdict::Partial, "{dtype} {shape:?}");
        let error = stack(&plan, true).unwrap_err();
        let expected = SkipKind::Foreign;
        assert!(
            matches!(error, StackError::Strict { kind, .. } if kind == expected),
            "{error}"
        );
    }
}

#[test]
fn duplicates_in_a_file_are_compared_by_their_first_bytes() {
    let rows = |stem: &str, (a, b): (&str, &str)| {
        [
            (format!("{stem}.{a}.weight"), [1u64, 3072]),
            (format!("{stem}.{b}.weight"), [3072, 1]),
        ]
    };
    let tensors: Vec<_> = rows(TO_Q, ("lora_A", "lora_B"))
        .into_iter()
        .chain(rows(FLAT_TO_Q, ("lora_down", "lora_up")))
        .collect();
    let each = 3072 * 2;
    let header: Vec<String> = tensors
        .iter()
        .enumerate()
        .map(|(i, (key, shape))| {
            let (begin, end) = (i * each, (i + 1) * each);
            format!(
                r#""{key}":{{"dtype":"BF16","shape":{shape:?},"data_offsets":[{begin},{end}]}}"#
            )
        })
        .collect();
    let header = format!("{{{}}}", header.join(","));
    // (byte that differs in the last tensor, whether the duplicate is then told)
    for (differing, is_told) in [(None, false), (Some(4095), true), (Some(4096), false)] {
        let mut data = vec![0u8; 4 * each];
        if let Some(at) = differing {
            data[3 * each + at] = 1;
        }
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&(header.len() as u64).to_le_bytes())
            .unwrap();
        file.write_all(header.as_bytes()).unwrap();
        file.write_all(&data).unwrap();
        let plan = FilePlan::read(file.path()).unwrap();
        let told = reasons(&plan).iter().any(|r| r.contains("unlike"));
        assert_eq!(told, is_told, "{differing:?}");
        assert_eq!(plan.verdict() == Verdict::Partial, is_told);
    }
}

// Adapter names

#[test]
fn a_magnitude_or_scale_belongs_to_the_adapter_that_is_kept() {
    for magnitude in [
        "lora_magnitude_vector",
        "lora_magnitude_vector.default.weight",
        "lora_magnitude_vector.lone.weight",
        "dora_scale",
    ] {
        let plan = Tensors::default()
            .tensor(&format!("{TO_Q}.lora_A.default.weight"), &[16, 3072])
            .tensor(&format!("{TO_Q}.lora_B.default.weight"), &[3072, 16])
            .tensor(&format!("{TO_Q}.{magnitude}"), &[3072])
            .plan();
        assert_eq!(plan.modules()[0].adapter, Adapter::Dora, "{magnitude}");
        assert_eq!(plan.verdict(), Verdict::Apply, "{magnitude}");
    }
    let plan = Tensors::default()
        .tensor(&format!("{TO_Q}.lora_A.default.weight"), &[16, 3072])
        .tensor(&format!("{TO_Q}.lora_B.default.weight"), &[3072, 16])
        .scalar(&format!("{TO_Q}.lora_A.scale_weight"), 2.0)
        .scalar(&format!("{TO_Q}.lora_B.default.weight_scale"), 3.0)
        .plan();
    assert_eq!((scales(&plan), plan.verdict()), (vec![6.0], Verdict::Apply));
}

#[test]
fn the_first_adapter_name_wins() {
    let plan = Tensors::default()
        .tensor(&format!("{TO_Q}.lora_A.one.weight"), &[16, 3072])
        .tensor(&format!("{TO_Q}.lora_B.one.weight"), &[3072, 16])
        .tensor(&format!("{TO_Q}.lora_A.two.weight"), &[8, 3072])
        .tensor(&format!("{TO_Q}.lora_B.two.weight"), &[3072, 8])
        .tensor(&format!("{TO_Q}.lora_magnitude_vector.two"), &[3072])
        .scalar(&format!("{TO_Q}.lora_A.two.scale_weight"), 7.0)
        .plan();
    let module = &plan.modules()[0];
    assert_eq!((module.adapter, module.rank), (Adapter::Lora, Some(16)));
    assert_eq!(scales(&plan), [1.0]);
    assert_eq!(reasons(&plan), ["second adapter `two` of this module"; 4]);
}

// Fused and split

const QKV: &str = "transformer_blocks.0.attn.to_qkv";

fn fused() -> Tensors {
    Tensors::default()
        .tensor(&format!("{QKV}.lora_A.weight"), &[16, 3072])
        .tensor(&format!("{QKV}.lora_B.weight"), &[9216, 16])
}

fn ids(plan: &FilePlan) -> Vec<usize> {
    plan.modules().iter().map(|m| m.tensors.len()).collect()
}

#[test]
fn all_parts_replace_the_fused_module() {
    let mut tensors = fused();
    for part in ["to_q", "to_k", "to_v"] {
        tensors = tensors.peft(&format!("transformer_blocks.0.attn.{part}"), 16);
    }
    let plan = tensors.plan();
    assert_eq!(
        (ids(&plan), plan.verdict()),
        (vec![2, 2, 2], Verdict::Apply)
    );
    assert_eq!(
        reasons(&plan),
        ["the file holds this module's parts as well"; 2]
    );
}

#[test]
fn some_parts_do_not_replace_the_fused_module() {
    let plan = fused()
        .peft(TO_Q, 16)
        .scalar("transformer_blocks.0.attn.to_k.alpha", 16.0)
        .scalar("transformer_blocks.0.attn.to_v.alpha", 16.0)
        .plan();
    assert_eq!((ids(&plan), plan.verdict()), (vec![2], Verdict::Partial));
    assert_eq!(
        reasons(&plan),
        ["the file holds the fused module as well"; 4]
    );
    assert_eq!(matters(&plan).len(), 4);
}

#[test]
fn a_fused_alpha_does_not_replace_a_part() {
    let plan = Tensors::default()
        .scalar(&format!("{QKV}.alpha"), 16.0)
        .peft(TO_Q, 16)
        .plan();
    assert_eq!(plan.applied_modules().count(), 1);
    assert_eq!(plan.verdict(), Verdict::Partial);
}

// Float8 and other companions

#[test]
fn float8_halves_beside_a_tensor_of_unknown_kind_are_not_applied() {
    let halves = |dtype| {
        Tensors::default()
            .typed(&format!("{TO_Q}.lora_A.weight"), dtype, &[16, 3072])
            .typed(&format!("{TO_Q}.lora_B.weight"), dtype, &[3072, 16])
    };
    assert_eq!(halves(Dtype::F8E4M3).plan().verdict(), Verdict::Apply);
    let with_unknown = |dtype| halves(dtype).scalar(&format!("{TO_Q}.lora_A.input_scale"), 2.0);
    assert_eq!(with_unknown(Dtype::BF16).plan().verdict(), Verdict::Partial);
    let plan = with_unknown(Dtype::F8E4M3).plan();
    assert_eq!(plan.verdict(), Verdict::Reject);
    insta::assert_snapshot!(
        plan.reason().unwrap(),
        @"1 of 1 modules, e.g. `transformer_blocks.0.attn.to_q`: float8 tensors beside a tensor of unknown kind, which may be their scale, are not supported"
    );
}

#[test]
fn what_cannot_stand_beside_a_pair_is_named() {
    for (suffix, text) in [
        ("w_norm", "`w_norm` beside a LoRA is not supported"),
        ("rescale", "`oft_rescale` beside a LoRA is not supported"),
        ("b_norm", "`b_norm` beside a LoRA is not supported"),
        ("on_input", "`ia3_on_input` beside a LoRA is not supported"),
        (
            "oft_R.scaled_oft",
            "`oft_scaled` beside a LoRA is not supported",
        ),
    ] {
        let key = format!("{TO_Q}.{suffix}");
        let plan = Tensors::default()
            .peft(TO_Q, 16)
            .tensor(&key, &[3072])
            .plan();
        let module = &plan.modules()[0];
        assert_eq!(module.left_out, [(2, text.to_owned())], "{suffix}");
        assert_eq!(plan.verdict(), Verdict::Partial, "{suffix}");
        assert_eq!(matters(&plan), [key], "{suffix}");
    }
}

#[test]
fn scales_that_multiply_to_infinity_are_refused() {
    let error = Tensors::default()
        .peft(TO_Q, 16)
        .scalar(&format!("{TO_Q}.lora_A.scale_weight"), 1e300)
        .scalar(&format!("{TO_Q}.lora_B.scale_weight"), 1e300)
        .try_plan()
        .unwrap_err();
    insta::assert_snapshot!(
        error,
        @"`test`: `transformer_blocks.0.attn.to_q` gives a scale of inf: it must be finite"
    );
}

// Limits

#[test]
fn state_dicts_keep_the_limits_of_a_header() {
    let error = Tensors::default()
        .tensor(&"dit.".repeat(100_000), &[1])
        .try_plan()
        .unwrap_err();
    insta::assert_snapshot!(
        error,
        @"`test`: tensor `dit.dit.dit.dit.dit.dit.dit.dit.dit.dit.dit.dit.dit.dit.…dit.dit.dit.dit.dit.dit.dit.dit.` (400000 bytes): the name is over the limit of 1024 bytes"
    );
    let mut tensors = Tensors::default();
    for index in 0..=65_536 {
        tensors = tensors.tensor(&format!("x{index}"), &[1]);
    }
    insta::assert_snapshot!(
        tensors.try_plan().unwrap_err(),
        @"`test` has too many tensors, over the limit of 65536: 65537"
    );
}

// Checkpoints' weights

#[test]
fn a_checkpoints_weight_matters_unless_the_base_is_saved_along() {
    let norm = "transformer_blocks.0.attn.norm_q.weight";
    let tensors = || Tensors::default().peft(TO_Q, 16).tensor(norm, &[128]);
    assert_eq!(matters(&tensors().plan()), [norm]);
    let dump = tensors()
        .tensor(&format!("{TO_Q}.base_layer.weight"), &[3072, 3072])
        .plan();
    assert!(matters(&dump).is_empty());
    stack(&dump, true).unwrap();
}

// Stacks

#[test]
fn strict_refuses_a_foreign_tensor_that_matters() {
    let key = format!("{TO_Q}.lora_C.weight");
    let plan = Tensors::default().peft(TO_Q, 16).tensor(&key, &[1]).plan();
    stack(&plan, false).unwrap();
    insta::assert_snapshot!(stack(&plan, true).unwrap_err(), @"
    `style`: `transformer_blocks.0.attn.to_q.lora_C.weight` would be left out: unknown kind of tensor
    hint: strict=False applies the rest
    ");
    let text_encoder = "text_encoder.layers.0.q.lora_A.weight";
    let plan = Tensors::default()
        .peft(TO_Q, 16)
        .tensor(text_encoder, &[1])
        .plan();
    stack(&plan, true).unwrap();
}

#[test]
fn a_lora_of_which_everything_is_turned_off_is_no_error() {
    let modulation = "transformer_blocks.0.img_mod.1";
    let tensors = || {
        Tensors::default()
            .tensor(&format!("{modulation}.lora_A.weight"), &[16, 3072])
            .tensor(&format!("{modulation}.lora_B.weight"), &[18432, 16])
    };
    for strict in [false, true] {
        let plan = stack(&tensors().plan(), strict).unwrap();
        assert_eq!((plan.applied_modules, plan.slots.len()), (vec![0], 0));
        assert_eq!(plan.skipped.len(), 1);
        assert_eq!(plan.skipped[0].kind, SkipKind::TurnedOff);
    }
    let broken = tensors().scalar(&format!("{TO_Q}.alpha"), 1.0).plan();
    insta::assert_snapshot!(
        stack(&broken, false).unwrap_err(),
        @"nothing of `style` can be applied: 2 modules are left out, the first `transformer_blocks.0.attn.to_q`: has alpha but no pair"
    );
}

#[test]
fn the_document_names_the_stack() {
    let plan = Tensors::default()
        .peft(&format!("diffusion_model.{TO_Q}"), 16)
        .kohya(FLAT_TO_Q, 16)
        .plan();
    let stack = stack(&plan, false).unwrap();
    let document: serde_json::Value = serde_json::from_str(&stack.to_json()).unwrap();
    let expected = serde_json::json!([{"name": "style", "strength": 0.5}]);
    assert_eq!(document["loras"], expected);
    let kinds: Vec<&str> = stack.skipped.iter().map(|s| s.reason.as_str()).collect();
    assert_eq!(kinds, ["the same tensor under another key"; 2]);
}

#[test]
fn offloaded_slots_of_one_pattern_share_a_rank() {
    let mut slots = slots();
    let mut other = slot("transformer_blocks.1.attn.to_qkv", SlotKind::Svdq, 9216);
    other.pattern.clone_from(&slots[0].pattern);
    slots.push(other);
    for slot in &mut slots {
        slot.offloaded = true;
    }
    let plan = Tensors::default().peft(TO_Q, 16).plan();
    let stack = StackPlan::new(&[item(&plan)], &slots, StackOptions::default()).unwrap();
    assert_eq!(stack.uniform.len(), 1);
    assert_eq!(stack.uniform[0].pattern, "transformer_blocks.*.attn.to_qkv");
    assert_eq!(stack.uniform[0].slots.len(), 2);
}
