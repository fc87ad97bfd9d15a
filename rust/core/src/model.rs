//! The modules of the known models, by every spelling, with their sizes.
//!
//! One table serves all Qwen-Image variants (they share every weight shape) and one Z-Image.
//! A spelling is looked up with `.` and `_` made the same, so dotted, flat and over-dotted names
//! are all one entry and no name is ever guessed from its underscores.

use std::collections::HashMap;
use std::fmt;
use std::sync::LazyLock;

use serde::Serialize;

/// A model family whose modules are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub enum Model {
    /// Qwen-Image, -2512, -Edit, -Edit-2509, -Edit-2511, -Layered.
    #[serde(rename = "qwen-image")]
    QwenImage,
    /// Z-Image and Z-Image-Turbo: parsed, not applied.
    #[serde(rename = "z-image")]
    ZImage,
}

impl Model {
    /// The name in reports and in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::QwenImage => "qwen-image",
            Self::ZImage => "z-image",
        }
    }
}

impl fmt::Display for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a module is, with the shape of its weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModuleKind {
    /// A linear layer: weight (out, in).
    Linear {
        /// Rows of the weight.
        out_features: u64,
        /// Columns of the weight.
        in_features: u64,
    },
    /// A norm with a weight of one value per channel and no bias.
    Norm {
        /// Number of channels.
        channels: u64,
    },
    /// An embedding: weight (rows, dim).
    Embedding {
        /// Number of embeddings.
        rows: u64,
        /// Size of each.
        dim: u64,
    },
}

impl ModuleKind {
    /// Shape of the module's weight.
    pub fn weight_shape(self) -> Vec<u64> {
        match self {
            Self::Linear {
                out_features,
                in_features,
            } => vec![out_features, in_features],
            Self::Norm { channels } => vec![channels],
            Self::Embedding { rows, dim } => vec![rows, dim],
        }
    }
}

/// Index of a target in the table.
pub type TargetId = usize;

/// Where a target's output rows lie inside the slot it is computed in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotPlace {
    /// Path of the slot, e.g. `transformer_blocks.0.attn.to_qkv` for `…attn.to_k`.
    pub slot: String,
    /// Which of the slot's parts this is.
    pub part: usize,
    /// Into how many equal parts the slot's rows are cut.
    pub parts: usize,
}

/// A module that a LoRA file can name.
#[derive(Debug, Clone)]
pub struct Target {
    /// Canonical (diffusers) path.
    pub path: String,
    /// The model it belongs to.
    pub model: Model,
    /// Kind and size in the released models.
    pub kind: ModuleKind,
    /// Index of the block, none at top level.
    pub block: Option<u32>,
    /// The place in the fused slot; for a target that is not fused, itself.
    pub place: SlotPlace,
    /// For a fused target, the targets its rows are cut into, in order.
    pub split: Vec<TargetId>,
}

impl Target {
    /// Whether the module is a fused one.
    pub fn is_fused(&self) -> bool {
        !self.split.is_empty()
    }
}

/// All targets of all models.
pub struct ModelTable {
    targets: Vec<Target>,
    by_spelling: HashMap<String, TargetId>,
    longest_bytes: usize,
}

impl ModelTable {
    /// The target with this index.
    ///
    /// # Panics
    /// If `id` did not come from this table.
    pub fn target(&self, id: TargetId) -> &Target {
        &self.targets[id]
    }

    /// All targets, in model order.
    pub fn targets(&self) -> &[Target] {
        &self.targets
    }

    /// Looks up a path whose dots have been turned into underscores.
    pub fn find_flat(&self, flat: &str) -> Option<TargetId> {
        // Nothing is hashed that is longer than any spelling: names in files may be long.
        if flat.len() > self.longest_bytes {
            return None;
        }
        self.by_spelling.get(flat).copied()
    }

    /// Number of spellings.
    pub fn spelling_count(&self) -> usize {
        self.by_spelling.len()
    }

    fn add(&mut self, target: Target) -> TargetId {
        let id = self.targets.len();
        self.alias(&target.path.clone(), id);
        self.targets.push(target);
        id
    }

    fn alias(&mut self, path: &str, id: TargetId) {
        self.longest_bytes = self.longest_bytes.max(path.len());
        let earlier = self.by_spelling.insert(path.replace('.', "_"), id);
        debug_assert!(
            earlier.is_none_or(|e| e == id),
            "two targets spelled {path}"
        );
    }
}

/// The one table of known modules.
pub fn table() -> &'static ModelTable {
    static TABLE: LazyLock<ModelTable> = LazyLock::new(build);
    &TABLE
}

/// Blocks of the released models: (flattened prefix of the block path, number of blocks).
pub const BLOCK_GROUPS: [(&str, u32); 4] = [
    ("transformer_blocks", 60),
    ("layers", 30),
    ("noise_refiner", 2),
    ("context_refiner", 2),
];

const QWEN_WIDTH: u64 = 3072;
const QWEN_MLP: u64 = 12288;
const QWEN_MOD: u64 = 18432;
const QWEN_TEXT: u64 = 3584;
const QWEN_LATENT: u64 = 64;
const HEAD_DIM: u64 = 128;
const Z_WIDTH: u64 = 3840;
const Z_MLP: u64 = 10240;

/// A linear of a block: (path in the block, out, in).
type LinearRow = (&'static str, u64, u64);
/// A fused linear: (path, the three parts it is made of).
type FusedRow = (&'static str, [&'static str; 3]);

const QWEN_LINEARS: [LinearRow; 14] = [
    ("attn.to_q", QWEN_WIDTH, QWEN_WIDTH),
    ("attn.to_k", QWEN_WIDTH, QWEN_WIDTH),
    ("attn.to_v", QWEN_WIDTH, QWEN_WIDTH),
    ("attn.add_q_proj", QWEN_WIDTH, QWEN_WIDTH),
    ("attn.add_k_proj", QWEN_WIDTH, QWEN_WIDTH),
    ("attn.add_v_proj", QWEN_WIDTH, QWEN_WIDTH),
    ("attn.to_out.0", QWEN_WIDTH, QWEN_WIDTH),
    ("attn.to_add_out", QWEN_WIDTH, QWEN_WIDTH),
    ("img_mlp.net.0.proj", QWEN_MLP, QWEN_WIDTH),
    ("img_mlp.net.2", QWEN_WIDTH, QWEN_MLP),
    ("txt_mlp.net.0.proj", QWEN_MLP, QWEN_WIDTH),
    ("txt_mlp.net.2", QWEN_WIDTH, QWEN_MLP),
    ("img_mod.1", QWEN_MOD, QWEN_WIDTH),
    ("txt_mod.1", QWEN_MOD, QWEN_WIDTH),
];
const QWEN_NORMS: [(&str, u64); 4] = [
    ("attn.norm_q", HEAD_DIM),
    ("attn.norm_k", HEAD_DIM),
    ("attn.norm_added_q", HEAD_DIM),
    ("attn.norm_added_k", HEAD_DIM),
];
const QWEN_FUSED: [FusedRow; 2] = [
    ("attn.to_qkv", ["attn.to_q", "attn.to_k", "attn.to_v"]),
    (
        "attn.add_qkv_proj",
        ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    ),
];
const QWEN_ALIASES: [(&str, &str); 2] = [
    ("attn.to_out", "attn.to_out.0"),
    ("attn.to_added_qkv", "attn.add_qkv_proj"),
];
const QWEN_TOP: [LinearRow; 6] = [
    ("img_in", QWEN_WIDTH, QWEN_LATENT),
    ("txt_in", QWEN_WIDTH, QWEN_TEXT),
    (
        "time_text_embed.timestep_embedder.linear_1",
        QWEN_WIDTH,
        256,
    ),
    (
        "time_text_embed.timestep_embedder.linear_2",
        QWEN_WIDTH,
        QWEN_WIDTH,
    ),
    ("norm_out.linear", 6144, QWEN_WIDTH),
    ("proj_out", QWEN_LATENT, QWEN_WIDTH),
];

const Z_LINEARS: [LinearRow; 7] = [
    ("attention.to_q", Z_WIDTH, Z_WIDTH),
    ("attention.to_k", Z_WIDTH, Z_WIDTH),
    ("attention.to_v", Z_WIDTH, Z_WIDTH),
    ("attention.to_out.0", Z_WIDTH, Z_WIDTH),
    ("feed_forward.w1", Z_MLP, Z_WIDTH),
    ("feed_forward.w2", Z_WIDTH, Z_MLP),
    ("feed_forward.w3", Z_MLP, Z_WIDTH),
];
const Z_NORMS: [(&str, u64); 6] = [
    ("attention.norm_q", HEAD_DIM),
    ("attention.norm_k", HEAD_DIM),
    ("attention_norm1", Z_WIDTH),
    ("attention_norm2", Z_WIDTH),
    ("ffn_norm1", Z_WIDTH),
    ("ffn_norm2", Z_WIDTH),
];
const Z_FUSED: [FusedRow; 1] = [(
    "attention.to_qkv",
    ["attention.to_q", "attention.to_k", "attention.to_v"],
)];
const Z_ALIASES: [(&str, &str); 3] = [
    ("attention.to_out", "attention.to_out.0"),
    ("attention.out", "attention.to_out.0"),
    ("attention.qkv", "attention.to_qkv"),
];
const Z_MODULATION: LinearRow = ("adaLN_modulation.0", 15360, 256);

/// What one block of a model holds.
struct BlockRows {
    model: Model,
    linears: Vec<LinearRow>,
    norms: &'static [(&'static str, u64)],
    fused: &'static [FusedRow],
    aliases: &'static [(&'static str, &'static str)],
}

fn build() -> ModelTable {
    let mut table = ModelTable {
        targets: Vec::new(),
        by_spelling: HashMap::new(),
        longest_bytes: 0,
    };
    let qwen = BlockRows {
        model: Model::QwenImage,
        linears: QWEN_LINEARS.to_vec(),
        norms: &QWEN_NORMS,
        fused: &QWEN_FUSED,
        aliases: &QWEN_ALIASES,
    };
    let z_plain = BlockRows {
        model: Model::ZImage,
        linears: Z_LINEARS.to_vec(),
        norms: &Z_NORMS,
        fused: &Z_FUSED,
        aliases: &Z_ALIASES,
    };
    let z_modulated = BlockRows {
        linears: Z_LINEARS.iter().copied().chain([Z_MODULATION]).collect(),
        ..z_plain
    };
    for (prefix, count) in BLOCK_GROUPS {
        let rows = match prefix {
            "transformer_blocks" => &qwen,
            // The context refiner sees no timestep, hence has no modulation.
            "context_refiner" => &z_plain,
            _ => &z_modulated,
        };
        for block in 0..count {
            add_block(&mut table, rows, prefix, block);
        }
    }
    add_qwen_top(&mut table);
    table
}

fn add_block(table: &mut ModelTable, rows: &BlockRows, prefix: &str, block: u32) {
    let full = |name: &str| format!("{prefix}.{block}.{name}");
    for &(name, out_features, in_features) in &rows.linears {
        let place = rows
            .fused
            .iter()
            .find_map(|(slot, parts)| {
                let part = parts.iter().position(|p| *p == name)?;
                Some(SlotPlace {
                    slot: full(slot),
                    part,
                    parts: parts.len(),
                })
            })
            .unwrap_or_else(|| whole(full(name)));
        table.add(Target {
            path: full(name),
            model: rows.model,
            kind: ModuleKind::Linear {
                out_features,
                in_features,
            },
            block: Some(block),
            place,
            split: Vec::new(),
        });
    }
    for &(name, channels) in rows.norms {
        table.add(Target {
            path: full(name),
            model: rows.model,
            kind: ModuleKind::Norm { channels },
            block: Some(block),
            place: whole(full(name)),
            split: Vec::new(),
        });
    }
    for (name, parts) in rows.fused {
        let split: Vec<TargetId> = parts
            .iter()
            .filter_map(|p| table.find_flat(&full(p).replace('.', "_")))
            .collect();
        let (mut rows_total, mut columns) = (0, 0);
        for &part in &split {
            if let ModuleKind::Linear {
                out_features,
                in_features,
            } = table.target(part).kind
            {
                rows_total += out_features;
                columns = in_features;
            }
        }
        table.add(Target {
            path: full(name),
            model: rows.model,
            kind: ModuleKind::Linear {
                out_features: rows_total,
                in_features: columns,
            },
            block: Some(block),
            place: whole(full(name)),
            split,
        });
    }
    for (alias, name) in rows.aliases {
        if let Some(id) = table.find_flat(&full(name).replace('.', "_")) {
            table.alias(&full(alias), id);
        }
    }
}

fn whole(slot: String) -> SlotPlace {
    SlotPlace {
        slot,
        part: 0,
        parts: 1,
    }
}

fn add_qwen_top(table: &mut ModelTable) {
    let mut add = |path: &str, kind: ModuleKind| {
        table.add(Target {
            path: path.to_owned(),
            model: Model::QwenImage,
            kind,
            block: None,
            place: whole(path.to_owned()),
            split: Vec::new(),
        });
    };
    for (path, out_features, in_features) in QWEN_TOP {
        add(
            path,
            ModuleKind::Linear {
                out_features,
                in_features,
            },
        );
    }
    add(
        "txt_norm",
        ModuleKind::Norm {
            channels: QWEN_TEXT,
        },
    );
    // Only Qwen-Image-Layered has it.
    add(
        "time_text_embed.addition_t_embedding",
        ModuleKind::Embedding {
            rows: 2,
            dim: QWEN_WIDTH,
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_the_table() {
        let qwen = table()
            .targets()
            .iter()
            .filter(|t| t.model == Model::QwenImage)
            .count();
        assert_eq!(qwen, 60 * 20 + 8);
        assert_eq!(
            table().spelling_count(),
            60 * 22 + 8 + 34 * (7 + 6 + 1 + 3) + 32
        );
    }

    #[test]
    fn fused_parts_know_their_place() {
        let id = table()
            .find_flat("transformer_blocks_7_attn_add_k_proj")
            .unwrap();
        let place = &table().target(id).place;
        assert_eq!(
            (place.slot.as_str(), place.part, place.parts),
            ("transformer_blocks.7.attn.add_qkv_proj", 1, 3)
        );
        let fused = table()
            .find_flat("transformer_blocks_7_attn_to_added_qkv")
            .unwrap();
        assert_eq!(table().target(fused).kind.weight_shape(), [9216, 3072]);
    }
}
