//! Tensors grouped into modules, each with its adapter, rank and scale.

mod scale;

use std::collections::{HashMap, HashSet};

use crate::adapter::Adapter;
use crate::dtype::Dtype;
use crate::header::Quoted;
use crate::model::{self, ModuleKind, TargetId};
use crate::peft::AdapterConfig;
use crate::role::Role;
use crate::table::{Entry, KeyTable};

/// Dtypes whose values usually need a scale.
const FLOAT8: [Dtype; 5] = [
    Dtype::F8E4M3,
    Dtype::F8E5M2,
    Dtype::F8E4M3Fnuz,
    Dtype::F8E5M2Fnuz,
    Dtype::F8E8M0,
];

/// A plain pair: what a low-rank piece is made of.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pair {
    /// Index of the down tensor, (rank, in).
    pub down: usize,
    /// Index of the up tensor, (out, rank).
    pub up: usize,
    /// Rank of the pair.
    pub rank: u64,
    /// Columns of `down`.
    pub in_features: u64,
    /// Rows of `up`.
    pub out_features: u64,
}

/// Why a module is not applied, or not wholly.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// The adapter's kind, or a part of it, is not supported by this version.
    Unsupported(String),
    /// Tensors are missing or contradict each other.
    Broken(String),
}

impl Fault {
    /// The reason in reports.
    pub fn text(&self) -> &str {
        match self {
            Self::Unsupported(text) | Self::Broken(text) => text,
        }
    }
}

/// A module that the file trains.
#[derive(Debug, Clone, PartialEq)]
pub struct Module {
    /// Which one.
    pub target: TargetId,
    /// Kind of adapter.
    pub adapter: Adapter,
    /// Rank of the delta or an upper bound; none for norms.
    pub rank: Option<u64>,
    /// Factor on the raw product at strength 1 (formats of every trainer: alpha / rank and kin).
    pub scale: f64,
    /// The pair of a plain LoRA.
    pub pair: Option<Pair>,
    /// Why it is not applied at all.
    pub fault: Option<Fault>,
    /// What of it is not applied although the rest is: (tensor, reason).
    pub left_out: Vec<(usize, String)>,
    /// How its shape differs from the released model's, where it does. A model at hand of another
    /// size is compared when a stack is planned.
    pub misfit: Option<String>,
    /// All of its tensors.
    pub tensors: Vec<usize>,
}

impl Module {
    /// Whether this version applies the module (its `left_out` aside).
    pub fn is_supported(&self) -> bool {
        self.fault.is_none()
    }
}

/// Faults that make a file unusable as a whole.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum ModuleError {
    /// An alpha, scale or float8 scale that is NaN or infinite where it is used, or a module whose
    /// scales multiply to that.
    #[error("{key} gives a scale of {value}: it must be finite")]
    NonFiniteScale {
        /// The tensor, or the module's path.
        key: Quoted,
        /// The scale.
        value: f64,
    },
    /// A scalar of more than one element.
    #[error("{key} has {elements} values where one is needed (shape {shape:?})")]
    NotAScalar {
        /// The tensor.
        key: Quoted,
        /// How many it has.
        elements: u64,
        /// Its shape.
        shape: Vec<u64>,
    },
}

/// Groups a table's entries, in order of each module's first tensor.
pub fn group(table: &KeyTable, config: Option<&AdapterConfig>) -> Result<Vec<Module>, ModuleError> {
    let mut order: Vec<TargetId> = Vec::new();
    let mut members: HashMap<TargetId, Vec<usize>> = HashMap::new();
    for (index, entry) in table.entries().iter().enumerate() {
        if let Some(target) = entry.target {
            let tensors = members.entry(target).or_insert_with(|| {
                order.push(target);
                Vec::new()
            });
            tensors.push(index);
        }
    }
    let beside_unknown: HashSet<TargetId> =
        table.entries().iter().filter_map(|e| e.beside).collect();
    order
        .into_iter()
        .map(|target| {
            let tensors = members.remove(&target).unwrap_or_default();
            Parts {
                entries: table.entries(),
                target,
                tensors,
                beside_unknown: beside_unknown.contains(&target),
            }
            .module(config)
        })
        .collect()
}

/// One module's tensors while they are being understood.
struct Parts<'t> {
    entries: &'t [Entry],
    target: TargetId,
    tensors: Vec<usize>,
    /// Whether the file has tensors of unknown kind under the module's name.
    beside_unknown: bool,
}

impl Parts<'_> {
    fn find(&self, role: Role) -> Option<(usize, &Entry)> {
        self.tensors
            .iter()
            .filter_map(|&i| Some((i, self.entries.get(i)?)))
            .find(|(_, e)| e.role == role)
    }

    fn has(&self, role: Role) -> bool {
        self.find(role).is_some()
    }

    fn kind(&self) -> ModuleKind {
        model::table().target(self.target).kind
    }

    fn module(self, config: Option<&AdapterConfig>) -> Result<Module, ModuleError> {
        let is_norm = matches!(self.kind(), ModuleKind::Norm { .. });
        let oft_rank = self
            .find(Role::OftBlocks)
            .map_or(0, |(_, e)| e.tensor.shape.len());
        let Some(adapter) = Adapter::of(&|role| self.has(role), is_norm, oft_rank) else {
            return Ok(self.incomplete());
        };
        let pair = self.pair(adapter);
        let fault = match &pair {
            Err(fault) => Some(fault.clone()),
            Ok(_) => self.unsupported(adapter),
        };
        let pair = pair.ok().flatten();
        let rank = self.rank(adapter, pair.as_ref());
        let scale = self.scale(adapter, rank, config)?;
        // What is not applied at all lacks no part.
        let left_out = match fault {
            Some(_) => Vec::new(),
            None => self.left_out(adapter),
        };
        Ok(Module {
            target: self.target,
            adapter,
            rank,
            scale,
            pair,
            fault,
            left_out,
            misfit: None,
            tensors: self.tensors,
        })
    }

    /// A module of which only scalars or leftovers are there.
    fn incomplete(self) -> Module {
        let names: Vec<&str> = self
            .tensors
            .iter()
            .filter_map(|&i| self.entries.get(i))
            .map(|e| e.role.name())
            .collect();
        let fault = Fault::Broken(format!("has {} but no pair", names.join(", ")));
        Module {
            target: self.target,
            adapter: Adapter::Lora,
            rank: None,
            scale: 1.0,
            pair: None,
            fault: Some(fault),
            left_out: Vec::new(),
            misfit: None,
            tensors: self.tensors,
        }
    }

    /// The plain pair of a LoRA or DoRA, checked for agreement between its halves.
    fn pair(&self, adapter: Adapter) -> Result<Option<Pair>, Fault> {
        if !matches!(adapter, Adapter::Lora | Adapter::Dora) || self.has(Role::PackedDown) {
            return Ok(None);
        }
        let half = |role: Role, other: &str| {
            let (index, entry) = self
                .find(role)
                .ok_or_else(|| Fault::Broken(format!("has {other} but no {}", role.name())))?;
            let matrix = entry.matrix().ok_or_else(|| {
                Fault::Broken(format!(
                    "{} is not a matrix: {:?}",
                    role.name(),
                    entry.tensor.shape
                ))
            })?;
            Ok::<_, Fault>((index, matrix))
        };
        let (down, (rank, in_features)) = half(Role::Down, "up")?;
        let (up, (out_features, up_rank)) = half(Role::Up, "down")?;
        if rank != up_rank {
            return Err(Fault::Broken(format!(
                "the halves differ in rank: down has {rank}, up has {up_rank}"
            )));
        }
        if rank == 0 {
            return Err(Fault::Broken("the pair has rank 0".to_owned()));
        }
        Ok(Some(Pair {
            down,
            up,
            rank,
            in_features,
            out_features,
        }))
    }

    fn unsupported(&self, adapter: Adapter) -> Option<Fault> {
        let text = if !adapter.is_supported() {
            format!("{} is not supported yet", adapter.title())
        } else if self.has(Role::PackedDown) || self.has(Role::PackedUp) {
            "Nunchaku-packed pairs are not supported yet".to_owned()
        } else if self.has(Role::Mid) {
            "a Tucker LoRA (lora_mid) is not supported yet".to_owned()
        } else if self.has(Role::Reshape) || self.has(Role::SetWeight) {
            "a LoRA that replaces or reshapes the module's weight is not supported".to_owned()
        } else if matches!(self.kind(), ModuleKind::Embedding { .. }) {
            "a LoRA of an embedding is not supported yet".to_owned()
        } else if matches!(self.kind(), ModuleKind::Norm { .. }) {
            "a LoRA of a norm has no meaning".to_owned()
        } else if self.beside_unknown && self.has_float8_half() {
            "float8 halves beside a tensor of unknown kind, which may be their scale, are not \
             supported"
                .to_owned()
        } else {
            return None;
        };
        Some(Fault::Unsupported(text))
    }

    fn has_float8_half(&self) -> bool {
        [Role::Down, Role::Up]
            .iter()
            .filter_map(|role| self.find(*role))
            .any(|(_, entry)| FLOAT8.contains(&entry.tensor.dtype))
    }

    /// What stands beside the pair and is not applied with it: everything that is not consumed.
    fn left_out(&self, adapter: Adapter) -> Vec<(usize, String)> {
        if adapter != Adapter::Lora {
            return Vec::new();
        }
        self.tensors
            .iter()
            .filter_map(|&index| {
                let text = match self.entries.get(index)?.role {
                    Role::Down | Role::Up | Role::Alpha | Role::Scale | Role::Fp8Scale => {
                        return None;
                    }
                    Role::UpBias | Role::DiffB => "bias deltas are not supported yet".to_owned(),
                    Role::Diff | Role::WNorm => {
                        "a full delta beside a LoRA is not supported yet".to_owned()
                    }
                    role => format!("`{}` beside a LoRA is not supported", role.name()),
                };
                Some((index, text))
            })
            .collect()
    }
}

/// Roles whose single value the plan needs.
pub fn is_scalar_role(role: Role) -> bool {
    matches!(role, Role::Alpha | Role::Scale | Role::Fp8Scale)
}
