//! The factor on a module's raw product, and where it comes from.

use std::fmt;

use serde::Serialize;

use super::ModuleError;
use crate::adapter::Adapter;
use crate::adapter::parts::Parts;
use crate::adapter::peft::AdapterConfig;
use crate::header::Quoted;
use crate::key::role::Role;
use crate::key::table::Entry;
use crate::model;

/// A scale and its ground.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scale {
    /// Factor on the raw product at strength 1.
    pub value: f64,
    /// Its ground.
    pub source: ScaleSource,
}

/// The ground of a scale; `T` names a tensor: its index in the table of keys, or its key.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(tag = "rule", rename_all = "snake_case")]
pub enum ScaleSource<T = usize> {
    /// The module's alpha tensor: alpha / rank.
    Alpha {
        /// The tensor.
        #[serde(rename = "key")]
        tensor: T,
        /// Its value.
        alpha: f64,
        /// The divisor.
        rank: u64,
    },
    /// An alpha tensor of 0, which means alpha = rank: 1.
    ZeroAlpha {
        /// The tensor.
        #[serde(rename = "key")]
        tensor: T,
    },
    /// A tensor that holds the scale itself.
    Stored {
        /// The tensor.
        #[serde(rename = "key")]
        tensor: T,
    },
    /// PEFT's configuration: alpha / rank, or alpha / sqrt(rank) with rsLoRA.
    Config {
        /// The alpha for this path.
        alpha: f64,
        /// The rank that, or whose root, divides it.
        rank: u64,
        /// Whether the root is taken.
        rslora: bool,
    },
    /// A LoKr whose factors are both stored as they are: 1, whatever alpha says.
    BothDirect,
    /// The file says nothing: 1.
    Nothing,
    /// An alpha tensor of LyCORIS' OFT or BOFT, which bounds the rotation and is no scale: 1.
    Bound {
        /// The tensor.
        #[serde(rename = "key")]
        tensor: T,
    },
    /// This kind of adapter has no alpha: 1.
    Unscaled,
}

impl<T> ScaleSource<T> {
    /// The same with another name for its tensor.
    pub(crate) fn map<U>(self, name: impl FnOnce(T) -> U) -> ScaleSource<U> {
        match self {
            Self::Alpha {
                tensor,
                alpha,
                rank,
            } => ScaleSource::Alpha {
                tensor: name(tensor),
                alpha,
                rank,
            },
            Self::ZeroAlpha { tensor } => ScaleSource::ZeroAlpha {
                tensor: name(tensor),
            },
            Self::Stored { tensor } => ScaleSource::Stored {
                tensor: name(tensor),
            },
            Self::Config {
                alpha,
                rank,
                rslora,
            } => ScaleSource::Config {
                alpha,
                rank,
                rslora,
            },
            Self::BothDirect => ScaleSource::BothDirect,
            Self::Nothing => ScaleSource::Nothing,
            Self::Bound { tensor } => ScaleSource::Bound {
                tensor: name(tensor),
            },
            Self::Unscaled => ScaleSource::Unscaled,
        }
    }
}

impl<T> fmt::Display for ScaleSource<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Alpha { alpha, rank, .. } => write!(f, "alpha {alpha} / rank {rank}"),
            Self::ZeroAlpha { .. } => f.write_str("alpha is 0, which means alpha = rank: 1"),
            Self::Stored { .. } => f.write_str("stored as a scale"),
            Self::Config {
                alpha,
                rank,
                rslora: false,
            } => write!(f, "alpha {alpha} of the configuration / rank {rank}"),
            Self::Config { alpha, rank, .. } => {
                write!(
                    f,
                    "alpha {alpha} of the configuration / sqrt(rank {rank}), rsLoRA"
                )
            }
            Self::BothDirect => {
                f.write_str("both factors are stored whole: 1, whatever alpha says")
            }
            Self::Nothing => f.write_str("neither an alpha nor a configuration: 1"),
            Self::Bound { .. } => f.write_str("alpha bounds the rotation, and is no scale: 1"),
            Self::Unscaled => f.write_str("this kind of adapter has no alpha: 1"),
        }
    }
}

impl Parts<'_> {
    /// The scale that trainers mean, without those of float8 tensors.
    pub(super) fn raw_scale(
        &self,
        adapter: Adapter,
        config: Option<&AdapterConfig>,
    ) -> Result<Scale, ModuleError> {
        let one = |source| Ok(Scale { value: 1.0, source });
        let Some(rank) = adapter.divisor(self).filter(|d| *d > 0) else {
            if let Some(scale) = self.configured_direct(adapter, config) {
                return Ok(scale);
            }
            // An alpha is not even looked at: in fp16 files it may be infinite.
            let bound = self.find(Role::Alpha).filter(|_| self.has(Role::OftBlocks));
            return one(match (adapter, bound) {
                (Adapter::Lokr, _) => ScaleSource::BothDirect,
                (Adapter::Oft | Adapter::Boft, Some((tensor, _))) => ScaleSource::Bound { tensor },
                _ => ScaleSource::Unscaled,
            });
        };
        match (self.stored(Role::Alpha)?, self.stored(Role::Scale)?) {
            (Some((tensor, alpha)), _) if alpha != 0.0 => Ok(Scale {
                value: ratio(alpha, rank),
                source: ScaleSource::Alpha {
                    tensor,
                    alpha,
                    rank,
                },
            }),
            (Some((tensor, _)), _) => one(ScaleSource::ZeroAlpha { tensor }),
            (None, Some((tensor, value))) => Ok(Scale {
                value,
                source: ScaleSource::Stored { tensor },
            }),
            (None, None) => Ok(self.configured(adapter, config, rank).unwrap_or(Scale {
                value: 1.0,
                source: ScaleSource::Nothing,
            })),
        }
    }

    fn configured(
        &self,
        adapter: Adapter,
        config: Option<&AdapterConfig>,
        rank: u64,
    ) -> Option<Scale> {
        let config = config.filter(|config| config.governs(adapter))?;
        let path = &model::table().module(self.id).path;
        Some(Scale {
            value: config.scale(path, rank)?,
            source: ScaleSource::Config {
                alpha: config.alpha(path)?,
                rank,
                rslora: config.use_rslora(),
            },
        })
    }

    /// The scale of a LoKr of PEFT's whose factors are both stored as they are: alpha / r, where
    /// every other trainer means 1. Such a file has no alpha tensor.
    fn configured_direct(&self, adapter: Adapter, config: Option<&AdapterConfig>) -> Option<Scale> {
        if adapter != Adapter::Lokr || self.has(Role::Alpha) {
            return None;
        }
        let path = &model::table().module(self.id).path;
        let rank = config?.promised_rank(path).filter(|rank| *rank > 0)?;
        self.configured(adapter, config, rank)
    }

    /// The scale with those of all float8 tensors of the weight's delta.
    pub(super) fn whole_scale(&self, adapter: Adapter, raw: f64) -> Result<f64, ModuleError> {
        let is_beside =
            |role| role == Role::Diff && !matches!(adapter, Adapter::Full | Adapter::Norm);
        self.float8_scaled(raw, |role| !is_beside(role))
    }

    /// `scale` times the scales of the float8 tensors of the roles that `is_meant`: a float8 tensor
    /// is its values times its scale.
    pub(super) fn float8_scaled(
        &self,
        mut scale: f64,
        is_meant: impl Fn(Role) -> bool,
    ) -> Result<f64, ModuleError> {
        for &index in &self.tensors {
            if let Some(entry) = self.entries.get(index)
                && entry.role == Role::Fp8Scale
                && entry.scales.is_some_and(&is_meant)
            {
                scale *= scalar(entry)?;
            }
        }
        if scale.is_finite() {
            Ok(scale)
        } else {
            let key = Quoted::new(&model::table().module(self.id).path);
            Err(ModuleError::NonFiniteScale { key, value: scale })
        }
    }

    fn stored(&self, role: Role) -> Result<Option<(usize, f64)>, ModuleError> {
        self.find(role)
            .map(|(index, entry)| Ok((index, scalar(entry)?)))
            .transpose()
    }
}

#[allow(clippy::cast_precision_loss, reason = "a rank is far below 2^52")]
fn ratio(alpha: f64, rank: u64) -> f64 {
    alpha / rank as f64
}

fn scalar(entry: &Entry) -> Result<f64, ModuleError> {
    let key = || Quoted::new(&entry.tensor.key);
    match entry.value {
        Some(value) if value.is_finite() => Ok(value),
        Some(value) => Err(ModuleError::NonFiniteScale { key: key(), value }),
        None => {
            let (elements, shape) = (entry.elements(), entry.tensor.shape.clone());
            Err(ModuleError::NotAScalar {
                key: key(),
                elements,
                shape,
            })
        }
    }
}
