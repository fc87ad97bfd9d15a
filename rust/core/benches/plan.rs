//! Header and plan of a large file, beside the `safetensors` crate reading the same header, and the
//! plan of a stack of it.

#![expect(clippy::unwrap_used, reason = "a bench may stop at once")]

use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use criterion::{Criterion, criterion_group, criterion_main};
use qwenlora_core::header::Header;
use qwenlora_core::model::slot::Slot;
use qwenlora_core::model::{Model, known};
use qwenlora_core::plan::FilePlan;
use qwenlora_core::stack::{PlacedStack, SlotIndex, StackItem, StackOptions};

/// The 2160 tensors of a Lightning LoRA (850 MB in bf16) as a sparse file.
fn lightning(path: &Path) -> Vec<u8> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/data/keys/lightning_f32_full60.json");
    let corpus: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(corpus).unwrap()).unwrap();
    let (mut json, mut end) = (String::from("{"), 0u64);
    for row in corpus["tensors"].as_array().unwrap() {
        let dtype = row["dtype"].as_str().unwrap();
        let width = if dtype == "I64" { 8 } else { 4 };
        let elements: u64 = row["shape"]
            .as_array()
            .unwrap()
            .iter()
            .map(|d| d.as_u64().unwrap())
            .product();
        let begin = end;
        end += elements * width;
        let comma = if begin == 0 { "" } else { "," };
        write!(
            json,
            r#"{comma}{}:{{"dtype":"{dtype}","shape":{},"data_offsets":[{begin},{end}]}}"#,
            row["key"], row["shape"]
        )
        .unwrap();
    }
    json.push('}');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.extend_from_slice(json.as_bytes());
    let mut file = File::create(path).unwrap();
    file.write_all(&header).unwrap();
    file.set_len(header.len() as u64 + end).unwrap();
    header
}

fn bench(criterion: &mut Criterion) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("lightning.safetensors");
    let header = lightning(&path);
    let file_len = path.metadata().unwrap().len();
    let mut group = criterion.benchmark_group("lightning, 2160 tensors");
    group.bench_function("header", |b| {
        b.iter(|| {
            Header::read(&mut header.as_slice(), file_len)
                .unwrap()
                .tensors()
                .len()
        });
    });
    group.bench_function("header, the safetensors crate", |b| {
        b.iter(|| {
            let json: safetensors::tensor::Metadata = serde_json::from_slice(&header[8..]).unwrap();
            json.tensors().len()
        });
    });
    group.bench_function("file plan with 720 alphas", |b| {
        b.iter(|| FilePlan::read(&path).unwrap().modules().len());
    });
    let plan = FilePlan::read(&path).unwrap();
    group.bench_function("file plan as JSON", |b| b.iter(|| plan.to_json().len()));
    let slots = known::known_slots(Model::QwenImage);
    // As in a model at hand: the blocks' slots are alike.
    let pattern = |path: &str| {
        let segments = path.split('.');
        let starred = segments.map(|s| if s.parse::<u32>().is_ok() { "*" } else { s });
        starred.collect::<Vec<_>>().join(".")
    };
    let slots: Vec<Slot> = slots
        .into_iter()
        .map(|known| Slot {
            pattern: pattern(&known.slot.path),
            ..known.slot
        })
        .collect();
    let item = StackItem {
        name: "lightning",
        plan: &plan,
        strength: 1.0,
        modulation: true,
        off: &[],
    };
    let index = SlotIndex::new(&slots);
    let place = || PlacedStack::new(&[item], &slots, &index, StackOptions::default()).unwrap();
    group.bench_function("stack plan", |b| b.iter(|| place().added_bytes));
    let stack = place();
    group.bench_function("stack plan, grouped", |b| {
        b.iter(|| stack.grouped(&[&plan], &slots, &index).groups.len());
    });
    group.bench_function("stack plan, told as JSON", |b| {
        b.iter(|| stack.told(&[&plan], &slots).to_json().len());
    });
    group.finish();
}

criterion_group!(benches, bench);
criterion_main!(benches);
