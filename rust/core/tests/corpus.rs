//! All 109 key layouts: every tensor's module and role, every module's rank and scale, every
//! file's verdict, and a stack of each file on the whole model.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::LazyLock;

use qwenlora_core::adapter::exactness::Exactness;
use qwenlora_core::adapter::module;
use qwenlora_core::dtype::Dtype;
use qwenlora_core::key::table::RawTensor;
use qwenlora_core::model::slot::{Slot, SlotKind};
use qwenlora_core::model::{Model, known};
use qwenlora_core::plan::FilePlan;
use qwenlora_core::stack::{StackItem, StackOptions, StackPlan};
use serde_json::Value;

/// The files' names and what is in them, read once for all tests.
static CORPUS: LazyLock<Vec<(String, Value)>> = LazyLock::new(|| {
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
});

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
    assert_eq!(CORPUS.len(), 109);
}

#[test]
fn every_tensor_has_its_target_role_and_reason() {
    let mut tensors = 0;
    for (name, file) in &*CORPUS {
        let document = document(name, file);
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
                "{name}: module of {key}"
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
    assert_eq!(tensors, 13_675);
}

#[test]
fn every_module_has_its_adapter_rank_and_scale() {
    let mut modules = 0;
    for (name, file) in &*CORPUS {
        let document = document(name, file);
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
    assert_eq!(modules, 5256);
}

#[test]
fn verdicts_are_the_corpus_own() {
    for (name, file) in &*CORPUS {
        let document = document(name, file);
        let expected = file["expect"].as_str().unwrap();
        assert_eq!(document["verdict"], expected, "{name}");
        let reason = document["reason"].as_str().unwrap_or_default();
        assert_eq!(expected == "apply", reason.is_empty(), "{name}: {reason}");
        let model = document["model"].as_str().unwrap_or("none");
        assert_eq!(model, file["model"].as_str().unwrap(), "{name}");
    }
}

#[test]
fn every_module_but_the_refused_is_supported() {
    for (name, file) in &*CORPUS {
        let document = document(name, file);
        for module in document["modules"].as_array().unwrap() {
            let target = module["target"].as_str().unwrap();
            let reshaped = name == "control_lora_img_in" && target == "img_in";
            assert_eq!(module["supported"], !reshaped, "{name}: {module}");
        }
    }
}

/// The slots of a released model as Nunchaku quantizes it, with offload on.
fn model_slots(model: Model) -> Vec<Slot> {
    known::known_slots(model)
        .into_iter()
        .map(|known| {
            let group = known.slot.path.split('.').next().unwrap_or_default();
            let in_block = ["transformer_blocks", "layers"].contains(&group);
            Slot {
                base_rank: if known.slot.kind == SlotKind::Svdq {
                    32
                } else {
                    0
                },
                offloaded: in_block,
                pattern: match known.slot.path.splitn(3, '.').collect::<Vec<_>>()[..] {
                    [group, _, name] if in_block => format!("{group}.*.{name}"),
                    _ => known.slot.path.clone(),
                },
                ..known.slot
            }
        })
        .collect()
}

#[test]
fn every_file_is_planned_whole_or_refused() {
    let (qwen_image, z_image) = (model_slots(Model::QwenImage), model_slots(Model::ZImage));
    assert_eq!(qwen_image.len(), 60 * 14 + 8);
    let options = StackOptions {
        strict: true,
        ..StackOptions::default()
    };
    for (name, file) in &*CORPUS {
        let plan = plan(name, file);
        let item = StackItem {
            name,
            plan: &plan,
            strength: 1.0,
            modulation: true,
            off: &[],
        };
        let (own, other) = match plan.model() {
            Some(Model::ZImage) => (&z_image, &qwen_image),
            _ => (&qwen_image, &z_image),
        };
        assert!(StackPlan::new(&[item], other, options).is_err(), "{name}");
        let stack = StackPlan::new(&[item], own, options);
        if file["expect"] == "reject" {
            assert!(stack.is_err(), "{name}");
            continue;
        }
        if name == "control_lora_img_in" {
            let text = stack.unwrap_err().to_string();
            assert!(text.contains("`reshape_weight` is not supported"), "{text}");
            continue;
        }
        let stack = stack.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(stack.applied_modules, [plan.modules().len()], "{name}");
        assert!(stack.skipped.iter().all(|skip| !skip.matters), "{name}");
        assert!(stack.added_bytes > 0, "{name}");
        let planned: usize = stack
            .slots
            .iter()
            .flat_map(|slot| &slot.pieces)
            .map(|piece| piece.tensors.len())
            .sum();
        let applied = plan
            .table()
            .entries()
            .iter()
            .filter(|entry| entry.module.is_some() && !module::is_scalar_role(entry.role));
        assert_eq!(planned, applied.count(), "{name}: tensors");
    }
}

/// How often each (kind, adapter, rank, budget) occurs among the pieces of a file.
fn pieces_of(wanted: &str) -> Vec<String> {
    let (name, file) = CORPUS.iter().find(|(name, _)| name == wanted).unwrap();
    let plan = plan(name, file);
    let item = StackItem {
        name,
        plan: &plan,
        strength: 1.0,
        modulation: true,
        off: &[],
    };
    let stack = StackPlan::new(
        &[item],
        &model_slots(Model::QwenImage),
        StackOptions::default(),
    )
    .unwrap();
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for slot in &stack.slots {
        for piece in &slot.pieces {
            let budget = piece
                .rank_budget
                .map_or(String::new(), |b| format!(" of budget {b}"));
            let (kind, slot) = (piece.kind, slot.kind);
            let text = format!("{kind:?} in {slot:?}, rank {}{budget}", piece.rank);
            *counts.entry(text).or_default() += 1;
        }
    }
    let rows = counts.into_iter();
    rows.map(|(text, count)| format!("{count} {text}"))
        .collect()
}

#[test]
fn kinds_of_pieces() {
    for (name, expected) in [
        (
            "ai_toolkit_lokr_full_bf16",
            vec!["4 Kron in Awq, rank 0", "24 Kron in Svdq, rank 0"],
        ),
        (
            "ai_toolkit_lokr_lowrank",
            vec!["4 LowRank in Awq, rank 64", "24 LowRank in Svdq, rank 64"],
        ),
        (
            "ai_toolkit_full_layers",
            vec![
                // Each of 60 blocks would have room for it.
                "2 Dense in Awq, rank 256 of budget 256",
                "2 LowRank in Awq, rank 16",
                "24 LowRank in Svdq, rank 16",
                "2 Vector in Awq, rank 0",
                "8 Vector in Norm, rank 0",
            ],
        ),
        (
            "ai_toolkit_dora",
            vec!["4 Diagonal in Awq, rank 16", "24 Diagonal in Svdq, rank 16"],
        ),
        ("onetrainer_lokr_dora", vec!["24 Diagonal in Svdq, rank 0"]),
        ("lycoris_glora", vec!["24 LowRank in Svdq, rank 16"]),
        ("lycoris_ia3", vec!["12 Diagonal in Svdq, rank 0"]),
        ("lycoris_diag_oft", vec!["24 Rotation in Svdq, rank 0"]),
        ("lycoris_boft", vec!["24 Rotation in Svdq, rank 0"]),
        ("onetrainer_oft", vec!["24 Rotation in Svdq, rank 0"]),
        (
            "lycoris_loha_rslora",
            vec!["4 LowRank in Awq, rank 256", "24 LowRank in Svdq, rank 256"],
        ),
        (
            "nunchaku_packed_lowrank",
            vec!["8 LowRank in Svdq, rank 32", "4 LowRank in Svdq, rank 96"],
        ),
        (
            "layered_extract_embedding",
            vec![
                "4 LowRank in Awq, rank 8",
                "1 LowRank in Embedding, rank 2",
                "24 LowRank in Svdq, rank 8",
            ],
        ),
        (
            "diffusers_peft_lora_bias",
            vec!["8 LowRank in Svdq, rank 16", "8 Vector in Svdq, rank 0"],
        ),
    ] {
        assert_eq!(pieces_of(name), expected, "{name}");
    }
}

/// What a file's plan says of each module before any model is at hand is what its stack finds on the
/// released model.
#[test]
fn the_class_of_every_module_is_that_of_its_pieces() {
    let worst = |classes: &mut BTreeMap<String, Exactness>, path: &str, class: Exactness| {
        let own = classes.entry(path.to_owned()).or_insert(class);
        *own = class.max(*own);
    };
    let mut seen = BTreeMap::new();
    for (name, file) in &*CORPUS {
        let plan = plan(name, file);
        let Some(model) = plan.model() else { continue };
        let slots: Vec<Slot> = model_slots(model)
            .into_iter()
            .map(|slot| Slot {
                offloaded: false,
                ..slot
            })
            .collect();
        let item = StackItem {
            name,
            plan: &plan,
            strength: 1.0,
            modulation: true,
            off: &[],
        };
        let stack = StackPlan::new(&[item], &slots, StackOptions::default()).unwrap();
        let mut found = BTreeMap::new();
        for piece in stack.slots.iter().flat_map(|slot| &slot.pieces) {
            worst(&mut found, &piece.module, piece.exactness);
        }
        let mut said = BTreeMap::new();
        for (module, class) in plan.exactness() {
            *seen.entry(class).or_insert(0) += 1;
            worst(&mut said, &model_path(module), class);
        }
        assert_eq!(said, found, "{name}");
    }
    // No layer of a released model is one that cuts what the files hold.
    let classes = [Exactness::Exact, Exactness::Norms];
    assert!(seen.keys().copied().eq(classes), "{seen:?}");
}

fn model_path(module: &module::Module) -> String {
    qwenlora_core::model::table().module(module.id).path.clone()
}

#[test]
fn slots_of_fused_modules_add_their_ranks() {
    let (name, file) = CORPUS
        .iter()
        .find(|(name, _)| name == "diffusers_peft_patterns")
        .unwrap();
    let document = document(name, file);
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

#[test]
fn every_module_lists_its_pieces() {
    let (name, file) = CORPUS
        .iter()
        .find(|(name, _)| name == "diffusers_peft_lora_bias")
        .unwrap();
    assert_eq!(
        document(name, file)["modules"][0]["pieces"],
        serde_json::json!([
            {"kind": "LowRank", "adapter": "lora", "rank": 16, "scale": 2.0},
            {"kind": "Vector", "adapter": "full", "rank": 0, "scale": 2.0},
        ])
    );
}

#[test]
fn no_real_file_is_said_to_name_another_model() {
    for (name, file) in &*CORPUS {
        let notes = plan(name, file).notes().join("\n");
        assert!(!notes.contains("names another model"), "{name}: {notes}");
    }
}

#[test]
fn what_is_applied_but_cut_is_said() {
    let said = |wanted: &str, words: &str| {
        let (name, file) = CORPUS.iter().find(|(name, _)| name == wanted).unwrap();
        plan(name, file)
            .notes()
            .iter()
            .any(|note| note.contains(words))
    };
    let full = "full deltas of quantized layers";
    let rank = "more ranks than a quantized layer";
    for file in ["lycoris_full", "ai_toolkit_fullrank"] {
        assert!(said(file, full) && !said(file, rank), "{file}");
    }
    for file in [
        "musubi_loha",
        "lycoris_lokr_both",
        "musubi_lora_full60",
        "lycoris_norms",
        // Fused kernels are opened for them.
        "z_image_ai_toolkit_lokr",
        "simpletuner_lycoris_lokr",
        "ai_toolkit_lokr_full_bf16",
    ] {
        assert!(
            ![full, rank].iter().any(|words| said(file, words)),
            "{file}"
        );
    }
}

#[test]
fn foreign_keys_are_told_by_component() {
    let component =
        |name: &str, reason: &str, tensors: usize| (name.to_owned(), reason.to_owned(), tensors);
    for (wanted, expected) in [
        (
            "foreign_keys_mixed_in",
            vec![
                component("text_encoder", "text encoder", 2),
                component("lora_te", "text encoder", 1),
                component("bundle_emb", "embedding", 1),
                component("_aux", "bookkeeping", 1),
                component("pipe.perceiver_resampler", "not a transformer module", 1),
            ],
        ),
        (
            "onetrainer_comfy",
            vec![component("text_encoders.qwen25_7b", "text encoder", 3)],
        ),
        ("musubi_lora_full60", Vec::new()),
    ] {
        let (name, file) = CORPUS.iter().find(|(name, _)| name == wanted).unwrap();
        let found = plan(name, file).components();
        let found: Vec<_> = found
            .into_iter()
            .map(|c| component(&c.name, c.reason, c.tensors))
            .collect();
        assert_eq!(found, expected, "{name}");
    }
}
