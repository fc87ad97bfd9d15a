//! Work done by several threads, whose results come in the order of the items.

use std::io;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::Duration;

/// Reading headers waits for disks and networks, so that more threads than a small machine has
/// cores are of use; many more only make a disk seek.
const THREADS: (usize, usize) = (4, 8);
/// Results that a thread may have waiting. It bounds memory, however many files there are.
const WAITING: usize = 2;
/// Time after which the receiver is told that nothing has come.
const TICK: Duration = Duration::from_millis(100);

/// A message to the receiver.
pub(crate) enum Event<R> {
    /// The next result.
    Ready(R),
    /// It takes its time.
    Waiting,
}

/// Calls `work` for each item, and `receive` with the results in the items' order.
///
/// Ends early with the first error of `receive`.
pub(crate) fn each<T: Sync, R: Send>(
    items: &[T],
    work: impl Fn(&T) -> R + Sync,
    mut receive: impl FnMut(Event<R>) -> io::Result<()>,
) -> io::Result<()> {
    let threads = threads().min(items.len());
    if threads < 2 {
        return items
            .iter()
            .try_for_each(|item| receive(Event::Ready(work(item))));
    }
    thread::scope(|scope| {
        // Thread n does items n, n + threads, and so on: whose turn it is needs no book-keeping, and
        // a full channel is what holds a thread back.
        let turns: Vec<Receiver<R>> = (0..threads)
            .map(|first| {
                let (sender, receiver) = mpsc::sync_channel(WAITING);
                let own = items.iter().skip(first).step_by(threads);
                let work = &work;
                scope.spawn(move || {
                    // An error means that the receiver wants no more.
                    own.map(work).try_for_each(|result| sender.send(result))
                });
                receiver
            })
            .collect();
        items
            .iter()
            .zip(turns.iter().cycle())
            .try_for_each(|(_, turn)| receive_next(turn, &mut receive))
    })
}

fn threads() -> usize {
    let (least, most) = THREADS;
    thread::available_parallelism().map_or(least, |cores| cores.get().clamp(least, most))
}

fn receive_next<R>(
    turn: &Receiver<R>,
    receive: &mut impl FnMut(Event<R>) -> io::Result<()>,
) -> io::Result<()> {
    loop {
        match turn.recv_timeout(TICK) {
            Ok(result) => return receive(Event::Ready(result)),
            Err(RecvTimeoutError::Timeout) => receive(Event::Waiting)?,
            // The thread is gone with a panic, which the scope passes on.
            Err(RecvTimeoutError::Disconnected) => return Err(io::ErrorKind::Other.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    use super::*;

    #[test]
    fn results_come_in_order_whoever_is_first() {
        let items: Vec<u64> = (0..100).collect();
        let work = |item: &u64| {
            thread::sleep(Duration::from_micros(item * 7919 % 900));
            *item
        };
        let mut results = Vec::new();
        each(&items, work, |event| {
            if let Event::Ready(result) = event {
                results.push(result);
            }
            Ok(())
        })
        .unwrap();
        assert_eq!(results, items);
    }

    #[test]
    fn nothing_runs_far_ahead() {
        let items = [(); 500];
        let started = AtomicUsize::new(0);
        let mut received = 0;
        each(
            &items,
            |()| started.fetch_add(1, SeqCst),
            |event| {
                if let Event::Ready(_) = event {
                    received += 1;
                    thread::sleep(Duration::from_micros(200));
                    let ahead = started.load(SeqCst) - received;
                    assert!(ahead <= threads() * (WAITING + 2), "{ahead}");
                }
                Ok(())
            },
        )
        .unwrap();
        assert_eq!(received, items.len());
    }

    #[test]
    fn an_error_of_the_receiver_ends_the_work() {
        let items = [(); 10_000];
        let started = AtomicUsize::new(0);
        let result = each(
            &items,
            |()| started.fetch_add(1, SeqCst),
            |_| Err(io::ErrorKind::BrokenPipe.into()),
        );
        assert_eq!(
            result.map_err(|error| error.kind()),
            Err(io::ErrorKind::BrokenPipe)
        );
        assert!(started.load(SeqCst) < 100);
    }

    #[test]
    fn a_slow_item_is_told_of() {
        let mut waited = 0;
        each(
            &[5, 0],
            |tenths| thread::sleep(Duration::from_millis(100 * tenths)),
            |event| {
                waited += usize::from(matches!(event, Event::Waiting));
                Ok(())
            },
        )
        .unwrap();
        assert!(waited > 0);
    }
}
