//! Deltas: made up of a module's tensors, carried by slots.

use serde::Serialize;

use crate::adapter::rotation::{Rotation, RotationRule};
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

/// The side of a weight (out, in) that a diagonal or a rotation is multiplied to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// The rows: the outputs.
    Out,
    /// The columns: the inputs.
    In,
}

/// DoRA's magnitude: one value per channel of a side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Magnitude {
    /// The values.
    pub values: Factor,
    /// Whose channels they are of.
    pub side: Side,
}

/// How tensors make up a delta.
#[derive(Debug, Clone, Copy, PartialEq)]
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
    /// b1 b2 + W a1 a2 of the base weight W.
    Glora {
        /// Left half of the weight's product: (in, r), or (r, in) in older files.
        a1: Factor,
        /// Its right half: (r, in), or (in, r) in older files.
        a2: Factor,
        /// Left half of the other product: (out, r), or (r, in) in older files.
        b1: Factor,
        /// Its right half: (r, in), or (out, r) in older files.
        b2: Factor,
        /// Which of them are left halves.
        layout: GloraLayout,
    },
    /// The base weight times reflections on its input, less the weight.
    Householder {
        /// A vector per reflection: (in, r).
        u: Factor,
    },
    /// The base weight, its rows or columns stretched, less the weight.
    Diagonal {
        /// One value per channel.
        values: Factor,
        /// Whose channels they are of.
        side: Side,
        /// How they are stored.
        stored: StoredDiagonal,
    },
    /// The base weight, its rows or columns turned, less the weight.
    Rotation(Rotation),
    /// The delta itself; of a replacement, what replaces the weight.
    Full {
        /// The matrix.
        diff: Factor,
        /// Order of its sides.
        order: WeightOrder,
    },
    /// One value per output, added to a parameter; of a replacement, what replaces it.
    Vector {
        /// The values, as one column.
        values: Factor,
        /// The parameter that it is added to.
        parameter: Parameter,
    },
}

/// How the values of a diagonal are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoredDiagonal {
    /// The factors less 1: LyCORIS.
    LessOne,
    /// The factors: PEFT, which on the outputs stretches the bias with them.
    Whole,
}

impl StoredDiagonal {
    fn role(self) -> Role {
        match self {
            Self::LessOne => Role::Ia3,
            Self::Whole => Role::Ia3L,
        }
    }
}

/// The order of a `GLoRA`'s halves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GloraLayout {
    /// a1 and b1 are left halves.
    Current,
    /// a2 and b2 are left halves of their products: b2 b1 + W a2 a1, in older files.
    Old,
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
    /// What the weight with this delta is normed and stretched by: DoRA's.
    pub magnitude: Option<Magnitude>,
}

/// The sides of a delta, as far as its tensors tell: (out, in).
pub type Sides = (Option<u64>, Option<u64>);

impl Form {
    /// (out, in) of the delta; for a vector of a norm (out, 1), for one of a bias (out, none). What is
    /// multiplied to one side of the weight tells that side alone.
    ///
    /// `None` where the product of factors is beyond any number.
    pub fn shape(&self) -> Option<Sides> {
        let whole = |out: u64, inp: u64| Some((Some(out), Some(inp)));
        match *self {
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
            Form::Glora {
                a1, b1, b2, layout, ..
            } => match layout {
                GloraLayout::Current => whole(b1.rows, a1.rows),
                GloraLayout::Old => whole(b2.rows, a1.columns),
            },
            Form::Householder { u } => Some((None, Some(u.rows))),
            Form::Diagonal { values, side, .. } => {
                let channels = Some(values.rows.max(values.columns));
                Some(match side {
                    Side::Out => (channels, None),
                    Side::In => (None, channels),
                })
            }
            Form::Rotation(rotation) => rotation.shape(),
            Form::Vector { values, parameter } => {
                let inp = (parameter == Parameter::Weight).then_some(1);
                Some((Some(values.rows), inp))
            }
        }
    }
}

impl Delta {
    /// (out, in) of the delta, as [`Form::shape`] tells them.
    pub fn shape(&self) -> Option<Sides> {
        self.form.shape()
    }

    /// Columns of the exact pair that the delta equals, or the most that its shape allows.
    pub fn rank_bound(&self) -> u64 {
        let smaller_side = || match self.shape() {
            Some((Some(out), Some(inp))) => out.min(inp),
            Some((Some(side), None) | (None, Some(side))) => side,
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
            Form::Glora { a1, b1, .. } => {
                let ranks = a1.rows.min(a1.columns);
                ranks.saturating_add(b1.rows.min(b1.columns))
            }
            Form::Householder { u } => u.columns,
            Form::Full { .. } | Form::Diagonal { .. } | Form::Rotation(_) => smaller_side(),
            Form::Vector { .. } => 0,
        }
    }

    /// Its tensors, by the name that a piece gives them, with their roles' own names but where an
    /// embedding's halves are stored transposed.
    pub fn tensors(&self) -> Vec<(&'static str, Factor)> {
        let mut tensors = self.form_tensors();
        let magnitude = self.magnitude.iter();
        tensors.extend(magnitude.map(|own| (Role::DoraScale.name(), own.values)));
        tensors
    }

    fn form_tensors(&self) -> Vec<(&'static str, Factor)> {
        let named = |role: Role, factor: Factor| (role.name(), factor);
        let is_set = self.adapter == Adapter::Set;
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
            Form::Glora { a1, a2, b1, b2, .. } => vec![
                named(Role::GloraA1, a1),
                named(Role::GloraA2, a2),
                named(Role::GloraB1, b1),
                named(Role::GloraB2, b2),
            ],
            Form::Householder { u } => vec![named(Role::HraU, u)],
            Form::Diagonal { values, stored, .. } => vec![named(stored.role(), values)],
            Form::Rotation(rotation) => rotation.tensors(),
            Form::Full { diff, .. } if is_set => vec![named(Role::SetWeight, diff)],
            Form::Full { diff, .. } => vec![named(Role::Diff, diff)],
            Form::Vector { values, .. } if is_set => vec![named(Role::SetWeight, values)],
            Form::Vector { values, .. } => vec![("vector", values)],
        }
    }

    /// The side that a diagonal or a rotation is multiplied to.
    pub fn side(&self) -> Option<Side> {
        match (self.magnitude, self.form) {
            (Some(magnitude), _) => Some(magnitude.side),
            (None, Form::Diagonal { side, .. }) => Some(side),
            (None, Form::Rotation(rotation)) => Some(rotation.side()),
            _ => None,
        }
    }

    /// How a rotation's blocks become rotations.
    pub fn rotation(&self) -> Option<RotationRule> {
        match self.form {
            Form::Rotation(rotation) => Some(rotation.rule),
            _ => None,
        }
    }

    /// Whether the layer's bias changes with its rows.
    pub fn scales_bias(&self) -> bool {
        matches!(
            self.form,
            Form::Diagonal {
                side: Side::Out,
                stored: StoredDiagonal::Whole,
                ..
            }
        )
    }

    /// The kind of piece that it is, where a slot can carry it as it is stored.
    pub fn piece_kind(&self) -> PieceKind {
        if self.magnitude.is_some() {
            return PieceKind::Diagonal;
        }
        match self.form {
            Form::Pair { .. }
            | Form::Tucker { .. }
            | Form::Packed { .. }
            | Form::Hadamard { .. }
            | Form::Glora { .. }
            | Form::Householder { .. } => PieceKind::LowRank,
            Form::Diagonal { .. } => PieceKind::Diagonal,
            Form::Rotation(_) => PieceKind::Rotation,
            Form::Kronecker { .. } => PieceKind::Kron,
            Form::Full { .. } => PieceKind::Dense,
            Form::Vector { .. } => PieceKind::Vector,
        }
    }

    /// Whether a tensor is one of its own.
    pub fn holds(&self, index: usize) -> bool {
        match (self.form, self.magnitude) {
            // Of nearly all files; the others take a list.
            (Form::Pair { down, up, .. }, None) => [down.index, up.index].contains(&index),
            _ => self.tensors().iter().any(|(_, own)| own.index == index),
        }
    }
}
