//! Waiting for Rust's threads without the GIL, as long as the user does not want to stop.

use std::time::Duration;

use pyo3::prelude::*;

/// How long a wait goes on before it is asked whether the user wants to stop.
const SIGNALS: Duration = Duration::from_millis(50);

/// Waits until `wait`, which waits for at most so long, says that it is done; what it says else.
///
/// Raises what a signal handler raises meanwhile.
pub(crate) fn wait_until<E: Send>(
    py: Python<'_>,
    wait: impl Fn(Duration) -> Result<bool, E> + Sync,
) -> PyResult<Result<(), E>> {
    loop {
        match py.detach(|| wait(SIGNALS)) {
            Ok(true) => return Ok(Ok(())),
            Ok(false) => py.check_signals()?,
            Err(error) => return Ok(Err(error)),
        }
    }
}
