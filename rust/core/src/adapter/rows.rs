//! Some rows of a delta, as a delta of the same tensors' rows.
//!
//! A file may hold one delta for a linear that the model at hand has in parts, such as query, key
//! and value. Rows of a factor lie one behind the other, so a part is a range of bytes.

use std::ops::Range;

use super::delta::{Delta, Factor, Form, GloraLayout, KronFactor, Magnitude, Side, WeightOrder};
use super::rotation::{Rotation, StoredRotation};

/// Rows of a packed factor that lie together.
const PACKED_ROWS: u64 = 16;

impl Factor {
    /// Some of its rows.
    fn part(self, rows: &Range<u64>) -> Self {
        Self {
            first_row: self.first_row + rows.start,
            rows: rows.end - rows.start,
            ..self
        }
    }
}

impl KronFactor {
    fn part(self, rows: &Range<u64>) -> Self {
        match self {
            Self::Direct(factor) => Self::Direct(factor.part(rows)),
            Self::LowRank { left, right } => Self::LowRank {
                left: left.part(rows),
                right,
            },
        }
    }
}

impl Magnitude {
    /// A row's norm is its own. A column's is of all rows.
    fn part(self, rows: &Range<u64>) -> Option<Self> {
        match self.side {
            Side::Out => Some(Self {
                values: self.values.part(rows),
                ..self
            }),
            Side::In => None,
        }
    }
}

impl Rotation {
    /// Blocks of outputs are cut between them, and only where no norm of all of them is bounded.
    fn part(self, rows: &Range<u64>) -> Option<Self> {
        match self.stored {
            StoredRotation::Triangles { .. } => Some(self),
            StoredRotation::InputBlocks { blocks, factor } => Some(Self {
                stored: StoredRotation::InputBlocks {
                    blocks,
                    factor: factor.part(rows),
                },
                ..self
            }),
            StoredRotation::Blocks { blocks, rescale } => {
                let is_whole = |row: u64| row.is_multiple_of(self.size);
                if self.rule.constraint > 0.0 || !is_whole(rows.start) || !is_whole(rows.end) {
                    return None;
                }
                let own = rows.start / self.size..rows.end / self.size;
                Some(Self {
                    count: own.end - own.start,
                    stored: StoredRotation::Blocks {
                        blocks: blocks.part(&own),
                        rescale: rescale.map(|all| all.part(rows)),
                    },
                    ..self
                })
            }
            StoredRotation::Butterfly { .. } => None,
        }
    }
}

impl Delta {
    /// The runs of rows, within these, each of which is one delta of the same form.
    ///
    /// A Kronecker product has a block of rows for each row of its first factor. So a range is the
    /// rest of a block, whole blocks, and the begin of a block.
    pub fn runs(&self, rows: Range<u64>) -> Vec<Range<u64>> {
        let Form::Kronecker { w2, .. } = self.form else {
            return vec![rows];
        };
        let block = w2.rows().max(1);
        let first_whole = rows.start.next_multiple_of(block).min(rows.end);
        let last_whole = (rows.end / block * block).max(first_whole);
        [
            rows.start..first_whole,
            first_whole..last_whole,
            last_whole..rows.end,
        ]
        .into_iter()
        .filter(|run| !run.is_empty())
        .collect()
    }

    /// Some of its rows, which are one of its [`Delta::runs`]; `None` where they are no delta of
    /// its form.
    pub fn part(&self, rows: &Range<u64>) -> Option<Self> {
        let form = match self.form {
            Form::Pair {
                down,
                up,
                order: order @ WeightOrder::OutIn,
            } => Form::Pair {
                down,
                up: up.part(rows),
                order,
            },
            Form::Tucker { down, mid, up } => Form::Tucker {
                down,
                mid,
                up: up.part(rows),
            },
            Form::Packed { down, up } => {
                let is_whole = |row: u64| row.is_multiple_of(PACKED_ROWS);
                if !is_whole(rows.start) || !is_whole(rows.end) {
                    return None;
                }
                Form::Packed {
                    down,
                    up: up.part(rows),
                }
            }
            Form::Hadamard {
                w1_a,
                w1_b,
                w2_a,
                w2_b,
            } => Form::Hadamard {
                w1_a: w1_a.part(rows),
                w1_b,
                w2_a: w2_a.part(rows),
                w2_b,
            },
            Form::Kronecker { w1, w2 } => kronecker_part(w1, w2, rows)?,
            Form::Full {
                diff,
                order: order @ WeightOrder::OutIn,
            } => Form::Full {
                diff: diff.part(rows),
                order,
            },
            Form::Vector { values, parameter } => Form::Vector {
                values: values.part(rows),
                parameter,
            },
            Form::Glora {
                a1,
                a2,
                b1,
                b2,
                layout,
            } => {
                // The weight's own product has the rows of the weight at hand.
                let (b1, b2) = match layout {
                    GloraLayout::Current => (b1.part(rows), b2),
                    GloraLayout::Old => (b1, b2.part(rows)),
                };
                Form::Glora {
                    a1,
                    a2,
                    b1,
                    b2,
                    layout,
                }
            }
            // What changes the inputs is the same for all rows.
            form @ (Form::Householder { .. } | Form::Diagonal { side: Side::In, .. }) => form,
            Form::Diagonal {
                values,
                side,
                stored,
            } => Form::Diagonal {
                values: values.part(rows),
                side,
                stored,
            },
            Form::Rotation(rotation) => Form::Rotation(rotation.part(rows)?),
            Form::Pair { .. } | Form::Full { .. } => return None,
        };
        let magnitude = match self.magnitude {
            Some(magnitude) => Some(magnitude.part(rows)?),
            None => None,
        };
        Some(Self {
            form,
            magnitude,
            ..*self
        })
    }
}

fn kronecker_part(w1: KronFactor, w2: KronFactor, rows: &Range<u64>) -> Option<Form> {
    let block = w2.rows();
    let (first, begin) = (rows.start.checked_div(block)?, rows.start % block);
    if begin == 0 && rows.end.is_multiple_of(block) {
        let w1 = w1.part(&(first..rows.end / block));
        return Some(Form::Kronecker { w1, w2 });
    }
    let end = begin + (rows.end - rows.start);
    (end <= block).then(|| Form::Kronecker {
        w1: w1.part(&(first..first + 1)),
        w2: w2.part(&(begin..end)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::Adapter;

    fn factor(index: usize, rows: u64, columns: u64) -> Factor {
        Factor {
            index,
            first_row: 0,
            rows,
            columns,
        }
    }

    fn kronecker(rows1: u64, rows2: u64) -> Delta {
        Delta {
            form: Form::Kronecker {
                w1: KronFactor::Direct(factor(0, rows1, 3)),
                w2: KronFactor::LowRank {
                    left: factor(1, rows2, 2),
                    right: factor(2, 2, 5),
                },
            },
            adapter: Adapter::Lokr,
            scale: 1.0,
            magnitude: None,
        }
    }

    /// The rows of a Kronecker product, each as (row of w1, row of w2).
    fn rows_of(delta: &Delta) -> Vec<(u64, u64)> {
        let Form::Kronecker { w1, w2 } = delta.form else {
            unreachable!()
        };
        let first = |own: KronFactor| match own {
            KronFactor::Direct(own) | KronFactor::LowRank { left: own, .. } => own.first_row,
        };
        let (begin1, begin2) = (first(w1), first(w2));
        (0..w1.rows())
            .flat_map(|a| (0..w2.rows()).map(move |b| (begin1 + a, begin2 + b)))
            .collect()
    }

    #[test]
    fn runs_of_a_kronecker_product_are_its_rows_in_order() {
        for (rows1, rows2) in [(1, 12), (12, 1), (4, 3), (3, 4), (2, 6), (5, 7)] {
            let whole = kronecker(rows1, rows2);
            let expected = rows_of(&whole);
            let total = rows1 * rows2;
            for begin in 0..total {
                for end in begin + 1..=total {
                    let runs = whole.runs(begin..end);
                    assert!(runs.len() <= 3, "{begin}..{end}");
                    let found: Vec<_> = runs
                        .iter()
                        .flat_map(|run| rows_of(&whole.part(run).unwrap()))
                        .collect();
                    let range = usize::try_from(begin).unwrap()..usize::try_from(end).unwrap();
                    assert_eq!(found, expected[range]);
                }
            }
        }
    }

    #[test]
    fn a_packed_factor_is_cut_between_its_tiles() {
        let delta = Delta {
            form: Form::Packed {
                down: factor(0, 64, 16),
                up: factor(1, 96, 16),
            },
            adapter: Adapter::Lora,
            scale: 1.0,
            magnitude: None,
        };
        assert!(delta.part(&(32..64)).is_some());
        assert!(delta.part(&(30..64)).is_none());
        assert!(delta.part(&(32..70)).is_none());
    }

    #[test]
    fn a_part_of_a_part_is_one_of_the_whole() {
        let pair = Delta {
            form: Form::Pair {
                down: factor(0, 4, 8),
                up: factor(1, 12, 4),
                order: WeightOrder::OutIn,
            },
            adapter: Adapter::Lora,
            scale: 0.5,
            magnitude: None,
        };
        let once = pair.part(&(3..9)).unwrap();
        assert_eq!(once.part(&(1..4)), pair.part(&(4..7)));
        assert_eq!(once.shape(), Some((Some(6), Some(8))));
    }
}
