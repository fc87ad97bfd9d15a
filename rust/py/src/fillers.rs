//! `Fillers`: recipes of `fill_packed` that are carried out while Python does something else.

use std::num::NonZeroUsize;
use std::sync::{Mutex, PoisonError};

use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use qwenlora_core::packed::{Fillers as CoreFillers, Filling as CoreFilling};

use crate::bytes::{Place, check_apart, collide};
use crate::pack::{PackedArgument, PackedTuple, borrowed};
use crate::signals::wait_until;

/// Threads that fill one list of recipes after another, in the order in which that was asked for.
#[pyclass(frozen, module = "qwenlora._core")]
pub(crate) struct Fillers {
    state: Mutex<State>,
}

struct State {
    /// None when closed.
    fillers: Option<CoreFillers>,
    begun: Vec<Begun>,
}

/// A request, and the memory that it fills.
struct Begun {
    places: Vec<Place>,
    filling: CoreFilling,
}

#[pymethods]
impl Fillers {
    /// Starts up to `threads` threads.
    #[new]
    #[pyo3(signature = (*, threads))]
    fn new(threads: NonZeroUsize) -> Self {
        let state = State {
            fillers: Some(CoreFillers::new(threads)),
            begun: Vec::new(),
        };
        Self {
            state: Mutex::new(state),
        }
    }

    /// Begins to carry out recipes, as `fill_packed` does, when those before them are done.
    ///
    /// Nobody may touch the arrays until the filling is done, or gone. Where a recipe writes to
    /// memory that is still in use, or reads what is still being filled, the call returns when that
    /// is done and this is begun.
    fn fill(&self, py: Python<'_>, recipes: Vec<PackedTuple<'_>>) -> PyResult<Filling> {
        let mut arguments = borrowed(py, &recipes)?;
        let places: Vec<_> = arguments.iter().flat_map(PackedArgument::places).collect();
        check_apart(places.clone())?;
        loop {
            let before = match self.begin(&mut arguments, &places)? {
                Start::Begun(filling) => {
                    let arrays = arguments.iter().flat_map(PackedArgument::arrays).collect();
                    return Ok(Filling {
                        filling,
                        _arrays: arrays,
                    });
                }
                Start::After(before) => before,
            };
            // What became of it is told to whoever asked for it.
            let _ = wait_until(py, |timeout| before.wait(timeout))?;
        }
    }

    /// Waits until all that was begun is done; no more can be begun.
    fn close(&self, py: Python<'_>) {
        let (fillers, begun) = self.locked(|state| {
            let begun = state.begun.iter().map(|begun| begun.filling.clone());
            (state.fillers.take(), begun.collect::<Vec<_>>())
        });
        py.detach(|| {
            // Whoever closes them a second time waits as well.
            begun.iter().for_each(CoreFilling::settle);
            drop(fillers);
        });
    }
}

/// The outcome of a request.
enum Start {
    Begun(CoreFilling),
    /// It takes memory of this one.
    After(CoreFilling),
}

impl Fillers {
    /// Begins, unless something else has to be done before.
    #[expect(unsafe_code, reason = "bytes are lent beyond a call")]
    fn begin(&self, arguments: &mut [PackedArgument<'_>], places: &[Place]) -> PyResult<Start> {
        self.locked(|state| {
            let fillers = state.fillers.as_ref();
            let fillers = fillers.ok_or_else(|| PyValueError::new_err("the fillers are closed"))?;
            state.begun.retain(|begun| !begun.filling.is_done());
            let mut begun = state.begun.iter();
            if let Some(before) = begun.find(|begun| collide(&begun.places, places)) {
                return Ok(Start::After(before.filling.clone()));
            }
            // SAFETY: `Filling` keeps the arrays, and settles before it lets them go. Of what these
            // fillers have in use nothing is written to a second time, nor read while it is written;
            // from all else Python keeps away until then, as it does for one call of `fill_packed`.
            let lend = |argument: &mut PackedArgument<'_>| unsafe { argument.lent() };
            let recipes = arguments.iter_mut().map(lend);
            let filling = fillers
                .fill(recipes.collect::<PyResult<_>>()?)
                .map_err(|e| PyValueError::new_err(e.to_string()))?;
            state.begun.push(Begun {
                places: places.to_vec(),
                filling: filling.clone(),
            });
            Ok(Start::Begun(filling))
        })
    }

    /// Does something with the state, with the GIL held all the time: whoever waits for one of the
    /// two never holds the other.
    fn locked<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        act(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Memory that is being filled; it is kept alive, and no thread uses it when this is gone.
#[pyclass(frozen, module = "qwenlora._core")]
pub(crate) struct Filling {
    filling: CoreFilling,
    _arrays: Vec<Py<PyAny>>,
}

#[pymethods]
impl Filling {
    /// Returns when all is filled; raises where that failed.
    fn wait(&self, py: Python<'_>) -> PyResult<()> {
        wait_until(py, |timeout| self.filling.wait(timeout))?
            .map_err(|e| PyRuntimeError::new_err(e.to_string()))
    }

    /// Whether nobody uses the memory any more, whatever became of it.
    fn query(&self) -> bool {
        self.filling.is_done()
    }

    /// Waits until nobody does.
    fn synchronize(&self, py: Python<'_>) {
        py.detach(|| self.filling.settle());
    }
}

impl Drop for Filling {
    fn drop(&mut self) {
        // Before the arrays go. No thread that fills needs the GIL.
        self.filling.settle();
    }
}
