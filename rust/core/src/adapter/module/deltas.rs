//! The deltas that a module's tensors make up, checked against each other.

use super::{Fault, ModuleError, Parts};
use crate::adapter::Adapter;
use crate::adapter::delta::{Delta, Factor, Form, KronFactor, Parameter, WeightOrder};
use crate::dtype::Dtype;
use crate::key::role::Role;
use crate::key::table::Entry;
use crate::model::ModuleKind;
use crate::model::slot::RANK_MULTIPLE;

/// Dtypes that the tensors of a delta may be stored in.
const FLOAT_DTYPES: [Dtype; 6] = [
    Dtype::F64,
    Dtype::F32,
    Dtype::F16,
    Dtype::BF16,
    Dtype::F8E4M3,
    Dtype::F8E5M2,
];

/// The deltas, and the tensors that are left out with the reason; or why nothing is applied.
type Built = Result<(Vec<Delta>, Vec<(usize, String)>), Fault>;

impl Parts<'_> {
    /// Builds the weight's delta and those beside it; `raw` is the scale without float8's.
    pub(super) fn deltas(&self, adapter: Adapter, raw: f64) -> Result<Built, ModuleError> {
        let form = match self.weight_form(adapter) {
            Ok(form) => form,
            Err(fault) => return Ok(Err(fault)),
        };
        let mut deltas = vec![Delta {
            form,
            adapter,
            scale: self.whole_scale(adapter, raw)?,
        }];
        let mut left_out = Vec::new();
        for &index in &self.tensors {
            let Some(entry) = self.entries.get(index) else {
                continue;
            };
            if is_scale(entry.role) || deltas.iter().any(|delta| delta.holds(index)) {
                continue;
            }
            match self.beside(index, entry, form, raw)? {
                Ok(delta) => deltas.push(delta),
                Err(Some(text)) => left_out.push((index, text)),
                Err(None) => left_out.push((
                    index,
                    format!(
                        "`{}` beside a {} is not supported",
                        entry.role.name(),
                        adapter.title()
                    ),
                )),
            }
        }
        Ok(Ok((deltas, left_out)))
    }

    /// The delta that a tensor beside the weight's makes up, or why none if there is a reason of
    /// its own.
    fn beside(
        &self,
        index: usize,
        entry: &Entry,
        form: Form,
        raw: f64,
    ) -> Result<Result<Delta, Option<String>>, ModuleError> {
        let is_linear = matches!(self.kind(), ModuleKind::Linear { .. });
        let is_pair = matches!(form, Form::Pair { .. } | Form::Tucker { .. });
        let (made, scale) = match entry.role {
            Role::DiffB if is_linear => (vector(index, entry, Parameter::Bias), 1.0),
            Role::UpBias if is_linear && is_pair => (vector(index, entry, Parameter::Bias), raw),
            Role::Diff
                if !matches!(
                    form,
                    Form::Vector {
                        parameter: Parameter::Weight,
                        ..
                    }
                ) =>
            {
                let scale = self.float8_scaled(1.0, |role| role == Role::Diff)?;
                (self.full(), scale)
            }
            _ => return Ok(Err(None)),
        };
        Ok(made
            .map(|form| Delta {
                form,
                adapter: Adapter::Full,
                scale,
            })
            .map_err(|fault| Some(fault.text().to_owned())))
    }

    fn weight_form(&self, adapter: Adapter) -> Result<Form, Fault> {
        match adapter {
            Adapter::Lora if self.has(Role::PackedDown) || self.has(Role::PackedUp) => {
                self.packed()
            }
            Adapter::Lora if self.has(Role::Mid) => self.tucker(),
            Adapter::Lora => self.pair(),
            Adapter::Lokr => self.kronecker(),
            Adapter::Loha => self.hadamard(),
            Adapter::Full if self.has(Role::Diff) => self.full(),
            Adapter::Full | Adapter::Norm => self.lone_vector(adapter),
            Adapter::Dora
            | Adapter::Glora
            | Adapter::Oft
            | Adapter::Boft
            | Adapter::Ia3
            | Adapter::Peft(_) => Err(Fault::Unsupported(format!(
                "{} is not supported",
                adapter.title()
            ))),
        }
    }

    fn pair(&self) -> Result<Form, Fault> {
        let down = self.half(Role::Down, Role::Up)?;
        let up = self.half(Role::Up, Role::Down)?;
        if down.rows != up.columns {
            return Err(Fault::Broken(format!(
                "the halves differ in rank: down has {}, up has {}",
                down.rows, up.columns
            )));
        }
        let is_embedding = matches!(self.kind(), ModuleKind::Embedding { .. });
        let order = if is_embedding && !self.is_peft_embedding() {
            WeightOrder::InOut
        } else {
            WeightOrder::OutIn
        };
        Ok(Form::Pair { down, up, order })
    }

    /// LyCORIS' order of the core's axes, which ComfyUI reads alike: (rank of up, rank of down).
    fn tucker(&self) -> Result<Form, Fault> {
        let down = self.half(Role::Down, Role::Up)?;
        let up = self.half(Role::Up, Role::Down)?;
        let mid = self.half(Role::Mid, Role::Down)?;
        if (mid.rows, mid.columns) != (up.columns, down.rows) {
            return Err(Fault::Broken(format!(
                "mid is {}x{} between an up of rank {} and a down of rank {}",
                mid.rows, mid.columns, up.columns, down.rows
            )));
        }
        Ok(Form::Tucker { down, mid, up })
    }

    fn packed(&self) -> Result<Form, Fault> {
        let down = self.half(Role::PackedDown, Role::PackedUp)?;
        let up = self.half(Role::PackedUp, Role::PackedDown)?;
        if down.columns != up.columns || !down.columns.is_multiple_of(RANK_MULTIPLE) {
            return Err(Fault::Broken(format!(
                "the packed halves have ranks {} and {}: both must be the same multiple of \
                 {RANK_MULTIPLE}",
                down.columns, up.columns
            )));
        }
        Ok(Form::Packed { down, up })
    }

    fn hadamard(&self) -> Result<Form, Fault> {
        let factor = |role| {
            self.factor(role)?
                .ok_or_else(|| missing(Adapter::Loha, role))
        };
        let (w1_a, w1_b) = (factor(Role::HadaW1A)?, factor(Role::HadaW1B)?);
        let (w2_a, w2_b) = (factor(Role::HadaW2A)?, factor(Role::HadaW2B)?);
        if w1_a.columns != w1_b.rows || w2_a.columns != w2_b.rows {
            return Err(Fault::Broken(format!(
                "the halves differ in rank: hada_w1 has {} and {}, hada_w2 has {} and {}",
                w1_a.columns, w1_b.rows, w2_a.columns, w2_b.rows
            )));
        }
        if (w1_a.rows, w1_b.columns) != (w2_a.rows, w2_b.columns) {
            return Err(Fault::Broken(format!(
                "its two products differ in shape: {}x{} and {}x{}",
                w1_a.rows, w1_b.columns, w2_a.rows, w2_b.columns
            )));
        }
        Ok(Form::Hadamard {
            w1_a,
            w1_b,
            w2_a,
            w2_b,
        })
    }

    fn kronecker(&self) -> Result<Form, Fault> {
        let factor = |direct: Role, left: Role, right: Role| {
            // As every reader does: what is stored whole wins over what is stored in halves.
            if let Some(factor) = self.factor(direct)? {
                return Ok(KronFactor::Direct(factor));
            }
            let half = |role| {
                self.factor(role)?
                    .ok_or_else(|| missing(Adapter::Lokr, direct))
            };
            let (left, right) = (half(left)?, half(right)?);
            if left.columns != right.rows {
                return Err(Fault::Broken(format!(
                    "the halves of {} differ in rank: {} and {}",
                    direct.name(),
                    left.columns,
                    right.rows
                )));
            }
            Ok(KronFactor::LowRank { left, right })
        };
        let w1 = factor(Role::LokrW1, Role::LokrW1A, Role::LokrW1B)?;
        let w2 = factor(Role::LokrW2, Role::LokrW2A, Role::LokrW2B)?;
        let sides = [(w1.rows(), w2.rows()), (w1.columns(), w2.columns())];
        if sides.iter().any(|(a, b)| a.checked_mul(*b).is_none()) {
            return Err(Fault::Broken(
                "its factors multiply to more rows or columns than can be counted".to_owned(),
            ));
        }
        Ok(Form::Kronecker { w1, w2 })
    }

    fn full(&self) -> Result<Form, Fault> {
        let diff = self
            .factor(Role::Diff)?
            .ok_or_else(|| missing(Adapter::Full, Role::Diff))?;
        let order = match self.kind() {
            ModuleKind::Embedding { .. } => WeightOrder::InOut,
            ModuleKind::Linear { .. } | ModuleKind::Norm { .. } => WeightOrder::OutIn,
        };
        Ok(Form::Full { diff, order })
    }

    /// A norm's weight, or a bias whose weight is left as it is.
    fn lone_vector(&self, adapter: Adapter) -> Result<Form, Fault> {
        let candidates: &[(Role, Parameter)] = if adapter == Adapter::Norm {
            &[
                (Role::Diff, Parameter::Weight),
                (Role::WNorm, Parameter::Weight),
            ]
        } else {
            &[(Role::DiffB, Parameter::Bias)]
        };
        let found = candidates
            .iter()
            .find_map(|(role, parameter)| Some((self.find(*role)?, *parameter)));
        let ((index, entry), parameter) =
            found.ok_or_else(|| Fault::Broken("has a norm's delta but is no norm".to_owned()))?;
        vector(index, entry, parameter)
    }

    /// A half of a pair; without it the other says nothing.
    fn half(&self, role: Role, other: Role) -> Result<Factor, Fault> {
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

    /// The tensor of a role, fit to be multiplied.
    fn factor(&self, role: Role) -> Result<Option<Factor>, Fault> {
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
            rows,
            columns,
        }))
    }
}

/// Scalars that are multiplied in, not applied by themselves.
fn is_scale(role: Role) -> bool {
    matches!(role, Role::Alpha | Role::Scale | Role::Fp8Scale)
}

fn missing(adapter: Adapter, role: Role) -> Fault {
    Fault::Broken(format!("is a {} without {}", adapter.title(), role.name()))
}

fn vector(index: usize, entry: &Entry, parameter: Parameter) -> Result<Form, Fault> {
    check_tensor(entry)?;
    match entry.tensor.shape.as_slice() {
        [len] => Ok(Form::Vector {
            index,
            len: *len,
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
