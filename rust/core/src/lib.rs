//! Reads LoRA files for Qwen-Image and Z-Image and plans how they apply.
//!
//! The stages are folders, and a folder uses only those above it here:
//!
//! - `work`: threads that share work.
//! - [`dtype`]: element types, and values as numbers.
//! - [`header`]: the bytes of a header to names, dtypes, shapes, offsets.
//! - [`packed`]: factors moved to the places where a layer reads them.
//! - [`weight`]: 4-bit weights as numbers, and their norms.
//! - [`source`]: an open file, its identity, its bytes.
//! - [`model`]: the modules of the known models, and the slots of a model at hand.
//! - [`key`]: names of tensors to modules and roles.
//! - [`adapter`]: a module's tensors to deltas and a scale.
//! - [`plan`]: one file without a model, [`plan::FilePlan`].
//! - [`stack`]: file plans on the slots of a model, [`stack::StackPlan`].
//!
//! Outside of [`weight`] no tensor arithmetic happens, and nothing here knows Python.

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
pub mod weight;
mod work;
