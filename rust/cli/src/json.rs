//! `--json`: a line per file.

use std::path::Path;

use qwenlora_core::plan::FilePlan;
use qwenlora_core::plan::document::SCHEMA;
use serde::Serialize;

use crate::escape;

/// The document of a file that cannot be read.
#[derive(Serialize)]
struct Failure<'e> {
    schema: u32,
    path: &'e str,
    error: &'e str,
}

/// The document of a file.
pub(crate) fn document(plan: &FilePlan) -> String {
    escape::json(&plan.to_json())
}

/// The line of a file that cannot be read.
pub(crate) fn failure(path: &Path, error: &str) -> String {
    let failure = Failure {
        schema: SCHEMA,
        path: &path.to_string_lossy(),
        error,
    };
    // Two strings and a number always serialise.
    escape::json(&serde_json::to_string(&failure).unwrap_or_default())
}
