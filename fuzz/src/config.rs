//! PEFT's configuration: one answer per path, finite where its numbers are.

use qwenlora_core::adapter::peft::AdapterConfig;
use serde::de::IgnoredAny;

use crate::assert_speakable;

/// Paths of each form that patterns are written for.
const PATHS: [&str; 6] = [
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.59.attn.add_q_proj",
    "transformer_blocks.7.attn.to_out.0",
    "transformer_blocks.31.img_mlp.net.0.proj",
    "time_text_embed.timestep_embedder.linear_1",
    "",
];
const RANKS: [u64; 4] = [1, 16, 1024, u64::MAX];

/// Checks a configuration; bytes that are no text are replaced.
pub fn check(bytes: &[u8]) {
    let json = String::from_utf8_lossy(bytes);
    let parse = || AdapterConfig::parse("adapter_config.json", &json);
    let (config, again) = match (parse(), parse()) {
        (Ok(config), Ok(again)) => (config, again),
        (Err(error), Err(again)) => {
            assert_eq!(error, again);
            assert_speakable(&error.to_string());
            return;
        }
        _ => panic!("the same configuration is taken and refused"),
    };
    // Skipped, not decoded: a field that means nothing here may hold a number beyond any f64.
    let is_json = serde_json::from_str::<IgnoredAny>(&json).is_ok();
    assert!(is_json, "only we take it for JSON");
    assert_eq!(config.use_rslora(), again.use_rslora());
    for path in PATHS {
        let alpha = config.alpha(path);
        assert_eq!(alpha, again.alpha(path));
        assert!(
            alpha.is_none_or(f64::is_finite),
            "JSON has no such number: {alpha:?}"
        );
        assert_eq!(config.promised_rank(path), again.promised_rank(path));
        for rank in RANKS {
            let scale = config.scale(path, rank);
            assert_eq!(scale.is_some(), alpha.is_some());
            // A rank divides, so that it cannot carry a finite alpha beyond what is finite.
            assert!(scale.is_none_or(f64::is_finite), "{scale:?}");
        }
    }
}
