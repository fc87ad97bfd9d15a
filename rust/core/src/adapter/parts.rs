//! One module's tensors while they are being understood.

use super::delta::{Factor, Form, Parameter};
use super::module::Fault;
use crate::dtype::Dtype;
use crate::key::role::{Role, Roles};
use crate::key::suffix;
use crate::key::table::Entry;
use crate::model::{self, ModuleId, ModuleKind};

/// Dtypes that the tensors of a delta may be stored in.
const FLOAT_DTYPES: [Dtype; 6] = [
    Dtype::F64,
    Dtype::F32,
    Dtype::F16,
    Dtype::BF16,
    Dtype::F8E4M3,
    Dtype::F8E5M2,
];

/// The tensors that a file has under one module's name.
pub(super) struct Parts<'t> {
    /// All entries of the file.
    pub(super) entries: &'t [Entry],
    /// Which module it is.
    pub(super) id: ModuleId,
    /// Indices of the module's own.
    pub(super) tensors: Vec<usize>,
    /// Their roles.
    pub(super) roles: Roles,
    /// Whether the file has tensors of unknown kind under the module's name.
    pub(super) beside_unknown: bool,
}

impl Parts<'_> {
    pub(super) fn find(&self, role: Role) -> Option<(usize, &Entry)> {
        if !self.roles.has(role) {
            return None;
        }
        self.tensors
            .iter()
            .filter_map(|&i| Some((i, self.entries.get(i)?)))
            .find(|(_, e)| e.role == role)
    }

    pub(super) fn has(&self, role: Role) -> bool {
        self.roles.has(role)
    }

    pub(super) fn has_any(&self, roles: &[Role]) -> bool {
        roles.iter().any(|role| self.has(*role))
    }

    pub(super) fn kind(&self) -> ModuleKind {
        model::table().module(self.id).kind
    }

    /// The rank of any matrix of the weight's shape, at most.
    pub(super) fn full_rank(&self) -> Option<u64> {
        self.kind().weight_shape().iter().copied().min()
    }

    /// (out, in) of a matrix that is stored as the weight is: the table of an embedding is (in, out).
    pub(super) fn out_in(&self, (rows, columns): (u64, u64)) -> (u64, u64) {
        match self.kind() {
            ModuleKind::Embedding { .. } => (columns, rows),
            ModuleKind::Linear { .. } | ModuleKind::Norm { .. } => (rows, columns),
        }
    }

    pub(super) fn is_peft_embedding(&self) -> bool {
        self.find(Role::Down)
            .is_some_and(|(_, e)| suffix::is_peft_embedding(&e.tensor.key))
    }

    pub(super) fn matrix(&self, role: Role) -> Option<(u64, u64)> {
        self.find(role).and_then(|(_, e)| Entry::matrix(e))
    }

    pub(super) fn rows(&self, role: Role) -> Option<u64> {
        self.find(role)?.1.tensor.shape.first().copied()
    }

    /// A half of a pair; without it the other says nothing.
    pub(super) fn half(&self, role: Role, other: Role) -> Result<Factor, Fault> {
        let lacks = || {
            let plain = |role: Role| match role {
                Role::PackedDown => Role::Down.name(),
                Role::PackedUp => Role::Up.name(),
                other => other.name(),
            };
            Fault::Broken(format!("has {} but no {}", plain(other), plain(role)))
        };
        self.factor(role)?.ok_or_else(lacks)
    }

    /// One value per channel, fit to be multiplied, and how they lie.
    pub(super) fn channels(&self, role: Role) -> Result<Option<(Factor, Laid)>, Fault> {
        let Some((index, entry)) = self.find(role) else {
            return Ok(None);
        };
        check_tensor(entry)?;
        let (rows, columns, laid) = match (entry.tensor.shape.as_slice(), entry.matrix()) {
            ([len], _) => (*len, 1, Laid::Flat),
            (_, Some((rows, 1))) => (rows, 1, Laid::Column),
            (_, Some((1, columns))) => (1, columns, Laid::Row),
            (other, _) => {
                let name = role.name();
                let text = format!("{name} is not one value per channel: {other:?}");
                return Err(Fault::Broken(text));
            }
        };
        let factor = Factor {
            index,
            first_row: 0,
            rows,
            columns,
        };
        Ok(Some((factor, laid)))
    }

    /// The value of a stored scalar.
    pub(super) fn number(&self, role: Role) -> Result<Option<f64>, Fault> {
        let Some((_, entry)) = self.find(role) else {
            return Ok(None);
        };
        let name = role.name();
        match entry.value {
            Some(value) if value.is_finite() => Ok(Some(value)),
            Some(value) => Err(Fault::Broken(format!(
                "{name} is {value}: it must be finite"
            ))),
            None => Err(Fault::Broken(format!(
                "{name} has {} values where one is needed",
                entry.elements()
            ))),
        }
    }

    /// The dimensions that a tensor of a role is stored with.
    pub(super) fn dimensions(&self, role: Role) -> &[u64] {
        self.find(role)
            .map_or(&[], |(_, entry)| &entry.tensor.shape)
    }

    /// The tensor of a role, fit to be multiplied.
    pub(super) fn factor(&self, role: Role) -> Result<Option<Factor>, Fault> {
        let Some((index, entry)) = self.find(role) else {
            return Ok(None);
        };
        check_tensor(entry)?;
        let (rows, columns) = entry.matrix().ok_or_else(|| {
            Fault::Broken(format!(
                "{} is not a matrix: {:?}",
                role.name(),
                entry.tensor.shape
            ))
        })?;
        Ok(Some(Factor {
            index,
            first_row: 0,
            rows,
            columns,
        }))
    }
}

/// How one value per channel lies in its tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Laid {
    /// (n).
    Flat,
    /// (n, 1).
    Column,
    /// (1, n).
    Row,
}

/// A tensor of one value per channel, fit to be added to a parameter.
pub(super) fn vector(index: usize, entry: &Entry, parameter: Parameter) -> Result<Form, Fault> {
    check_tensor(entry)?;
    match entry.tensor.shape.as_slice() {
        [len] => Ok(Form::Vector {
            values: Factor {
                index,
                first_row: 0,
                rows: *len,
                columns: 1,
            },
            parameter,
        }),
        other => Err(Fault::Broken(format!(
            "{} is not a vector: {other:?}",
            entry.role.name()
        ))),
    }
}

/// Whether there is anything in a tensor, and of a type that can be multiplied.
fn check_tensor(entry: &Entry) -> Result<(), Fault> {
    let (name, dtype) = (entry.role.name(), entry.tensor.dtype);
    if !FLOAT_DTYPES.contains(&dtype) {
        return Err(Fault::Unsupported(format!(
            "{name} of dtype {dtype} is not supported"
        )));
    }
    if entry.tensor.shape.contains(&0) {
        return Err(Fault::Broken(format!(
            "{name} is empty: {:?}",
            entry.tensor.shape
        )));
    }
    Ok(())
}
