//! The room that pieces take besides ranks, in bytes.

use std::collections::{BTreeMap, HashSet};

use serde::Serialize;

use crate::adapter::delta::{Delta, Form, Parameter};
use crate::model::slot::Slot;

/// The room that a piece takes in its slot besides ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Branch {
    /// Nothing.
    None,
    /// Both factors of a Kronecker product.
    Kron(KronShape),
    /// A matrix of the whole layer's size, whichever of its rows are changed.
    Dense,
    /// Another tensor in the place of a parameter.
    Swap(Parameter),
}

/// The shape of a Kronecker branch: those of one shape can take each other's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct KronShape {
    /// First of the slot's logical output rows that it changes.
    pub row_begin: u64,
    /// How many rows it changes.
    pub row_count: u64,
    /// Rows of w1.
    pub w1_rows: u64,
    /// Columns of w1.
    pub w1_columns: u64,
    /// Rows of w2.
    pub w2_rows: u64,
    /// Columns of w2.
    pub w2_columns: u64,
}

impl KronShape {
    fn elements(self) -> u64 {
        let w1 = self.w1_rows.saturating_mul(self.w1_columns);
        w1.saturating_add(self.w2_rows.saturating_mul(self.w2_columns))
    }
}

/// Room for Kronecker products of one shape, in each of the uniform slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct KronBuffer {
    /// Their shape.
    #[serde(flatten)]
    pub shape: KronShape,
    /// How many of them.
    pub count: usize,
}

impl Branch {
    /// The branch of a Kronecker product or of a delta stored whole.
    pub(super) fn of(delta: &Delta, (row_begin, row_count): (u64, u64)) -> Self {
        match delta.form {
            Form::Kronecker { w1, w2 } => Self::Kron(KronShape {
                row_begin,
                row_count,
                w1_rows: w1.rows(),
                w1_columns: w1.columns(),
                w2_rows: w2.rows(),
                w2_columns: w2.columns(),
            }),
            Form::Full { .. } => Self::Dense,
            Form::Vector { parameter, .. } => Self::Swap(parameter),
            Form::Pair { .. }
            | Form::Tucker { .. }
            | Form::Packed { .. }
            | Form::Hadamard { .. } => Self::None,
        }
    }
}

/// How many Kronecker products of each shape there are.
pub(super) fn count_krons(branches: impl Iterator<Item = Branch>) -> BTreeMap<KronShape, usize> {
    let mut counts = BTreeMap::new();
    for branch in branches {
        if let Branch::Kron(shape) = branch {
            *counts.entry(shape).or_default() += 1;
        }
    }
    counts
}

/// Bytes of that many Kronecker products.
pub(super) fn kron_bytes<'k>(
    krons: impl IntoIterator<Item = (&'k KronShape, &'k usize)>,
    element_bytes: u64,
) -> u64 {
    krons.into_iter().fold(0, |bytes, (shape, count)| {
        let one = shape.elements().saturating_mul(element_bytes);
        bytes.saturating_add(one.saturating_mul(*count as u64))
    })
}

/// Bytes of everything that is neither rank nor a Kronecker product. A parameter is swapped once,
/// however many vectors are added to it, and a layer has one matrix.
pub(super) fn other_bytes(slot: &Slot, branches: impl Iterator<Item = Branch>) -> u64 {
    let mut swapped = HashSet::new();
    let mut is_dense = false;
    let elements = branches.fold(0u64, |elements, branch| {
        elements.saturating_add(match branch {
            Branch::Dense if !std::mem::replace(&mut is_dense, true) => {
                slot.out_features.saturating_mul(slot.in_features)
            }
            Branch::Swap(parameter) if swapped.insert(parameter) => slot.out_features,
            Branch::Dense | Branch::Swap(_) | Branch::Kron(_) | Branch::None => 0,
        })
    });
    elements.saturating_mul(slot.element_bytes)
}
