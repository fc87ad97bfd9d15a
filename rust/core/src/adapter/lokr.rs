//! LoKr: a Kronecker product, each factor stored whole or as a low-rank product.

use super::Adapter;
use super::delta::{Form, KronFactor};
use super::module::Fault;
use super::parts::Parts;
use crate::key::role::Role;

/// Any of these makes a module one.
pub(super) const ROLES: [Role; 7] = [
    Role::LokrW1,
    Role::LokrW1A,
    Role::LokrW1B,
    Role::LokrW2,
    Role::LokrW2A,
    Role::LokrW2B,
    Role::LokrT2,
];

/// The roles of one factor: stored whole, or as a left and a right half.
struct FactorRoles {
    direct: Role,
    left: Role,
    right: Role,
}

const W1: FactorRoles = FactorRoles {
    direct: Role::LokrW1,
    left: Role::LokrW1A,
    right: Role::LokrW1B,
};
const W2: FactorRoles = FactorRoles {
    direct: Role::LokrW2,
    left: Role::LokrW2A,
    right: Role::LokrW2B,
};

pub(super) fn form(parts: &Parts<'_>) -> Result<Form, Fault> {
    let (w1, w2) = (W1.factor(parts)?, W2.factor(parts)?);
    let sides = [(w1.rows(), w2.rows()), (w1.columns(), w2.columns())];
    if sides.iter().any(|(a, b)| a.checked_mul(*b).is_none()) {
        return Err(Fault::Broken(
            "its factors multiply to more rows or columns than can be counted".to_owned(),
        ));
    }
    Ok(Form::Kronecker { w1, w2 })
}

/// An upper bound: the product of the factors' ranks.
pub(super) fn rank(parts: &Parts<'_>) -> Option<u64> {
    Some(W1.rank(parts)?.saturating_mul(W2.rank(parts)?))
}

pub(super) fn divisor(parts: &Parts<'_>) -> Option<u64> {
    W2.divisor(parts).or_else(|| W1.divisor(parts))
}

pub(super) fn shape(parts: &Parts<'_>) -> Option<(u64, u64)> {
    let (ol, im) = W1.shape(parts)?;
    let (ok, il) = W2.shape(parts)?;
    Some((ol.checked_mul(ok)?, im.checked_mul(il)?))
}

impl FactorRoles {
    fn factor(&self, parts: &Parts<'_>) -> Result<KronFactor, Fault> {
        // As every reader does: what is stored whole wins over what is stored in halves.
        if let Some(factor) = parts.factor(self.direct)? {
            return Ok(KronFactor::Direct(factor));
        }
        let half = |role| {
            let lacks = || super::missing(Adapter::Lokr, self.direct);
            parts.factor(role)?.ok_or_else(lacks)
        };
        let (left, right) = (half(self.left)?, half(self.right)?);
        if left.columns != right.rows {
            return Err(Fault::Broken(format!(
                "the halves of {} differ in rank: {} and {}",
                self.direct.name(),
                left.columns,
                right.rows
            )));
        }
        Ok(KronFactor::LowRank { left, right })
    }

    /// The rank that is stored, else an upper bound.
    fn rank(&self, parts: &Parts<'_>) -> Option<u64> {
        match parts.matrix(self.direct) {
            Some((rows, columns)) => Some(rows.min(columns)),
            None => parts.rows(self.right),
        }
    }

    fn divisor(&self, parts: &Parts<'_>) -> Option<u64> {
        (!parts.has(self.direct)).then(|| parts.rows(self.right))?
    }

    fn shape(&self, parts: &Parts<'_>) -> Option<(u64, u64)> {
        match parts.matrix(self.direct) {
            Some(shape) => Some(shape),
            None => Some((parts.matrix(self.left)?.0, parts.matrix(self.right)?.1)),
        }
    }
}
