//! The room that pieces take besides ranks, in bytes.

use std::collections::{BTreeMap, HashSet};

use serde::Serialize;

use super::placed::{Placed, Takes};
use crate::adapter::delta::{Delta, Form, Parameter, Side};
use crate::adapter::rotation::{Rotation, StoredRotation};
use crate::model::slot::Slot;

/// Bytes of a scalar, which is float32 whatever the slot's dtype.
const SCALAR_BYTES: u64 = 4;

/// The form in which a part beside a layer acts, and its sizes.
///
/// All are neutral where they are zero, so that parts of one shape can take each other's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum PartForm {
    /// Adds a Kronecker product, its rows and its columns stretched.
    Kron {
        /// Rows of w1.
        w1_rows: u64,
        /// Columns of w1.
        w1_columns: u64,
        /// Rows of w2.
        w2_rows: u64,
        /// Columns of w2.
        w2_columns: u64,
        /// Whether its rows are stretched.
        has_rows: bool,
        /// Whether its columns are.
        has_columns: bool,
    },
    /// Adds a matrix.
    Dense {
        /// Its columns.
        columns: u64,
    },
    /// Stretches the layer's output.
    Factor,
    /// Stretches the layer's input.
    InputFactor {
        /// How many inputs there are.
        columns: u64,
    },
    /// Turns blocks of the output.
    Rotation {
        /// How many blocks.
        blocks: u64,
        /// Rows of each.
        size: u64,
    },
    /// Turns blocks of the input.
    InputRotation {
        /// How many blocks.
        blocks: u64,
        /// Rows of each.
        size: u64,
    },
    /// Turns blocks of the output in several stages.
    Butterfly {
        /// How many stages.
        stages: u64,
        /// How many blocks in each.
        blocks: u64,
        /// Rows of each.
        size: u64,
    },
    /// Runs the layer on turned input, and stretches its output.
    Pass {
        /// How many blocks.
        blocks: u64,
        /// Rows of each.
        size: u64,
    },
}

/// The shape of a part beside a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct PartShape {
    /// First of the slot's logical output rows that it changes.
    pub row_begin: u64,
    /// How many rows it changes.
    pub row_count: u64,
    /// Its form and sizes.
    #[serde(flatten)]
    pub form: PartForm,
}

/// Room for parts of one shape, in each of the uniform slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct PartRoom {
    /// Their shape.
    #[serde(flatten)]
    pub shape: PartShape,
    /// How many of them.
    pub count: usize,
}

/// How many parts of each shape there are.
pub(super) type Rooms = BTreeMap<PartShape, usize>;

impl PartShape {
    /// The one matrix of a slot, which is of the whole layer's size, whichever of its rows are
    /// changed: full deltas are summed in it.
    pub(super) fn dense(slot: &Slot) -> Self {
        Self {
            row_begin: 0,
            row_count: slot.out_features,
            form: PartForm::Dense {
                columns: slot.in_features,
            },
        }
    }

    /// Upper bound of the bytes of its tensors, whose values but scalars are of the slot's dtype.
    pub(super) fn bytes(self, element_bytes: u64) -> u64 {
        let rows = self.row_count;
        let squares = |count: u64, size: u64| product(&[count, size, size]);
        let (elements, scalars) = match self.form {
            PartForm::Kron {
                w1_rows,
                w1_columns,
                w2_rows,
                w2_columns,
                has_rows,
                has_columns,
            } => {
                let pair = w1_rows
                    .saturating_mul(w1_columns)
                    .saturating_add(w2_rows.saturating_mul(w2_columns));
                let along = |has: bool, a: u64, b: u64| if has { a.saturating_mul(b) } else { 0 };
                let vectors = along(has_rows, w1_rows, w2_rows).saturating_add(along(
                    has_columns,
                    w1_columns,
                    w2_columns,
                ));
                (pair.saturating_add(vectors), 0)
            }
            PartForm::Dense { columns } => (rows.saturating_mul(columns), 1),
            // What of the bias is not scaled is beside the factors.
            PartForm::Factor => (rows.saturating_mul(2), 0),
            PartForm::InputFactor { columns } => (columns, 0),
            PartForm::Rotation { blocks, size } => (squares(blocks, size).saturating_add(rows), 0),
            PartForm::Pass { blocks, size } => (
                squares(blocks, size).saturating_add(rows.saturating_mul(2)),
                0,
            ),
            PartForm::InputRotation { blocks, size } => (squares(blocks, size), 0),
            PartForm::Butterfly {
                stages,
                blocks,
                size,
            } => {
                let stages = stages.saturating_mul(squares(blocks, size));
                (stages.saturating_add(rows.saturating_mul(2)), 1)
            }
        };
        elements
            .saturating_mul(element_bytes)
            .saturating_add(scalars * SCALAR_BYTES)
    }
}

fn product(sides: &[u64]) -> u64 {
    sides.iter().fold(1, |all, side| all.saturating_mul(*side))
}

/// What pieces take in their slot besides ranks.
#[derive(Debug, Clone, Default)]
pub(super) struct Branch {
    /// Parts beside the layer.
    pub(super) rooms: Rooms,
    /// Parameters that another tensor takes the place of.
    swapped: HashSet<Parameter>,
}

impl Branch {
    /// Takes in the room of a piece: `delta` is what is placed of it.
    pub(super) fn add(&mut self, placed: &Placed, delta: &Delta, slot: &Slot) {
        if placed.execution.takes == Takes::Ranks {
            return;
        }
        if let Form::Vector { parameter, .. } = delta.form {
            self.swapped.insert(parameter);
            return;
        }
        let (row_begin, row_count) = placed.rows;
        for form in parts_of(placed, delta, slot) {
            if matches!(form, PartForm::Dense { .. }) {
                self.rooms.insert(PartShape::dense(slot), 1);
                continue;
            }
            let shape = PartShape {
                row_begin,
                row_count,
                form,
            };
            *self.rooms.entry(shape).or_default() += 1;
        }
    }

    /// Upper bound of all its bytes. A parameter is swapped once, however many vectors are added to
    /// it.
    pub(super) fn bytes(&self, slot: &Slot) -> u64 {
        let swapped = (self.swapped.len() as u64).saturating_mul(slot.out_features);
        let swapped = swapped.saturating_mul(slot.element_bytes);
        swapped.saturating_add(room_bytes(&self.rooms, slot.element_bytes))
    }
}

/// Upper bound of the bytes of parts.
pub(super) fn room_bytes(rooms: &Rooms, element_bytes: u64) -> u64 {
    rooms.iter().fold(0, |bytes, (shape, count)| {
        let own = shape.bytes(element_bytes).saturating_mul(*count as u64);
        bytes.saturating_add(own)
    })
}

/// The parts that a piece becomes.
fn parts_of(placed: &Placed, delta: &Delta, slot: &Slot) -> Vec<PartForm> {
    let columns = slot.in_features;
    let side = delta.magnitude.map(|own| own.side);
    let mut parts = match (delta.form, delta.magnitude) {
        (Form::Kronecker { w1, w2 }, _) if placed.execution.rank == 0 => vec![PartForm::Kron {
            w1_rows: w1.rows(),
            w1_columns: w1.columns(),
            w2_rows: w2.rows(),
            w2_columns: w2.columns(),
            has_rows: side == Some(Side::Out),
            has_columns: side == Some(Side::In),
        }],
        (Form::Full { .. }, None) => vec![PartForm::Dense { columns }],
        (Form::Diagonal { side, .. }, None) => vec![diagonal(side, columns)],
        (Form::Rotation(rotation), None) => turned(rotation, columns),
        _ => Vec::new(),
    };
    parts.extend(side.map(|side| diagonal(side, columns)));
    parts
}

fn diagonal(side: Side, columns: u64) -> PartForm {
    match side {
        Side::Out => PartForm::Factor,
        Side::In => PartForm::InputFactor { columns },
    }
}

fn turned(rotation: Rotation, columns: u64) -> Vec<PartForm> {
    let size = rotation.size;
    match rotation.stored {
        StoredRotation::Blocks { .. } => vec![PartForm::Rotation {
            blocks: rotation.count,
            size,
        }],
        StoredRotation::Butterfly { stages, .. } => vec![PartForm::Butterfly {
            stages: stages.rows,
            blocks: rotation.count,
            size,
        }],
        StoredRotation::Triangles { .. } => vec![PartForm::InputRotation {
            blocks: rotation.blocks_of(columns),
            size,
        }],
        StoredRotation::InputBlocks { .. } => {
            let blocks = rotation.count;
            vec![
                PartForm::InputRotation { blocks, size },
                PartForm::Pass { blocks, size },
            ]
        }
    }
}
