//! Threads that fill composed factors while somebody else does something else: one request after
//! another, without a pause in between.

use std::convert::Infallible;
use std::num::NonZeroUsize;
use std::time::Duration;

use thiserror::Error;

use super::band::{self, Band};
use super::{PackError, Recipe, check_all};
use crate::work::crew::{Begun, Crew, Turn, Work};
use crate::work::tasks::Apart;

/// Threads that carry out recipes in the order in which they come.
///
/// Dropped, they first do all that was begun.
#[derive(Debug)]
pub struct Fillers {
    crew: Crew<Bands>,
    wanted: NonZeroUsize,
}

/// Recipes that are being carried out, or wait for it.
#[derive(Debug, Clone)]
pub struct Filling {
    begun: Begun<Bands>,
}

/// A thread panicked while it filled, and has told so; what was to be filled is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("filling memory failed: a thread panicked")]
pub struct FillPanic;

/// Bands of all recipes of one request.
#[derive(Debug)]
struct Bands;

impl Fillers {
    /// Starts up to `threads` threads; where the system gives none, filling happens when asked for.
    pub fn new(threads: NonZeroUsize) -> Self {
        Self {
            crew: Crew::start("qwenlora-fill", threads),
            wanted: threads,
        }
    }

    /// Begins to carry out recipes, when all that was begun before is done.
    ///
    /// Every recipe is checked before. Their memory must not be used until [`Filling::wait`] says
    /// that it is filled.
    pub fn fill(&self, recipes: Vec<Recipe<'static>>) -> Result<Filling, PackError> {
        check_all(&recipes)?;
        let bands = recipes.into_iter().flat_map(band::cut).collect();
        let bands = Apart::new(bands, self.wanted);
        Ok(Filling {
            begun: self.crew.begin(Bands, bands),
        })
    }
}

impl Filling {
    /// Waits for at most this long; whether all is filled.
    pub fn wait(&self, timeout: Duration) -> Result<bool, FillPanic> {
        match self.begun.wait(timeout, |lapse| lapse.is_none()) {
            None => Ok(false),
            Some(true) => Ok(true),
            Some(false) => Err(FillPanic),
        }
    }

    /// Whether nobody uses the recipes' memory any more.
    pub fn is_done(&self) -> bool {
        self.begun.is_done()
    }

    /// Waits until nobody does.
    pub fn settle(&self) {
        self.begun.settle();
    }
}

impl Work for Bands {
    type Tasks = Apart<Band<'static>>;
    type Fault = Infallible;
    // A recipe may read what one before it fills.
    const TURN: Turn = Turn::WhenDone;

    fn carry_out(&self, band: Band<'static>) -> Result<(), Infallible> {
        band.fill();
        Ok(())
    }
}
