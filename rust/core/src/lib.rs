//! Reads LoRA files for Qwen-Image and plans how they apply.
//!
//! The stages, each one type: [`header::Header`] (bytes to names, dtypes, shapes, offsets),
//! [`key::table::KeyTable`] (names to modules and roles), [`plan::FilePlan`] (one file, no model),
//! [`stack::StackPlan`] (file plans and the slots of a model at hand). [`packed::fill`] moves factors to
//! where a layer reads them. No tensor arithmetic happens here, and nothing here knows Python.

#![forbid(unsafe_code)]
#![deny(missing_docs)]

pub mod adapter;
pub mod dtype;
pub mod header;
pub mod key;
pub mod model;
pub mod packed;
pub mod plan;
pub mod source;
pub mod stack;
mod work;
