//! Work shared among threads.

pub(crate) mod countdown;
pub(crate) mod crew;
pub(crate) mod drain;
#[cfg(test)]
#[cfg(loom)]
pub(crate) mod model_checking;
pub(crate) mod sync;
pub(crate) mod tasks;
