//! The extension module `qwenlora._core`: plain arguments in, core called, errors mapped.
//!
//! Users never import it; `python/qwenlora` does.

#![expect(
    clippy::needless_pass_by_value,
    reason = "PyO3 hands over owned arguments"
)]

mod bytes;
mod cli;
mod error;
mod file_plan;
mod fillers;
mod findings;
mod pack;
mod reader;
mod signals;
mod stack_plan;
mod touch;
mod watch;
mod weight;

use pyo3::prelude::*;

/// Rust core of qwenlora.
#[pymodule(gil_used = false)]
mod _core {
    #[pymodule_export]
    use super::cli::run_keys;
    #[pymodule_export]
    use super::file_plan::{FilePlan, file_identity};
    #[pymodule_export]
    use super::fillers::{Fillers, Filling};
    #[pymodule_export]
    use super::findings::look_at;
    #[pymodule_export]
    use super::pack::{fill_packed, unpack_factor};
    #[pymodule_export]
    use super::reader::{Readers, Reading, TensorReader};
    #[pymodule_export]
    use super::stack_plan::{PlannedStack, SlotMap, known_slots, layer_kinds, plan_stack};
    #[pymodule_export]
    use super::touch::touch;
    #[pymodule_export]
    use super::watch::Watch;
    #[pymodule_export]
    use super::weight::{awq_rows, column_norms, row_norms, svdq_rows};

    #[pymodule_export]
    const MAX_RANK: u64 = qwenlora_core::model::slot::MAX_RANK;
    #[pymodule_export]
    const MODULATION_PLANES: u64 = qwenlora_core::model::qwen_image::MODULATION_PLANES;
    #[pymodule_export]
    const RANK_MULTIPLE: u64 = qwenlora_core::model::slot::RANK_MULTIPLE;
    #[pymodule_export]
    const TILE: usize = qwenlora_core::packed::TILE;
    #[pymodule_export]
    const TRUNCATED_RANK: u64 = qwenlora_core::stack::TRUNCATED_RANK;

    #[allow(non_upper_case_globals, reason = "Python's name")]
    #[pymodule_export]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
