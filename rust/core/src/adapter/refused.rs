//! Kinds of adapter that are not applied: those that only PEFT knows.

use super::Adapter;
use super::delta::Form;
use super::module::Fault;

/// Never a form, whatever the tensors are.
pub(super) fn form(adapter: Adapter) -> Result<Form, Fault> {
    Err(Fault::Unsupported(format!(
        "{} is not supported",
        adapter.title()
    )))
}
