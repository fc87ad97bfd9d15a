//! One file, no model: what it is, and what would be applied.

pub mod check;
pub mod component;
pub mod config;
pub mod document;
mod error;
pub mod exactness;
pub mod explain;
mod file_plan;
pub mod fit;
mod notes;
mod tally;

pub use error::PlanError;
pub use file_plan::{FilePlan, Verdict};
