//! Z-Image: its modules, their sizes, and how Nunchaku computes them.
//!
//! Paths are those of diffusers' dense model. Hosts build it under other names: Nunchaku fuses the
//! projections of the attention and of the MLP, ComfyUI has names of its own.

use super::rows::{Alias, BlockRows, LinearRow, ModelRows, TopRow, top};
use super::{Layer, ModuleKind, Section, Stream};

/// Planes of a modulation layer: scale and gate, twice.
const MODULATION_PLANES: u64 = 4;

const WIDTH: u64 = 3840;
const MLP: u64 = 10240;
const TEXT: u64 = 2560;
/// Values of a patch: 16 channels of 2 x 2.
const LATENT: u64 = 64;
const HEAD_DIM: u64 = 128;
/// Inputs of the modulation: the embedding of a timestep.
const TIME: u64 = 256;
/// Channels inside the embedder of a timestep.
const TIME_HIDDEN: u64 = 1024;

const IMAGE: Option<Stream> = Some(Stream::Image);
const TEXT_TOKENS: Option<Stream> = Some(Stream::Text);

pub(super) const ROWS: ModelRows = ModelRows {
    name: "z-image",
    title: "Z-Image",
    metadata_word: "zimage",
    blocks: &[
        blocks("layers", None, 30, &MODULATED),
        blocks("noise_refiner", IMAGE, 2, &MODULATED),
        // It sees no timestep, hence has no modulation.
        blocks("context_refiner", TEXT_TOKENS, 2, &PLAIN),
    ],
    top: &TOP,
    top_aliases: &TOP_ALIASES,
    unused: &UNUSED,
    parameters: &PARAMETERS,
};

const MODULATED: [LinearRow; 8] = [
    PLAIN[0],
    PLAIN[1],
    PLAIN[2],
    PLAIN[3],
    PLAIN[4],
    PLAIN[5],
    PLAIN[6],
    LinearRow {
        path: "adaLN_modulation.0",
        section: Section::Modulation,
        stream: None,
        out_features: MODULATION_PLANES * WIDTH,
        in_features: TIME,
        // Dense in every form, so its rows lie as in files.
        layer: Some(Layer::Plain),
    },
];
const PLAIN: [LinearRow; 7] = [
    projection("attention.to_q"),
    projection("attention.to_k"),
    projection("attention.to_v"),
    linear("attention.to_out.0", Section::Attention, WIDTH, WIDTH),
    linear("feed_forward.w1", Section::Mlp, MLP, WIDTH),
    linear("feed_forward.w2", Section::Mlp, WIDTH, MLP),
    linear("feed_forward.w3", Section::Mlp, MLP, WIDTH),
];
/// (path, section, stream, channels).
const NORMS: [(&str, Section, Option<Stream>, u64); 6] = [
    ("attention.norm_q", Section::Attention, None, HEAD_DIM),
    ("attention.norm_k", Section::Attention, None, HEAD_DIM),
    ("attention_norm1", Section::Other, None, WIDTH),
    ("attention_norm2", Section::Other, None, WIDTH),
    ("ffn_norm1", Section::Other, None, WIDTH),
    ("ffn_norm2", Section::Other, None, WIDTH),
];
const FUSED: [(&str, &[&str]); 2] = [
    (
        "attention.to_qkv",
        &["attention.to_q", "attention.to_k", "attention.to_v"],
    ),
    // The value first, then the gate: the order of the rows in diffusers' `SwiGLU`.
    (
        "feed_forward.net.0.proj",
        &["feed_forward.w3", "feed_forward.w1"],
    ),
];
const ALIASES: [Alias; 6] = [
    ("attention.to_out", "attention.to_out.0"),
    ("attention.out", "attention.to_out.0"),
    ("attention.qkv", "attention.to_qkv"),
    ("attention.q_norm", "attention.norm_q"),
    ("attention.k_norm", "attention.norm_k"),
    ("feed_forward.net.2", "feed_forward.w2"),
];
/// `w13` is no spelling in files: nobody is known to write it, and its order of rows is a fact of
/// the model at hand.
const BUILT_AS: [Alias; 9] = [
    ("attention.fused_module.qkv", "attention.to_qkv"),
    ("attention.fused_module.norm_q", "attention.norm_q"),
    ("attention.fused_module.norm_k", "attention.norm_k"),
    ("attention.qkv", "attention.to_qkv"),
    ("attention.out", "attention.to_out.0"),
    ("attention.q_norm", "attention.norm_q"),
    ("attention.k_norm", "attention.norm_k"),
    ("feed_forward.w13", "feed_forward.net.0.proj"),
    ("feed_forward.net.2", "feed_forward.w2"),
];
const TOP: [TopRow; 7] = [
    top("all_x_embedder.2-1", IMAGE, WIDTH, LATENT),
    top("cap_embedder.1", TEXT_TOKENS, WIDTH, TEXT),
    top("t_embedder.mlp.0", None, TIME_HIDDEN, TIME),
    top("t_embedder.mlp.2", None, TIME, TIME_HIDDEN),
    top("all_final_layer.2-1.linear", IMAGE, LATENT, WIDTH),
    // Its scale.
    top("all_final_layer.2-1.adaLN_modulation.1", IMAGE, WIDTH, TIME),
    (
        "cap_embedder.0",
        ModuleKind::Norm { channels: TEXT },
        TEXT_TOKENS,
    ),
];
/// As ComfyUI names them, which has them for one size of patches alone.
const TOP_ALIASES: [Alias; 3] = [
    ("x_embedder", "all_x_embedder.2-1"),
    ("final_layer.linear", "all_final_layer.2-1.linear"),
    (
        "final_layer.adaLN_modulation.1",
        "all_final_layer.2-1.adaLN_modulation.1",
    ),
];

/// Tokens that pad an image and a text.
const PARAMETERS: [&str; 2] = ["x_pad_token", "cap_pad_token"];
/// ComfyUI's class has it, checkpoints do not.
const UNUSED: [&str; 1] = ["norm_final"];

const fn blocks(
    path: &'static str,
    stream: Option<Stream>,
    count: u32,
    linears: &'static [LinearRow],
) -> BlockRows {
    BlockRows {
        path,
        title: path,
        stream,
        count,
        linears,
        norms: &NORMS,
        fused: &FUSED,
        aliases: &ALIASES,
        built_as: &BUILT_AS,
    }
}

/// A projection of the attention: Nunchaku norms and rotates it in the kernel that computes it.
const fn projection(path: &'static str) -> LinearRow {
    LinearRow {
        layer: Some(Layer::SvdqInKernel),
        ..linear(path, Section::Attention, WIDTH, WIDTH)
    }
}

const fn linear(
    path: &'static str,
    section: Section,
    out_features: u64,
    in_features: u64,
) -> LinearRow {
    LinearRow {
        path,
        section,
        stream: None,
        out_features,
        in_features,
        layer: Some(Layer::Svdq),
    }
}
