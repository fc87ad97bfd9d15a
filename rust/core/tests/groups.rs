//! Groups of slots that are alike, against the plan told slot by slot.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use proptest::prelude::*;
use proptest::sample::select;
use qwenlora_core::adapter::{Adapter, PieceKind};
use qwenlora_core::dtype::Dtype;
use qwenlora_core::key::table::RawTensor;
use qwenlora_core::model::slot::{BlockBuild, Slot, SlotKind};
use qwenlora_core::plan::FilePlan;
use qwenlora_core::stack::{
    Group, Piece, PlacedStack, Route, SlotIndex, SlotPlan, StackItem, StackOptions, StackPlan,
};

const BLOCKS: usize = 4;
/// Slots of a block, with their (out, in) and the modules in them.
const SLOTS: [(&str, SlotKind, u64, u64, &[&str]); 4] = [
    (
        "attn.to_qkv",
        SlotKind::Svdq,
        9216,
        3072,
        &["attn.to_v", "attn.to_q", "attn.to_qkv"],
    ),
    (
        "attn.to_out.0",
        SlotKind::Svdq,
        3072,
        3072,
        &["attn.to_out.0"],
    ),
    ("img_mod.1", SlotKind::Awq, 18432, 3072, &["img_mod.1"]),
    ("attn.norm_q", SlotKind::Norm, 128, 1, &["attn.norm_q"]),
];

/// What a file holds of a module.
#[derive(Debug, Clone, Copy)]
enum Held {
    Nothing,
    Pair(u64, Dtype),
    /// With the value of its alpha.
    Scaled(u64, f64),
    Kron,
    /// A pair, and a bias beside it.
    Biased(u64),
    /// A pair with a magnitude.
    Stretched(u64),
}

fn held() -> impl Strategy<Value = Held> {
    select(vec![
        Held::Pair(16, Dtype::BF16),
        Held::Pair(16, Dtype::BF16),
        Held::Pair(16, Dtype::BF16),
        Held::Pair(24, Dtype::BF16),
        Held::Pair(16, Dtype::F32),
        Held::Pair(16, Dtype::F64),
        Held::Pair(400, Dtype::BF16),
        Held::Scaled(16, 8.0),
        Held::Scaled(16, 16.0),
        Held::Kron,
        Held::Biased(16),
        Held::Stretched(16),
        Held::Nothing,
    ])
}

fn slots(offloaded: usize, base_rank: u64) -> Vec<Slot> {
    let of_block = |block: usize| {
        SLOTS
            .iter()
            .map(move |&(name, kind, out_features, in_features, _)| Slot {
                path: format!("transformer_blocks.{block}.{name}"),
                kind,
                in_features,
                out_features,
                base_rank: if kind == SlotKind::Svdq { base_rank } else { 0 },
                element_bytes: 2,
                offloaded: block < offloaded,
                pattern: format!("transformer_blocks.*.{name}"),
                has_bias: true,
                build: BlockBuild::Nunchaku,
                opens: false,
            })
    };
    (0..BLOCKS).flat_map(of_block).collect()
}

/// A file, module by module in the order of `held`; `None` where nothing of it is left.
fn file(held: &[Held]) -> Option<FilePlan> {
    let mut tensors: Vec<RawTensor> = Vec::new();
    let mut scalars = Vec::new();
    let mut end = 0;
    let mut add = |key: String, dtype: Dtype, shape: &[u64], value: Option<f64>| {
        let len_bytes = shape.iter().product::<u64>() * dtype.bits() / 8;
        tensors.push(RawTensor {
            key,
            dtype,
            shape: shape.to_vec(),
            offset_bytes: end,
            len_bytes,
        });
        end += len_bytes;
        scalars.push(value);
    };
    let modules = (0..BLOCKS).flat_map(|block| {
        let of_slot = move |&(_, _, out, inp, names): &(_, _, u64, u64, &'static [&str])| {
            names.iter().map(move |name| {
                let is_part = ["attn.to_q", "attn.to_v"].contains(name);
                let rows = if is_part { out / 3 } else { out };
                (format!("transformer_blocks.{block}.{name}"), rows, inp)
            })
        };
        SLOTS.iter().flat_map(of_slot)
    });
    for ((stem, out, inp), held) in modules.zip(held) {
        if inp == 1 {
            if !matches!(held, Held::Nothing) {
                add(format!("{stem}.diff"), Dtype::BF16, &[out], None);
            }
            continue;
        }
        let mut pair = |rank: u64, dtype: Dtype| {
            add(format!("{stem}.lora_A.weight"), dtype, &[rank, inp], None);
            add(format!("{stem}.lora_B.weight"), dtype, &[out, rank], None);
        };
        match *held {
            Held::Nothing => {}
            Held::Pair(rank, dtype) => pair(rank, dtype),
            Held::Scaled(rank, alpha) => {
                pair(rank, Dtype::BF16);
                add(format!("{stem}.alpha"), Dtype::F32, &[], Some(alpha));
            }
            Held::Kron => {
                add(format!("{stem}.lokr_w1"), Dtype::BF16, &[16, 16], None);
                add(
                    format!("{stem}.lokr_w2"),
                    Dtype::BF16,
                    &[out / 16, inp / 16],
                    None,
                );
            }
            Held::Stretched(rank) => {
                pair(rank, Dtype::BF16);
                add(format!("{stem}.dora_scale"), Dtype::BF16, &[out, 1], None);
            }
            Held::Biased(rank) => {
                pair(rank, Dtype::BF16);
                add(format!("{stem}.diff_b"), Dtype::BF16, &[out], None);
            }
        }
    }
    let plan = FilePlan::from_tensors("test", tensors, &scalars, Vec::new()).unwrap();
    (!plan.modules().is_empty()).then_some(plan)
}

/// What must be equal where slots are composed together; none for a slot that is composed alone.
fn key(plan: &SlotPlan, slot: &Slot) -> Option<String> {
    if plan.route == Route::Beside {
        return None;
    }
    let piece = |piece: &Piece| {
        let names: Vec<&str> = piece.tensors.keys().copied().collect();
        let tensors = || piece.tensors.values();
        let dtype = tensors().next()?.dtype;
        let is_plain = (piece.kind, piece.adapter) == (PieceKind::LowRank, Adapter::Lora)
            && names == ["down", "up"]
            && tensors().all(|tensor| tensor.dtype == dtype)
            && ["BF16", "F16", "F32"].contains(&dtype)
            && !piece.module.ends_with("qkv");
        let (lora, rank, scale) = (piece.lora, piece.rank, piece.scale.to_bits());
        let (begin, count) = (piece.row_begin, piece.row_count);
        is_plain.then(|| format!("{lora} {rank} {scale} {begin} {count} {dtype}"))
    };
    let pieces: Vec<String> = plan.pieces.iter().map(piece).collect::<Option<_>>()?;
    let ranks: u64 = (0..2)
        .map(|lora| {
            let own = plan.pieces.iter().filter(|piece| piece.lora == lora);
            own.map(|piece| piece.rank)
                .sum::<u64>()
                .next_multiple_of(16)
        })
        .sum();
    let exact: u64 = plan.pieces.iter().map(|piece| piece.rank).sum();
    let fits = plan
        .rank_limit
        .is_none_or(|limit| exact <= limit && ranks <= limit.next_multiple_of(16));
    fits.then(|| format!("{} {} {pieces:?}", slot.pattern, slot.offloaded))
}

/// A group's modules as the pieces of one of its slots tell them.
fn assert_told(group: &Group, at: usize, plan: &SlotPlan) {
    let members = group.shares.iter();
    let members = members.flat_map(|stack| stack.members.iter().map(move |m| (stack.lora, m)));
    assert_eq!(members.clone().count(), plan.pieces.len());
    for ((lora, member), piece) in members.zip(&plan.pieces) {
        assert_eq!(
            (lora, member.rank, member.scale.to_bits()),
            (piece.lora, piece.rank, piece.scale.to_bits())
        );
        assert_eq!(
            (member.row_begin, member.row_count),
            (piece.row_begin, piece.row_count)
        );
        for (name, own) in [("down", &member.down), ("up", &member.up)] {
            let tensor = &piece.tensors[name];
            assert_eq!(
                (member.dtype, own.len_bytes),
                (tensor.dtype, tensor.len_bytes)
            );
            assert_eq!(own.offsets_bytes[at], tensor.offset_bytes);
            assert_eq!(own.indices[at], tensor.index as u64);
            assert_eq!(own.indices.len(), group.slots.len());
        }
    }
    assert_eq!(group.row_order, plan.row_order);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn slots_are_told_together_exactly_where_they_are_alike(
        files in proptest::collection::vec(proptest::collection::vec(held(), BLOCKS * 6), 1..3),
        offloaded in 0..=BLOCKS,
        base_rank in select(vec![32, 512]),
        max_rank in select(vec![None, Some(64)]),
    ) {
        let slots = slots(offloaded, base_rank);
        let index = SlotIndex::new(&slots);
        let plans: Vec<FilePlan> = files.iter().filter_map(|held| file(held)).collect();
        let plans: Vec<&FilePlan> = plans.iter().collect();
        let items: Vec<StackItem<'_>> = plans
            .iter()
            .map(|&plan| StackItem { name: "lora", plan, strength: 1.0, modulation: true, off: &[] })
            .collect();
        let options = StackOptions { max_rank, ..StackOptions::default() };
        let placed = PlacedStack::new(&items, &slots, &index, options).unwrap();
        let told = StackPlan::new(&items, &slots, options).unwrap();
        prop_assert_eq!(&placed.told(&plans, &slots), &told);

        let places = told.slots.iter().map(|plan| {
            slots.iter().position(|slot| slot.path == plan.path).unwrap()
        });
        let mut expected: Vec<(String, Vec<usize>)> = Vec::new();
        let mut single = Vec::new();
        for (place, plan) in places.zip(&told.slots) {
            let Some(key) = key(plan, &slots[place]) else {
                single.push((place, plan.clone()));
                continue;
            };
            match expected.iter_mut().find(|(own, _)| *own == key) {
                Some((_, group)) => group.push(place),
                None => expected.push((key, vec![place])),
            }
        }
        let found = placed.grouped(&plans, &slots, &index);
        prop_assert_eq!(found.single, single);
        let groups: Vec<Vec<usize>> = expected.into_iter().map(|(_, group)| group).collect();
        let found_groups: Vec<Vec<usize>> = found.groups.iter().map(|own| own.slots.clone()).collect();
        prop_assert_eq!(found_groups, groups);
        for group in &found.groups {
            for (at, place) in group.slots.iter().enumerate() {
                let plan = told.slots.iter().find(|plan| plan.path == slots[*place].path).unwrap();
                assert_told(group, at, plan);
            }
        }
    }
}
