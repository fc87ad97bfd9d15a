//! Adapters that are more than a pair, or need the base weight: what their tensors make up, what is
//! wrong with them, where they run, and what that takes.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod slots;
mod state_dict;

use qwenlora_core::adapter::PieceKind;
use qwenlora_core::adapter::delta::Side;
use qwenlora_core::adapter::exactness::Exactness;
use qwenlora_core::adapter::rotation::{Cayley, RotationRule};
use qwenlora_core::dtype::Dtype;
use qwenlora_core::model::slot::{BlockBuild, MlpPath, Slot, SlotKind};
use qwenlora_core::plan::{FilePlan, Verdict};
use qwenlora_core::stack::{
    PartForm, Piece, Route, Skip, SkipKind, SlotPlan, StackItem, StackOptions, StackPlan,
};
use state_dict::{TO_Q, Tensors};

const TO_K: &str = "transformer_blocks.0.attn.to_k";
const TO_QKV: &str = "transformer_blocks.0.attn.to_qkv";
const FC1: &str = "transformer_blocks.0.img_mlp.net.0.proj";
const FC2: &str = "transformer_blocks.0.img_mlp.net.2";
const MOD: &str = "transformer_blocks.0.img_mod.1";
const IMG_IN: &str = "img_in";
const NORM: &str = "transformer_blocks.0.attn.norm_q";
const EMBEDDING: &str = "time_text_embed.addition_t_embedding";
const Z_QKV: &str = "layers.0.attention.to_qkv";

fn slot(path: &str, kind: SlotKind, out_features: u64, in_features: u64) -> Slot {
    Slot {
        opens: path.contains("_mlp."),
        ..slots::slot(path, kind, out_features, in_features)
    }
}

fn slots() -> Vec<Slot> {
    vec![
        slot(TO_QKV, SlotKind::Svdq, 9216, 3072),
        slot(FC1, SlotKind::Svdq, 12288, 3072),
        slot(FC2, SlotKind::Svdq, 3072, 12288),
        slot(MOD, SlotKind::Awq, 18432, 3072),
        slot(NORM, SlotKind::Norm, 128, 1),
        slot(EMBEDDING, SlotKind::Embedding, 3072, 2),
        slot(IMG_IN, SlotKind::Linear, 3072, 64),
    ]
}

/// The same projections apart.
fn apart() -> Vec<Slot> {
    ["to_q", "to_k", "to_v"]
        .map(|name| {
            let path = format!("transformer_blocks.0.attn.{name}");
            Slot {
                build: BlockBuild::Stock,
                ..slot(&path, SlotKind::Svdq, 3072, 3072)
            }
        })
        .to_vec()
}

/// Fused projections of some blocks, offloaded but for the last.
fn offloaded(blocks: u64) -> Vec<Slot> {
    (0..blocks)
        .map(|block| {
            let path = format!("transformer_blocks.{block}.attn.to_qkv");
            Slot {
                pattern: "transformer_blocks.*.attn.to_qkv".to_owned(),
                offloaded: block + 1 < blocks,
                ..slot(&path, SlotKind::Svdq, 9216, 3072)
            }
        })
        .collect()
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

fn stack_on(plans: &[&FilePlan], slots: &[Slot], options: StackOptions) -> StackPlan {
    let items: Vec<_> = plans.iter().map(|plan| item(plan)).collect();
    StackPlan::new(&items, slots, options).unwrap()
}

fn stack(tensors: Tensors) -> StackPlan {
    stack_on(&[&tensors.plan()], &slots(), StackOptions::default())
}

fn only(stack: &StackPlan) -> (&SlotPlan, &Piece) {
    let [slot] = stack.slots.as_slice() else {
        panic!("{:?}", stack.skipped)
    };
    let [piece] = slot.pieces.as_slice() else {
        panic!("{:?}", slot.pieces)
    };
    (slot, piece)
}

fn roles(piece: &Piece) -> Vec<&str> {
    piece.tensors.keys().copied().collect()
}

/// What is skipped of a file that goes to the slots beside a pair that fits.
fn skip(tensors: Tensors, slots: &[Slot]) -> Skip {
    let plan = tensors.peft("transformer_blocks.0.attn.to_v", 16).plan();
    let stack = stack_on(&[&plan], slots, StackOptions::default());
    let mut matters = stack.skipped.into_iter().filter(|skip| skip.matters);
    matters.next().unwrap()
}

/// Asserts why a module is left out, as the whole reason.
fn assert_left_out(tensors: Tensors, kind: SkipKind, reason: &str) {
    let skip = skip(tensors, &slots());
    assert_eq!((skip.kind, skip.reason.as_str()), (kind, reason));
}

fn pair(stem: &str, out: u64, inp: u64, rank: u64) -> Tensors {
    Tensors::default()
        .tensor(&format!("{stem}.lora_A.weight"), &[rank, inp])
        .tensor(&format!("{stem}.lora_B.weight"), &[out, rank])
}

fn dora(stem: &str, out: u64, inp: u64, magnitude: &[u64]) -> Tensors {
    pair(stem, out, inp, 16).tensor(&format!("{stem}.dora_scale"), magnitude)
}

fn lokr_dora(stem: &str, w1: [u64; 2], w2: [u64; 2], magnitude: &[u64]) -> Tensors {
    Tensors::default()
        .tensor(&format!("{stem}.lokr_w1"), &w1)
        .tensor(&format!("{stem}.lokr_w2"), &w2)
        .tensor(&format!("{stem}.dora_scale"), magnitude)
}

fn glora(stem: &str, [a1, a2, b1, b2]: [[u64; 2]; 4]) -> Tensors {
    [("a1", a1), ("a2", a2), ("b1", b1), ("b2", b2)]
        .iter()
        .fold(Tensors::default(), |tensors, (name, shape)| {
            tensors.tensor(&format!("{stem}.{name}.weight"), shape)
        })
}

fn ia3(stem: &str, values: u64, on_input: f64) -> Tensors {
    Tensors::default()
        .tensor(&format!("{stem}.weight"), &[values])
        .scalar(&format!("{stem}.on_input"), on_input)
}

fn oft(stem: &str, blocks: &[u64]) -> Tensors {
    Tensors::default().tensor(&format!("{stem}.oft_blocks"), blocks)
}

fn one(stem: &str, suffix: &str, shape: &[u64]) -> Tensors {
    Tensors::default().tensor(&format!("{stem}.{suffix}"), shape)
}

// DoRA

#[test]
fn a_magnitude_s_own_shape_tells_its_side() {
    for (magnitude, side) in [
        (&[3072][..], Side::Out),
        (&[3072, 1], Side::Out),
        (&[3072, 1, 1, 1], Side::Out),
        (&[1, 3072], Side::In),
        (&[1, 3072, 1, 1], Side::In),
    ] {
        let stack = stack(dora(TO_Q, 3072, 3072, magnitude));
        let (slot, piece) = only(&stack);
        assert_eq!(
            (piece.kind, piece.side, piece.rank),
            (PieceKind::Diagonal, Some(side), 16)
        );
        assert_eq!(roles(piece), ["dora_scale", "down", "up"]);
        assert_eq!((slot.route, slot.rank), (Route::Beside, 16));
        assert_eq!(piece.exactness, Exactness::Norms);
        // The factor, and for outputs the bias.
        let vectors = if side == Side::Out { 2 } else { 1 };
        assert_eq!(slot.branch_bytes, vectors * 3072 * 2);
        assert!(!piece.scales_bias);
    }
}

#[test]
fn what_is_under_a_magnitude_runs_as_it_would_alone_but_beside() {
    let halves = lokr_dora(TO_Q, [16, 16], [192, 192], &[3072, 1]);
    let stack = stack(halves);
    let (slot, piece) = only(&stack);
    assert_eq!((piece.kind, piece.rank), (PieceKind::Diagonal, 0));
    assert_eq!(roles(piece), ["dora_scale", "lokr_w1", "lokr_w2"]);
    let kron = 16 * 16 + 192 * 192 + 3072;
    assert_eq!(slot.branch_bytes, (kron + 2 * 3072) * 2);

    let low = Tensors::default()
        .tensor(&format!("{TO_Q}.lokr_w1"), &[8, 8])
        .tensor(&format!("{TO_Q}.lokr_w2_a"), &[384, 8])
        .tensor(&format!("{TO_Q}.lokr_w2_b"), &[8, 384])
        .scalar(&format!("{TO_Q}.alpha"), 4.0)
        .tensor(&format!("{TO_Q}.dora_scale"), &[1, 3072]);
    let stack = self::stack(low);
    let (slot, piece) = only(&stack);
    assert_eq!((piece.rank, slot.rank), (64, 64));
    assert_eq!(piece.scale.to_bits(), 0.5f64.to_bits());
    assert_eq!(slot.branch_bytes, 3072 * 2);

    let loha = [("w1_a", [3072, 8]), ("w1_b", [8, 3072])];
    let loha = loha
        .iter()
        .chain(&[("w2_a", [3072, 8]), ("w2_b", [8, 3072])]);
    let loha = loha.fold(Tensors::default(), |tensors, (name, shape)| {
        tensors.tensor(&format!("{TO_Q}.hada_{name}"), shape)
    });
    let stack = self::stack(loha.tensor(&format!("{TO_Q}.dora_scale"), &[3072]));
    let (_, piece) = only(&stack);
    assert_eq!((piece.kind, piece.rank), (PieceKind::Diagonal, 64));
}

#[test]
fn a_magnitude_that_fits_nothing_is_named() {
    let broken = SkipKind::Broken;
    assert_left_out(
        dora(TO_Q, 3072, 3072, &[64, 1]),
        broken,
        "dora_scale has 64 values where the delta has 3072 outputs",
    );
    assert_left_out(
        dora(FC1, 12288, 3072, &[1, 12288]),
        broken,
        "dora_scale has 12288 values where the delta has 3072 inputs",
    );
    assert_left_out(
        dora(TO_Q, 3072, 3072, &[48, 64]),
        broken,
        "dora_scale is not one value per channel: [48, 64]",
    );
    assert_left_out(
        one(TO_Q, "dora_scale", &[3072]),
        broken,
        "has dora_scale but no pair",
    );
    assert_left_out(
        one(TO_Q, "lora_A.weight", &[16, 3072]).tensor(&format!("{TO_Q}.dora_scale"), &[3072]),
        broken,
        "has down but no up",
    );
    assert_left_out(
        pair(TO_Q, 3072, 3072, 16).typed(&format!("{TO_Q}.dora_scale"), Dtype::I64, &[3072]),
        SkipKind::Unsupported,
        "dora_scale of dtype I64 is not supported",
    );
    assert_left_out(
        dora(EMBEDDING, 3072, 2, &[3072]),
        SkipKind::Unsupported,
        "a DoRA of an embedding has no meaning",
    );
}

#[test]
fn a_pair_that_does_not_fit_the_model_is_a_misfit_with_its_magnitude() {
    assert_left_out(
        dora(TO_Q, 64, 3072, &[64]),
        SkipKind::Shape,
        "is 64x3072 where the model has 3072x3072",
    );
}

// GLoRA and HRA

#[test]
fn both_layouts_of_a_glora_have_the_same_ranks_and_scale() {
    let current = [[3072, 8], [8, 3072], [12288, 8], [8, 3072]];
    let old = [[8, 3072], [3072, 8], [8, 3072], [12288, 8]];
    for layout in [current, old] {
        let tensors = glora(FC1, layout).scalar(&format!("{FC1}.alpha"), 4.0);
        let stack = stack(tensors);
        let (slot, piece) = only(&stack);
        assert_eq!((piece.kind, piece.rank), (PieceKind::LowRank, 16));
        assert_eq!(piece.scale.to_bits(), 0.5f64.to_bits());
        assert_eq!(
            roles(piece),
            ["glora_a1", "glora_a2", "glora_b1", "glora_b2"]
        );
        assert_eq!((slot.route, slot.branch_bytes), (Route::Inside, 0));
        assert_eq!(piece.exactness, Exactness::Exact);
    }
}

#[test]
fn a_glora_whose_halves_do_not_meet_is_named() {
    let broken = SkipKind::Broken;
    assert_left_out(
        glora(TO_Q, [[3072, 8], [4, 3072], [3072, 8], [8, 3072]]),
        broken,
        "the halves differ in rank: glora_a has 8 and 4, glora_b has 8 and 8",
    );
    assert_left_out(
        glora(TO_Q, [[3072, 8], [8, 3072], [3072, 8], [8, 64]]),
        broken,
        "its products differ in inputs: glora_a has 3072 and 3072, glora_b has 64",
    );
    assert_left_out(
        glora(TO_Q, [[64, 8], [8, 64], [3072, 8], [8, 64]]),
        SkipKind::Shape,
        "is 3072x64 where the model has 3072x3072",
    );
    assert_left_out(
        one(TO_Q, "a1.weight", &[3072, 8]),
        broken,
        "is a GLoRA without glora_a2",
    );
    let whole = glora(TO_Q, [[3072, 8], [8, 3072], [3072, 8], [8, 3072]]);
    assert_left_out(
        whole.tensor(&format!("{TO_Q}.bm.weight"), &[8, 8, 3, 3]),
        SkipKind::Unsupported,
        "`glora_bm` is not supported: it is the core of a convolution, of which the model has none",
    );
}

#[test]
fn an_hra_is_rank_wherever_ranks_go() {
    for (stem, inp) in [(TO_Q, 3072), (FC2, 12288), (MOD, 3072), (IMG_IN, 64)] {
        let stack = stack(one(stem, "hra_u", &[inp, 8]));
        let (slot, piece) = only(&stack);
        assert_eq!((piece.kind, piece.rank), (PieceKind::LowRank, 8), "{stem}");
        assert_eq!((roles(piece), slot.route), (vec!["hra_u"], Route::Inside));
    }
    assert_left_out(
        one(TO_Q, "hra_u", &[64, 8]),
        SkipKind::Shape,
        "is of 64 inputs where the model has 3072",
    );
    let config = r#"{"peft_type": "HRA", "r": 8, "apply_GS": true}"#;
    assert_left_out(
        one(TO_Q, "hra_u", &[3072, 8]).metadata("lora_adapter_metadata", config),
        SkipKind::Unsupported,
        "HRA with `apply_GS` is not supported: its vectors are made orthogonal first",
    );
}

// IA3

#[test]
fn the_side_of_an_ia3_is_told_by_its_marker_or_by_its_shape() {
    let peft = |shape: &[u64]| one(FC2, "ia3_l", shape);
    for (tensors, role, side, scales_bias, bytes) in [
        (ia3(FC2, 3072, 0.0), "ia3", Side::Out, false, 2 * 3072 * 2),
        (ia3(FC2, 12288, 1.0), "ia3", Side::In, false, 12288 * 2),
        (peft(&[3072, 1]), "ia3_l", Side::Out, true, 2 * 3072 * 2),
        (peft(&[1, 12288]), "ia3_l", Side::In, false, 12288 * 2),
    ] {
        let stack = stack(tensors);
        let (slot, piece) = only(&stack);
        assert_eq!(
            (piece.kind, piece.rank, piece.side),
            (PieceKind::Diagonal, 0, Some(side))
        );
        assert_eq!((roles(piece), piece.scales_bias), (vec![role], scales_bias));
        assert_eq!((slot.route, slot.branch_bytes), (Route::Beside, bytes));
        assert_eq!(piece.exactness, Exactness::Exact);
    }
}

#[test]
fn an_ia3_that_fits_neither_side_is_named() {
    assert_left_out(
        ia3(FC2, 12288, 0.0),
        SkipKind::Shape,
        "has 12288 values where the model has 3072",
    );
    assert_left_out(
        ia3(FC2, 3072, 1.0),
        SkipKind::Shape,
        "is of 3072 inputs where the model has 12288",
    );
    assert_left_out(
        one(FC2, "ia3_l", &[3072]),
        SkipKind::Broken,
        "ia3_l is a vector: its shape does not say which side it stretches",
    );
    assert_left_out(
        one(FC2, "weight", &[3072]).tensor(&format!("{FC2}.on_input"), &[3]),
        SkipKind::Broken,
        "ia3_on_input has 3 values where one is needed",
    );
    // Without its marker it is a checkpoint's weight.
    let skip = skip(one(FC2, "weight", &[3072]), &slots());
    assert_eq!(skip.kind, SkipKind::Foreign);
}

// OFT and BOFT

fn rule(cayley: Cayley) -> RotationRule {
    RotationRule {
        cayley,
        constraint: 0.0,
        scaled: false,
        shared: false,
    }
}

#[test]
fn rotations_and_their_rules() {
    let scalar = |stem: &str, name: &str| format!("{stem}.{name}");
    let exact = rule(Cayley::Exact);
    let neumann = rule(Cayley::Neumann);
    let solve = rule(Cayley::Solve);
    let oft_r = |rows| one(TO_Q, "oft_R.weight", &[rows, 496]);
    let configured = |json: &str| oft_r(96).metadata("lora_adapter_metadata", json);
    let squares = 96 * 32 * 32;
    for (tensors, roles_of, side, expected, elements) in [
        (
            oft(TO_Q, &[96, 32, 32]).scalar(&scalar(TO_Q, "alpha"), 0.0),
            vec!["oft_blocks"],
            Side::Out,
            exact,
            squares + 3072,
        ),
        (
            oft(TO_Q, &[96, 32, 32])
                .scalar(&scalar(TO_Q, "alpha"), 1e-3)
                .tensor(&scalar(TO_Q, "rescale"), &[3072, 1]),
            vec!["oft_blocks", "oft_rescale"],
            Side::Out,
            RotationRule {
                constraint: 1e-3,
                ..exact
            },
            squares + 3072,
        ),
        (oft_r(96), vec!["oft_r"], Side::In, neumann, squares),
        (
            oft_r(96).scalar(&scalar(TO_Q, "oft_R.scaled_oft"), 1.0),
            vec!["oft_r"],
            Side::In,
            RotationRule {
                scaled: true,
                ..neumann
            },
            squares,
        ),
        (
            oft_r(1),
            vec!["oft_r"],
            Side::In,
            RotationRule {
                shared: true,
                ..neumann
            },
            squares,
        ),
        (
            configured(r#"{"peft_type": "OFT", "use_cayley_neumann": false, "coft": true}"#),
            vec!["oft_r"],
            Side::In,
            solve,
            squares,
        ),
        (
            configured(r#"{"peft_type": "OFT", "num_cayley_neumann_terms": 5, "r": 96}"#),
            vec!["oft_r"],
            Side::In,
            neumann,
            squares,
        ),
        (
            one(TO_Q, "boft_R", &[1, 96, 32, 32]).tensor(&scalar(TO_Q, "boft_s"), &[3072, 1]),
            vec!["boft_r", "boft_s"],
            Side::In,
            solve,
            2 * (squares + 3072),
        ),
    ] {
        let stack = stack(tensors);
        let (slot, piece) = only(&stack);
        assert_eq!((piece.kind, piece.rank), (PieceKind::Rotation, 0));
        assert_eq!((roles(piece), piece.side), (roles_of, Some(side)));
        assert_eq!(piece.rotation, Some(expected));
        // An alpha is no scale.
        assert_eq!(piece.scale.to_bits(), 1.0f64.to_bits());
        assert_eq!(
            (slot.route, slot.branch_bytes),
            (Route::Beside, elements * 2)
        );
    }
}

#[test]
fn an_alpha_of_rotations_is_said_to_be_a_bound() {
    let ground = |tensors: Tensors| tensors.plan().modules()[0].scale_source.to_string();
    let blocks = || oft(TO_Q, &[96, 32, 32]);
    assert_eq!(
        ground(blocks().scalar(&format!("{TO_Q}.alpha"), 0.5)),
        "alpha bounds the rotation, and is no scale: 1"
    );
    assert_eq!(ground(blocks()), "this kind of adapter has no alpha: 1");
}

#[test]
fn a_butterfly_turns_the_outputs_in_stages() {
    let stack = stack(oft(TO_Q, &[10, 512, 6, 6]).tensor(&format!("{TO_Q}.rescale"), &[3072, 1]));
    let (slot, piece) = only(&stack);
    assert_eq!(
        (piece.adapter.name(), piece.side),
        ("boft", Some(Side::Out))
    );
    let elements = 10 * 512 * 36 + 2 * 3072;
    assert_eq!(slot.branch_bytes, elements * 2 + 4);
}

#[test]
fn rotations_that_fit_nothing_are_named() {
    let broken = SkipKind::Broken;
    let unsupported = SkipKind::Unsupported;
    for (tensors, kind, reason) in [
        (
            oft(TO_Q, &[96, 32, 16]),
            broken,
            "oft_blocks holds no square blocks: [96, 32, 16]",
        ),
        (
            oft(TO_Q, &[48, 32, 32]),
            SkipKind::Shape,
            "has 1536 values where the model has 3072",
        ),
        (
            oft(TO_Q, &[96, 32, 32]).tensor(&format!("{TO_Q}.rescale"), &[64, 1]),
            broken,
            "oft_rescale has 64 values where the blocks turn 3072 outputs",
        ),
        (
            oft(TO_Q, &[96, 32, 32]).tensor(&format!("{TO_Q}.rescale"), &[1, 3072]),
            broken,
            "oft_rescale has 3072 values in a row, and is of the outputs",
        ),
        (
            oft(TO_Q, &[96, 32, 32]).scalar(&format!("{TO_Q}.alpha"), f64::INFINITY),
            broken,
            "alpha is inf: it must be finite",
        ),
        (
            one(TO_Q, "oft_R.weight", &[96, 497]),
            broken,
            "oft_r has 497 values in a row, which are no triangle of a block",
        ),
        (
            one(TO_Q, "oft_R.weight", &[48, 496]),
            SkipKind::Shape,
            "is of 1536 inputs where the model has 3072",
        ),
        (
            // A block of 40.
            one(TO_Q, "oft_R.weight", &[1, 780]),
            SkipKind::Shape,
            "has a block of 40 inputs where the model has 3072",
        ),
        (
            oft(TO_Q, &[11, 512, 6, 6]),
            broken,
            "512 blocks of 6 make no butterfly of 11 stages",
        ),
        (
            oft(TO_Q, &[2, 1024, 3, 3]),
            broken,
            "1024 blocks of 3 make no butterfly of 2 stages",
        ),
        (
            one(TO_Q, "boft_R", &[1, 96, 32, 32]),
            broken,
            "is a BOFT without boft_s",
        ),
        (
            one(TO_Q, "boft_R", &[2, 96, 32, 32]).tensor(&format!("{TO_Q}.boft_s"), &[3072, 1]),
            unsupported,
            "PEFT's BOFT of 2 butterfly factors is not supported: one is",
        ),
    ] {
        assert_left_out(tensors, kind, reason);
    }
    let config = r#"{"peft_type": "OFT", "num_cayley_neumann_terms": 7}"#;
    assert_left_out(
        one(TO_Q, "oft_R.weight", &[96, 496]).metadata("lora_adapter_metadata", config),
        unsupported,
        "OFT with 7 terms of the Cayley-Neumann series is not supported: 5 are",
    );
}

// Replaced values

#[test]
fn a_replacement_is_exact_where_the_value_is_there() {
    for (stem, shape, kind, parameter) in [
        (IMG_IN, &[3072, 64][..], PieceKind::Dense, false),
        (EMBEDDING, &[2, 3072], PieceKind::Dense, false),
        (NORM, &[128], PieceKind::Vector, true),
    ] {
        let plan = one(stem, "set_weight", shape).plan();
        assert_eq!(plan.verdict(), Verdict::Apply, "{stem}");
        let stack = stack_on(&[&plan], &slots(), StackOptions::default());
        let (_, piece) = only(&stack);
        assert_eq!((piece.kind, piece.adapter.name()), (kind, "set"), "{stem}");
        assert_eq!(
            (roles(piece), piece.parameter.is_some()),
            (vec!["set_weight"], parameter)
        );
        assert_eq!(piece.exactness, Exactness::Exact);
    }
}

#[test]
fn a_replacement_of_a_quantized_weight_is_refused_before_a_model_is_at_hand() {
    let reason = "`set_weight` is not supported on a quantized layer: what it replaces is not \
                  there, and the difference would hold the error of the quantization";
    let tensors = || one(TO_Q, "set_weight", &[3072, 3072]);
    assert_left_out(tensors(), SkipKind::Unsupported, reason);
    let plan = tensors().plan();
    assert_eq!(plan.verdict(), Verdict::Reject);
    assert!(plan.reason().unwrap().ends_with(reason));
    // A model of which the layer is plain takes it.
    let plain = [slot(TO_Q, SlotKind::Linear, 3072, 3072)];
    let stack = stack_on(&[&plan], &plain, StackOptions::default());
    assert_eq!(only(&stack).1.kind, PieceKind::Dense);
}

// Kernels

#[test]
fn a_fused_mlp_is_opened_unless_the_kernel_is_to_be_kept() {
    let whole = |stem: &str| {
        Tensors::default()
            .tensor(&format!("{stem}.lokr_w1"), &[16, 16])
            .tensor(&format!("{stem}.lokr_w2"), &[768, 192])
    };
    let kept = StackOptions {
        mlp: MlpPath::Rank,
        ..StackOptions::default()
    };
    let plan = whole(FC1).plan();
    let opened = stack_on(&[&plan], &slots(), StackOptions::default());
    let (_, piece) = only(&opened);
    assert_eq!(
        (piece.kind, piece.exactness),
        (PieceKind::Kron, Exactness::Exact)
    );
    let closed = stack_on(&[&plan], &slots(), kept);
    let (_, piece) = only(&closed);
    assert_eq!(
        (piece.rank_budget, piece.exactness),
        (Some(256), Exactness::Truncated)
    );
    let plan = dora(FC2, 3072, 12288, &[3072, 1])
        .peft("transformer_blocks.0.attn.to_v", 16)
        .plan();
    let stack = stack_on(&[&plan], &slots(), kept);
    assert_eq!(
        stack.skipped[0].reason,
        "DoRA is more than rank, and `mlp=\"rank\"` keeps Nunchaku's fused kernel, which takes \
         ranks alone: `mlp=\"exact\"` applies it"
    );
    assert!(
        stack_on(&[&plan], &slots(), StackOptions::default())
            .skipped
            .is_empty()
    );
}

#[test]
fn a_kernel_that_nothing_opens_takes_what_is_rank_alone() {
    let slots = [
        slot(Z_QKV, SlotKind::Svdq, 11520, 3840),
        slot("layers.0.attention.to_out.0", SlotKind::Svdq, 3840, 3840),
    ];
    let to_q = "layers.0.attention.to_q";
    let beside = |tensors: Tensors| {
        let out = "layers.0.attention.to_out.0";
        tensors
            .tensor(&format!("{out}.lora_A.weight"), &[16, 3840])
            .tensor(&format!("{out}.lora_B.weight"), &[3840, 16])
            .plan()
    };
    for (tensors, title) in [
        (dora(to_q, 3840, 3840, &[3840]), "DoRA"),
        (ia3(to_q, 3840, 0.0), "IA3"),
        (oft(to_q, &[120, 32, 32]), "OFT"),
    ] {
        let plan = beside(tensors);
        // The known hosts' models can all be opened.
        assert_eq!(plan.verdict(), Verdict::Apply);
        let stack = stack_on(&[&plan], &slots, StackOptions::default());
        let reason = format!(
            "{title} is more than rank, and Nunchaku computes this layer inside a kernel that \
             takes ranks alone: a model that calls the layer by itself takes it"
        );
        assert_eq!(stack.skipped[0].reason, reason);
        let opened = slots.clone().map(|slot| Slot {
            opens: true,
            ..slot
        });
        assert!(
            stack_on(&[&plan], &opened, StackOptions::default())
                .skipped
                .is_empty()
        );
    }
    for tensors in [
        glora(to_q, [[3840, 8], [8, 3840], [3840, 8], [8, 3840]]),
        one(to_q, "hra_u", &[3840, 8]),
    ] {
        let plan = beside(tensors);
        assert_eq!(plan.verdict(), Verdict::Apply);
        assert!(
            stack_on(&[&plan], &slots, StackOptions::default())
                .skipped
                .is_empty()
        );
    }
}

// Routes

#[test]
fn ranks_of_a_slot_go_beside_with_a_diagonal_and_no_kernel_limits_them() {
    let plain = pair(TO_K, 3072, 3072, 1000).plan();
    let stretched = dora(TO_Q, 3072, 3072, &[3072]).plan();
    let alone = stack_on(&[&plain], &slots(), StackOptions::default());
    let slot = &alone.slots[0];
    assert_eq!(
        (slot.route, slot.rank, slot.rank_limit),
        (Route::Inside, 992, Some(992))
    );
    assert_eq!(slot.pieces[0].exactness, Exactness::Truncated);
    let both = stack_on(&[&plain, &stretched], &slots(), StackOptions::default());
    let slot = &both.slots[0];
    // 16 + 1000, not padded to the kernels' tiles.
    assert_eq!(
        (slot.route, slot.rank, slot.rank_limit),
        (Route::Beside, 1016, None)
    );
    let classes: Vec<_> = slot.pieces.iter().map(|p| p.exactness).collect();
    assert_eq!(classes, [Exactness::Exact, Exactness::Norms]);
    let limited = StackOptions {
        max_rank: Some(100),
        ..StackOptions::default()
    };
    let slot = &stack_on(&[&plain, &stretched], &slots(), limited).slots[0];
    assert_eq!((slot.rank, slot.rank_limit), (100, Some(100)));
}

#[test]
fn a_base_that_fills_the_kernels_leaves_room_beside() {
    let mut slots = slots();
    slots[0].base_rank = 1024;
    let plan = dora(TO_Q, 3072, 3072, &[3072]).plan();
    let stack = stack_on(&[&plan], &slots, StackOptions::default());
    assert_eq!(only(&stack).0.rank, 16);
}

#[test]
fn under_offload_all_blocks_go_beside_with_one() {
    let block = |at: u64, name: &str| format!("transformer_blocks.{at}.attn.{name}");
    let plan = dora(&block(1, "to_q"), 3072, 3072, &[3072])
        .peft(&block(0, "to_q"), 24)
        .peft(&block(3, "to_q"), 24)
        .plan();
    let slots = offloaded(4);
    let stack = stack_on(&[&plan], &slots, StackOptions::default());
    let found: Vec<_> = stack.slots.iter().map(|s| (s.route, s.rank)).collect();
    // The last block is not offloaded.
    assert_eq!(
        found,
        [
            (Route::Beside, 24),
            (Route::Beside, 16),
            (Route::Inside, 32)
        ]
    );
    let group = &stack.uniform[0];
    assert_eq!((group.route, group.rank), (Route::Beside, 24));
    let forms: Vec<_> = group.room.iter().map(|r| (r.shape.form, r.count)).collect();
    assert_eq!(forms, [(PartForm::Factor, 1)]);
    assert_eq!(group.branch_bytes, 2 * 3072 * 2);
    // Three offloaded blocks have the room and the ranks, the fourth ranks of its own.
    let per_rank = (9216 + 3072) * 2;
    let bytes = 3 * (group.branch_bytes + 24 * per_rank) + 32 * per_rank;
    assert_eq!(stack.added_bytes, bytes);
}

#[test]
fn rooms_are_the_most_of_each_shape_over_all_blocks() {
    let block = |at: u64, name: &str| format!("transformer_blocks.{at}.attn.{name}");
    let first = oft(&block(0, "to_q"), &[96, 32, 32])
        .tensor(&format!("{}.ia3_l", block(1, "to_q")), &[1, 3072])
        .tensor(&format!("{}.ia3_l", block(2, "to_k")), &[3072, 1])
        .plan();
    let second = oft(&block(0, "to_q"), &[96, 32, 32]).plan();
    let stack = stack_on(&[&first, &second], &offloaded(4), StackOptions::default());
    let squares = 96 * 32 * 32;
    let each = 2 * (2 * (squares + 3072) + 3072 + 2 * 3072);
    let group = &stack.uniform[0];
    assert_eq!((group.rank, group.branch_bytes), (0, each));
    let counts: Vec<_> = group.room.iter().map(|room| room.count).collect();
    assert_eq!(counts, [1, 2, 1]);
    assert!(stack.slots.iter().all(|slot| slot.branch_bytes == each));
    assert_eq!(stack.added_bytes, 3 * each);
}

// The budget of full deltas

#[test]
fn the_budget_is_spent_in_the_order_of_the_stack() {
    let full = |block: u64| {
        let stem = format!("transformer_blocks.{block}.attn.to_q");
        one(&stem, "diff", &[3072, 3072])
    };
    let matrix = 9216 * 3072 * 2 + 4;
    let (first, second) = (full(3).plan(), full(0).plan());
    let whole = |plans: &[&FilePlan], dense_budget: u64| -> Vec<(usize, bool)> {
        let options = StackOptions {
            dense_budget,
            ..StackOptions::default()
        };
        let slots: Vec<Slot> = offloaded(4)
            .into_iter()
            .map(|slot| Slot {
                offloaded: false,
                ..slot
            })
            .collect();
        let stack = stack_on(plans, &slots, options);
        let pieces = stack.slots.iter().flat_map(|slot| &slot.pieces);
        pieces
            .map(|piece| (piece.lora, piece.rank_budget.is_none()))
            .collect()
    };
    // Slots are in model order, so the second LoRA's comes first.
    for (budget, expected) in [
        (2 * matrix, [(1, true), (0, true)]),
        (2 * matrix - 1, [(1, false), (0, true)]),
        (matrix - 1, [(1, false), (0, false)]),
    ] {
        assert_eq!(whole(&[&first, &second], budget), expected);
    }
    // One slot has one matrix, in which all are summed.
    assert_eq!(whole(&[&first, &first], matrix), [(0, true), (1, true)]);
}

#[test]
fn under_offload_all_blocks_have_room_for_a_matrix() {
    let full = |tensors: Tensors, block: u64| {
        let stem = format!("transformer_blocks.{block}.attn.to_q");
        tensors.tensor(&format!("{stem}.diff"), &[3072, 3072])
    };
    let matrix = 9216 * 3072 * 2 + 4;
    let plan = full(full(Tensors::default(), 0), 1).plan();
    for (dense_budget, is_whole) in [(3 * matrix, true), (3 * matrix - 1, false)] {
        let options = StackOptions {
            dense_budget,
            ..StackOptions::default()
        };
        let stack = stack_on(&[&plan], &offloaded(4), options);
        let pieces = stack.slots.iter().flat_map(|slot| &slot.pieces);
        for piece in pieces {
            assert_eq!(piece.rank_budget.is_none(), is_whole);
            let class = if is_whole {
                Exactness::Exact
            } else {
                Exactness::Truncated
            };
            assert_eq!(piece.exactness, class);
        }
        let bytes = if is_whole {
            3 * matrix
        } else {
            3 * 256 * (9216 + 3072) * 2
        };
        assert_eq!(stack.added_bytes, bytes);
    }
}

// A fused module's delta on a model that has its parts apart

/// A tensor of a piece: its role, its first row where it is cut, and its shape.
type Cut = (String, Option<u64>, Vec<u64>);

/// What of a delta of all three projections is the second one's.
fn cut(tensors: Tensors) -> Vec<Cut> {
    let plan = tensors.plan();
    let stack = stack_on(&[&plan], &apart(), StackOptions::default());
    assert_eq!(stack.applied_modules, [1], "{:?}", stack.skipped);
    let to_k = stack.slots.iter().find(|slot| slot.path == TO_K).unwrap();
    let tensors = to_k.pieces[0].tensors.iter();
    tensors
        .map(|(role, own)| ((*role).to_owned(), own.first_row, own.shape.clone()))
        .collect()
}

#[test]
fn rows_are_cut_where_that_is_exact() {
    let row =
        |role: &str, first: Option<u64>, shape: &[u64]| (role.to_owned(), first, shape.to_vec());
    assert_eq!(
        cut(dora(TO_QKV, 9216, 3072, &[9216, 1])),
        vec![
            row("dora_scale", Some(3072), &[3072, 1]),
            row("down", None, &[16, 3072]),
            row("up", Some(3072), &[3072, 16]),
        ]
    );
    assert_eq!(
        cut(ia3(TO_QKV, 9216, 0.0)),
        vec![row("ia3", Some(3072), &[3072])]
    );
    assert_eq!(cut(ia3(TO_QKV, 3072, 1.0)), vec![row("ia3", None, &[3072])]);
    let parts = [[3072, 8], [8, 3072], [9216, 8], [8, 3072]];
    assert_eq!(
        cut(glora(TO_QKV, parts))[2],
        row("glora_b1", Some(3072), &[3072, 8])
    );
    let old = [[8, 3072], [3072, 8], [8, 3072], [9216, 8]];
    assert_eq!(
        cut(glora(TO_QKV, old))[2..],
        [
            row("glora_b1", None, &[8, 3072]),
            row("glora_b2", Some(3072), &[3072, 8])
        ]
    );
    assert_eq!(
        cut(one(TO_QKV, "hra_u", &[3072, 8])),
        vec![row("hra_u", None, &[3072, 8])]
    );
    assert_eq!(
        cut(oft(TO_QKV, &[288, 32, 32]).tensor(&format!("{TO_QKV}.rescale"), &[9216, 1])),
        vec![
            row("oft_blocks", Some(96), &[96, 32, 32]),
            row("oft_rescale", Some(3072), &[3072, 1]),
        ]
    );
    assert_eq!(
        cut(one(TO_QKV, "oft_R.weight", &[96, 496])),
        vec![row("oft_r", None, &[96, 496])]
    );
    let boft = one(TO_QKV, "boft_R", &[1, 96, 32, 32]);
    assert_eq!(
        cut(boft.tensor(&format!("{TO_QKV}.boft_s"), &[9216, 1]))[1],
        row("boft_s", Some(3072), &[3072, 1])
    );
}

#[test]
fn rows_that_hang_together_are_not_cut() {
    for tensors in [
        // A column's norm is of all rows.
        dora(TO_QKV, 9216, 3072, &[1, 3072]),
        // A block lies over the border of two parts.
        oft(TO_QKV, &[2, 4608, 4608]),
        // The stages of a butterfly mix all of them.
        oft(TO_QKV, &[2, 1536, 6, 6]),
        // The norm of all blocks is bounded.
        oft(TO_QKV, &[288, 32, 32]).scalar(&format!("{TO_QKV}.alpha"), 0.1),
    ] {
        let plan = tensors.peft(IMG_IN, 1).plan();
        let mut slots = apart();
        slots.push(slot(IMG_IN, SlotKind::Linear, 3072, 3072));
        let stack = stack_on(&[&plan], &slots, StackOptions::default());
        assert_eq!(
            (stack.skipped[0].kind, stack.skipped[0].reason.as_str()),
            (
                SkipKind::Unsupported,
                "cannot be cut into the parts that the model has of this module"
            )
        );
    }
}

#[test]
fn a_bias_beside_any_of_them_is_a_vector_as_ever() {
    for tensors in [
        dora(TO_Q, 3072, 3072, &[3072]),
        ia3(TO_Q, 3072, 0.0),
        oft(TO_Q, &[96, 32, 32]),
        one(TO_Q, "hra_u", &[3072, 8]),
    ] {
        let stack = stack(tensors.tensor(&format!("{TO_Q}.diff_b"), &[3072]));
        let kinds: Vec<_> = stack.slots[0].pieces.iter().map(|p| p.kind).collect();
        assert_eq!((kinds.len(), stack.skipped.len()), (2, 0));
        assert!(kinds.contains(&PieceKind::Vector));
    }
}

#[test]
fn a_file_of_one_sided_shapes_is_judged_by_them() {
    let other = oft(TO_Q, &[128, 32, 32]).plan();
    assert_eq!(other.verdict(), Verdict::Reject);
    assert!(
        other
            .reason()
            .unwrap()
            .starts_with("a LoRA of another model")
    );
    // One module that does not fit makes no other model of many that do.
    let mut tensors = oft(TO_Q, &[128, 32, 32]);
    for block in 30..33 {
        let stem = format!("transformer_blocks.{block}.attn.to_q.oft_blocks");
        tensors = tensors.tensor(&stem, &[96, 32, 32]);
    }
    assert_eq!(tensors.plan().verdict(), Verdict::Partial);
}
