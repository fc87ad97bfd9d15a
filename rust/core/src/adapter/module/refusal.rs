//! Adapters that are not applied, by name and with what would be lost.

use super::{Fault, is_scalar_role};
use crate::adapter::Adapter;
use crate::adapter::parts::Parts;
use crate::dtype::Dtype;
use crate::key::role::Role;
use crate::model::ModuleKind;

/// Dtypes whose values usually need a scale.
const FLOAT8: [Dtype; 5] = [
    Dtype::F8E4M3,
    Dtype::F8E5M2,
    Dtype::F8E4M3Fnuz,
    Dtype::F8E5M2Fnuz,
    Dtype::F8E8M0,
];

impl Parts<'_> {
    /// Why a module of this kind of adapter is not applied, whatever its shapes are.
    pub(super) fn refusal(&self, adapter: Adapter) -> Option<Fault> {
        let unsupported = |text: String| Some(Fault::Unsupported(text));
        if let Some(loss) = adapter.loss() {
            return unsupported(format!("{} is not supported: {loss}", adapter.title()));
        }
        self.reshaped()
            .or_else(|| self.mixed(adapter))
            .or_else(|| self.convolution())
            .or_else(|| self.wrong_layer(adapter))
            .or_else(|| {
                if self.beside_unknown && self.has_float8() {
                    unsupported(
                        "float8 tensors beside a tensor of unknown kind, which may be their \
                         scale, are not supported"
                            .to_owned(),
                    )
                } else {
                    None
                }
            })
    }

    /// A LoRA that changes the size of its module.
    pub(super) fn reshaped(&self) -> Option<Fault> {
        let text = "`reshape_weight` is not supported: it asks for a module of another size";
        let has = self.has(Role::Reshape);
        has.then(|| Fault::Unsupported(text.to_owned()))
    }

    /// A replacement beside a delta of what it replaces.
    fn mixed(&self, adapter: Adapter) -> Option<Fault> {
        let is_beside = match adapter {
            Adapter::Set => self.has_any(&[Role::Diff, Role::WNorm]),
            _ => self.has(Role::SetWeight),
        };
        let text = "`set_weight` beside a delta of the same weight is not supported: which of them \
                    comes first is not known";
        is_beside.then(|| Fault::Unsupported(text.to_owned()))
    }

    /// The cores of convolutions: the model has none.
    fn convolution(&self) -> Option<Fault> {
        let core = [Role::LokrT2, Role::HadaT1, Role::HadaT2]
            .into_iter()
            .find(|role| self.has(*role))?;
        Some(Fault::Unsupported(format!(
            "`{}` is not supported: it is the core of a convolution, of which the model has none",
            core.name()
        )))
    }

    /// An adapter of a layer to which it cannot be applied.
    fn wrong_layer(&self, adapter: Adapter) -> Option<Fault> {
        let (layer, fits) = match self.kind() {
            ModuleKind::Linear { .. } => return None,
            ModuleKind::Norm { .. } => ("norm", matches!(adapter, Adapter::Norm | Adapter::Set)),
            ModuleKind::Embedding { .. } => (
                "embedding",
                matches!(adapter, Adapter::Lora | Adapter::Full | Adapter::Set)
                    && !self.has_any(&[Role::Mid, Role::PackedDown, Role::WNorm]),
            ),
        };
        let (title, article) = (adapter.title(), if layer == "norm" { "a" } else { "an" });
        (!fits)
            .then(|| Fault::Unsupported(format!("a {title} of {article} {layer} has no meaning")))
    }

    fn has_float8(&self) -> bool {
        self.tensors
            .iter()
            .filter_map(|&i| self.entries.get(i))
            .any(|e| !is_scalar_role(e.role) && FLOAT8.contains(&e.tensor.dtype))
    }
}
