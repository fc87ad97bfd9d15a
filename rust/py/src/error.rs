//! Core errors as Python exceptions: the only such place.
//!
//! The classes live in `qwenlora.errors`, because a class that also extends a built-in can only be
//! written in Python. Every variant is matched, so that a new one fails to compile.

use std::io::ErrorKind;

use pyo3::prelude::*;
use pyo3::types::PyType;
use qwenlora_core::header::HeaderError;
use qwenlora_core::plan::PlanError;
use qwenlora_core::source::SourceError;
use qwenlora_core::stack::{SkipKind, StackError};

/// An exception of `qwenlora.errors` with this message.
fn raise(py: Python<'_>, class: &str, message: String) -> PyErr {
    let class = py
        .import("qwenlora.errors")
        .and_then(|module| module.getattr(class))
        .and_then(|class| class.cast_into::<PyType>().map_err(PyErr::from));
    match class {
        Ok(class) => PyErr::from_type(class, message),
        Err(missing) => missing,
    }
}

fn source_class(error: &SourceError) -> &'static str {
    match error {
        SourceError::Header {
            source: HeaderError::Pickle,
            ..
        } => "PickleFileError",
        SourceError::Header { .. } => "LoraFileError",
        SourceError::Io { source, .. } if source.kind() == ErrorKind::NotFound => {
            "LoraNotFoundError"
        }
        SourceError::Io { .. }
        | SourceError::Directory { .. }
        | SourceError::NotAFile { .. }
        | SourceError::Ended { .. }
        | SourceError::Changed { .. }
        | SourceError::Stopped { .. }
        | SourceError::Panicked { .. }
        | SourceError::NotAScalar { .. }
        | SourceError::NoNumber { .. }
        | SourceError::Range { .. } => "LoraReadError",
    }
}

/// A fault of reading.
pub(crate) fn from_source(py: Python<'_>, error: &SourceError) -> PyErr {
    raise(py, source_class(error), error.to_string())
}

/// A fault of planning one file.
pub(crate) fn from_plan(py: Python<'_>, error: &PlanError) -> PyErr {
    let class = match error {
        PlanError::Source(source) => source_class(source),
        PlanError::PickledPeftFolder { .. } => "PickleFileError",
        PlanError::NotAPeftFolder { .. } | PlanError::Config { .. } => "LoraReadError",
        PlanError::ConfigContent { .. }
        | PlanError::TooManyTensors { .. }
        | PlanError::NameTooLong { .. }
        | PlanError::Module { .. } => "LoraFileError",
    };
    raise(py, class, error.to_string())
}

/// A fault of planning a stack.
pub(crate) fn from_stack(py: Python<'_>, error: &StackError) -> PyErr {
    let class = match error {
        StackError::OtherModel { .. } => "OtherModelError",
        StackError::NothingApplicable { .. } => "NothingToApplyError",
        StackError::Strict { kind, .. } => match kind {
            SkipKind::Unsupported | SkipKind::UnknownLayout | SkipKind::Foreign => {
                "UnsupportedAdapterError"
            }
            SkipKind::Broken => "BrokenPairError",
            SkipKind::Shape | SkipKind::Missing | SkipKind::TurnedOff => "ShapeMismatchError",
        },
        StackError::SlotFull { .. } | StackError::RankLimit { .. } => "RankError",
    };
    raise(py, class, error.to_string())
}

/// JSON that Python built and Rust cannot read: a fault of ours.
pub(crate) fn from_json(py: Python<'_>, what: &str, error: &serde_json::Error) -> PyErr {
    raise(
        py,
        "QwenLoraError",
        format!("{what} is not what the planner takes: {error}"),
    )
}
