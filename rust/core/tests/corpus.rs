//! All 80 real key layouts: every tensor's target and role, every module's rank and scale, the
//! verdict of every file whose kinds this version supports.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use qwenlora_core::dtype::Dtype;
use qwenlora_core::plan::FilePlan;
use qwenlora_core::table::RawTensor;
use serde_json::Value;

fn corpus() -> Vec<(String, Value)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/keys");
    let mut files: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "json"))
        .map(|path| {
            let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
            (
                name,
                serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap(),
            )
        })
        .collect();
    files.sort_by(|a: &(String, Value), b| a.0.cmp(&b.0));
    files
}

fn scalar(value: &Value) -> Option<f64> {
    match value {
        Value::Number(number) => number.as_f64(),
        Value::Bool(flag) => Some(f64::from(u8::from(*flag))),
        Value::String(text) if text == "inf" => Some(f64::INFINITY),
        _ => None,
    }
}

fn plan(name: &str, file: &Value) -> FilePlan {
    let rows = file["tensors"].as_array().unwrap();
    let tensors = rows
        .iter()
        .map(|row| {
            let dtype = Dtype::parse(row["dtype"].as_str().unwrap()).unwrap();
            let shape: Vec<u64> = row["shape"]
                .as_array()
                .unwrap()
                .iter()
                .map(|d| d.as_u64().unwrap())
                .collect();
            let len_bytes = shape.iter().product::<u64>() * dtype.bits() / 8;
            let key = row["key"].as_str().unwrap().to_owned();
            RawTensor {
                key,
                dtype,
                shape,
                offset_bytes: 0,
                len_bytes,
            }
        })
        .collect();
    let scalars: Vec<Option<f64>> = rows.iter().map(|row| scalar(&row["value"])).collect();
    let metadata = file["metadata"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(k, v)| (k.clone(), v.as_str().unwrap().to_owned()))
        .collect();
    FilePlan::from_tensors(name, tensors, &scalars, metadata).unwrap()
}

fn document(name: &str, file: &Value) -> Value {
    serde_json::from_str(&plan(name, file).to_json()).unwrap()
}

#[test]
fn every_file_is_there() {
    assert_eq!(corpus().len(), 80);
}

#[test]
fn every_tensor_has_its_target_role_and_reason() {
    let mut tensors = 0;
    for (name, file) in corpus() {
        let document = document(&name, &file);
        let pairs = file["tensors"]
            .as_array()
            .unwrap()
            .iter()
            .zip(document["tensors"].as_array().unwrap());
        for (expected, found) in pairs {
            let key = &expected["key"];
            assert_eq!(found["key"], *key, "{name}");
            assert_eq!(
                found["target"], expected["target"],
                "{name}: target of {key}"
            );
            assert_eq!(found["role"], expected["role"], "{name}: role of {key}");
            if !expected["reason"].is_null() {
                assert_eq!(
                    found["reason"], expected["reason"],
                    "{name}: reason of {key}"
                );
            }
            tensors += 1;
        }
    }
    assert_eq!(tensors, 11_885);
}

#[test]
fn every_module_has_its_adapter_rank_and_scale() {
    let mut modules = 0;
    for (name, file) in corpus() {
        let document = document(&name, &file);
        let found: BTreeMap<&str, &Value> = document["modules"]
            .as_array()
            .unwrap()
            .iter()
            .map(|m| (m["target"].as_str().unwrap(), m))
            .collect();
        let expected = file["expected_modules"].as_array().unwrap();
        assert_eq!(found.len(), expected.len(), "{name}: number of modules");
        for module in expected {
            let target = module["target"].as_str().unwrap();
            let found = found
                .get(target)
                .unwrap_or_else(|| panic!("{name}: no {target}"));
            assert_eq!(
                found["adapter"], module["adapter"],
                "{name}: adapter of {target}"
            );
            assert_eq!(found["rank"], module["rank"], "{name}: rank of {target}");
            let (got, want) = (
                found["scale"].as_f64().unwrap(),
                module["scale"].as_f64().unwrap(),
            );
            assert!(
                (got - want).abs() <= want * 1e-15,
                "{name}: scale of {target}: {got} {want}"
            );
            modules += 1;
        }
    }
    assert_eq!(modules, 4593);
}

#[test]
fn verdicts_are_the_end_state_or_less_for_a_named_reason() {
    for (name, file) in corpus() {
        let document = document(&name, &file);
        let (verdict, expected) = (
            document["verdict"].as_str().unwrap(),
            file["expect"].as_str().unwrap(),
        );
        let rank = |v: &str| {
            ["apply", "partial", "reject"]
                .iter()
                .position(|n| *n == v)
                .unwrap()
        };
        assert!(
            rank(verdict) >= rank(expected),
            "{name}: {verdict}, expected {expected}"
        );
        let reason = document["reason"].as_str().unwrap_or_default();
        assert_eq!(
            verdict == "apply",
            reason.is_empty(),
            "{name}: {verdict} {reason}"
        );
        if verdict != expected {
            let honest = reason.contains("not supported");
            assert!(
                honest,
                "{name}: {verdict} instead of {expected} because: {reason}"
            );
        }
        let model = document["model"].as_str().unwrap_or("none");
        assert_eq!(model, file["model"].as_str().unwrap(), "{name}");
    }
}

#[test]
fn slots_of_fused_modules_add_their_ranks() {
    let (name, file) = corpus()
        .into_iter()
        .find(|(name, _)| name == "diffusers_peft_patterns")
        .unwrap();
    let document = document(&name, &file);
    let slots: Vec<(String, u64, usize)> = document["slots"]
        .as_array()
        .unwrap()
        .iter()
        .map(|s| {
            let parts = s["parts"].as_array().unwrap().len();
            (
                s["slot"].as_str().unwrap().to_owned(),
                s["rank"].as_u64().unwrap(),
                parts,
            )
        })
        .collect();
    let expected = [
        ("transformer_blocks.0.attn.to_qkv", 64, 3),
        ("transformer_blocks.0.attn.to_out.0", 16, 1),
        ("transformer_blocks.59.attn.to_qkv", 112, 3),
        ("transformer_blocks.59.attn.to_out.0", 16, 1),
    ];
    assert_eq!(slots, expected.map(|(s, r, p)| (s.to_owned(), r, p)));
}
