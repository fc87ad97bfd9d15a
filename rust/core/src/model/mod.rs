//! The modules of the known models, by every spelling, with their sizes.
//!
//! One table serves all Qwen-Image variants (they share every weight shape) and one Z-Image.
//! A spelling is looked up with `.` and `_` made the same, so dotted, flat and over-dotted names
//! are all one entry and no name is ever guessed from its underscores.

pub mod known;
pub mod qwen_image;
mod rows;
pub mod slot;
mod z_image;

use std::fmt;
use std::sync::LazyLock;

use serde::Serialize;

use rows::ModelRows;
use slot::RowOrder;

/// A model family whose modules are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub enum Model {
    /// Qwen-Image, -2512, -Edit, -Edit-2509, -Edit-2511, -Layered.
    #[serde(rename = "qwen-image")]
    QwenImage,
    /// Z-Image, -Turbo, -Base, -Edit.
    #[serde(rename = "z-image")]
    ZImage,
}

impl Model {
    /// Every one.
    pub const ALL: [Self; 2] = [Self::QwenImage, Self::ZImage];

    fn rows(self) -> &'static ModelRows {
        match self {
            Self::QwenImage => &qwen_image::ROWS,
            Self::ZImage => &z_image::ROWS,
        }
    }

    /// The name in reports and in JSON.
    pub fn name(self) -> &'static str {
        self.rows().name
    }

    /// How people write it.
    pub fn title(self) -> &'static str {
        self.rows().title
    }

    /// All of them by title, as `Qwen-Image or Z-Image`.
    pub fn any() -> String {
        Self::ALL.map(Self::title).join(" or ")
    }

    /// Whether metadata names it, in lower case, without `-` and `_`.
    pub(crate) fn is_named_by(self, name: &str) -> bool {
        name.contains(self.rows().metadata_word)
    }
}

impl fmt::Display for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The kind of a module, with the shape of its weight.
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

/// The part of a block that a module belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Section {
    /// The attention.
    Attention,
    /// The MLPs.
    Mlp,
    /// The modulation.
    Modulation,
    /// None of these, or no block at all.
    Other,
}

/// The tokens that a module works on, where it does not work on all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stream {
    /// Those of the image.
    Image,
    /// Those of the text.
    Text,
}

/// How Nunchaku's model computes a linear.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Layer {
    /// By SVDQuant.
    Svdq,
    /// By SVDQuant in a kernel that computes more than this layer: its output never surfaces.
    SvdqInKernel,
    /// By AWQ.
    Awq {
        /// Its rows are cut into this many equal planes.
        planes: u64,
        /// The order of its rows.
        row_order: RowOrder,
    },
    /// As a plain linear.
    Plain,
}

impl Layer {
    /// Whether its weight is quantized.
    pub fn is_quantized(self) -> bool {
        match self {
            Self::Svdq | Self::SvdqInKernel | Self::Awq { .. } => true,
            Self::Plain => false,
        }
    }
}

/// Index of a module in the table.
pub type ModuleId = usize;

/// The place of a module's output rows in the slot that computes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotPlace {
    /// Path of the slot, e.g. `transformer_blocks.0.attn.to_qkv` for `…attn.to_k`.
    pub slot: String,
    /// The module that the slot is.
    pub module: ModuleId,
    /// Which of the slot's parts this is.
    pub part: usize,
    /// Into how many equal parts the slot's rows are cut.
    pub parts: usize,
}

/// A module that a LoRA file can name.
#[derive(Debug, Clone)]
pub struct KnownModule {
    /// Canonical (diffusers) path.
    pub path: String,
    /// The model it belongs to.
    pub model: Model,
    /// Kind and size in the released models.
    pub kind: ModuleKind,
    /// The part of a block that it belongs to.
    pub section: Section,
    /// The tokens that it works on, where these are not all.
    pub stream: Option<Stream>,
    /// For a linear, how Nunchaku's models compute it, where that is known.
    pub layer: Option<Layer>,
    /// Index of the block, none at top level.
    pub block: Option<u32>,
    /// Whether its block is one of those that the model's blocks are counted by.
    pub is_numbered: bool,
    /// The place in the fused slot; for a module that is not fused, itself.
    pub place: SlotPlace,
    /// For a fused module, the modules its rows are cut into, in order.
    pub split: Vec<ModuleId>,
}

impl KnownModule {
    /// Whether the module is a fused one.
    pub fn is_fused(&self) -> bool {
        !self.split.is_empty()
    }

    /// Whether Nunchaku computes it inside a kernel, of which the layer can be run by itself.
    pub fn opens(&self) -> bool {
        self.layer == Some(Layer::SvdqInKernel)
    }

    /// The number of its block, where the model's blocks are counted by it.
    pub fn number(&self) -> Option<u32> {
        self.block.filter(|_| self.is_numbered)
    }

    /// The kinds of layer that it is of, by the names that callers give factors to.
    pub fn kinds(&self) -> impl Iterator<Item = &'static str> {
        let section = match self.section {
            Section::Attention => Some("attn"),
            Section::Mlp => Some("mlp"),
            Section::Modulation => Some("mod"),
            Section::Other => None,
        };
        let stream = self.stream.map(|stream| match stream {
            Stream::Image => "img",
            Stream::Text => "txt",
        });
        let rest = self.number().is_none().then_some("rest");
        [section, stream, rest].into_iter().flatten()
    }
}

/// All modules of all models.
pub struct ModelTable {
    modules: Vec<KnownModule>,
    blocks: Vec<Blocks>,
    /// Flattened paths of the modules outside of blocks.
    top: Vec<(String, ModuleId)>,
    /// Paths of the same in models at hand.
    built_top: Vec<(String, ModuleId)>,
    /// Flattened paths of modules that a host's class has, and that no forward calls.
    unused: Vec<String>,
    /// Flattened paths of parameters that are no module's.
    parameters: Vec<String>,
}

/// The blocks of one kind: each has the same modules, one block's after another's.
struct Blocks {
    /// Flattened path of the blocks, with the `_` before their numbers.
    prefix: String,
    count: u32,
    /// The first module of the first block.
    first: ModuleId,
    /// How many modules a block has.
    stride: usize,
    /// Flattened spellings of a block's modules, and which of its modules each is.
    names: Vec<(String, usize)>,
    /// Paths of the same in models at hand.
    built: Vec<(String, usize)>,
}

impl ModelTable {
    /// The module with this index.
    ///
    /// # Panics
    /// If `id` did not come from this table.
    pub fn module(&self, id: ModuleId) -> &KnownModule {
        &self.modules[id]
    }

    /// All modules, in model order.
    pub fn modules(&self) -> &[KnownModule] {
        &self.modules
    }

    /// Looks up a path; its dots may have been turned into underscores, or its underscores into
    /// dots.
    pub fn find(&self, path: &str) -> Option<ModuleId> {
        let in_blocks = self.blocks.iter().find_map(|blocks| blocks.find(path));
        in_blocks.or_else(|| find_name(&self.top, path))
    }

    /// Whether a path is that of a module which a host's class of a model has, and never calls.
    pub fn is_unused(&self, path: &str) -> bool {
        self.unused.iter().any(|own| is_flat_of(own, path))
    }

    /// Whether a path is that of a parameter that is no module's: no delta is applied to one.
    pub fn is_parameter(&self, path: &str) -> bool {
        self.parameters.iter().any(|own| is_flat_of(own, path))
    }

    /// The module that a model at hand has at this path: its canonical one, or the one that a
    /// host's own classes give it.
    pub fn find_built(&self, path: &str) -> Option<ModuleId> {
        let in_blocks = self
            .blocks
            .iter()
            .find_map(|blocks| blocks.find_built(path));
        let top = || self.built_top.iter().find(|(own, _)| own == path);
        in_blocks.or_else(|| top().map(|(_, id)| *id))
    }

    /// How Nunchaku's model computes the linear that a model at hand has at this path, where that
    /// is known.
    pub fn layer_at(&self, path: &str) -> Option<Layer> {
        self.module(self.find_built(path)?).layer
    }

    /// Number of spellings.
    pub fn spelling_count(&self) -> usize {
        let in_blocks = |blocks: &Blocks| blocks.count as usize * blocks.names.len();
        self.blocks.iter().map(in_blocks).sum::<usize>() + self.top.len()
    }
}

impl Blocks {
    fn find(&self, path: &str) -> Option<ModuleId> {
        let (block, rest) = self.block(strip_flat(path, &self.prefix)?)?;
        let place = find_name(&self.names, strip_flat(rest, "_")?)?;
        Some(self.module(block, place))
    }

    fn find_built(&self, path: &str) -> Option<ModuleId> {
        let group = self.prefix.strip_suffix('_')?;
        let (block, rest) = self.block(path.strip_prefix(group)?.strip_prefix('.')?)?;
        let name = rest.strip_prefix('.')?;
        let (_, place) = self.built.iter().find(|(own, _)| own == name)?;
        Some(self.module(block, *place))
    }

    /// The number at the begin of a path, where it is a block's, and what follows it.
    fn block<'p>(&self, path: &'p str) -> Option<(u32, &'p str)> {
        let digits = path.bytes().take_while(u8::is_ascii_digit).count();
        let (number, rest) = path.split_at_checked(digits)?;
        // Numbers are written in one way.
        let is_padded = number.len() > 1 && number.starts_with('0');
        let block: u32 = number.parse().ok().filter(|_| !is_padded)?;
        (block < self.count).then_some((block, rest))
    }

    fn module(&self, block: u32, place: usize) -> ModuleId {
        self.first + block as usize * self.stride + place
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

/// The rest of a path behind `prefix`, in which `_` stands for a dot, too.
pub(crate) fn strip_flat<'p>(path: &'p str, prefix: &str) -> Option<&'p str> {
    let (begin, rest) = path.split_at_checked(prefix.len())?;
    is_flat_of(prefix, begin).then_some(rest)
}

/// The one table of known modules.
pub fn table() -> &'static ModelTable {
    static TABLE: LazyLock<ModelTable> = LazyLock::new(rows::build);
    &TABLE
}

/// Blocks of one kind of a released model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockKind {
    /// Their path, without their numbers.
    pub path: &'static str,
    /// Their name in reports.
    pub title: &'static str,
    /// How many there are.
    pub count: u32,
}

/// The blocks of all released models, kind by kind.
pub fn block_kinds() -> impl Iterator<Item = BlockKind> {
    let rows = Model::ALL.into_iter().flat_map(|model| model.rows().blocks);
    rows.map(|rows| BlockKind {
        path: rows.path,
        title: rows.title,
        count: rows.count,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_the_table() {
        let qwen = table()
            .modules()
            .iter()
            .filter(|t| t.model == Model::QwenImage)
            .count();
        assert_eq!(qwen, 60 * 20 + 8);
        // Linears, norms, fused ones and aliases; then the modulations, and what is outside.
        assert_eq!(
            table().spelling_count(),
            60 * 22 + 8 + 34 * (7 + 6 + 2 + 6) + 32 + 7 + 3
        );
    }

    #[test]
    fn every_target_is_found_by_every_spelling_and_nothing_else_is() {
        for (id, module) in table().modules().iter().enumerate() {
            let flat = module.path.replace('.', "_");
            for spelling in [&module.path, &flat, &flat.replace('_', ".")] {
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
    fn layers_are_known_by_canonical_paths() {
        let layer = |path| table().layer_at(path);
        let modulation = Layer::Awq {
            planes: 6,
            row_order: RowOrder::Interleaved,
        };
        for (path, expected) in [
            ("transformer_blocks.59.attn.to_qkv", Some(Layer::Svdq)),
            ("transformer_blocks.59.attn.to_add_out", Some(Layer::Svdq)),
            (
                "transformer_blocks.0.img_mlp.net.0.proj",
                Some(Layer::SvdqInKernel),
            ),
            (
                "transformer_blocks.0.txt_mlp.net.2",
                Some(Layer::SvdqInKernel),
            ),
            ("transformer_blocks.0.img_mod.1", Some(modulation)),
            ("transformer_blocks.0.txt_mod.1", Some(modulation)),
            ("norm_out.linear", Some(Layer::Plain)),
            ("txt_norm", None),
            ("transformer_blocks.0.attn.norm_q", None),
            ("transformer_blocks_0_img_mod_1", None),
            ("transformer_blocks.60.img_mod.1", None),
            ("layers.0.attention.to_q", Some(Layer::SvdqInKernel)),
            (
                "layers.0.attention.fused_module.qkv",
                Some(Layer::SvdqInKernel),
            ),
            ("layers.29.attention.qkv", Some(Layer::SvdqInKernel)),
            ("layers.29.attention.out", Some(Layer::Svdq)),
            ("noise_refiner.1.feed_forward.w13", Some(Layer::Svdq)),
            ("context_refiner.1.feed_forward.net.2", Some(Layer::Svdq)),
            ("layers.30.feed_forward.net.2", None),
            ("layers.0.attention.to_out", None),
            ("layers.3.adaLN_modulation.0", Some(Layer::Plain)),
            ("final_layer.linear", Some(Layer::Plain)),
            ("cap_embedder.1", Some(Layer::Plain)),
        ] {
            assert_eq!(layer(path), expected, "{path}");
        }
    }

    #[test]
    fn models_at_hand_have_names_of_their_own() {
        for (built, path) in [
            (
                "layers.7.attention.fused_module.qkv",
                "layers.7.attention.to_qkv",
            ),
            (
                "layers.7.attention.fused_module.norm_k",
                "layers.7.attention.norm_k",
            ),
            ("layers.7.attention.q_norm", "layers.7.attention.norm_q"),
            (
                "layers.7.feed_forward.w13",
                "layers.7.feed_forward.net.0.proj",
            ),
            ("x_embedder", "all_x_embedder.2-1"),
        ] {
            assert_eq!(table().find_built(built), table().find(path), "{built}");
            assert!(table().find(path).is_some(), "{path}");
        }
        let w13 = table().find("layers.7.feed_forward.net.0.proj").unwrap();
        let parts = &table().module(w13).split;
        let parts: Vec<_> = parts.iter().map(|id| table().module(*id)).collect();
        assert_eq!(parts[0].path, "layers.7.feed_forward.w3");
        assert_eq!(parts[1].path, "layers.7.feed_forward.w1");
        assert_eq!(parts[1].place.part, 1);
        assert_eq!(parts[1].place.module, w13);
        // Nobody writes it to files, and its rows may lie in either order there.
        assert_eq!(table().find("layers.7.feed_forward.w13"), None);
    }

    #[test]
    fn every_module_is_in_the_place_that_it_names() {
        for (id, module) in table().modules().iter().enumerate() {
            assert_eq!(table().find_built(&module.path), Some(id));
            let slot = table().module(module.place.module);
            assert_eq!(slot.path, module.place.slot);
        }
    }

    #[test]
    fn modules_know_their_kinds() {
        let facts = |path| {
            let module = table().module(table().find(path).unwrap());
            (module.number(), module.kinds().collect::<Vec<_>>())
        };
        for (path, number, kinds) in [
            ("transformer_blocks.0.attn.to_q", Some(0), "attn img"),
            ("transformer_blocks.7.attn.to_qkv", Some(7), "attn img"),
            (
                "transformer_blocks.7.attn.add_qkv_proj",
                Some(7),
                "attn txt",
            ),
            (
                "transformer_blocks.59.attn.to_add_out",
                Some(59),
                "attn txt",
            ),
            ("transformer_blocks.1.attn.norm_q", Some(1), "attn img"),
            (
                "transformer_blocks.1.attn.norm_added_k",
                Some(1),
                "attn txt",
            ),
            ("transformer_blocks.2.img_mlp.net.2", Some(2), "mlp img"),
            (
                "transformer_blocks.2.txt_mlp.net.0.proj",
                Some(2),
                "mlp txt",
            ),
            ("transformer_blocks.3.img_mod.1", Some(3), "mod img"),
            ("transformer_blocks.3.txt_mod.1", Some(3), "mod txt"),
            ("img_in", None, "img rest"),
            ("txt_in", None, "txt rest"),
            ("txt_norm", None, "txt rest"),
            ("proj_out", None, "img rest"),
            ("norm_out.linear", None, "img rest"),
            ("time_text_embed.timestep_embedder.linear_1", None, "rest"),
            ("layers.29.attention.to_q", Some(29), "attn"),
            ("layers.4.ffn_norm1", Some(4), ""),
            ("layers.4.adaLN_modulation.0", Some(4), "mod"),
            ("layers.4.feed_forward.net.0.proj", Some(4), "mlp"),
            ("all_x_embedder.2-1", None, "img rest"),
            ("noise_refiner.1.feed_forward.w2", None, "mlp img rest"),
            ("context_refiner.0.attention.to_qkv", None, "attn txt rest"),
        ] {
            let kinds: Vec<_> = kinds.split_whitespace().collect();
            assert_eq!(facts(path), (number, kinds), "{path}");
        }
    }

    #[test]
    fn fused_parts_know_their_place() {
        let id = table()
            .find("transformer_blocks_7_attn_add_k_proj")
            .unwrap();
        let place = &table().module(id).place;
        assert_eq!(
            (place.slot.as_str(), place.part, place.parts),
            ("transformer_blocks.7.attn.add_qkv_proj", 1, 3)
        );
        let fused = table()
            .find("transformer_blocks_7_attn_to_added_qkv")
            .unwrap();
        assert_eq!(table().module(fused).kind.weight_shape(), [9216, 3072]);
    }
}
