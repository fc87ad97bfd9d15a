//! A module's rank, and the factor on its raw product.

use super::{ModuleError, Pair, Parts};
use crate::adapter::Adapter;
use crate::header::Quoted;
use crate::model;
use crate::peft::{self, AdapterConfig};
use crate::role::Role;
use crate::suffix::Half;
use crate::table::Entry;

impl Parts<'_> {
    pub(super) fn rank(&self, adapter: Adapter, pair: Option<&Pair>) -> Option<u64> {
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

    pub(super) fn scale(
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
        let scale = scale * self.float8_scale()?;
        if scale.is_finite() {
            Ok(scale)
        } else {
            let key = Quoted::new(&model::table().target(self.target).path);
            Err(ModuleError::NonFiniteScale { key, value: scale })
        }
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
