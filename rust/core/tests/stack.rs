//! Every kind of delta on every kind of slot: how it is executed, what it costs, what is refused.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod slots;
mod state_dict;

use proptest::prelude::*;
use qwenlora_core::adapter::delta::Parameter;
use qwenlora_core::adapter::{Adapter, PieceKind};
use qwenlora_core::dtype::Dtype;
use qwenlora_core::model::slot::{BlockBuild, Slot, SlotKind};
use qwenlora_core::plan::{FilePlan, Verdict};
use qwenlora_core::stack::{
    LokrScale, MAX_KRON_RANK, PartForm, Piece, Skip, SkipKind, StackError, StackItem, StackOptions,
    StackPlan, TRUNCATED_RANK,
};
use slots::slot;
use state_dict::{TO_Q, Tensors};

const MLP: &str = "transformer_blocks.0.img_mlp.net.0.proj";
const MOD: &str = "transformer_blocks.0.img_mod.1";
const NORM: &str = "transformer_blocks.0.attn.norm_q";
const EMBEDDING: &str = "time_text_embed.addition_t_embedding";
const IMG_IN: &str = "img_in";

fn slots() -> Vec<Slot> {
    vec![
        slot(
            "transformer_blocks.0.attn.to_qkv",
            SlotKind::Svdq,
            9216,
            3072,
        ),
        slot(MLP, SlotKind::Svdq, 12288, 3072),
        slot(MOD, SlotKind::Awq, 18432, 3072),
        slot(NORM, SlotKind::Norm, 128, 1),
        slot(EMBEDDING, SlotKind::Embedding, 3072, 2),
        slot(IMG_IN, SlotKind::Linear, 3072, 64),
    ]
}

fn item(plan: &FilePlan) -> StackItem<'_> {
    StackItem {
        name: "style",
        plan,
        strength: 1.0,
        modulation: true,
        off: &[],
    }
}

fn stack_on(plan: &FilePlan, slots: &[Slot], options: StackOptions) -> StackPlan {
    StackPlan::new(&[item(plan)], slots, options).unwrap()
}

fn stack(tensors: Tensors) -> StackPlan {
    stack_on(&tensors.plan(), &slots(), StackOptions::default())
}

fn pieces(stack: &StackPlan) -> Vec<&Piece> {
    stack.slots.iter().flat_map(|slot| &slot.pieces).collect()
}

fn only(stack: &StackPlan) -> &Piece {
    let pieces = pieces(stack);
    assert_eq!(pieces.len(), 1, "{:?}", stack.skipped);
    pieces[0]
}

/// (kind, rank, budget)
fn execution(piece: &Piece) -> (PieceKind, u64, Option<u64>) {
    (piece.kind, piece.rank, piece.rank_budget)
}

fn roles(piece: &Piece) -> Vec<&str> {
    piece.tensors.keys().copied().collect()
}

/// What is skipped of a file that goes to the slots beside a pair that fits.
fn skips(tensors: Tensors) -> Vec<Skip> {
    let with_pair = tensors.peft("transformer_blocks.0.attn.to_v", 16);
    stack(with_pair).skipped
}

fn lokr(stem: &str, w1: [u64; 2], w2: [u64; 2]) -> Tensors {
    Tensors::default()
        .tensor(&format!("{stem}.lokr_w1"), &w1)
        .tensor(&format!("{stem}.lokr_w2"), &w2)
}

fn lokr_low(stem: &str, w1: [u64; 2], w2: [u64; 2], rank: u64) -> Tensors {
    Tensors::default()
        .tensor(&format!("{stem}.lokr_w1"), &w1)
        .tensor(&format!("{stem}.lokr_w2_a"), &[w2[0], rank])
        .tensor(&format!("{stem}.lokr_w2_b"), &[rank, w2[1]])
}

// LoKr

#[test]
fn a_lokr_of_low_rank_is_rank_and_another_a_side_branch() {
    let budget = TRUNCATED_RANK;
    for (tensors, expected) in [
        (
            lokr_low(TO_Q, [16, 16], [192, 192], 8),
            (PieceKind::LowRank, 128, None),
        ),
        (
            lokr_low(TO_Q, [48, 48], [64, 64], 3),
            (PieceKind::Kron, 0, None),
        ),
        (lokr(TO_Q, [16, 16], [192, 192]), (PieceKind::Kron, 0, None)),
        (lokr(MOD, [16, 16], [1152, 192]), (PieceKind::Kron, 0, None)),
        (
            lokr(MLP, [16, 16], [768, 192]),
            (PieceKind::LowRank, budget, Some(budget)),
        ),
        (
            lokr_low(MLP, [8, 8], [1536, 384], 16),
            (PieceKind::LowRank, 128, None),
        ),
        // The bound is capped by the module's smaller side.
        (
            lokr(IMG_IN, [64, 8], [48, 8]),
            (PieceKind::LowRank, 64, None),
        ),
    ] {
        let stack = stack(tensors);
        let piece = only(&stack);
        assert_eq!(execution(piece), expected, "{}", piece.module);
        assert_eq!(piece.adapter, Adapter::Lokr);
    }
}

#[test]
fn an_mlp_that_is_not_quantized_carries_the_side_branch() {
    let slots = [slot(MLP, SlotKind::Linear, 12288, 3072)];
    let plan = lokr(MLP, [16, 16], [768, 192]).plan();
    let stack = stack_on(&plan, &slots, StackOptions::default());
    assert_eq!(only(&stack).kind, PieceKind::Kron);
}

#[test]
fn the_budget_is_the_least_of_all_limits() {
    let plan = lokr(MLP, [16, 16], [768, 192]).plan();
    let low = lokr_low(MLP, [16, 16], [768, 192], 12).plan();
    for (max_rank, truncated_rank, base_rank, expected) in [
        (None, 256, 32, (256, Some(256))),
        (None, 4096, 32, (992, Some(992))),
        (Some(64), 256, 32, (64, Some(64))),
        (None, 256, 928, (96, Some(96))),
        (Some(7), 3, 32, (3, Some(3))),
    ] {
        let mut slots = slots();
        slots[1].base_rank = base_rank;
        let options = StackOptions {
            max_rank,
            truncated_rank,
            ..StackOptions::default()
        };
        let stack = stack_on(&plan, &slots, options);
        let piece = only(&stack);
        assert_eq!((piece.rank, piece.rank_budget), expected);
    }
    // 16 * 12 = 192 is above what is executed as rank anyway, and below the budget.
    let options = StackOptions {
        truncated_rank: 200,
        ..StackOptions::default()
    };
    let stack = stack_on(&low, &slots(), options);
    assert_eq!(execution(only(&stack)), (PieceKind::LowRank, 192, None));
}

#[test]
fn a_lokr_tells_which_factors_are_halves() {
    let direct = stack(lokr(TO_Q, [16, 16], [192, 192]));
    assert_eq!(roles(only(&direct)), ["lokr_w1", "lokr_w2"]);
    let both = Tensors::default()
        .tensor(&format!("{TO_Q}.lokr_w1_a"), &[48, 4])
        .tensor(&format!("{TO_Q}.lokr_w1_b"), &[4, 48])
        .tensor(&format!("{TO_Q}.lokr_w2_a"), &[64, 4])
        .tensor(&format!("{TO_Q}.lokr_w2_b"), &[4, 64])
        .scalar(&format!("{TO_Q}.alpha"), 2.0);
    let both = stack(both);
    assert_eq!(
        roles(only(&both)),
        ["lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"]
    );
    assert_eq!(execution(only(&both)), (PieceKind::LowRank, 16, None));
    assert_eq!(only(&both).scale.to_bits(), 0.5f64.to_bits());
}

#[test]
fn the_scale_of_whole_factors_is_one_unless_the_network_is_asked() {
    let files = |alpha: &str, dim: &str| {
        lokr(TO_Q, [16, 16], [192, 192])
            .scalar(&format!("{TO_Q}.alpha"), f64::INFINITY)
            .tensor(&format!("{TO_Q}.diff_b"), &[3072])
            .metadata("ss_network_alpha", alpha)
            .metadata("ss_network_dim", dim)
            .plan()
    };
    let scales = |plan: &FilePlan, lokr_scale| {
        let options = StackOptions {
            lokr_scale,
            ..StackOptions::default()
        };
        let stack = stack_on(plan, &slots(), options);
        pieces(&stack).iter().map(|p| p.scale).collect::<Vec<_>>()
    };
    assert_eq!(scales(&files("1", "32"), LokrScale::Standard), [1.0, 1.0]);
    assert_eq!(
        scales(&files("1", "32"), LokrScale::Network),
        [0.03125, 1.0]
    );
    for (alpha, dim) in [
        ("nan", "32"),
        ("1", "0"),
        ("-1", "32"),
        ("1", "Dynamic"),
        ("inf", "4"),
        ("1e308", "1e-308"),
    ] {
        assert_eq!(scales(&files(alpha, dim), LokrScale::Network), [1.0, 1.0]);
    }
    let absurd = lokr(TO_Q, [16, 16], [192, 192])
        .typed(&format!("{TO_Q}.diff_b"), Dtype::F32, &[3072])
        .scalar(&format!("{TO_Q}.lokr_w1.scale_weight"), 1e200)
        .peft("transformer_blocks.0.attn.to_v", 16)
        .metadata("ss_network_alpha", "1e200")
        .metadata("ss_network_dim", "1")
        .plan();
    let options = StackOptions {
        lokr_scale: LokrScale::Network,
        ..StackOptions::default()
    };
    assert_eq!(
        stack_on(&absurd, &slots(), options).skipped[0].reason,
        "gives a scale of inf: it must be finite"
    );
    let low = lokr_low(TO_Q, [16, 16], [192, 192], 8)
        .metadata("ss_network_alpha", "1")
        .metadata("ss_network_dim", "32")
        .plan();
    assert_eq!(scales(&low, LokrScale::Network), [1.0]);
}

#[test]
fn an_infinite_alpha_matters_where_it_is_used() {
    let error = lokr_low(TO_Q, [16, 16], [192, 192], 8)
        .scalar(&format!("{TO_Q}.alpha"), f64::INFINITY)
        .try_plan()
        .unwrap_err();
    insta::assert_snapshot!(
        error,
        @"`test`: `transformer_blocks.0.attn.to_q.alpha` gives a scale of inf: it must be finite"
    );
}

#[test]
fn factors_that_do_not_multiply_to_the_module_are_another_models() {
    let plan = lokr(TO_Q, [3072, 16], [16, 3072]).plan();
    assert_eq!(plan.verdict(), Verdict::Reject);
    insta::assert_snapshot!(
        plan.reason().unwrap(),
        @"a LoRA of another model: `transformer_blocks.0.attn.to_q` is 49152x49152 where qwen-image has 3072x3072"
    );
    let skipped = skips(lokr(TO_Q, [3072, 16], [16, 3072]));
    assert_eq!(skipped.len(), 1);
    assert_eq!(
        (skipped[0].name.as_str(), skipped[0].kind),
        (TO_Q, SkipKind::Shape)
    );
    // In the other order than LyCORIS sorts them, they do.
    let stack = stack(lokr(TO_Q, [192, 192], [16, 16]));
    assert_eq!(only(&stack).kind, PieceKind::Kron);
}

// LoHa, full, Tucker, packed

#[test]
fn a_loha_is_the_product_of_its_ranks() {
    let loha = |stem: &str, out: u64, inp: u64, r1: u64, r2: u64| {
        Tensors::default()
            .tensor(&format!("{stem}.hada_w1_a"), &[out, r1])
            .tensor(&format!("{stem}.hada_w1_b"), &[r1, inp])
            .tensor(&format!("{stem}.hada_w2_a"), &[out, r2])
            .tensor(&format!("{stem}.hada_w2_b"), &[r2, inp])
            .scalar(&format!("{stem}.alpha"), 4.0)
    };
    // Wider than half the matrix, it is cut as a matrix; up to there together with what else the
    // slot carries.
    for (r1, r2, rank, budget, scale) in [
        (8, 8, 64, None, 0.5f64),
        (4, 16, 64, None, 1.0),
        (32, 48, 1536, None, 0.125),
        (64, 64, 992, Some(992), 0.0625),
    ] {
        let stack = stack(loha(TO_Q, 3072, 3072, r1, r2));
        let piece = only(&stack);
        assert_eq!(execution(piece), (PieceKind::LowRank, rank, budget));
        assert_eq!(piece.scale.to_bits(), scale.to_bits());
        assert_eq!(
            roles(piece),
            ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"]
        );
    }
    let unequal = loha(TO_Q, 3072, 3072, 8, 8).plan();
    assert_eq!(unequal.verdict(), Verdict::Apply);
    let broken = Tensors::default()
        .tensor(&format!("{TO_Q}.hada_w1_a"), &[3072, 8])
        .tensor(&format!("{TO_Q}.hada_w1_b"), &[8, 3072])
        .tensor(&format!("{TO_Q}.hada_w2_a"), &[3072, 8])
        .tensor(&format!("{TO_Q}.hada_w2_b"), &[8, 64]);
    let skipped = skips(broken);
    assert_eq!(skipped[0].kind, SkipKind::Broken);
    assert_eq!(
        skipped[0].reason,
        "its two products differ in shape: 3072x3072 and 3072x64"
    );
}

#[test]
fn a_full_delta_is_whole_within_the_budget_and_else_truncated_where_the_weight_is_quantized() {
    let whole = (PieceKind::Dense, 0, None);
    let cut = (PieceKind::Dense, 256, Some(256));
    // A matrix, and the number that it is stored with.
    let matrix = |rows: u64, columns: u64| rows * columns * 2 + 4;
    for (stem, shape, budget, expected, bytes) in [
        (
            TO_Q,
            [3072, 3072],
            matrix(9216, 3072),
            whole,
            matrix(9216, 3072),
        ),
        (TO_Q, [3072, 3072], matrix(9216, 3072) - 1, cut, 0),
        (MOD, [18432, 3072], u64::MAX, whole, matrix(18432, 3072)),
        (MOD, [18432, 3072], 0, cut, 0),
        // Inside a kernel it is never whole.
        (MLP, [12288, 3072], u64::MAX, cut, 0),
        (IMG_IN, [3072, 64], 0, whole, matrix(3072, 64)),
        (EMBEDDING, [2, 3072], 0, whole, matrix(2, 3072)),
    ] {
        let plan = Tensors::default()
            .tensor(&format!("{stem}.diff"), &shape)
            .plan();
        let options = StackOptions {
            dense_budget: budget,
            ..StackOptions::default()
        };
        let stack = stack_on(&plan, &slots(), options);
        let piece = only(&stack);
        assert_eq!(execution(piece), expected, "{stem}");
        assert_eq!((piece.adapter, roles(piece)), (Adapter::Full, vec!["diff"]));
        assert_eq!(stack.slots[0].branch_bytes, bytes, "{stem}");
    }
    // ai-toolkit's full rank: a lone `lora_A` of the weight's size.
    let stack = stack(Tensors::default().tensor(&format!("{TO_Q}.lora_A.weight"), &[3072, 3072]));
    assert_eq!(only(&stack).kind, PieceKind::Dense);
}

#[test]
fn a_tucker_pair_has_the_ranks_of_its_core() {
    let tucker = |mid: &[u64]| {
        Tensors::default()
            .tensor(&format!("{TO_Q}.lora_down.weight"), &[8, 3072, 1, 1])
            .tensor(&format!("{TO_Q}.lora_mid.weight"), mid)
            .tensor(&format!("{TO_Q}.lora_up.weight"), &[3072, 4, 1, 1])
            .scalar(&format!("{TO_Q}.alpha"), 2.0)
    };
    for mid in [&[4, 8][..], &[4, 8, 1, 1]] {
        let stack = stack(tucker(mid));
        let piece = only(&stack);
        assert_eq!(execution(piece), (PieceKind::LowRank, 4, None));
        assert_eq!(roles(piece), ["down", "mid", "up"]);
        assert_eq!(piece.scale.to_bits(), 0.25f64.to_bits());
    }
    for mid in [&[8, 4][..], &[8, 8], &[4, 8, 3, 3]] {
        assert_eq!(skips(tucker(mid))[0].kind, SkipKind::Broken, "{mid:?}");
    }
}

#[test]
fn packed_pairs_cover_a_whole_quantized_slot() {
    let qkv = "transformer_blocks.0.attn.to_qkv";
    let packed = |stem: &str, out: u64, rank: u64| {
        Tensors::default()
            .tensor(&format!("{stem}.lora_down"), &[3072, rank])
            .tensor(&format!("{stem}.lora_up"), &[out, rank])
            .scalar(&format!("{stem}.alpha"), 3.0)
    };
    let whole = stack(packed(qkv, 9216, 48));
    let piece = only(&whole);
    assert_eq!(execution(piece), (PieceKind::LowRank, 48, None));
    assert_eq!((piece.row_begin, piece.row_count), (0, 9216));
    assert_eq!(roles(piece), ["packed_down", "packed_up"]);
    assert_eq!(piece.scale.to_bits(), 1.0f64.to_bits());
    for (tensors, kind) in [
        (packed(MLP, 12288, 40), SkipKind::Broken),
        (packed(TO_Q, 3072, 48), SkipKind::Unsupported),
        (packed(MOD, 18432, 48), SkipKind::Unsupported),
        (packed(MLP, 9216, 48), SkipKind::Shape),
    ] {
        assert_eq!(skips(tensors)[0].kind, kind);
    }
}

// Vectors

#[test]
fn biases_and_norms_are_vectors() {
    let tensors = Tensors::default()
        .peft(TO_Q, 16)
        .scalar(&format!("{TO_Q}.alpha"), 8.0)
        .tensor(&format!("{TO_Q}.lora_B.bias"), &[3072])
        .tensor(&format!("{TO_Q}.diff_b"), &[3072])
        .tensor(&format!("{TO_Q}.diff"), &[3072, 3072])
        .tensor(&format!("{NORM}.w_norm"), &[128])
        .tensor("transformer_blocks.0.attn.to_k.diff_b", &[3072]);
    let stack = stack(tensors);
    let found: Vec<_> = pieces(&stack)
        .into_iter()
        .map(|p| {
            (
                p.kind,
                p.parameter,
                p.scale.to_string(),
                p.row_begin,
                p.row_count,
            )
        })
        .collect();
    let (bias, weight) = (Some(Parameter::Bias), Some(Parameter::Weight));
    let row = |kind, parameter, scale: &str, begin, count| {
        (kind, parameter, scale.to_owned(), begin, count)
    };
    assert_eq!(
        found,
        [
            row(PieceKind::LowRank, None, "0.5", 0, 3072),
            row(PieceKind::Dense, None, "1", 0, 3072),
            row(PieceKind::Vector, bias, "1", 0, 3072),
            row(PieceKind::Vector, bias, "0.5", 0, 3072),
            row(PieceKind::Vector, bias, "1", 3072, 3072),
            row(PieceKind::Vector, weight, "1", 0, 128),
        ]
    );
    assert!(stack.skipped.is_empty());
    // One bias of 9216 is swapped, however many vectors are added to it, beside a matrix.
    let (matrix, bias) = (9216 * 3072 * 2 + 4, 9216 * 2);
    assert_eq!(stack.slots[0].branch_bytes, matrix + bias);
    assert_eq!(stack.slots[1].branch_bytes, 128 * 2);
    assert_eq!(stack.slots[0].rank, 16);
    assert_eq!(
        stack.added_bytes,
        16 * (9216 + 3072) * 2 + matrix + bias + 128 * 2
    );
}

#[test]
fn the_order_of_keys_changes_no_order_of_pieces() {
    let (bias, diff) = (format!("{TO_Q}.diff_b"), format!("{TO_Q}.diff"));
    let last = Tensors::default()
        .peft(TO_Q, 16)
        .tensor(&bias, &[3072])
        .tensor(&diff, &[3072, 3072]);
    let first = Tensors::default()
        .tensor(&diff, &[3072, 3072])
        .tensor(&bias, &[3072])
        .peft(TO_Q, 16);
    // Which tensor of the file each is depends on the order of keys, and nothing else does.
    let slots = |tensors| {
        let mut slots = stack(tensors).slots;
        let pieces = slots.iter_mut().flat_map(|slot| &mut slot.pieces);
        for tensor in pieces.flat_map(|piece| piece.tensors.values_mut()) {
            tensor.index = 0;
        }
        slots
    };
    assert_eq!(slots(last), slots(first));
}

#[test]
fn what_does_not_fit_beside_a_pair_is_left_out_by_its_key() {
    let bias = format!("{TO_Q}.diff_b");
    let plan = Tensors::default()
        .peft(TO_Q, 16)
        .tensor(&bias, &[64])
        .plan();
    assert_eq!(plan.verdict(), Verdict::Partial);
    assert_eq!(
        plan.modules()[0].left_out,
        [(2, "has 64 values where qwen-image has 3072".to_owned())]
    );
    let stack = stack_on(&plan, &slots(), StackOptions::default());
    assert_eq!(
        (pieces(&stack).len(), stack.applied_modules.as_slice()),
        (1, &[1][..])
    );
    let skip = &stack.skipped[0];
    assert_eq!(
        (skip.name.as_str(), skip.kind, skip.piece, skip.matters),
        (
            bias.as_str(),
            SkipKind::Shape,
            Some(PieceKind::Vector),
            true
        )
    );
    assert_eq!(skip.reason, "has 64 values where the model has 3072");
    let mut without = slots();
    without[0].has_bias = false;
    let plan = Tensors::default()
        .peft(TO_Q, 16)
        .tensor(&bias, &[3072])
        .plan();
    let stack = stack_on(&plan, &without, StackOptions::default());
    assert_eq!(stack.skipped[0].kind, SkipKind::Missing);
}

#[test]
fn a_pair_that_does_not_fit_takes_what_stands_beside_it_along() {
    let plan = Tensors::default()
        .tensor(&format!("{TO_Q}.lora_A.weight"), &[16, 64])
        .tensor(&format!("{TO_Q}.lora_B.weight"), &[3072, 16])
        .tensor(&format!("{TO_Q}.diff_b"), &[3072])
        .peft("transformer_blocks.0.attn.to_v", 16)
        .plan();
    let stack = stack_on(&plan, &slots(), StackOptions::default());
    assert_eq!((pieces(&stack).len(), stack.applied_modules[0]), (1, 1));
    assert_eq!(stack.skipped.len(), 1);
    assert_eq!(stack.skipped[0].name, TO_Q);
}

// Layers that are no linears

#[test]
fn both_forms_of_an_embeddings_pair() {
    let peft = Tensors::default()
        .tensor(&format!("{EMBEDDING}.lora_embedding_A"), &[4, 2])
        .tensor(&format!("{EMBEDDING}.lora_embedding_B"), &[3072, 4]);
    let extracted = Tensors::default()
        .tensor(&format!("{EMBEDDING}.lora_down.weight"), &[2, 3072])
        .tensor(&format!("{EMBEDDING}.lora_up.weight"), &[2, 2]);
    let peft = stack(peft);
    assert_eq!(
        (roles(only(&peft)), only(&peft).rank),
        (vec!["down", "up"], 4)
    );
    let extracted = stack(extracted);
    let piece = only(&extracted);
    assert_eq!((roles(piece), piece.rank), (vec!["down_t", "up_t"], 2));
    let shape = |role: &str| piece.tensors[role].shape.clone();
    // Stored transposed: down (r, num) and up (dim, r).
    assert_eq!(
        (shape("down_t"), shape("up_t")),
        (vec![2, 2], vec![2, 3072])
    );
    assert_eq!((piece.row_begin, piece.row_count), (0, 3072));
}

#[test]
fn what_has_no_meaning_on_a_layer_is_refused_by_name() {
    let pair = |stem: &str, out: u64, inp: u64| {
        Tensors::default()
            .tensor(&format!("{stem}.lora_A.weight"), &[1, inp])
            .tensor(&format!("{stem}.lora_B.weight"), &[out, 1])
    };
    for (tensors, reason) in [
        (pair(NORM, 128, 1), "a LoRA of a norm has no meaning"),
        (
            lokr(NORM, [8, 1], [16, 1]),
            "a LoKr of a norm has no meaning",
        ),
        (
            lokr(EMBEDDING, [1, 16], [2, 192]),
            "a LoKr of an embedding has no meaning",
        ),
    ] {
        let skipped = skips(tensors);
        assert_eq!(
            (skipped[0].kind, skipped[0].reason.as_str()),
            (SkipKind::Unsupported, reason)
        );
    }
    let missing = skips(Tensors::default().tensor("txt_norm.diff", &[3584]));
    assert_eq!(missing[0].kind, SkipKind::Missing);
    let long = skips(Tensors::default().tensor(&format!("{NORM}.diff"), &[64]));
    assert_eq!(long[0].reason, "has 64 values where the model has 128");
}

#[test]
fn refused_kinds_say_why() {
    let with = |suffix: &str, shape: &[u64]| {
        Tensors::default()
            .peft(TO_Q, 16)
            .tensor(&format!("{TO_Q}.{suffix}"), shape)
    };
    for (suffix, shape, reason) in [
        (
            "lora_E",
            &[16, 1][..],
            "AdaLoRA is not supported: only PEFT knows what its tensors make up",
        ),
        (
            "set_weight",
            &[3072, 3072],
            "`set_weight` beside a delta of the same weight is not supported: which of them comes first is not known",
        ),
        (
            "reshape_weight",
            &[2],
            "`reshape_weight` is not supported: it asks for a module of another size",
        ),
    ] {
        let skipped = skips(with(suffix, shape));
        assert_eq!(
            (skipped[0].name.as_str(), skipped[0].reason.as_str()),
            (TO_Q, reason)
        );
        assert_eq!(skipped[0].kind, SkipKind::Unsupported);
    }
    for core in ["lokr_t2", "hada_t1"] {
        let tensors =
            lokr(TO_Q, [16, 16], [192, 192]).tensor(&format!("{TO_Q}.{core}"), &[8, 8, 3, 3]);
        let reason = &skips(tensors)[0].reason;
        assert!(reason.starts_with(&format!("`{core}` is not supported")));
    }
}

// Numbers that are not to be trusted

#[test]
fn every_tensor_of_a_delta_is_a_float() {
    let typed = |suffix: &str, shape: &[u64], dtype| {
        Tensors::default().typed(&format!("{TO_Q}.{suffix}"), dtype, shape)
    };
    for dtype in [
        Dtype::I8,
        Dtype::I64,
        Dtype::Bool,
        Dtype::F8E8M0,
        Dtype::C64,
        Dtype::F4,
    ] {
        for (tensors, role) in [
            (typed("diff", &[3072, 3072], dtype), "diff"),
            (typed("diff_b", &[3072], dtype), "diff_b"),
            (
                typed("lokr_w1", &[16, 16], dtype).tensor(&format!("{TO_Q}.lokr_w2"), &[192, 192]),
                "lokr_w1",
            ),
            (
                typed("lora_A.weight", &[16, 3072], dtype)
                    .tensor(&format!("{TO_Q}.lora_B.weight"), &[3072, 16]),
                "down",
            ),
        ] {
            let skipped = skips(tensors);
            assert_eq!(
                (skipped[0].kind, skipped[0].reason.clone()),
                (
                    SkipKind::Unsupported,
                    format!("{role} of dtype {dtype} is not supported")
                )
            );
        }
    }
}

#[test]
fn float8_scales_join_the_delta_that_they_scale() {
    for (suffix, scale, expected) in [
        ("lokr_w1.scale_weight", 3.0, [3.0, 1.0, 1.0]),
        ("lokr_w2.weight_scale", 0.5, [0.5, 1.0, 1.0]),
        ("diff.scale_weight", 5.0, [1.0, 5.0, 1.0]),
    ] {
        let tensors = lokr(TO_Q, [16, 16], [192, 192])
            .tensor(&format!("{TO_Q}.diff_b"), &[3072])
            .typed(&format!("{TO_Q}.diff"), Dtype::F8E4M3, &[3072, 3072])
            .scalar(&format!("{TO_Q}.{suffix}"), scale);
        let stack = stack(tensors);
        let scales: Vec<f64> = pieces(&stack).iter().map(|p| p.scale).collect();
        assert_eq!(scales, expected, "{suffix}");
    }
}

#[test]
fn empty_and_absurd_tensors_are_broken() {
    let max = u64::MAX;
    for (tensors, kind) in [
        (lokr(TO_Q, [0, 16], [192, 192]), SkipKind::Broken),
        (lokr(TO_Q, [max, max], [192, 192]), SkipKind::Broken),
        (lokr(TO_Q, [1, 1], [max, max]), SkipKind::Shape),
        (
            Tensors::default().tensor(&format!("{TO_Q}.diff"), &[max, max]),
            SkipKind::Shape,
        ),
        (
            Tensors::default().tensor(&format!("{TO_Q}.diff"), &[3072, max, max]),
            SkipKind::Broken,
        ),
        (
            Tensors::default().tensor(&format!("{TO_Q}.diff_b"), &[0]),
            SkipKind::Broken,
        ),
        (
            Tensors::default().tensor(&format!("{TO_Q}.diff_b"), &[3072, 1]),
            SkipKind::Broken,
        ),
        (
            Tensors::default().tensor(&format!("{TO_Q}.lokr_w1"), &[16, 16]),
            SkipKind::Broken,
        ),
        (
            Tensors::default().tensor(&format!("{TO_Q}.w_norm"), &[128]),
            SkipKind::Broken,
        ),
    ] {
        let skipped = skips(tensors);
        assert_eq!(skipped[0].kind, kind, "{}", skipped[0].reason);
    }
}

// Limits

#[test]
fn a_limit_of_zero_is_an_error() {
    let plan = Tensors::default().peft(TO_Q, 16).plan();
    for (options, option) in [
        (
            StackOptions {
                max_rank: Some(0),
                ..StackOptions::default()
            },
            "max_rank",
        ),
        (
            StackOptions {
                truncated_rank: 0,
                ..StackOptions::default()
            },
            "truncated_rank",
        ),
    ] {
        let error = StackPlan::new(&[item(&plan)], &slots(), options).unwrap_err();
        assert_eq!(error, StackError::RankLimit { option });
    }
}

#[test]
fn a_full_slot_still_carries_what_takes_no_rank() {
    let mut slots = slots();
    slots[0].base_rank = 1024;
    let plan = lokr(TO_Q, [16, 16], [192, 192])
        .tensor(&format!("{TO_Q}.diff_b"), &[3072])
        .plan();
    let stack = stack_on(&plan, &slots, StackOptions::default());
    assert_eq!(pieces(&stack).len(), 2);
    for tensors in [
        Tensors::default().peft(TO_Q, 16),
        Tensors::default().tensor(&format!("{TO_Q}.diff"), &[3072, 3072]),
    ] {
        let plan = tensors.plan();
        let options = StackOptions {
            dense_budget: 0,
            ..StackOptions::default()
        };
        let error = StackPlan::new(&[item(&plan)], &slots, options).unwrap_err();
        assert!(matches!(
            error,
            StackError::SlotFull {
                base_rank: 1024,
                ..
            }
        ));
    }
}

#[test]
fn modulation_is_each_loras_own() {
    let plan = Tensors::default()
        .tensor(&format!("{MOD}.lora_A.weight"), &[16, 3072])
        .tensor(&format!("{MOD}.lora_B.weight"), &[18432, 16])
        .tensor(&format!("{MOD}.diff_b"), &[18432])
        .plan();
    let off = StackItem {
        modulation: false,
        ..item(&plan)
    };
    let options = StackOptions {
        strict: true,
        ..StackOptions::default()
    };
    let stack = StackPlan::new(&[off, item(&plan)], &slots(), options).unwrap();
    assert_eq!(stack.applied_modules, [0, 1]);
    assert!(pieces(&stack).iter().all(|piece| piece.lora == 1));
    assert_eq!(stack.skipped.len(), 1);
    assert_eq!(stack.skipped[0].kind, SkipKind::TurnedOff);
    assert_eq!(
        (stack.skipped[0].lora, stack.skipped[0].matters),
        (0, false)
    );
}

#[test]
fn slots_that_are_off_take_nothing() {
    let plan = Tensors::default()
        .tensor(&format!("{MOD}.lora_A.weight"), &[16, 3072])
        .tensor(&format!("{MOD}.lora_B.weight"), &[18432, 16])
        .tensor(&format!("{MOD}.diff_b"), &[18432])
        .plan();
    let slots = slots();
    let at = slots.iter().position(|slot| slot.path == MOD).unwrap();
    let off = StackItem {
        off: &[at],
        ..item(&plan)
    };
    let options = StackOptions {
        strict: true,
        ..StackOptions::default()
    };
    let stack = StackPlan::new(&[off, item(&plan)], &slots, options).unwrap();
    assert_eq!(stack.applied_modules, [0, 1]);
    assert!(pieces(&stack).iter().all(|piece| piece.lora == 1));
    let skips: Vec<_> = stack.skipped.iter().map(|s| (s.lora, s.kind)).collect();
    assert_eq!(skips, [(0, SkipKind::TurnedOff)]);
    assert!(!stack.skipped[0].matters);
    let alone = StackPlan::new(&[off], &slots, options).unwrap();
    assert_eq!((alone.slots.len(), alone.added_bytes), (0, 0));
}

// Offload

/// Four blocks' fused attention, offloaded but for the last.
fn offloaded() -> Vec<Slot> {
    (0..4)
        .map(|block| {
            let path = format!("transformer_blocks.{block}.attn.to_qkv");
            Slot {
                pattern: "transformer_blocks.*.attn.to_qkv".to_owned(),
                offloaded: block < 3,
                ..slot(&path, SlotKind::Svdq, 9216, 3072)
            }
        })
        .collect()
}

#[test]
fn side_branches_are_uniform_over_offloaded_blocks() {
    let part = |block: u64, name: &str| format!("transformer_blocks.{block}.attn.{name}");
    let direct = |stem: &str| lokr(stem, [16, 16], [192, 192]);
    // Block 0 has two of q; block 1 has q in another shape, and k; block 2 a bias alone; block 3
    // is not offloaded.
    let first = direct(&part(0, "to_q"))
        .tensor(&format!("{}.lokr_w1", part(1, "to_q")), &[48, 48])
        .tensor(&format!("{}.lokr_w2", part(1, "to_q")), &[64, 64])
        .tensor(&format!("{}.lokr_w1", part(1, "to_k")), &[16, 16])
        .tensor(&format!("{}.lokr_w2", part(1, "to_k")), &[192, 192])
        .tensor(&format!("{}.diff_b", part(2, "to_q")), &[3072])
        .tensor(&format!("{}.lokr_w1", part(3, "to_q")), &[16, 16])
        .tensor(&format!("{}.lokr_w2", part(3, "to_q")), &[192, 192])
        .plan();
    let second = direct(&part(0, "to_q")).plan();
    let stack = StackPlan::new(
        &[item(&first), item(&second)],
        &offloaded(),
        StackOptions::default(),
    )
    .unwrap();
    let (wide, square) = (16 * 16 + 192 * 192, 48 * 48 + 64 * 64);
    let each = 2 * (2 * wide + square + wide);
    let group = &stack.uniform[0];
    assert_eq!((stack.uniform.len(), group.slots.len()), (1, 3));
    assert_eq!((group.rank, group.branch_bytes), (0, each));
    let counts: Vec<_> = group
        .room
        .iter()
        .map(|room| match room.shape.form {
            PartForm::Kron { w1_rows, .. } => (room.shape.row_begin, w1_rows, room.count),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(counts, [(0, 16, 2), (0, 48, 1), (3072, 16, 1)]);
    let bytes: Vec<_> = stack
        .slots
        .iter()
        .map(|s| (s.uniform, s.branch_bytes))
        .collect();
    assert_eq!(
        bytes,
        [
            (Some(0), each),
            (Some(0), each),
            (Some(0), each + 9216 * 2),
            (None, 2 * wide)
        ]
    );
    assert_eq!(stack.added_bytes, 3 * each + 9216 * 2 + 2 * wide);
    let json: serde_json::Value = serde_json::from_str(&stack.to_json()).unwrap();
    assert_eq!(
        json["groups"][0]["room"][1],
        serde_json::json!({
            "kind": "kron", "row_begin": 0, "row_count": 3072,
            "has_rows": false, "has_columns": false,
            "w1_rows": 48, "w1_columns": 48, "w2_rows": 64, "w2_columns": 64,
            "count": 1,
        })
    );
}

#[test]
fn vectors_alone_make_no_group() {
    let plan = Tensors::default()
        .tensor(&format!("{TO_Q}.diff_b"), &[3072])
        .plan();
    let stack = stack_on(&plan, &offloaded(), StackOptions::default());
    assert!(stack.uniform.is_empty());
    assert_eq!(
        (stack.slots[0].uniform, stack.added_bytes),
        (None, 9216 * 2)
    );
}

#[test]
fn a_group_without_a_piece_in_a_block_counts_its_room() {
    let plan = lokr(TO_Q, [16, 16], [192, 192])
        .peft("transformer_blocks.1.attn.to_q", 16)
        .plan();
    let stack = stack_on(&plan, &offloaded(), StackOptions::default());
    let kron = 2 * (16 * 16 + 192 * 192);
    assert_eq!(stack.added_bytes, 3 * (kron + 16 * (9216 + 3072) * 2));
    let ranks: Vec<_> = stack.slots.iter().map(|s| s.rank).collect();
    assert_eq!((ranks, stack.uniform[0].rank), (vec![0, 16], 16));
}

#[test]
fn the_document_of_a_piece() {
    let stack = stack(lokr(MLP, [16, 16], [768, 192]));
    let json: serde_json::Value = serde_json::from_str(&stack.to_json()).unwrap();
    let slot = &json["slots"][0];
    assert_eq!(
        (&slot["branch_bytes"], &slot["route"]),
        (&0.into(), &"inside".into())
    );
    let mut piece = slot["pieces"][0].clone();
    piece["tensors"] = serde_json::Value::Null;
    assert_eq!(
        piece,
        serde_json::json!({
            "kind": "LowRank", "adapter": "lokr", "lora": 0, "target": MLP,
            "rank": 256, "rank_bound": 3072, "rank_budget": 256, "scale": 1.0,
            "row_begin": 0, "row_count": 12288, "parameter": null, "side": null,
            "rotation": null, "scales_bias": false, "exactness": "truncated", "tensors": null,
        })
    );
    let options: StackOptions = serde_json::from_str(
        r#"{"max_rank": null, "strict": true, "truncated_rank": 96, "lokr_scale": "network"}"#,
    )
    .unwrap();
    assert_eq!(
        (options.truncated_rank, options.lokr_scale),
        (96, LokrScale::Network)
    );
    for (kind, name) in [(SlotKind::Norm, "norm"), (SlotKind::Embedding, "embedding")] {
        let row = format!(
            r#"{{"path": "x", "kind": "{name}", "in_features": 1, "out_features": 8,
            "base_rank": 0, "element_bytes": 2, "offloaded": false, "pattern": "x"}}"#
        );
        let slot: Slot = serde_json::from_str(&row).unwrap();
        assert_eq!((slot.kind, slot.has_bias), (kind, true));
    }
}

// Properties

/// A factorisation of 3072 and one of the two ways to store each factor.
fn kron_sides() -> impl Strategy<Value = (u64, u64, Option<u64>, Option<u64>)> {
    let divisors: Vec<u64> = (1..=3072).filter(|d| 3072 % d == 0).collect();
    let side = proptest::sample::select(divisors);
    let halves = || proptest::option::of(1..200u64);
    (side.clone(), side, halves(), halves())
}

proptest! {
    #[test]
    fn the_kind_of_a_lokr_follows_from_its_bound(
        (rows, columns, r1, r2) in kron_sides(),
        truncated_rank in 1..2000u64,
        in_mlp: bool,
    ) {
        let (stem, out) = if in_mlp { (MLP, 4) } else { (TO_Q, 1) };
        let (w1, w2) = ([rows, columns], [3072 / rows * out, 3072 / columns]);
        let mut tensors = Tensors::default();
        for (name, shape, rank) in [("lokr_w1", w1, r1), ("lokr_w2", w2, r2)] {
            tensors = match rank {
                None => tensors.tensor(&format!("{stem}.{name}"), &shape),
                Some(rank) => tensors
                    .tensor(&format!("{stem}.{name}_a"), &[shape[0], rank])
                    .tensor(&format!("{stem}.{name}_b"), &[rank, shape[1]]),
            };
        }
        let bound = (r1.unwrap_or(rows.min(columns)) * r2.unwrap_or(w2[0].min(w2[1]))).min(3072);
        let options = StackOptions { truncated_rank, ..StackOptions::default() };
        let stack = stack_on(&tensors.plan(), &slots(), options);
        let budget = truncated_rank.min(992);
        let expected = if bound > MAX_KRON_RANK && !in_mlp {
            (PieceKind::Kron, 0, None)
        } else if bound > 992 {
            (PieceKind::LowRank, budget, Some(budget))
        } else {
            (PieceKind::LowRank, bound, None)
        };
        prop_assert_eq!(execution(only(&stack)), expected);
        let branch = if expected.0 == PieceKind::Kron {
            2 * (w1[0] * w1[1] + w2[0] * w2[1])
        } else {
            0
        };
        prop_assert_eq!(stack.slots[0].branch_bytes, branch);
    }

    #[test]
    fn hostile_shapes_give_reasons(
        rows in proptest::collection::vec(
            (
                proptest::sample::select(vec![
                    "lora_A.weight", "lora_B.weight", "lora_mid.weight", "lora_down", "lora_up",
                    "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b",
                    "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "diff", "diff_b",
                    "w_norm", "b_norm", "lora_B.bias", "dora_scale", "a1.weight", "oft_blocks",
                    "a2.weight", "b1.weight", "b2.weight", "rescale", "oft_R.weight", "hra_u",
                    "boft_R", "boft_s", "ia3_l", "weight", "on_input", "lora_embedding_A", "lora_embedding_B", "set_weight", "lora_A.scale_weight",
                ]),
                proptest::collection::vec(
                    proptest::sample::select(vec![0, 1, 2, 16, 128, 3072, 1 << 40, u64::MAX]),
                    0..4,
                ),
            ),
            1..12,
        ),
        stem in proptest::sample::select(vec![TO_Q, MLP, MOD, NORM, EMBEDDING, IMG_IN]),
        offload: bool,
    ) {
        let mut tensors = Tensors::default();
        for (suffix, shape) in rows {
            tensors = tensors.sized(&format!("{stem}.{suffix}"), &shape, 8);
        }
        let Ok(plan) = tensors.try_plan() else { return Ok(()) };
        let mut slots = slots();
        for slot in &mut slots {
            slot.offloaded = offload;
        }
        let _ = plan.to_json();
        let _ = plan.notes();
        for entry in plan.table().entries() {
            prop_assert!(plan.explain(&entry.tensor.key).is_some());
        }
        if let Ok(stack) = StackPlan::new(&[item(&plan)], &slots, StackOptions::default()) {
            for (slot, plan) in slots.iter().flat_map(|slot| {
                stack.slots.iter().filter(|plan| plan.path == slot.path).map(move |p| (slot, p))
            }) {
                for piece in &plan.pieces {
                    prop_assert!(piece.row_begin + piece.row_count <= slot.out_features);
                    prop_assert!(piece.tensors.values().all(|t| !t.shape.contains(&0)));
                    let is_pair = matches!(
                        piece.adapter,
                        Adapter::Lora | Adapter::Dora | Adapter::Glora | Adapter::Hra
                    );
                    let side = piece.row_count.min(slot.in_features);
                    prop_assert!(is_pair || piece.rank <= side);
                    prop_assert!(piece.scale.is_finite());
                }
                prop_assert!(plan.rank <= plan.rank_limit.map_or(u64::MAX, |l| l.next_multiple_of(16)));
            }
        }
    }

    #[test]
    fn offloaded_branches_cost_the_most_of_each_shape_on_every_block(
        // Per block, how many LoRAs bring q, k, v as a Kronecker product.
        counts in proptest::collection::vec([0..3usize, 0..3usize, 0..3usize], 3),
    ) {
        let mut files: Vec<Tensors> = (0..2).map(|_| Tensors::default()).collect();
        for (block, parts) in counts.iter().enumerate() {
            for (part, count) in ["to_q", "to_k", "to_v"].iter().zip(parts) {
                for file in files.iter_mut().take(*count) {
                    let stem = format!("transformer_blocks.{block}.attn.{part}");
                    *file = std::mem::take(file)
                        .tensor(&format!("{stem}.lokr_w1"), &[16, 16])
                        .tensor(&format!("{stem}.lokr_w2"), &[192, 192]);
                }
            }
        }
        let plans: Vec<FilePlan> = files
            .into_iter()
            .map(Tensors::plan)
            .filter(|plan| !plan.modules().is_empty())
            .collect();
        let items: Vec<StackItem<'_>> = plans.iter().map(item).collect();
        let stack = StackPlan::new(&items, &offloaded(), StackOptions::default()).unwrap();
        let most = |part: usize| counts.iter().map(|block| block[part]).max().unwrap_or(0) as u64;
        let each = (most(0) + most(1) + most(2)) * 2 * (16 * 16 + 192 * 192);
        prop_assert_eq!(stack.added_bytes, 3 * each);
        for slot in &stack.slots {
            prop_assert_eq!(slot.branch_bytes, each);
        }
    }
}

// diffusers' stock blocks

/// The slots of a block whose projections are apart, and whose layers are all called.
fn stock() -> Vec<Slot> {
    let mut slots: Vec<Slot> = ["attn.to_q", "attn.to_k", "attn.to_v"]
        .map(|name| format!("transformer_blocks.0.{name}"))
        .iter()
        .map(|path| slot(path, SlotKind::Svdq, 3072, 3072))
        .collect();
    slots.push(slot(MLP, SlotKind::Svdq, 12288, 3072));
    slots.push(slot(MOD, SlotKind::Awq, 18432, 3072));
    for slot in &mut slots {
        slot.build = BlockBuild::Stock;
    }
    slots
}

const TO_QKV: &str = "transformer_blocks.0.attn.to_qkv";

fn with_pair(tensors: Tensors, stem: &str, rows: u64, rank: u64) -> Tensors {
    tensors
        .tensor(&format!("{stem}.lora_A.weight"), &[rank, 3072])
        .tensor(&format!("{stem}.lora_B.weight"), &[rows, rank])
}

fn fused(rank: u64) -> Tensors {
    with_pair(Tensors::default(), TO_QKV, 9216, rank)
}

/// A tensor of a piece: its role, its first row, and its shape.
type CutTensor<'p> = (&'p str, Option<u64>, Vec<u64>);

/// (slot, first row, rows, tensors) of a plan's pieces.
fn cuts(stack: &StackPlan) -> Vec<(&str, u64, u64, Vec<CutTensor<'_>>)> {
    let cut = |piece: &Piece| {
        let tensors = piece.tensors.iter();
        tensors
            .map(|(role, tensor)| (*role, tensor.first_row, tensor.shape.clone()))
            .collect()
    };
    stack
        .slots
        .iter()
        .flat_map(|slot| slot.pieces.iter().map(move |piece| (slot, piece)))
        .map(|(slot, piece)| {
            let name = slot.path.rsplit('.').next().unwrap();
            (name, piece.row_begin, piece.row_count, cut(piece))
        })
        .collect()
}

#[test]
fn a_fused_pair_becomes_rows_of_its_parts() {
    let plan = fused(16).plan();
    let stack = stack_on(&plan, &stock(), StackOptions::default());
    let part = |name, first| {
        let down = ("down", None, vec![16, 3072]);
        (
            name,
            0,
            3072,
            vec![down, ("up", Some(first), vec![3072, 16])],
        )
    };
    assert_eq!(
        cuts(&stack),
        [part("to_q", 0), part("to_k", 3072), part("to_v", 6144)]
    );
    assert_eq!(stack.applied_modules, [1]);
    let ups: Vec<_> = pieces(&stack).iter().map(|p| &p.tensors["up"]).collect();
    assert!(
        ups.windows(2)
            .all(|w| w[0].offset_bytes + w[0].len_bytes == w[1].offset_bytes)
    );
}

#[test]
fn a_fused_lokr_is_cut_between_and_within_the_blocks_of_its_rows() {
    let plan = lokr(TO_QKV, [16, 48], [576, 64]).plan();
    let stack = stack_on(&plan, &stock(), StackOptions::default());
    let rows: Vec<_> = cuts(&stack)
        .into_iter()
        .map(|(name, begin, count, _)| (name, begin, count))
        .collect();
    let expected = [
        ("to_q", 0, 2880),
        ("to_q", 2880, 192),
        ("to_k", 0, 384),
        ("to_k", 384, 2304),
        ("to_k", 2688, 384),
        ("to_v", 0, 192),
        ("to_v", 192, 2880),
    ];
    assert_eq!(rows, expected);
}

#[test]
fn a_part_that_the_model_lacks_leaves_the_fused_module_out() {
    let plan = with_pair(fused(16), MOD, 18432, 4).plan();
    let mut without = stock();
    without.remove(1);
    let stack = stack_on(&plan, &without, StackOptions::default());
    let [skip] = stack.skipped.as_slice() else {
        panic!("{:?}", stack.skipped)
    };
    assert_eq!((skip.name.as_str(), skip.kind), (TO_QKV, SkipKind::Missing));
}

#[test]
fn a_fused_pair_of_another_size_does_not_fit_the_parts() {
    let plan = with_pair(fused(16), MOD, 18432, 4).plan();
    let mut larger = stock();
    larger[1].out_features = 6144;
    let stack = stack_on(&plan, &larger, StackOptions::default());
    let [skip] = stack.skipped.as_slice() else {
        panic!("{:?}", stack.skipped)
    };
    assert_eq!(skip.kind, SkipKind::Shape);
}

#[test]
fn a_stock_block_calls_every_layer_and_takes_planar_rows() {
    use qwenlora_core::model::slot::RowOrder;

    let plan = with_pair(lokr(MLP, [64, 48], [192, 64]), MOD, 18432, 4).plan();
    for (slots, kind, order) in [
        (slots(), PieceKind::LowRank, RowOrder::Interleaved),
        (stock(), PieceKind::Kron, RowOrder::Planar),
    ] {
        let stack = stack_on(&plan, &slots, StackOptions::default());
        let of = |path: &str| stack.slots.iter().find(|slot| slot.path == path).unwrap();
        assert_eq!(of(MLP).pieces[0].kind, kind);
        assert_eq!(of(MOD).row_order, order);
    }
}
