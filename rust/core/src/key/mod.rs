//! Names of tensors: what they say, and the table of a file's.

pub mod lookalike;
mod parse;
pub mod part;
pub mod peft_method;
pub mod reason;
pub mod role;
pub mod suffix;
pub mod table;
mod wrapper;

pub use parse::{Foreign, PREFIXES, ParsedKey, Resolved, parse, resolve, resolve_with_prefixes};
pub(crate) use parse::{block_out_of_range, named_module, parse_beside};
pub(crate) use wrapper::unwrap_pattern;
