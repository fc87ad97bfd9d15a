//! Work shared among threads: pieces of one list, each taken by whoever is free.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

/// Does all the work with up to `threads` threads, this one among them; the first error stops
/// every worker.
pub(crate) fn drain<T: Send, E: Send>(
    items: Vec<T>,
    threads: NonZeroUsize,
    work: impl Fn(T) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let helpers = threads.get().min(items.len()).saturating_sub(1);
    let queue = Mutex::new(items.into_iter());
    let failure = Mutex::new(None);
    let stop = AtomicBool::new(false);
    let take = || {
        while !stop.load(Ordering::Relaxed) {
            let next = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some(item) = next else { return };
            if let Err(error) = work(item) {
                stop.store(true, Ordering::Relaxed);
                let mut failure = failure.lock().unwrap_or_else(PoisonError::into_inner);
                failure.get_or_insert(error);
            }
        }
    };
    thread::scope(|scope| {
        for _ in 0..helpers {
            // This thread works, too: where the system gives no more threads, fewer do it all.
            if thread::Builder::new().spawn_scoped(scope, take).is_err() {
                break;
            }
        }
        take();
    });
    failure
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner)
        .map_or(Ok(()), Err)
}
