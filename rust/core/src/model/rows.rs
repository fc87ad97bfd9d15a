//! The rows that a model's file is made of, and the table built from them.

use super::{
    Blocks, KnownModule, Layer, Model, ModelTable, ModuleId, ModuleKind, Section, SlotPlace, Stream,
};

/// The facts of one model.
pub(super) struct ModelRows {
    /// The name in reports and in JSON.
    pub(super) name: &'static str,
    /// How people write it.
    pub(super) title: &'static str,
    /// A word of every name that metadata gives it, in lower case, without `-` and `_`.
    pub(super) metadata_word: &'static str,
    /// Its blocks, kind by kind. By those of the first kind the model's blocks are counted.
    pub(super) blocks: &'static [BlockRows],
    /// Its modules outside of blocks.
    pub(super) top: &'static [TopRow],
    /// Other spellings of those.
    pub(super) top_aliases: &'static [Alias],
    /// Modules that a host's class of it has, and that its forward never calls.
    pub(super) unused: &'static [&'static str],
    /// Its parameters that are no module's.
    pub(super) parameters: &'static [&'static str],
}

/// Blocks of one kind: each has the same modules.
pub(super) struct BlockRows {
    /// Their path, without their numbers.
    pub(super) path: &'static str,
    /// Their name in reports.
    pub(super) title: &'static str,
    /// The tokens that they work on, where none of their modules works on all.
    pub(super) stream: Option<Stream>,
    pub(super) count: u32,
    pub(super) linears: &'static [LinearRow],
    /// (path in the block, section, stream, channels).
    pub(super) norms: &'static [(&'static str, Section, Option<Stream>, u64)],
    /// (path of a fused linear, the parts whose rows it has, in order).
    pub(super) fused: &'static [(&'static str, &'static [&'static str])],
    /// Other spellings in files.
    pub(super) aliases: &'static [Alias],
    /// Other names in models at hand, which hosts' own classes give.
    pub(super) built_as: &'static [Alias],
}

/// Another name of a module, and its path.
pub(super) type Alias = (&'static str, &'static str);

/// A linear of a block.
#[derive(Clone, Copy)]
pub(super) struct LinearRow {
    /// The path in the block.
    pub(super) path: &'static str,
    pub(super) section: Section,
    pub(super) stream: Option<Stream>,
    pub(super) out_features: u64,
    pub(super) in_features: u64,
    /// How Nunchaku's models compute it, where that is known.
    pub(super) layer: Option<Layer>,
}

/// A module outside of blocks, which no model quantizes: path, kind and stream.
pub(super) type TopRow = (&'static str, ModuleKind, Option<Stream>);

/// A linear outside of blocks.
pub(super) const fn top(
    path: &'static str,
    stream: Option<Stream>,
    out_features: u64,
    in_features: u64,
) -> TopRow {
    let kind = ModuleKind::Linear {
        out_features,
        in_features,
    };
    (path, kind, stream)
}

/// Builds the table of all models: their blocks first, then what stands around them.
pub(super) fn build() -> ModelTable {
    let mut table = ModelTable {
        modules: Vec::new(),
        blocks: Vec::new(),
        top: Vec::new(),
        built_top: Vec::new(),
        unused: Vec::new(),
        parameters: Vec::new(),
    };
    for model in Model::ALL {
        for (at, rows) in model.rows().blocks.iter().enumerate() {
            table.blocks.push(rows.blocks(table.modules.len()));
            for block in 0..rows.count {
                rows.add_block(&mut table.modules, model, block, at == 0);
            }
        }
    }
    for model in Model::ALL {
        let flat = |paths: &[&str]| -> Vec<String> {
            paths.iter().map(|path| path.replace('.', "_")).collect()
        };
        table.unused.extend(flat(model.rows().unused));
        table.parameters.extend(flat(model.rows().parameters));
        for &(path, kind, stream) in model.rows().top {
            let aliases = model.rows().top_aliases.iter();
            let id = table.modules.len();
            let others = aliases.filter(|(_, own)| *own == path);
            for spelling in others.map(|(spelling, _)| *spelling).chain([path]) {
                table.top.push((spelling.replace('.', "_"), id));
                table.built_top.push((spelling.to_owned(), id));
            }
            table
                .modules
                .push(top_module(id, model, path, kind, stream));
        }
    }
    table
}

fn top_module(
    id: ModuleId,
    model: Model,
    path: &str,
    kind: ModuleKind,
    stream: Option<Stream>,
) -> KnownModule {
    KnownModule {
        path: path.to_owned(),
        model,
        kind,
        section: Section::Other,
        stream,
        layer: matches!(kind, ModuleKind::Linear { .. }).then_some(Layer::Plain),
        block: None,
        is_numbered: false,
        place: whole(id, path.to_owned()),
        split: Vec::new(),
    }
}

impl BlockRows {
    /// The modules of a block in the order of its modules.
    fn names(&self) -> impl Iterator<Item = &'static str> {
        let linears = self.linears.iter().map(|row| row.path);
        let norms = self.norms.iter().map(|(path, ..)| *path);
        linears
            .chain(norms)
            .chain(self.fused.iter().map(|(path, _)| *path))
    }

    /// Which of a block's modules a module is.
    fn place_of(&self, name: &str) -> Option<usize> {
        self.names().position(|own| own == name)
    }

    /// How the modules of all blocks are found; `first` is the first module.
    fn blocks(&self, first: ModuleId) -> Blocks {
        let places = |others: &'static [Alias]| {
            let own = self.names().map(|name| (name, name));
            let named = own.chain(others.iter().copied());
            named.filter_map(|(spelling, name)| Some((spelling, self.place_of(name)?)))
        };
        let flat = |(name, place): (&str, usize)| (name.replace('.', "_"), place);
        let plain = |(name, place): (&str, usize)| (name.to_owned(), place);
        Blocks {
            prefix: format!("{}_", self.path),
            count: self.count,
            first,
            stride: self.names().count(),
            names: places(self.aliases).map(flat).collect(),
            built: places(self.built_as).map(plain).collect(),
        }
    }

    fn add_block(
        &self,
        modules: &mut Vec<KnownModule>,
        model: Model,
        block: u32,
        is_numbered: bool,
    ) {
        let first = modules.len();
        let prefix = format!("{}.{block}.", self.path);
        let module = |id, name: &str, kind, (section, stream): (Section, Option<Stream>), layer| {
            let path = [prefix.as_str(), name].concat();
            KnownModule {
                place: whole(id, path.clone()),
                path,
                model,
                kind,
                section,
                stream: stream.or(self.stream),
                layer,
                block: Some(block),
                is_numbered,
                split: Vec::new(),
            }
        };
        for row in self.linears {
            let sides = (row.section, row.stream);
            let own = module(modules.len(), row.path, row.kind(), sides, row.layer);
            let place = self.place_in_fused(row.path, &prefix, first);
            modules.push(KnownModule {
                place: place.unwrap_or_else(|| own.place.clone()),
                ..own
            });
        }
        for &(name, section, stream, channels) in self.norms {
            let kind = ModuleKind::Norm { channels };
            modules.push(module(modules.len(), name, kind, (section, stream), None));
        }
        for (name, parts) in self.fused {
            let places = parts.iter().filter_map(|part| self.place_of(part));
            let split = places.map(|place| first + place).collect();
            let rows = || self.linears.iter().filter(|row| parts.contains(&row.path));
            let Some(like) = rows().next() else { continue };
            let kind = ModuleKind::Linear {
                out_features: rows().map(|row| row.out_features).sum(),
                in_features: like.in_features,
            };
            modules.push(KnownModule {
                split,
                ..module(
                    modules.len(),
                    name,
                    kind,
                    (like.section, like.stream),
                    like.layer,
                )
            });
        }
    }

    /// The place of a linear in the fused one that has its rows, if any.
    fn place_in_fused(&self, name: &str, prefix: &str, first: ModuleId) -> Option<SlotPlace> {
        self.fused.iter().find_map(|(slot, parts)| {
            Some(SlotPlace {
                slot: [prefix, slot].concat(),
                module: first + self.place_of(slot)?,
                part: parts.iter().position(|part| *part == name)?,
                parts: parts.len(),
            })
        })
    }
}

impl LinearRow {
    fn kind(&self) -> ModuleKind {
        ModuleKind::Linear {
            out_features: self.out_features,
            in_features: self.in_features,
        }
    }
}

fn whole(module: ModuleId, slot: String) -> SlotPlace {
    SlotPlace {
        slot,
        module,
        part: 0,
        parts: 1,
    }
}
