//! DoRA: the weight with a delta, normed row by row or column by column, and stretched to stored
//! magnitudes.

use super::delta::{Form, Magnitude, Side};
use super::module::Fault;
use super::parts::{Laid, Parts};
use super::{Adapter, loha, lokr, lora};
use crate::key::role::Role;

/// It makes a module one.
pub(super) const ROLES: [Role; 1] = [Role::DoraScale];

/// The kind of delta under the magnitude: trainers know it of LoKr and LoHa, too. None where there
/// is no such delta.
pub(super) fn inner(parts: &Parts<'_>) -> Option<Adapter> {
    if parts.has_any(&lokr::ROLES) {
        Some(Adapter::Lokr)
    } else if parts.has_any(&loha::ROLES) {
        Some(Adapter::Loha)
    } else {
        parts.has_any(&lora::ROLES).then_some(Adapter::Lora)
    }
}

/// The form of the delta under the magnitude.
pub(super) fn form(parts: &Parts<'_>) -> Result<Form, Fault> {
    let form = match inner(parts) {
        Some(Adapter::Lokr) => lokr::form(parts)?,
        Some(Adapter::Loha) => loha::form(parts)?,
        Some(_) => lora::form(parts)?,
        None => {
            let text = format!("has {} but no pair", Role::DoraScale.name());
            return Err(Fault::Broken(text));
        }
    };
    match form {
        Form::Packed { .. } => Err(Fault::Unsupported(
            "a magnitude beside a Nunchaku-packed pair is not supported".to_owned(),
        )),
        form => Ok(form),
    }
}

/// The magnitude. Its own shape alone tells the side: on a square weight both fit.
pub(super) fn magnitude(parts: &Parts<'_>, form: &Form) -> Result<Magnitude, Fault> {
    let lacks = || super::missing(Adapter::Dora, Role::DoraScale);
    let (values, laid) = parts.channels(Role::DoraScale)?.ok_or_else(lacks)?;
    let (out, inp) = form.shape().unwrap_or_default();
    let (side, found, expected, channels) = match laid {
        Laid::Flat | Laid::Column => (Side::Out, values.rows, out, "outputs"),
        Laid::Row => (Side::In, values.columns, inp, "inputs"),
    };
    match expected {
        Some(expected) if expected != found => Err(Fault::Broken(format!(
            "{} has {found} values where the delta has {expected} {channels}",
            Role::DoraScale.name()
        ))),
        _ => Ok(Magnitude { values, side }),
    }
}
