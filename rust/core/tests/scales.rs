//! What a file says of its scale beside the tensors of its pairs: configurations in other spellings,
//! empty ones, lost magnitudes, and values that look like a scale.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod state_dict;

use qwenlora_core::adapter::peft::METADATA_KEY;
use qwenlora_core::plan::{FilePlan, Verdict};
use state_dict::{TO_Q, Tensors};

fn configured(text: &str) -> FilePlan {
    let tensors = Tensors::default().peft(&TO_Q.replace(".0.", ".40."), 16);
    tensors.metadata(METADATA_KEY, text).plan()
}

fn scales(plan: &FilePlan) -> Vec<f64> {
    plan.modules().iter().map(|module| module.scale).collect()
}

fn scale(plan: &FilePlan) -> f64 {
    *scales(plan).first().unwrap()
}

#[test]
fn kinds_are_read_in_any_spelling() {
    for kind in [
        r#""LORA""#,
        r#""lora""#,
        r#""LoRA""#,
        r#"" Lora ""#,
        r#""PeftType.LORA""#,
        r#""""#,
        "null",
    ] {
        let fields = r#""transformer.r": 16, "transformer.lora_alpha": 32"#;
        let plan = configured(&format!(r#"{{{fields}, "transformer.peft_type": {kind}}}"#));
        assert_eq!((scale(&plan), plan.notes().len()), (2.0, 0), "{kind}");
    }
}

#[test]
fn what_is_not_used_of_a_configuration_is_said() {
    let other = configured(r#"{"r": 16, "lora_alpha": 32, "peft_type": "XLORA"}"#);
    assert_eq!((scale(&other), other.verdict()), (1.0, Verdict::Apply));
    insta::assert_snapshot!(other.notes().join("\n"), @"the configuration is of another kind of adapter, `XLORA`: its alpha is not used, the scale may be wrong");
    let elsewhere = configured(r#"{"unet.r": 16, "unet.lora_alpha": 32}"#);
    insta::assert_snapshot!(elsewhere.notes().join("\n"), @"the configuration has `unet.lora_alpha`, which is not the transformer's: its alpha is not used, the scale may be wrong");
    // Another component's own is nothing of the transformer's.
    let text = configured(r#"{"text_encoder.lora_alpha": 32, "text_encoder_2.lora_alpha": 8}"#);
    assert_eq!((scale(&text), text.notes().len()), (1.0, 0));
    // Where the file itself says the scale, the configuration is not missed.
    let stem = TO_Q.replace(".0.", ".40.");
    let tensors = Tensors::default().peft(&stem, 16);
    let stored = tensors.scalar(&format!("{stem}.alpha"), 8.0);
    let plan = stored
        .metadata(METADATA_KEY, r#"{"peft_type": "XLORA"}"#)
        .plan();
    assert_eq!((scale(&plan), plan.notes().len()), (0.5, 0));
}

#[test]
fn fields_may_stand_in_an_object_of_the_component() {
    let nested =
        r#"{"transformer": {"r": 16, "lora_alpha": 32}, "text_encoder": {"lora_alpha": 1}}"#;
    assert_eq!(scales(&configured(nested)), [2.0]);
    let patterns = r#"{"transformer": {"lora_alpha": 16, "alpha_pattern": {"to_(q|k)": 4}}}"#;
    assert_eq!(scales(&configured(patterns)), [0.25]);
}

/// A model that was wrapped before its adapter was made has the wrapper's name in its patterns, too.
#[test]
fn patterns_of_wrapped_models_match() {
    for pattern in [
        "transformer_blocks.40._orig_mod.attn.to_q",
        r"_orig_mod\\.transformer_blocks\\.40\\.attn\\.to_(q|k)",
        r"^transformer_blocks\\.\\d+\\._fsdp_wrapped_module\\._checkpoint_wrapped_module\\.attn\\.to_q",
    ] {
        let json = format!(r#"{{"lora_alpha": 16, "alpha_pattern": {{"{pattern}": 4}}}}"#);
        assert_eq!(scales(&configured(&json)), [0.25], "{pattern}");
    }
}

#[test]
fn a_configuration_that_says_nothing_is_none() {
    for text in ["", " \n", "null", "None", "{}", r#"{"transformer": null}"#] {
        let plan = configured(text);
        assert_eq!(
            (scale(&plan), plan.verdict()),
            (1.0, Verdict::Apply),
            "{text}"
        );
        assert!(plan.notes().is_empty(), "{text}");
    }
    let tensors = Tensors::default().peft(TO_Q, 16);
    let error = tensors.metadata(METADATA_KEY, "{").try_plan().unwrap_err();
    assert!(error.to_string().contains("is not the JSON"), "{error}");
}

#[test]
fn a_dora_without_its_magnitudes_is_not_applied() {
    let plan = configured(r#"{"transformer.lora_alpha": 32, "transformer.use_dora": true}"#);
    assert_eq!(plan.verdict(), Verdict::Reject);
    insta::assert_snapshot!(plan.reason().unwrap(), @"1 of 1 modules, e.g. `transformer_blocks.40.attn.to_q`: the configuration says `use_dora`, and the magnitude is missing: without it the pair would be another LoRA");
    let plan = configured(r#"{"transformer.lora_alpha": 32, "transformer.use_dora": false}"#);
    assert_eq!(plan.verdict(), Verdict::Apply);
    // Only pairs have magnitudes.
    let full = Tensors::default().tensor(&format!("{TO_Q}.diff"), &[3072, 3072]);
    let plan = full.metadata(METADATA_KEY, r#"{"use_dora": true}"#).plan();
    assert_eq!(plan.verdict(), Verdict::Apply);
}

#[test]
fn values_that_look_like_a_scale_are_told() {
    let stem = TO_Q.replace(".0.", ".40.");
    let notes = |key: &str, shape: &[u64]| {
        let plan = Tensors::default().peft(&stem, 16).tensor(key, shape).plan();
        plan.notes().join("\n")
    };
    for ending in [
        "lora_down.alpha",
        "lora_A.alpha",
        "lora_A.default.alpha",
        "alpha.default",
        "network_alpha",
        "Alpha",
        "scaling",
        "scaling.default",
        "lora_scale",
        "lora_B.scaling",
        "multiplier",
    ] {
        let key = format!("{stem}.{ending}");
        let expected =
            format!("`{key}` looks like a scale and is not understood: the scale may be wrong");
        assert_eq!(notes(&key, &[]), expected);
        assert_eq!(notes(&key, &[1]), expected);
        assert_eq!(notes(&key, &[16]), "", "{key}");
    }
    for key in ["network_alpha", "transformer.lora_alpha", "scaling"] {
        assert!(notes(key, &[]).contains("looks like a scale"), "{key}");
    }
    for key in [
        "logit_scale",
        "_aux.scale",
        "text_encoder.q.scaling",
        "alphabet",
    ] {
        assert_eq!(notes(key, &[]), "", "{key}");
    }
    let flat = "lora_unet_transformer_blocks_40_attn_to_q_alpha";
    assert!(notes(flat, &[]).contains("looks like a scale"));
    let both = Tensors::default()
        .peft(&stem, 16)
        .tensor(&format!("{stem}.lora_A.scaling"), &[])
        .tensor(&format!("{stem}.lora_B.scaling"), &[]);
    let plan = both.plan();
    insta::assert_snapshot!(plan.notes().join("\n"), @"2 tensors, e.g. `transformer_blocks.40.attn.to_q.lora_A.scaling`, look like scales and are not understood: the scales may be wrong");
    assert_eq!(plan.verdict(), Verdict::Partial);
}
