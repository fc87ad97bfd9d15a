//! `run_keys`: the program `qwenlora-keys` inside the wheel.

use std::ffi::OsString;
use std::io::{self, Write};

use pyo3::prelude::*;

/// Runs `qwenlora-keys` with these arguments (without the program's name); its exit status.
#[pyfunction]
pub(crate) fn run_keys(py: Python<'_>, args: Vec<OsString>) -> u8 {
    py.detach(|| {
        let (mut stdout, mut stderr) = (io::stdout().lock(), io::stderr().lock());
        let exit = qwenlora_keys::run(args, &mut stdout, &mut stderr);
        // Python's own streams know nothing of these; a closed pipe has been answered already.
        let _ = stdout.flush().and_then(|()| stderr.flush());
        exit.code()
    })
}
