//! Tensors grouped into modules, each with its adapter, rank and scale.

use std::collections::HashMap;

use crate::adapter::Adapter;
use crate::header::Quoted;
use crate::model::{self, Model, ModuleKind, TargetId};
use crate::peft::{self, AdapterConfig};
use crate::role::Role;
use crate::suffix::Half;
use crate::table::{Entry, KeyTable};

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
    /// An alpha, scale or float8 scale that is NaN or infinite where it is used.
    #[error("{key} is {value}: a scale must be finite")]
    NonFiniteScale {
        /// The tensor.
        key: Quoted,
        /// Its value.
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
            members.entry(target).or_insert_with(|| {
                order.push(target);
                Vec::new()
            });
            members.entry(target).and_modify(|m| m.push(index));
        }
    }
    order
        .into_iter()
        .map(|target| {
            let tensors = members.remove(&target).unwrap_or_default();
            Parts {
                entries: table.entries(),
                target,
                tensors,
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
        let left_out = self.left_out(adapter);
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
        } else {
            return None;
        };
        Some(Fault::Unsupported(text))
    }

    /// Deltas beside the pair that this version does not apply.
    fn left_out(&self, adapter: Adapter) -> Vec<(usize, String)> {
        if adapter != Adapter::Lora {
            return Vec::new();
        }
        self.tensors
            .iter()
            .filter_map(|&index| {
                let text = match self.entries.get(index)?.role {
                    Role::UpBias | Role::DiffB => "bias deltas are not supported yet",
                    Role::Diff | Role::WNorm => "a full delta beside a LoRA is not supported yet",
                    _ => return None,
                };
                Some((index, text.to_owned()))
            })
            .collect()
    }

    fn rank(&self, adapter: Adapter, pair: Option<&Pair>) -> Option<u64> {
        let weight = self.kind().weight_shape();
        let full = weight.iter().copied().min();
        let dim = |role, axis: usize| self.find(role)?.1.tensor.shape.get(axis).copied();
        let bounded = |rank: Option<u64>| Some(rank?.min(full?));
        match adapter {
            Adapter::Lora | Adapter::Dora => {
                pair.map(|p| p.rank).or_else(|| dim(Role::PackedDown, 1))
            }
            Adapter::Lokr => bounded(self.factor_ranks().map(|(w1, w2)| w1.saturating_mul(w2))),
            Adapter::Loha => {
                let (r1, r2) = (dim(Role::HadaW1B, 0)?, dim(Role::HadaW2B, 0)?);
                bounded(Some(r1.saturating_mul(r2)))
            }
            Adapter::Glora => bounded(self.glora_rank().map(|r| r.saturating_mul(2))),
            Adapter::Oft | Adapter::Boft | Adapter::Ia3 | Adapter::Full => full,
            Adapter::Norm => None,
        }
    }

    /// Upper bounds of the ranks of LoKr's two factors.
    fn factor_ranks(&self) -> Option<(u64, u64)> {
        let rank = |direct: Role, right: Role| {
            if let Some((_, entry)) = self.find(right) {
                return entry.tensor.shape.first().copied();
            }
            let (rows, columns) = self.find(direct)?.1.matrix()?;
            Some(rows.min(columns))
        };
        Some((
            rank(Role::LokrW1, Role::LokrW1B)?,
            rank(Role::LokrW2, Role::LokrW2B)?,
        ))
    }

    /// The small axis of GLoRA's a1: its roles were transposed in older files.
    fn glora_rank(&self) -> Option<u64> {
        let (rows, columns) = self.find(Role::GloraA1)?.1.matrix()?;
        Some(rows.min(columns))
    }

    fn scale(
        &self,
        adapter: Adapter,
        rank: Option<u64>,
        config: Option<&AdapterConfig>,
    ) -> Result<f64, ModuleError> {
        let divisor = match adapter {
            Adapter::Lora | Adapter::Dora if self.has(Role::PackedDown) => None,
            Adapter::Lora | Adapter::Dora => rank,
            // Both factors direct: 1, whatever alpha says (it may be infinite in fp16 files).
            Adapter::Lokr => self
                .find(Role::LokrW2B)
                .or_else(|| self.find(Role::LokrW1B))
                .and_then(|(_, e)| e.tensor.shape.first().copied()),
            Adapter::Loha => self
                .find(Role::HadaW1B)
                .and_then(|(_, e)| e.tensor.shape.first().copied()),
            Adapter::Glora => self.glora_rank(),
            _ => None,
        };
        let Some(divisor) = divisor.filter(|d| *d > 0) else {
            return Ok(1.0);
        };
        let scale = match (self.stored(Role::Alpha)?, self.stored(Role::Scale)?) {
            (Some(alpha), _) if alpha != 0.0 => ratio(alpha, divisor),
            (Some(_), _) => 1.0,
            (None, Some(scale)) => scale,
            (None, None) => self.configured(config, divisor).unwrap_or(1.0),
        };
        Ok(scale * self.float8_scale()?)
    }

    fn configured(&self, config: Option<&AdapterConfig>, rank: u64) -> Option<f64> {
        let governed = self
            .tensors
            .iter()
            .any(|&i| self.entries.get(i).is_some_and(|e| peft::governs(e.role)));
        let path = &model::table().target(self.target).path;
        governed.then(|| config?.scale(path, rank)).flatten()
    }

    /// A float8 half is its values times its scale; both scales join the pair's.
    fn float8_scale(&self) -> Result<f64, ModuleError> {
        let mut scale = 1.0;
        for &index in &self.tensors {
            if let Some(entry) = self.entries.get(index)
                && entry.role == Role::Fp8Scale
                && matches!(entry.half, Some(Half::Down | Half::Up))
            {
                scale *= scalar(entry)?;
            }
        }
        Ok(scale)
    }

    fn stored(&self, role: Role) -> Result<Option<f64>, ModuleError> {
        self.find(role).map(|(_, entry)| scalar(entry)).transpose()
    }
}

#[allow(clippy::cast_precision_loss, reason = "a rank is far below 2^52")]
fn ratio(alpha: f64, rank: u64) -> f64 {
    alpha / rank as f64
}

fn scalar(entry: &Entry) -> Result<f64, ModuleError> {
    let key = Quoted::new(&entry.tensor.key);
    match entry.value {
        Some(value) if value.is_finite() => Ok(value),
        Some(value) => Err(ModuleError::NonFiniteScale { key, value }),
        None => {
            let (elements, shape) = (entry.elements(), entry.tensor.shape.clone());
            Err(ModuleError::NotAScalar {
                key,
                elements,
                shape,
            })
        }
    }
}

/// Roles whose single value the plan needs.
pub fn is_scalar_role(role: Role) -> bool {
    matches!(role, Role::Alpha | Role::Scale | Role::Fp8Scale)
}

/// How a module's shapes compare with the released model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fit {
    /// They agree.
    Fits,
    /// They do not: what is there, what belongs there.
    Differs(String),
    /// Nothing to compare.
    Unknown,
}

/// Compares a module's tensors with the weight of the released model.
pub fn fit(module: &Module, entries: &[Entry]) -> Fit {
    let target = model::table().target(module.target);
    let ModuleKind::Linear {
        out_features,
        in_features,
    } = target.kind
    else {
        return Fit::Unknown;
    };
    let found = |role| {
        module
            .tensors
            .iter()
            .filter_map(|&i| entries.get(i))
            .find(|e| e.role == role)
    };
    let shape = match module.adapter {
        Adapter::Lora | Adapter::Dora => match module.pair {
            Some(pair) => Some((pair.out_features, pair.in_features)),
            None => found(Role::PackedDown)
                .zip(found(Role::PackedUp))
                .and_then(|(down, up)| {
                    Some((*up.tensor.shape.first()?, *down.tensor.shape.first()?))
                }),
        },
        Adapter::Lokr => lokr_shape(&found),
        Adapter::Loha => found(Role::HadaW1A)
            .zip(found(Role::HadaW1B))
            .and_then(|(a, b)| Some((a.matrix()?.0, b.matrix()?.1))),
        Adapter::Full => found(Role::Diff).and_then(Entry::matrix),
        _ => None,
    };
    match shape {
        None => Fit::Unknown,
        Some(shape) if shape == (out_features, in_features) => Fit::Fits,
        Some((out, inp)) => Fit::Differs(format!(
            "is {out}x{inp} where {} has {out_features}x{in_features}",
            target.model
        )),
    }
}

fn lokr_shape<'e>(found: &impl Fn(Role) -> Option<&'e Entry>) -> Option<(u64, u64)> {
    let factor = |direct, left, right| match found(direct) {
        Some(entry) => entry.matrix(),
        None => Some((found(left)?.matrix()?.0, found(right)?.matrix()?.1)),
    };
    let (ol, im) = factor(Role::LokrW1, Role::LokrW1A, Role::LokrW1B)?;
    let (ok, il) = factor(Role::LokrW2, Role::LokrW2A, Role::LokrW2B)?;
    Some((ol.checked_mul(ok)?, im.checked_mul(il)?))
}

/// The model most modules belong to.
pub fn majority_model(modules: &[Module]) -> Option<Model> {
    let qwen = modules
        .iter()
        .filter(|m| model::table().target(m.target).model == Model::QwenImage)
        .count();
    match modules.len() {
        0 => None,
        all if qwen * 2 >= all => Some(Model::QwenImage),
        _ => Some(Model::ZImage),
    }
}
