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
    /// Why its files are not applied, where they are not.
    pub(super) refusal: Option<&'static str>,
    /// Its blocks, kind by kind. By those of the first kind the model's blocks are counted.
    pub(super) blocks: &'static [BlockRows],
    /// Its modules outside of blocks.
    pub(super) top: &'static [TopRow],
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
    /// (path of a fused linear, the parts whose rows it has).
    pub(super) fused: &'static [(&'static str, [&'static str; 3])],
    /// (another spelling, path).
    pub(super) aliases: &'static [(&'static str, &'static str)],
}

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

/// Builds the table of all models: their blocks first, then what stands around them.
pub(super) fn build() -> ModelTable {
    let mut table = ModelTable {
        modules: Vec::new(),
        blocks: Vec::new(),
        top: Vec::new(),
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
        for &(path, kind, stream) in model.rows().top {
            let flat = path.replace('.', "_");
            table.top.push((flat, table.modules.len()));
            table.modules.push(top_module(model, path, kind, stream));
        }
    }
    table
}

fn top_module(model: Model, path: &str, kind: ModuleKind, stream: Option<Stream>) -> KnownModule {
    KnownModule {
        path: path.to_owned(),
        model,
        kind,
        section: Section::Other,
        stream,
        layer: matches!(kind, ModuleKind::Linear { .. }).then_some(Layer::Plain),
        block: None,
        is_numbered: false,
        place: whole(path.to_owned()),
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
        let own = self.names().map(|name| (name, name));
        let spelled = own.chain(self.aliases.iter().copied());
        let names = spelled.filter_map(|(spelling, name)| {
            let place = self.place_of(name)?;
            Some((spelling.replace('.', "_"), place))
        });
        Blocks {
            prefix: format!("{}_", self.path),
            count: self.count,
            first,
            stride: self.names().count(),
            names: names.collect(),
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
        let module = |name: &str, kind, (section, stream): (Section, Option<Stream>), layer| {
            let path = [prefix.as_str(), name].concat();
            KnownModule {
                place: whole(path.clone()),
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
            let own = module(row.path, row.kind(), (row.section, row.stream), row.layer);
            let place = self.place_in_fused(row.path, &prefix);
            modules.push(KnownModule {
                place: place.unwrap_or_else(|| own.place.clone()),
                ..own
            });
        }
        for &(name, section, stream, channels) in self.norms {
            let kind = ModuleKind::Norm { channels };
            modules.push(module(name, kind, (section, stream), None));
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
                ..module(name, kind, (like.section, like.stream), like.layer)
            });
        }
    }

    /// The place of a linear in the fused one that has its rows, if any.
    fn place_in_fused(&self, name: &str, prefix: &str) -> Option<SlotPlace> {
        self.fused.iter().find_map(|(slot, parts)| {
            Some(SlotPlace {
                slot: [prefix, slot].concat(),
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

fn whole(slot: String) -> SlotPlace {
    SlotPlace {
        slot,
        part: 0,
        parts: 1,
    }
}
