//! The modules of the known models, by every spelling, with their sizes.
//!
//! One table serves all Qwen-Image variants (they share every weight shape) and one Z-Image.
//! A spelling is looked up with `.` and `_` made the same, so dotted, flat and over-dotted names
//! are all one entry and no name is ever guessed from its underscores.

pub mod known;
pub mod slot;

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

    /// How people write it.
    pub fn title(self) -> &'static str {
        match self {
            Self::QwenImage => "Qwen-Image",
            Self::ZImage => "Z-Image",
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
    blocks: Vec<Blocks>,
    /// Flattened paths of the modules outside of blocks.
    top: Vec<(String, TargetId)>,
}

/// The blocks of one kind: each has the same modules, one block's after another's.
struct Blocks {
    /// Flattened path of the blocks, with the `_` before their numbers.
    prefix: String,
    count: u32,
    /// The first target of the first block.
    first: TargetId,
    /// How many targets a block has.
    stride: usize,
    /// Flattened spellings of a block's modules, and which of its targets each is.
    names: Vec<(String, usize)>,
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

    /// Looks up a path; its dots may have been turned into underscores, or its underscores into
    /// dots.
    pub fn find(&self, path: &str) -> Option<TargetId> {
        let in_blocks = self.blocks.iter().find_map(|blocks| blocks.find(path));
        in_blocks.or_else(|| find_name(&self.top, path))
    }

    /// Number of spellings.
    pub fn spelling_count(&self) -> usize {
        let in_blocks = |blocks: &Blocks| blocks.count as usize * blocks.names.len();
        self.blocks.iter().map(in_blocks).sum::<usize>() + self.top.len()
    }
}

impl Blocks {
    fn find(&self, path: &str) -> Option<TargetId> {
        let rest = strip_flat(path, &self.prefix)?;
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (number, rest) = rest.split_at_checked(digits)?;
        // Numbers are written in one way.
        let is_padded = number.len() > 1 && number.starts_with('0');
        let block: u32 = number.parse().ok().filter(|_| !is_padded)?;
        let name = strip_flat(rest, "_").filter(|_| block < self.count)?;
        let place = find_name(&self.names, name)?;
        Some(self.first + block as usize * self.stride + place)
    }
}

fn find_name<T: Copy>(names: &[(String, T)], name: &str) -> Option<T> {
    let found = names.iter().find(|(own, _)| is_flat_of(own, name));
    found.map(|(_, value)| *value)
}

/// Whether `flat` is `path` with its dots turned into underscores.
fn is_flat_of(flat: &str, path: &str) -> bool {
    // No early end: lengths tell most apart, and so compilers compare many bytes at a time.
    flat.len() == path.len()
        && flat
            .bytes()
            .zip(path.bytes())
            .fold(true, |alike, (own, byte)| {
                alike & (own == if byte == b'.' { b'_' } else { byte })
            })
}

/// What follows `prefix`, in which `_` stands for a dot, too.
pub(crate) fn strip_flat<'p>(path: &'p str, prefix: &str) -> Option<&'p str> {
    let (begin, rest) = path.split_at_checked(prefix.len())?;
    is_flat_of(prefix, begin).then_some(rest)
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
        blocks: Vec::new(),
        top: Vec::new(),
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
        table
            .blocks
            .push(rows.blocks(prefix, count, table.targets.len()));
        for block in 0..count {
            rows.add_block(&mut table.targets, prefix, block);
        }
    }
    add_qwen_top(&mut table);
    table
}

impl BlockRows {
    /// The modules of a block in the order of its targets.
    fn names(&self) -> impl Iterator<Item = &'static str> {
        let linears = self.linears.iter().map(|(name, ..)| *name);
        let norms = self.norms.iter().map(|(name, _)| *name);
        linears
            .chain(norms)
            .chain(self.fused.iter().map(|(name, _)| *name))
    }

    /// Which of a block's targets a module is.
    fn place_of(&self, name: &str) -> Option<usize> {
        self.names().position(|own| own == name)
    }

    /// How the modules of all blocks are found; `first` is the first target.
    fn blocks(&self, prefix: &str, count: u32, first: TargetId) -> Blocks {
        let own = self.names().map(|name| (name, name));
        let spelled = own.chain(self.aliases.iter().copied());
        let names = spelled.filter_map(|(spelling, name)| {
            let place = self.place_of(name)?;
            Some((spelling.replace('.', "_"), place))
        });
        Blocks {
            prefix: format!("{prefix}_"),
            count,
            first,
            stride: self.names().count(),
            names: names.collect(),
        }
    }

    fn add_block(&self, targets: &mut Vec<Target>, prefix: &str, block: u32) {
        let first = targets.len();
        let path = format!("{prefix}.{block}.");
        let full = |name: &str| [path.as_str(), name].concat();
        let mut add = |name: &str, kind, place: Option<SlotPlace>, split| {
            let path = full(name);
            targets.push(Target {
                place: place.unwrap_or_else(|| whole(path.clone())),
                path,
                model: self.model,
                kind,
                block: Some(block),
                split,
            });
        };
        for &(name, out_features, in_features) in &self.linears {
            let kind = ModuleKind::Linear {
                out_features,
                in_features,
            };
            let place = self.fused.iter().find_map(|(slot, parts)| {
                let part = parts.iter().position(|p| *p == name)?;
                Some(SlotPlace {
                    slot: full(slot),
                    part,
                    parts: parts.len(),
                })
            });
            add(name, kind, place, Vec::new());
        }
        for &(name, channels) in self.norms {
            add(name, ModuleKind::Norm { channels }, None, Vec::new());
        }
        for (name, parts) in self.fused {
            let places = parts.iter().filter_map(|part| self.place_of(part));
            let split = places.map(|place| first + place).collect();
            add(name, self.fused_kind(parts), None, split);
        }
    }

    /// The linear whose rows are those of its parts.
    fn fused_kind(&self, parts: &[&str]) -> ModuleKind {
        let own = self
            .linears
            .iter()
            .filter(|(name, ..)| parts.contains(name));
        let (mut out_features, mut in_features) = (0, 0);
        for (_, rows, columns) in own {
            out_features += rows;
            in_features = *columns;
        }
        ModuleKind::Linear {
            out_features,
            in_features,
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
        table
            .top
            .push((path.replace('.', "_"), table.targets.len()));
        table.targets.push(Target {
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
    fn every_target_is_found_by_every_spelling_and_nothing_else_is() {
        for (id, target) in table().targets().iter().enumerate() {
            let flat = target.path.replace('.', "_");
            for spelling in [&target.path, &flat, &flat.replace('_', ".")] {
                assert_eq!(table().find(spelling), Some(id), "{spelling}");
            }
            for other in [format!("{flat}_"), format!("x{flat}"), format!("_{flat}")] {
                assert_eq!(table().find(&other), None, "{other}");
            }
        }
        for (alias, path) in [
            (
                "transformer_blocks.59.attn.to_out",
                "transformer_blocks.59.attn.to_out.0",
            ),
            (
                "transformer.blocks_0.attn.to_added_qkv",
                "transformer_blocks.0.attn.add_qkv_proj",
            ),
            ("layers_29_attention_out", "layers.29.attention.to_out.0"),
            (
                "context_refiner.1.attention.qkv",
                "context_refiner.1.attention.to_qkv",
            ),
        ] {
            assert_eq!(table().find(alias), table().find(path), "{alias}");
            assert!(table().find(path).is_some(), "{path}");
        }
        for other in [
            "",
            "transformer_blocks",
            "transformer_blocks.",
            "transformer_blocks.3",
            "transformer_blocks.3.",
            "transformer_blocks..attn.to_q",
            "transformer_blocks.03.attn.to_q",
            "transformer_blocks.00.attn.to_q",
            "transformer_blocks.+3.attn.to_q",
            "transformer_blocks.60.attn.to_q",
            "transformer_blocks.4294967296.attn.to_q",
            "transformer_blocks.3-attn.to_q",
            "context_refiner.0.adaLN_modulation.0",
            "transformer_blocks.3.attn.to_\u{e9}",
            "transformer_block\u{e9}",
        ] {
            assert_eq!(table().find(other), None, "{other}");
        }
    }

    #[test]
    fn fused_parts_know_their_place() {
        let id = table()
            .find("transformer_blocks_7_attn_add_k_proj")
            .unwrap();
        let place = &table().target(id).place;
        assert_eq!(
            (place.slot.as_str(), place.part, place.parts),
            ("transformer_blocks.7.attn.add_qkv_proj", 1, 3)
        );
        let fused = table()
            .find("transformer_blocks_7_attn_to_added_qkv")
            .unwrap();
        assert_eq!(table().target(fused).kind.weight_shape(), [9216, 3072]);
    }
}
