//! Z-Image: its modules and their sizes. Its files are parsed, not applied.

use super::rows::{BlockRows, LinearRow, ModelRows};
use super::{Section, Stream};

/// Planes of a modulation layer: scale and gate, twice.
const MODULATION_PLANES: u64 = 4;

const WIDTH: u64 = 3840;
const MLP: u64 = 10240;
const HEAD_DIM: u64 = 128;
/// Inputs of the modulation: the embedding of a timestep.
const TIME: u64 = 256;

pub(super) const ROWS: ModelRows = ModelRows {
    name: "z-image",
    title: "Z-Image",
    metadata_word: "zimage",
    refusal: Some("applying to Z-Image is not supported yet"),
    blocks: &[
        blocks("layers", None, 30, &MODULATED),
        blocks("noise_refiner", Some(Stream::Image), 2, &MODULATED),
        // It sees no timestep, hence has no modulation.
        blocks("context_refiner", Some(Stream::Text), 2, &PLAIN),
    ],
    top: &[],
};

const MODULATED: [LinearRow; 8] = [
    PLAIN[0],
    PLAIN[1],
    PLAIN[2],
    PLAIN[3],
    PLAIN[4],
    PLAIN[5],
    PLAIN[6],
    linear(
        "adaLN_modulation.0",
        Section::Modulation,
        MODULATION_PLANES * WIDTH,
        TIME,
    ),
];
const PLAIN: [LinearRow; 7] = [
    linear("attention.to_q", Section::Attention, WIDTH, WIDTH),
    linear("attention.to_k", Section::Attention, WIDTH, WIDTH),
    linear("attention.to_v", Section::Attention, WIDTH, WIDTH),
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
const FUSED: [(&str, [&str; 3]); 1] = [(
    "attention.to_qkv",
    ["attention.to_q", "attention.to_k", "attention.to_v"],
)];
const ALIASES: [(&str, &str); 3] = [
    ("attention.to_out", "attention.to_out.0"),
    ("attention.out", "attention.to_out.0"),
    ("attention.qkv", "attention.to_qkv"),
];

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
    }
}

/// A linear; how a quantized model computes it is not known.
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
        layer: None,
    }
}
