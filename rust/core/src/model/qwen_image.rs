//! Qwen-Image: its modules, their sizes, and how Nunchaku computes them.
//!
//! All variants share every shape; Layered alone has the one embedding.

use super::rows::{Alias, BlockRows, LinearRow, ModelRows, TopRow, top};
use super::slot::RowOrder;
use super::{Layer, ModuleKind, Section, Stream};

/// Planes of a modulation layer: shift, scale and gate, twice.
pub const MODULATION_PLANES: u64 = 6;

const WIDTH: u64 = 3072;
const MLP: u64 = 12288;
const TEXT: u64 = 3584;
const LATENT: u64 = 64;
const HEAD_DIM: u64 = 128;
/// Inputs of the embedding of a timestep.
const TIME: u64 = 256;

const IMAGE: Option<Stream> = Some(Stream::Image);
const TEXT_TOKENS: Option<Stream> = Some(Stream::Text);

pub(super) const ROWS: ModelRows = ModelRows {
    name: "qwen-image",
    title: "Qwen-Image",
    metadata_word: "qwen",
    blocks: &[BlockRows {
        path: "transformer_blocks",
        title: "blocks",
        stream: None,
        count: 60,
        linears: &LINEARS,
        norms: &NORMS,
        fused: &FUSED,
        aliases: &ALIASES,
        built_as: &[],
    }],
    top: &TOP,
    top_aliases: &[],
    unused: &[],
    parameters: &[],
};

const LINEARS: [LinearRow; 14] = [
    attention("attn.to_q", Stream::Image),
    attention("attn.to_k", Stream::Image),
    attention("attn.to_v", Stream::Image),
    attention("attn.add_q_proj", Stream::Text),
    attention("attn.add_k_proj", Stream::Text),
    attention("attn.add_v_proj", Stream::Text),
    attention("attn.to_out.0", Stream::Image),
    attention("attn.to_add_out", Stream::Text),
    mlp("img_mlp.net.0.proj", Stream::Image, MLP, WIDTH),
    mlp("img_mlp.net.2", Stream::Image, WIDTH, MLP),
    mlp("txt_mlp.net.0.proj", Stream::Text, MLP, WIDTH),
    mlp("txt_mlp.net.2", Stream::Text, WIDTH, MLP),
    modulation("img_mod.1", Stream::Image),
    modulation("txt_mod.1", Stream::Text),
];
/// (path, section, stream, channels).
const NORMS: [(&str, Section, Option<Stream>, u64); 4] = [
    norm("attn.norm_q", Stream::Image),
    norm("attn.norm_k", Stream::Image),
    norm("attn.norm_added_q", Stream::Text),
    norm("attn.norm_added_k", Stream::Text),
];
const FUSED: [(&str, &[&str]); 2] = [
    ("attn.to_qkv", &["attn.to_q", "attn.to_k", "attn.to_v"]),
    (
        "attn.add_qkv_proj",
        &["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    ),
];
const ALIASES: [Alias; 2] = [
    ("attn.to_out", "attn.to_out.0"),
    ("attn.to_added_qkv", "attn.add_qkv_proj"),
];
const TOP: [TopRow; 8] = [
    top("img_in", IMAGE, WIDTH, LATENT),
    top("txt_in", TEXT_TOKENS, WIDTH, TEXT),
    top(
        "time_text_embed.timestep_embedder.linear_1",
        None,
        WIDTH,
        TIME,
    ),
    top(
        "time_text_embed.timestep_embedder.linear_2",
        None,
        WIDTH,
        WIDTH,
    ),
    // Its scale and shift.
    top("norm_out.linear", IMAGE, 2 * WIDTH, WIDTH),
    top("proj_out", IMAGE, LATENT, WIDTH),
    ("txt_norm", ModuleKind::Norm { channels: TEXT }, TEXT_TOKENS),
    (
        "time_text_embed.addition_t_embedding",
        ModuleKind::Embedding {
            rows: 2,
            dim: WIDTH,
        },
        None,
    ),
];

const fn attention(path: &'static str, stream: Stream) -> LinearRow {
    LinearRow {
        path,
        section: Section::Attention,
        stream: Some(stream),
        out_features: WIDTH,
        in_features: WIDTH,
        layer: Some(Layer::Svdq),
    }
}

const fn norm(path: &'static str, stream: Stream) -> (&'static str, Section, Option<Stream>, u64) {
    (path, Section::Attention, Some(stream), HEAD_DIM)
}

const fn mlp(path: &'static str, stream: Stream, out_features: u64, in_features: u64) -> LinearRow {
    LinearRow {
        path,
        section: Section::Mlp,
        stream: Some(stream),
        out_features,
        in_features,
        layer: Some(Layer::SvdqInKernel),
    }
}

const fn modulation(path: &'static str, stream: Stream) -> LinearRow {
    LinearRow {
        path,
        section: Section::Modulation,
        stream: Some(stream),
        out_features: MODULATION_PLANES * WIDTH,
        in_features: WIDTH,
        layer: Some(Layer::Awq {
            planes: MODULATION_PLANES,
            row_order: RowOrder::Interleaved,
        }),
    }
}
