//! A module's rank and the shape of its delta, as far as tensors tell, for every kind of adapter.

use super::Parts;
use crate::adapter::Adapter;
use crate::key::role::Role;
use crate::key::suffix;
use crate::key::table::Entry;
use crate::model::ModuleKind;

impl Parts<'_> {
    /// The rank that is stored, or an upper bound of the delta's.
    pub(super) fn rank(&self, adapter: Adapter) -> Option<u64> {
        let weight = self.kind().weight_shape();
        let full = weight.iter().copied().min();
        let bounded = |rank: Option<u64>| Some(rank?.min(full?));
        match adapter {
            Adapter::Lora if self.has(Role::Mid) => {
                let (rows, columns) = self.matrix(Role::Mid)?;
                Some(rows.min(columns))
            }
            Adapter::Lora | Adapter::Dora => self.pair_rank(),
            Adapter::Lokr => {
                let (w1, w2) = self.factor_ranks()?;
                bounded(Some(w1.saturating_mul(w2)))
            }
            Adapter::Loha => {
                let (r1, r2) = (self.rows(Role::HadaW1B)?, self.rows(Role::HadaW2B)?);
                bounded(Some(r1.saturating_mul(r2)))
            }
            Adapter::Glora => bounded(self.glora_rank().map(|r| r.saturating_mul(2))),
            Adapter::Oft | Adapter::Boft | Adapter::Ia3 => full,
            Adapter::Full if self.has(Role::Diff) => full,
            Adapter::Full | Adapter::Norm | Adapter::Peft(_) => None,
        }
    }

    fn pair_rank(&self) -> Option<u64> {
        if self.has(Role::PackedDown) {
            return Some(self.matrix(Role::PackedDown)?.1);
        }
        let (down, up) = (self.matrix(Role::Down)?, self.matrix(Role::Up)?);
        (down.0 == up.1 && down.0 > 0).then_some(down.0)
    }

    /// Upper bounds of the ranks of LoKr's two factors.
    fn factor_ranks(&self) -> Option<(u64, u64)> {
        let rank = |direct: Role, right: Role| match self.matrix(direct) {
            Some((rows, columns)) => Some(rows.min(columns)),
            None => self.rows(right),
        };
        Some((
            rank(Role::LokrW1, Role::LokrW1B)?,
            rank(Role::LokrW2, Role::LokrW2B)?,
        ))
    }

    /// The small axis of GLoRA's a1: its roles were transposed in older files.
    pub(super) fn glora_rank(&self) -> Option<u64> {
        let (rows, columns) = self.matrix(Role::GloraA1)?;
        Some(rows.min(columns))
    }

    /// What a stored alpha is divided by; none where the kind of adapter has no alpha.
    pub(super) fn divisor(&self, adapter: Adapter) -> Option<u64> {
        match adapter {
            // Nunchaku's converter multiplies alpha in.
            Adapter::Lora | Adapter::Dora if self.has(Role::PackedDown) => None,
            Adapter::Lora if self.has(Role::Mid) => self.rows(Role::Down),
            Adapter::Lora | Adapter::Dora => self.pair_rank(),
            Adapter::Lokr => {
                let halves = |direct, right| (!self.has(direct)).then(|| self.rows(right))?;
                halves(Role::LokrW2, Role::LokrW2B).or_else(|| halves(Role::LokrW1, Role::LokrW1B))
            }
            Adapter::Loha => self.rows(Role::HadaW1B),
            Adapter::Glora => self.glora_rank(),
            Adapter::Oft
            | Adapter::Boft
            | Adapter::Ia3
            | Adapter::Full
            | Adapter::Norm
            | Adapter::Peft(_) => None,
        }
    }

    /// (out, in) of the weight's delta.
    pub(super) fn shape(&self, adapter: Adapter) -> Option<(u64, u64)> {
        // The table of an embedding is (in, out).
        let turned = |(rows, columns): (u64, u64)| match self.kind() {
            ModuleKind::Embedding { .. } => (columns, rows),
            ModuleKind::Linear { .. } | ModuleKind::Norm { .. } => (rows, columns),
        };
        match adapter {
            Adapter::Lora if self.has(Role::PackedDown) => {
                let (down, up) = (self.matrix(Role::PackedDown)?, self.matrix(Role::PackedUp)?);
                Some((up.0, down.0))
            }
            Adapter::Lora | Adapter::Dora => {
                let (down, up) = (self.matrix(Role::Down)?, self.matrix(Role::Up)?);
                let product = (up.0, down.1);
                let is_embedding = matches!(self.kind(), ModuleKind::Embedding { .. });
                Some(if is_embedding && self.is_peft_embedding() {
                    product
                } else {
                    turned(product)
                })
            }
            Adapter::Lokr => {
                let factor = |direct, left, right| match self.matrix(direct) {
                    Some(shape) => Some(shape),
                    None => Some((self.matrix(left)?.0, self.matrix(right)?.1)),
                };
                let (ol, im) = factor(Role::LokrW1, Role::LokrW1A, Role::LokrW1B)?;
                let (ok, il) = factor(Role::LokrW2, Role::LokrW2A, Role::LokrW2B)?;
                Some((ol.checked_mul(ok)?, im.checked_mul(il)?))
            }
            Adapter::Loha => {
                let (a, b) = (self.matrix(Role::HadaW1A)?, self.matrix(Role::HadaW1B)?);
                Some((a.0, b.1))
            }
            Adapter::Full => Some(turned(self.matrix(Role::Diff)?)),
            Adapter::Norm => {
                let (_, entry) = self.find(Role::Diff).or_else(|| self.find(Role::WNorm))?;
                Some((*entry.tensor.shape.first()?, 1))
            }
            Adapter::Glora | Adapter::Oft | Adapter::Boft | Adapter::Ia3 | Adapter::Peft(_) => None,
        }
    }

    pub(super) fn is_peft_embedding(&self) -> bool {
        self.find(Role::Down)
            .is_some_and(|(_, e)| suffix::is_peft_embedding(&e.tensor.key))
    }

    fn matrix(&self, role: Role) -> Option<(u64, u64)> {
        self.find(role).and_then(|(_, e)| Entry::matrix(e))
    }

    fn rows(&self, role: Role) -> Option<u64> {
        self.find(role)?.1.tensor.shape.first().copied()
    }
}
