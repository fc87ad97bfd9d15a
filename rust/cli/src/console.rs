//! The process's streams: whether they are watched, and how wide.

use std::env;
use std::io::{self, IsTerminal};
use std::time::Duration;

use crate::color::Palette;

/// Columns where nobody says otherwise.
const COLUMNS: usize = 80;
/// Narrower than this no table makes sense, and wider none has anything to say.
const COLUMNS_BOUNDS: (usize, usize) = (60, 1000);
/// Whoever waits longer than this wants to know for what.
const PATIENCE: Duration = Duration::from_secs(1);

/// How the streams that a run writes to are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Console {
    /// The meaning of `--color auto` for standard output.
    pub palette: Palette,
    /// Width of a table.
    pub columns: usize,
    /// How long standard error stays silent before it shows progress; none: for ever.
    pub progress_after: Option<Duration>,
}

impl Console {
    /// Streams that nobody watches: files, pipes, tests.
    pub const UNWATCHED: Self = Self {
        palette: Palette::Plain,
        columns: COLUMNS,
        progress_after: None,
    };

    /// The process's own streams.
    pub fn of_process() -> Self {
        Self {
            palette: Palette::of_stdout(),
            columns: columns(),
            progress_after: io::stderr().is_terminal().then_some(PATIENCE),
        }
    }
}

/// `COLUMNS` where it is set, else the terminal's width.
fn columns() -> usize {
    let set = env::var("COLUMNS")
        .ok()
        .and_then(|text| text.trim().parse().ok());
    let columns = set.filter(|columns| *columns > 0).or_else(|| {
        let (width, _) = terminal_size::terminal_size_of(io::stdout())?;
        Some(usize::from(width.0))
    });
    let (least, most) = COLUMNS_BOUNDS;
    columns.unwrap_or(COLUMNS).clamp(least, most)
}
