//! Standard error: errors, notes, the summary, and progress while there is nothing else to see.

use std::io::Write;
use std::time::{Duration, Instant};

use crate::escape;

/// The beginning of a message's second line.
pub(crate) const HINT: &str = "\nhint: ";
/// Time between two pictures of the progress.
const FRAME: Duration = Duration::from_millis(100);

/// Messages beside the data. A message that cannot be written is lost: nobody could be told.
pub(crate) struct Talk<'s> {
    stderr: &'s mut dyn Write,
    progress_after: Option<Duration>,
    started: Instant,
    drawn: Option<Drawn>,
    columns: usize,
}

/// The progress as it stands on the terminal.
struct Drawn {
    at: Instant,
    columns: usize,
}

impl<'s> Talk<'s> {
    /// On this stream, which shows progress after this time where it is a terminal.
    pub(crate) fn new(
        stderr: &'s mut dyn Write,
        progress_after: Option<Duration>,
        columns: usize,
    ) -> Self {
        Self {
            stderr,
            progress_after,
            started: Instant::now(),
            drawn: None,
            columns,
        }
    }

    /// A message: `error: …` or `note: …`, with its hint on a line of its own.
    pub(crate) fn say(&mut self, kind: &str, message: &str) {
        // The break before a hint is ours; any other came in with a name.
        let parts: Vec<String> = message.split(HINT).map(escape::line).collect();
        self.line(&format!("{kind}: {}", parts.join(HINT)));
    }

    /// A line below a message.
    pub(crate) fn item(&mut self, text: &str) {
        self.line(&format!("  {}", escape::line(text)));
    }

    /// A line of text that is fit for a terminal.
    pub(crate) fn line(&mut self, text: &str) {
        self.erase();
        let _ = writeln!(self.stderr, "{text}").and_then(|()| self.stderr.flush());
    }

    /// Shows how far the work is, if it has taken long, and not too often.
    pub(crate) fn progress(&mut self, text: impl FnOnce() -> String) {
        let is_early = self
            .progress_after
            .is_none_or(|silence| self.started.elapsed() < silence);
        let is_fresh = self
            .drawn
            .as_ref()
            .is_some_and(|drawn| drawn.at.elapsed() < FRAME);
        if is_early || is_fresh {
            return;
        }
        // A terminal that is written to its last column may begin a line of its own.
        let text = escape::start(&text(), self.columns.saturating_sub(1));
        self.erase();
        let _ = write!(self.stderr, "{text}").and_then(|()| self.stderr.flush());
        self.drawn = Some(Drawn {
            at: Instant::now(),
            columns: escape::columns(&text),
        });
    }

    /// Takes the progress away: with spaces, which every console obeys.
    pub(crate) fn erase(&mut self) {
        if let Some(drawn) = self.drawn.take() {
            let _ = write!(self.stderr, "\r{:1$}\r", "", drawn.columns)
                .and_then(|()| self.stderr.flush());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_drawn_late_seldom_and_taken_away() {
        let mut stream = Vec::new();
        let mut talk = Talk::new(&mut stream, Some(Duration::from_secs(3600)), 80);
        talk.progress(|| "too early".to_owned());
        talk.line("done");
        assert_eq!(stream, b"done\n");

        let mut stream = Vec::new();
        let mut talk = Talk::new(&mut stream, Some(Duration::ZERO), 12);
        talk.progress(|| "1 of 200\x1b files".to_owned());
        talk.progress(|| "too often".to_owned());
        talk.say("error", "no\rtensor");
        talk.erase();
        assert_eq!(
            String::from_utf8_lossy(&stream),
            "1 of 200\\u…\r           \rerror: no\\u{d}tensor\n"
        );

        let mut stream = Vec::new();
        Talk::new(&mut stream, None, 80).progress(|| "to nobody".to_owned());
        assert!(stream.is_empty());
    }
}
