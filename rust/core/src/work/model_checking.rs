//! How much of a concurrent program a model tries.

use loom::model::Builder;

/// Most times that threads are stopped where they could go on. Nearly every fault of concurrent programs
/// takes fewer, and all models together take seconds.
const PREEMPTIONS: usize = 3;

/// Runs a model in every order of events within the bound; panics where one goes wrong, or where
/// threads wait for ever.
pub(crate) fn check(model: impl Fn() + Send + Sync + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(PREEMPTIONS);
    builder.check(model);
}
