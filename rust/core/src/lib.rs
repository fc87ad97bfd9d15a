//! Reads LoRA files for Qwen-Image and plans how they apply.
//!
//! The stages, each one type: [`header::Header`] (bytes to names, dtypes, shapes, offsets),
//! [`table::KeyTable`] (names to modules and roles), [`plan::FilePlan`] (one file, no model),
//! [`stack::StackPlan`] (file plans and the slots of a model at hand). [`packed::fill`] moves factors to
//! where a layer reads them. No tensor arithmetic happens here, and nothing here knows Python.

#![forbid(unsafe_code)]
#![deny(missing_docs)]

pub mod adapter;
pub mod check;
pub mod component;
pub mod config;
mod countdown;
mod crew;
pub mod delta;
pub mod document;
pub mod dtype;
pub mod explain;
pub mod findings;
pub mod fit;
pub mod header;
pub mod key;
pub mod known;
pub mod lookalike;
pub mod magnitude;
pub mod model;
#[cfg(test)]
#[cfg(loom)]
mod model_checking;
pub mod module;
mod notes;
pub mod packed;
pub mod part;
pub mod peft;
mod pieces;
pub mod plan;
mod queue;
pub mod reason;
pub mod role;
pub mod slot;
pub mod source;
pub mod stack;
pub mod suffix;
mod sync;
pub mod table;
