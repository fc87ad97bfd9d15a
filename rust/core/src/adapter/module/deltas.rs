//! The deltas that a module's tensors make up, checked against each other.

use super::{Fault, ModuleError, is_scalar_role};
use crate::adapter::Adapter;
use crate::adapter::delta::{Delta, Form, Parameter};
use crate::adapter::full;
use crate::adapter::parts::{self, Parts};
use crate::adapter::peft::AdapterConfig;
use crate::key::role::Role;
use crate::key::table::Entry;
use crate::model::ModuleKind;

/// The deltas, and the tensors that are left out with the reason; or why nothing is applied.
type Built = Result<(Vec<Delta>, Vec<(usize, String)>), Fault>;

impl Parts<'_> {
    /// Builds the weight's delta and those beside it; `raw` is the scale without float8's.
    pub(super) fn deltas(
        &self,
        adapter: Adapter,
        raw: f64,
        config: Option<&AdapterConfig>,
    ) -> Result<Built, ModuleError> {
        let made = adapter.form(self, config);
        let made = made.and_then(|form| Ok((form, adapter.magnitude(self, &form)?)));
        let (form, magnitude) = match made {
            Ok(made) => made,
            Err(fault) => return Ok(Err(fault)),
        };
        let mut deltas = vec![Delta {
            form,
            adapter,
            scale: self.whole_scale(adapter, raw)?,
            magnitude,
        }];
        let mut left_out = Vec::new();
        for &index in &self.tensors {
            let Some(entry) = self.entries.get(index) else {
                continue;
            };
            if is_rule_of(entry.role, adapter) || deltas.iter().any(|delta| delta.holds(index)) {
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
            Role::DiffB if is_linear => (parts::vector(index, entry, Parameter::Bias), 1.0),
            Role::UpBias if is_linear && is_pair => {
                (parts::vector(index, entry, Parameter::Bias), raw)
            }
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
                (full::matrix(self), scale)
            }
            _ => return Ok(Err(None)),
        };
        Ok(made
            .map(|form| Delta {
                form,
                adapter: Adapter::Full,
                scale,
                magnitude: None,
            })
            .map_err(|fault| Some(fault.text().to_owned())))
    }
}

/// Whether a scalar says how the others of this kind of adapter are applied.
fn is_rule_of(role: Role, adapter: Adapter) -> bool {
    match role {
        Role::Ia3OnInput => adapter == Adapter::Ia3,
        Role::OftScaled => adapter == Adapter::Oft,
        role => is_scalar_role(role),
    }
}
