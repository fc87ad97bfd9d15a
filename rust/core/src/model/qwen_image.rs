//! Qwen-Image: its modules, their sizes, and how Nunchaku computes them.
//!
//! All variants share every shape; Layered alone has the one embedding.

use super::rows::{BlockRows, LinearRow, ModelRows, TopRow};
use super::slot::RowOrder;
use super::{Layer, ModuleKind, Section};

/// Planes of a modulation layer: shift, scale and gate, twice.
pub const MODULATION_PLANES: u64 = 6;

const WIDTH: u64 = 3072;
const MLP: u64 = 12288;
const TEXT: u64 = 3584;
const LATENT: u64 = 64;
const HEAD_DIM: u64 = 128;
/// Inputs of the embedding of a timestep.
const TIME: u64 = 256;

pub(super) const ROWS: ModelRows = ModelRows {
    name: "qwen-image",
    title: "Qwen-Image",
    metadata_word: "qwen",
    refusal: None,
    blocks: &[BlockRows {
        path: "transformer_blocks",
        title: "blocks",
        count: 60,
        linears: &LINEARS,
        norms: &NORMS,
        fused: &FUSED,
        aliases: &ALIASES,
    }],
    top: &TOP,
};

const LINEARS: [LinearRow; 14] = [
    attention("attn.to_q"),
    attention("attn.to_k"),
    attention("attn.to_v"),
    text_attention("attn.add_q_proj"),
    text_attention("attn.add_k_proj"),
    text_attention("attn.add_v_proj"),
    attention("attn.to_out.0"),
    text_attention("attn.to_add_out"),
    mlp("img_mlp.net.0.proj", MLP, WIDTH),
    mlp("img_mlp.net.2", WIDTH, MLP),
    mlp("txt_mlp.net.0.proj", MLP, WIDTH),
    mlp("txt_mlp.net.2", WIDTH, MLP),
    modulation("img_mod.1"),
    modulation("txt_mod.1"),
];
/// (path, section, channels).
const NORMS: [(&str, Section, u64); 4] = [
    ("attn.norm_q", Section::Attention, HEAD_DIM),
    ("attn.norm_k", Section::Attention, HEAD_DIM),
    ("attn.norm_added_q", Section::TextAttention, HEAD_DIM),
    ("attn.norm_added_k", Section::TextAttention, HEAD_DIM),
];
const FUSED: [(&str, [&str; 3]); 2] = [
    ("attn.to_qkv", ["attn.to_q", "attn.to_k", "attn.to_v"]),
    (
        "attn.add_qkv_proj",
        ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    ),
];
const ALIASES: [(&str, &str); 2] = [
    ("attn.to_out", "attn.to_out.0"),
    ("attn.to_added_qkv", "attn.add_qkv_proj"),
];
const TOP: [TopRow; 8] = [
    top("img_in", WIDTH, LATENT),
    top("txt_in", WIDTH, TEXT),
    top("time_text_embed.timestep_embedder.linear_1", WIDTH, TIME),
    top("time_text_embed.timestep_embedder.linear_2", WIDTH, WIDTH),
    // Its scale and shift.
    top("norm_out.linear", 2 * WIDTH, WIDTH),
    top("proj_out", LATENT, WIDTH),
    ("txt_norm", ModuleKind::Norm { channels: TEXT }),
    (
        "time_text_embed.addition_t_embedding",
        ModuleKind::Embedding {
            rows: 2,
            dim: WIDTH,
        },
    ),
];

const fn attention(path: &'static str) -> LinearRow {
    LinearRow {
        path,
        section: Section::Attention,
        out_features: WIDTH,
        in_features: WIDTH,
        layer: Some(Layer::Svdq),
    }
}

const fn text_attention(path: &'static str) -> LinearRow {
    LinearRow {
        section: Section::TextAttention,
        ..attention(path)
    }
}

const fn mlp(path: &'static str, out_features: u64, in_features: u64) -> LinearRow {
    LinearRow {
        path,
        section: Section::Mlp,
        out_features,
        in_features,
        layer: Some(Layer::SvdqInFusedMlp),
    }
}

const fn modulation(path: &'static str) -> LinearRow {
    LinearRow {
        path,
        section: Section::Modulation,
        out_features: MODULATION_PLANES * WIDTH,
        in_features: WIDTH,
        layer: Some(Layer::Awq {
            planes: MODULATION_PLANES,
            row_order: RowOrder::Interleaved,
        }),
    }
}

const fn top(path: &'static str, out_features: u64, in_features: u64) -> TopRow {
    let kind = ModuleKind::Linear {
        out_features,
        in_features,
    };
    (path, kind)
}
