//! What is said of one key: how it is read, the scale and its ground, what becomes of it.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod state_dict;

use qwenlora_core::adapter::module::ScaleSource;
use qwenlora_core::key::role::Role;
use qwenlora_core::plan::FilePlan;
use qwenlora_core::plan::explain::{Explanation, Fate, Reading};
use state_dict::{TO_Q, Tensors};

fn explain(plan: &FilePlan, key: &str) -> Explanation {
    plan.explain(key).unwrap()
}

#[test]
fn a_key_is_taken_apart() {
    let reading = Reading::of(
        "transformer.base_model.model.transformer_blocks.3.attn.to.out.lora_B.style.default.weight",
    );
    assert_eq!(
        reading.unwrap(),
        Reading {
            wrappers: Vec::new(),
            prefixes: vec!["transformer.", "base_model.model."],
            spelling: "transformer_blocks.3.attn.to.out".to_owned(),
            module: "transformer_blocks.3.attn.to_out.0",
            suffix: ".lora_B.style.default.weight".to_owned(),
            role: Role::Up,
            scales: None,
            adapter_name: Some("style.default".to_owned()),
        }
    );
    assert_eq!(
        Reading::of("lora_unet__transformer_blocks_3_attn_to_k.alpha").map(|r| r.prefixes),
        Some(vec!["lora_unet__"])
    );
    assert_eq!(Reading::of("text_encoder.layers.0.q.alpha"), None);
    assert_eq!(Reading::of(TO_Q), None);
}

#[test]
fn the_scale_names_its_ground() {
    let alpha = format!("{TO_Q}.alpha");
    let pair = || Tensors::default().peft(TO_Q, 16);
    let key = format!("{TO_Q}.lora_A.weight");
    let rule = |tensors: Tensors| {
        let module = explain(&tensors.plan(), &key).module.unwrap();
        (module.scale, module.scale_rule.to_string())
    };
    let said = |scale: f64, text: &str| (scale, text.to_owned());
    assert_eq!(
        rule(pair().scalar(&alpha, 8.0)),
        said(0.5, "alpha 8 / rank 16")
    );
    assert_eq!(
        rule(pair().scalar(&alpha, 0.0)),
        said(1.0, "alpha is 0, which means alpha = rank: 1")
    );
    assert_eq!(
        rule(pair().scalar(&format!("{TO_Q}.scale"), 0.25)),
        said(0.25, "stored as a scale")
    );
    assert_eq!(
        rule(pair()),
        said(1.0, "neither an alpha nor a configuration: 1")
    );
    let config = |text: &str| pair().metadata("lora_adapter_metadata", text);
    assert_eq!(
        rule(config(r#"{"transformer.lora_alpha": 4}"#)),
        said(0.25, "alpha 4 of the configuration / rank 16")
    );
    assert_eq!(
        rule(config(
            r#"{"transformer.lora_alpha": 4, "transformer.use_rslora": true}"#
        )),
        said(1.0, "alpha 4 of the configuration / sqrt(rank 16), rsLoRA")
    );
    let direct = Tensors::default()
        .tensor(&format!("{TO_Q}.lokr_w1"), &[16, 16])
        .tensor(&format!("{TO_Q}.lokr_w2"), &[192, 192])
        .scalar(&alpha, f64::INFINITY)
        .plan();
    let explanation = explain(&direct, &alpha);
    assert_eq!(explanation.fate, Fate::Applied);
    let module = explanation.module.as_ref().unwrap();
    assert_eq!(
        (module.scale, &module.scale_rule),
        (1.0, &ScaleSource::BothDirect)
    );
    let json = serde_json::to_value(&explanation).unwrap();
    assert_eq!(json["value"], "inf");
    assert_eq!(json["module"]["scale_rule"]["rule"], "both_direct");
}

#[test]
fn the_bias_of_a_pair_has_the_pairs_scale_without_float8s() {
    let bias = format!("{TO_Q}.lora_B.bias");
    let plan = Tensors::default()
        .peft(TO_Q, 16)
        .scalar(&format!("{TO_Q}.alpha"), 8.0)
        .scalar(&format!("{TO_Q}.lora_A.scale_weight"), 3.0)
        .tensor(&bias, &[3072])
        .plan();
    let module = explain(&plan, &bias).module.unwrap();
    assert_eq!((module.scale, module.tensor_scale), (1.5, Some(0.5)));
    assert_eq!(
        module.float8_scales,
        [format!("{TO_Q}.lora_A.scale_weight")]
    );
    assert_eq!(
        (module.slot, module.part, module.parts),
        ("transformer_blocks.0.attn.to_qkv", 0, 3)
    );
    assert_eq!(module.keys.len(), 5);
}

#[test]
fn every_fate_is_told() {
    let text_encoder = "text_encoder.layers.0.q.lora_A.weight";
    let rescale = format!("{TO_Q}.rescale");
    let unknown = "transformer_blocks.1.attn.to_q.lora_E";
    let plan = Tensors::default()
        .peft(TO_Q, 16)
        .tensor(&rescale, &[3072])
        .tensor(text_encoder, &[1])
        .peft("transformer_blocks.1.attn.to_q", 16)
        .tensor(unknown, &[16, 1])
        .plan();
    let fate = |key: &str| explain(&plan, key).fate;
    assert_eq!(fate(&format!("{TO_Q}.lora_B.weight")), Fate::Applied);
    assert_eq!(
        fate(&rescale),
        Fate::LeftOut {
            reason: "`oft_rescale` beside a LoRA is not supported".to_owned()
        }
    );
    assert_eq!(
        fate(unknown),
        Fate::NotApplied {
            reason: "AdaLoRA is not supported: only PEFT knows what its tensors make up".to_owned()
        }
    );
    assert_eq!(
        fate(text_encoder),
        Fate::Ignored {
            reason: "text encoder".to_owned(),
            harmless: false
        }
    );
    assert_eq!(plan.explain("nothing"), None);
}

#[test]
fn near_misses_are_of_the_same_module_first() {
    let plan = Tensors::default()
        .peft("transformer_blocks.1.attn.to_q", 16)
        .peft(TO_Q, 16)
        .plan();
    let down = format!("{TO_Q}.lora_A.weight");
    let up = format!("{TO_Q}.lora_B.weight");
    let nearest = |key: &str, at_most: usize| plan.nearest_keys(key, at_most);
    assert_eq!(
        nearest(
            "lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight",
            2
        ),
        [&down, &up]
    );
    assert_eq!(nearest(TO_Q, 9), [&down, &up]);
    assert_eq!(
        nearest("attn.to_q.lora_B", 1),
        ["transformer_blocks.1.attn.to_q.lora_B.weight"]
    );
    assert_eq!(nearest(&down.replace("attn", "atn"), 1), [&down]);
    assert!(nearest("vae.decoder.conv_in.weight", 9).is_empty());
}
