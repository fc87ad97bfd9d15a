//! Models of a crew: its threads in every order of events, with work that tells what it touches.

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::panic;
use std::sync::Arc;
use std::time::Duration;

use loom::sync::Mutex;
use loom::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use loom::thread;

use super::{Begun, Crew, Lapse, Shared, Turn, Work};
use crate::work::model_checking::check;
use crate::work::sync::lock;

/// Added to a place that its owner has taken back.
const FREED: usize = 100;

/// Places that are written to. Each access is relaxed: that one is seen has to come from elsewhere.
type Memory = Arc<[AtomicUsize; 2]>;

fn memory() -> Memory {
    Arc::new([0, 0].map(AtomicUsize::new))
}

/// How often each place was written to, as far as this thread can see.
fn written(memory: &Memory) -> [usize; 2] {
    std::array::from_fn(|place| memory[place].load(Relaxed))
}

/// The fate of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Task {
    Written(usize),
    Failing(usize),
    Panicking(usize),
}

/// Writes once to the place of each task.
struct Writing<const IN_TURN: bool> {
    /// The memory that must be written before.
    before: Option<Memory>,
}

impl<const IN_TURN: bool> Work for Writing<IN_TURN> {
    /// With a part of what they use: it must be let go of before they count.
    type Tasks = VecDeque<(Task, Memory)>;
    type Fault = usize;
    const TURN: Turn = if IN_TURN {
        Turn::WhenDone
    } else {
        Turn::WhenTaken
    };

    fn carry_out(&self, (task, memory): (Task, Memory)) -> Result<(), usize> {
        let before = self.before.as_ref().map(written);
        assert!(matches!(before, None | Some([1, 1])), "begun in turn");
        let (Task::Written(place) | Task::Failing(place) | Task::Panicking(place)) = task;
        memory[place].fetch_add(1, Relaxed);
        match task {
            Task::Written(_) => Ok(()),
            Task::Failing(place) => Err(place),
            // The same without a message.
            Task::Panicking(_) => panic::resume_unwind(Box::new(())),
        }
    }
}

/// Fills as `Fillers` do, in turn.
type Filling = Writing<true>;
/// Reads as `Readers` do, without a pause.
type Reading = Writing<false>;

const BOTH: [Task; 2] = [Task::Written(0), Task::Written(1)];

fn crew<W: Work>(threads: usize) -> Crew<W> {
    match NonZeroUsize::new(threads) {
        Some(threads) => Crew::start("model", threads),
        None => Crew::of(Arc::new(Shared::new()), Vec::new()),
    }
}

fn begin<const IN_TURN: bool>(
    crew: &Crew<Writing<IN_TURN>>,
    memory: &Memory,
    tasks: &[Task],
    before: Option<&Memory>,
) -> Begun<Writing<IN_TURN>> {
    let tasks = tasks.iter().map(|&task| (task, Arc::clone(memory)));
    let before = before.map(Arc::clone);
    crew.begin(Writing { before }, tasks.collect())
}

/// The outcome of a request that is done.
fn outcome<W: Work<Fault: Copy>>(begun: &Begun<W>) -> Option<Lapse<W::Fault>> {
    let told = begun.wait(Duration::MAX, |lapse| *lapse);
    told.expect("this wait does not end before")
}

/// All is written once, and only the test has it.
fn assert_written(memory: &Memory) {
    assert_eq!(written(memory), [1, 1]);
    assert_eq!(Arc::strong_count(memory), 1);
}

fn spawn(act: impl FnOnce() + 'static) -> thread::JoinHandle<()> {
    thread::spawn(act)
}

fn every_task_is_done_once<const IN_TURN: bool>(threads: usize) {
    check(move || {
        let (crew, memory) = (crew::<Writing<IN_TURN>>(threads), memory());
        let begun = begin(&crew, &memory, &BOTH, None);
        assert_eq!(outcome(&begun), None);
        assert_written(&memory);
        drop(crew);
        assert_written(&memory);
    });
}

#[test]
fn every_task_is_done_once_by_one_thread() {
    every_task_is_done_once::<true>(1);
    every_task_is_done_once::<false>(1);
}

#[test]
fn every_task_is_done_once_by_two_threads() {
    every_task_is_done_once::<true>(2);
    every_task_is_done_once::<false>(2);
}

#[test]
fn requests_are_carried_out_in_turn() {
    check(|| {
        let (crew, one, other) = (crew::<Filling>(2), memory(), memory());
        let first = begin(&crew, &one, &BOTH, None);
        let second = begin(&crew, &other, &BOTH, Some(&one));
        // Done when its turn would come.
        let nothing = begin(&crew, &other, &[], None);
        nothing.settle();
        assert!(first.is_done() && second.is_done());
        assert_eq!(outcome(&second), None);
        assert_eq!([written(&one), written(&other)], [[1, 1]; 2]);
    });
}

#[test]
fn requests_without_turn_overlap_and_are_all_done() {
    check(|| {
        let (crew, one, other) = (crew::<Reading>(2), memory(), memory());
        let first = begin(&crew, &one, &BOTH, None);
        let second = begin(&crew, &other, &BOTH, None);
        assert_eq!(outcome(&second), None);
        assert_written(&other);
        assert_eq!(outcome(&first), None);
        assert_written(&one);
    });
}

/// Who asks without waiting, or not for long, is told the truth.
#[test]
fn what_counts_as_done_is_visible() {
    check(|| {
        let (crew, memory) = (crew::<Filling>(2), memory());
        let begun = begin(&crew, &memory, &BOTH, None);
        if begun.is_done() {
            assert_written(&memory);
        }
        if begun.wait(Duration::ZERO, |lapse| *lapse).is_some() {
            assert_written(&memory);
        }
        begun.settle();
        assert_written(&memory);
    });
}

#[test]
fn two_wait_for_one_request() {
    check(|| {
        let (crew, memory) = (crew::<Filling>(1), memory());
        let begun = begin(&crew, &memory, &BOTH, None);
        let waiting = [(); 2].map(|()| {
            let (begun, memory) = (begun.clone(), Arc::clone(&memory));
            spawn(move || {
                begun.settle();
                assert_eq!(written(&memory), [1, 1]);
            })
        });
        for thread in waiting {
            thread.join().unwrap();
        }
        assert_eq!(outcome(&begun), None);
    });
}

#[test]
fn two_begin_at_once() {
    check(|| {
        let crew = Arc::new(crew::<Filling>(1));
        let own = Arc::clone(&crew);
        let asking = spawn(move || {
            let memory = memory();
            assert_eq!(outcome(&begin(&own, &memory, &BOTH, None)), None);
            assert_eq!(written(&memory), [1, 1]);
        });
        let memory = memory();
        assert_eq!(outcome(&begin(&crew, &memory, &BOTH, None)), None);
        assert_eq!(written(&memory), [1, 1]);
        asking.join().unwrap();
    });
}

#[test]
fn where_there_is_no_thread_whoever_asks_does_the_work() {
    check(|| {
        let crew = Arc::new(crew::<Filling>(0));
        let own = Arc::clone(&crew);
        let asking = spawn(move || {
            let memory = memory();
            let begun = begin(&own, &memory, &BOTH, None);
            assert!(begun.is_done());
            assert_eq!(written(&memory), [1, 1]);
        });
        let memory = memory();
        let begun = begin(&crew, &memory, &BOTH, None);
        assert!(begun.is_done());
        assert_eq!(written(&memory), [1, 1]);
        asking.join().unwrap();
    });
}

#[test]
fn a_crew_that_is_dropped_does_what_was_begun() {
    check(|| {
        let (crew, one, other) = (crew::<Filling>(2), memory(), memory());
        let first = begin(&crew, &one, &BOTH, None);
        let second = begin(&crew, &other, &BOTH[..1], Some(&one));
        drop(crew);
        assert!(first.is_done() && second.is_done());
        assert_eq!([written(&one), written(&other)], [[1, 1], [1, 0]]);
    });
}

#[test]
fn a_crew_that_gives_up_ends_while_others_wait() {
    check(|| {
        let (crew, memory) = (crew::<Reading>(1), memory());
        let begun = begin(&crew, &memory, &BOTH, None);
        let (own, buffer) = (begun.clone(), Arc::clone(&memory));
        let waiting = spawn(move || {
            let outcome = outcome(&own);
            let is_written = written(&buffer) == [1, 1];
            assert_eq!(outcome, (!is_written).then_some(Lapse::GivenUp));
            // This thread's and the test's: no task is left.
            assert_eq!(Arc::strong_count(&buffer), 2);
        });
        crew.give_up();
        drop(crew);
        assert!(begun.is_done());
        waiting.join().unwrap();
    });
}

/// As the extension has them: whoever comes late finds them closed, all others are told.
#[test]
fn a_crew_is_closed_while_others_begin() {
    check(|| {
        let crew = Arc::new(Mutex::new(Some(crew::<Reading>(1))));
        let own = Arc::clone(&crew);
        let asking = spawn(move || {
            let memory = memory();
            let begun = lock(&own)
                .as_ref()
                .map(|crew| begin(crew, &memory, &BOTH, None));
            match begun.as_ref().map(outcome) {
                None => assert_eq!(written(&memory), [0, 0]),
                Some(None) => assert_eq!(written(&memory), [1, 1]),
                Some(Some(lapse)) => assert_eq!(lapse, Lapse::GivenUp),
            }
        });
        let closing = lock(&crew).take();
        if let Some(crew) = &closing {
            crew.give_up();
        }
        drop(closing);
        asking.join().unwrap();
    });
}

#[test]
fn a_task_that_fails_ends_its_request_alone() {
    check(|| {
        let (crew, one, other) = (crew::<Reading>(2), memory(), memory());
        let first = begin(&crew, &one, &[Task::Failing(0), Task::Written(1)], None);
        let second = begin(&crew, &other, &BOTH, None);
        assert_eq!(outcome(&first), Some(Lapse::Failed(0)));
        assert_eq!(Arc::strong_count(&one), 1);
        // The other one may have been in work.
        assert!(matches!(written(&one), [1, 0 | 1]));
        assert_eq!(outcome(&second), None);
        assert_written(&other);
    });
}

/// Two tasks fail, and one error is told.
#[test]
fn a_request_fails_once() {
    check(|| {
        let (crew, memory) = (crew::<Reading>(2), memory());
        let tasks = [Task::Failing(0), Task::Failing(1)];
        let begun = begin(&crew, &memory, &tasks, None);
        assert!(matches!(outcome(&begun), Some(Lapse::Failed(0 | 1))));
        assert_eq!(Arc::strong_count(&memory), 1);
    });
}

#[test]
fn a_task_that_panics_is_told_and_its_thread_goes_on() {
    check(|| {
        let (crew, one, other) = (crew::<Filling>(1), memory(), memory());
        let tasks = [Task::Panicking(0), Task::Written(1)];
        let first = begin(&crew, &one, &tasks, None);
        let second = begin(&crew, &other, &BOTH, None);
        assert_eq!(outcome(&second), None);
        assert_written(&other);
        assert_eq!(outcome(&first), Some(Lapse::Panicked));
        assert_eq!(written(&one), [1, 0]);
    });
}

#[test]
fn nothing_writes_to_what_was_let_go() {
    check(|| {
        let (crew, one, other) = (crew::<Reading>(2), memory(), memory());
        let first = begin(&crew, &one, &BOTH, None);
        let second = begin(&crew, &other, &BOTH[..1], None);
        first.give_up();
        first.settle();
        drop(first);
        let written_before = written(&one);
        one.iter().for_each(|place| {
            place.fetch_add(FREED, Relaxed);
        });
        // Nothing knows it any more, and the others go on.
        assert_eq!(Arc::strong_count(&one), 1);
        assert_eq!(outcome(&second), None);
        drop(crew);
        assert_eq!(written(&one), written_before.map(|count| count + FREED));
        assert_eq!(written(&other), [1, 0]);
    });
}

#[test]
fn what_is_given_up_takes_nothing_else_with_it() {
    check(|| {
        let (crew, one, other) = (crew::<Reading>(1), memory(), memory());
        let first = begin(&crew, &one, &BOTH, None);
        let second = begin(&crew, &other, &BOTH, None);
        second.give_up();
        second.settle();
        assert_eq!(Arc::strong_count(&other), 1);
        assert_eq!(outcome(&first), None);
        assert_written(&one);
    });
}
