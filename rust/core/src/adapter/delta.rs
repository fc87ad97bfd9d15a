//! Deltas: made up of a module's tensors, carried by slots.

use serde::Serialize;

use crate::adapter::{Adapter, PieceKind};
use crate::key::role::Role;

/// A tensor as a matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Factor {
    /// Its index in the table of keys.
    pub index: usize,
    /// The first of the stored tensor's rows that it has.
    pub first_row: u64,
    /// Its rows.
    pub rows: u64,
    /// Its columns.
    pub columns: u64,
}

/// One of the two factors of a Kronecker product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KronFactor {
    /// Stored as it is.
    Direct(Factor),
    /// Stored as a product.
    LowRank {
        /// Left half: (rows, rank).
        left: Factor,
        /// Right half: (rank, columns).
        right: Factor,
    },
}

impl KronFactor {
    /// Rows of the factor.
    pub fn rows(self) -> u64 {
        match self {
            Self::Direct(factor) | Self::LowRank { left: factor, .. } => factor.rows,
        }
    }

    /// Columns of the factor.
    pub fn columns(self) -> u64 {
        match self {
            Self::Direct(factor) | Self::LowRank { right: factor, .. } => factor.columns,
        }
    }

    /// Rank of the product that is stored, else the most that the factor's shape allows.
    pub fn rank(self) -> u64 {
        match self {
            Self::Direct(factor) => factor.rows.min(factor.columns),
            Self::LowRank { right, .. } => right.rows,
        }
    }
}

/// The order of a weight's two sides, and with it that of its delta.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightOrder {
    /// (out, in), as in a linear layer.
    OutIn,
    /// (in, out): a row per input, as in the table of an embedding.
    InOut,
}

/// A parameter that a vector is added to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Parameter {
    /// The bias of a linear layer.
    Bias,
    /// The weight of a norm.
    Weight,
}

/// How tensors make up a delta.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// up (out, r) times down (r, in); of an [`WeightOrder::InOut`] weight, up (in, r) times down
    /// (r, out) is the delta transposed.
    Pair {
        /// Right half.
        down: Factor,
        /// Left half.
        up: Factor,
        /// The order of the weight's sides.
        order: WeightOrder,
    },
    /// up (out, s) times mid (s, r) times down (r, in): a Tucker pair of a 1x1 convolution.
    Tucker {
        /// Right factor.
        down: Factor,
        /// Core.
        mid: Factor,
        /// Left factor.
        up: Factor,
    },
    /// A pair in Nunchaku's packed layout: down (in, r), up (out, r), alpha multiplied in.
    Packed {
        /// Packed down.
        down: Factor,
        /// Packed up.
        up: Factor,
    },
    /// (`w1_a` `w1_b`) times (`w2_a` `w2_b`), element by element.
    Hadamard {
        /// First product, left half: (out, r1).
        w1_a: Factor,
        /// First product, right half: (r1, in).
        w1_b: Factor,
        /// Second product, left half: (out, r2).
        w2_a: Factor,
        /// Second product, right half: (r2, in).
        w2_b: Factor,
    },
    /// Kronecker product of w1 and w2.
    Kronecker {
        /// First factor.
        w1: KronFactor,
        /// Second factor.
        w2: KronFactor,
    },
    /// The delta itself.
    Full {
        /// The matrix.
        diff: Factor,
        /// Order of its sides.
        order: WeightOrder,
    },
    /// One value per output, added to a parameter.
    Vector {
        /// The values, as one column.
        values: Factor,
        /// The parameter that it is added to.
        parameter: Parameter,
    },
}

/// One delta of a module.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Delta {
    /// How its tensors make it up.
    pub form: Form,
    /// Kind of adapter that it is.
    pub adapter: Adapter,
    /// Factor on the raw product at strength 1.
    pub scale: f64,
}

impl Delta {
    /// (out, in) of the delta; for a vector of a norm (out, 1), for one of a bias (out, none).
    ///
    /// `None` where the product of Kronecker factors is beyond any number.
    pub fn shape(&self) -> Option<(u64, Option<u64>)> {
        let whole = |out: u64, inp: u64| Some((out, Some(inp)));
        match self.form {
            Form::Pair { down, up, order } => match order {
                WeightOrder::OutIn => whole(up.rows, down.columns),
                WeightOrder::InOut => whole(down.columns, up.rows),
            },
            Form::Tucker { down, up, .. } => whole(up.rows, down.columns),
            Form::Packed { down, up } => whole(up.rows, down.rows),
            Form::Hadamard { w1_a, w1_b, .. } => whole(w1_a.rows, w1_b.columns),
            Form::Kronecker { w1, w2 } => whole(
                w1.rows().checked_mul(w2.rows())?,
                w1.columns().checked_mul(w2.columns())?,
            ),
            Form::Full { diff, order } => match order {
                WeightOrder::OutIn => whole(diff.rows, diff.columns),
                WeightOrder::InOut => whole(diff.columns, diff.rows),
            },
            Form::Vector { values, parameter } => {
                Some((values.rows, (parameter == Parameter::Weight).then_some(1)))
            }
        }
    }

    /// Columns of the exact pair that the delta equals, or the most that its shape allows.
    pub fn rank_bound(&self) -> u64 {
        let smaller_side = || match self.shape() {
            Some((out, Some(inp))) => out.min(inp),
            _ => u64::MAX,
        };
        match self.form {
            Form::Pair { down, .. } => down.rows,
            Form::Tucker { mid, .. } => mid.rows.min(mid.columns),
            Form::Packed { down, .. } => down.columns,
            Form::Hadamard { w1_b, w2_b, .. } => {
                w1_b.rows.saturating_mul(w2_b.rows).min(smaller_side())
            }
            Form::Kronecker { w1, w2 } => w1.rank().saturating_mul(w2.rank()).min(smaller_side()),
            Form::Full { .. } => smaller_side(),
            Form::Vector { .. } => 0,
        }
    }

    /// Its tensors, by the name that a piece gives them, with their roles' own names but where an
    /// embedding's halves are stored transposed.
    pub fn tensors(&self) -> Vec<(&'static str, Factor)> {
        let named = |role: Role, factor: Factor| (role.name(), factor);
        match self.form {
            Form::Pair { down, up, order } => match order {
                WeightOrder::OutIn => vec![named(Role::Down, down), named(Role::Up, up)],
                WeightOrder::InOut => vec![("down_t", up), ("up_t", down)],
            },
            Form::Tucker { down, mid, up } => vec![
                named(Role::Down, down),
                named(Role::Mid, mid),
                named(Role::Up, up),
            ],
            Form::Packed { down, up } => {
                vec![named(Role::PackedDown, down), named(Role::PackedUp, up)]
            }
            Form::Hadamard {
                w1_a,
                w1_b,
                w2_a,
                w2_b,
            } => vec![
                named(Role::HadaW1A, w1_a),
                named(Role::HadaW1B, w1_b),
                named(Role::HadaW2A, w2_a),
                named(Role::HadaW2B, w2_b),
            ],
            Form::Kronecker { w1, w2 } => {
                let factor = |factor, direct: Role, left_role: Role, right_role: Role| match factor
                {
                    KronFactor::Direct(factor) => vec![named(direct, factor)],
                    KronFactor::LowRank { left, right } => {
                        vec![named(left_role, left), named(right_role, right)]
                    }
                };
                let mut tensors = factor(w1, Role::LokrW1, Role::LokrW1A, Role::LokrW1B);
                tensors.extend(factor(w2, Role::LokrW2, Role::LokrW2A, Role::LokrW2B));
                tensors
            }
            Form::Full { diff, .. } => vec![named(Role::Diff, diff)],
            Form::Vector { values, .. } => vec![("vector", values)],
        }
    }

    /// The kind of piece that it is, where a slot can carry it as it is stored.
    pub fn piece_kind(&self) -> PieceKind {
        match self.form {
            Form::Pair { .. }
            | Form::Tucker { .. }
            | Form::Packed { .. }
            | Form::Hadamard { .. } => PieceKind::LowRank,
            Form::Kronecker { .. } => PieceKind::Kron,
            Form::Full { .. } => PieceKind::Dense,
            Form::Vector { .. } => PieceKind::Vector,
        }
    }

    /// Whether a tensor is one of its own.
    pub fn holds(&self, index: usize) -> bool {
        match self.form {
            // Of nearly all files; the others take a list.
            Form::Pair { down, up, .. } => [down.index, up.index].contains(&index),
            _ => self.tensors().iter().any(|(_, own)| own.index == index),
        }
    }
}
