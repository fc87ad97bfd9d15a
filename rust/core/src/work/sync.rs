//! Locks, conditions and threads: the system's, or in a model `loom`'s, which tries every order of
//! events.
//!
//! `--cfg loom` chooses for unit tests. Whatever waits does so through this module, so that a model
//! checks the code that runs.

#[cfg(all(test, loom))]
pub(crate) use loom::{
    sync::{Condvar, Mutex, MutexGuard, atomic::AtomicBool},
    thread,
};
#[cfg(not(all(test, loom)))]
pub(crate) use std::{
    sync::{Condvar, Mutex, MutexGuard, atomic::AtomicBool},
    thread,
};

use std::sync::PoisonError;
use std::time::Duration;

/// Locks, whoever panicked before.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Locks, and waits for notifications as long as this holds.
pub(crate) fn wait_while<'m, T>(
    notified: &Condvar,
    mutex: &'m Mutex<T>,
    mut holds: impl FnMut(&mut T) -> bool,
) -> MutexGuard<'m, T> {
    let mut guard = lock(mutex);
    while holds(&mut guard) {
        let waited = notified.wait(guard);
        guard = waited.unwrap_or_else(PoisonError::into_inner);
    }
    guard
}

/// The same for at most this long.
#[cfg(not(all(test, loom)))]
pub(crate) fn wait_while_within<'m, T>(
    notified: &Condvar,
    mutex: &'m Mutex<T>,
    timeout: Duration,
    holds: impl FnMut(&mut T) -> bool,
) -> MutexGuard<'m, T> {
    let waited = notified.wait_timeout_while(lock(mutex), timeout, holds);
    waited.unwrap_or_else(PoisonError::into_inner).0
}

/// The same in a model, which has no clock: [`Duration::MAX`] never ends, any other time ends once,
/// after whatever other threads do meanwhile.
#[cfg(all(test, loom))]
pub(crate) fn wait_while_within<'m, T>(
    notified: &Condvar,
    mutex: &'m Mutex<T>,
    timeout: Duration,
    mut holds: impl FnMut(&mut T) -> bool,
) -> MutexGuard<'m, T> {
    if timeout == Duration::MAX {
        return wait_while(notified, mutex, holds);
    }
    let mut guard = lock(mutex);
    if holds(&mut guard) {
        drop(guard);
        thread::yield_now();
        guard = lock(mutex);
    }
    guard
}
