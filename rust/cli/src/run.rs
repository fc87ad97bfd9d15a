//! The files of one call: read side by side, reported in order.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use qwenlora_core::header::Quoted;
use qwenlora_core::plan::{FilePlan, Verdict};

use crate::args::{Format, Options};
use crate::brief::Brief;
use crate::color::Palette;
use crate::console::Console;
use crate::exit::Exit;
use crate::explanation;
use crate::json;
use crate::ordered::{self, Event};
use crate::report;
use crate::sources::{Form, Sources};
use crate::table::{self, Row};
use crate::talk::{HINT, Talk};
use crate::tally::count;

/// More files than this are a table, even if each is named.
const MAX_SCREENS: usize = 3;
/// Keys that are offered for one that a file does not have.
const MAX_NEAREST: usize = 5;

/// Something to report on.
#[derive(Debug)]
enum Item {
    /// A file or a PEFT folder.
    Source(PathBuf),
    /// A folder that gave nothing, and why.
    Fault(PathBuf, String),
}

/// The files that the arguments stand for.
#[derive(Debug, Default)]
struct Found {
    items: Vec<Item>,
    /// Links that lead out of a folder, left unread.
    links_out: Vec<PathBuf>,
    /// Files of folders that may hold LoRAs, in a form that is not read.
    passed_over: Vec<(Form, PathBuf)>,
    /// How many files and PEFT folders there are in all.
    sources: usize,
    /// Whether a folder stands for several of them.
    is_folder: bool,
}

/// The form of the report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Layout {
    /// A screen each.
    Screens { with_tensors: bool },
    /// A line each.
    Table,
    /// A line of JSON each.
    Json,
}

/// The report on one item.
struct Answer {
    exit: Exit,
    data: Data,
    trouble: Option<Trouble>,
}

enum Data {
    Text(String),
    Row(Row),
    Nothing,
}

/// A message on standard error.
struct Trouble {
    message: String,
    nearest: Vec<String>,
}

/// The outcomes so far, and the messages that are still to be said.
#[derive(Default)]
struct Report {
    exits: Vec<Exit>,
    has_text: bool,
    rows: Vec<Row>,
    troubles: Vec<Trouble>,
}

/// The files of one call.
pub(crate) struct Run<'r> {
    options: &'r Options,
    palette: Palette,
    columns: usize,
    stdout: &'r mut dyn Write,
    talk: Talk<'r>,
}

impl<'r> Run<'r> {
    /// With streams that are as the console says.
    pub(crate) fn new(
        options: &'r Options,
        console: Console,
        stdout: &'r mut dyn Write,
        stderr: &'r mut dyn Write,
    ) -> Self {
        Self {
            options,
            palette: Palette::choose(options.color, console.palette),
            columns: console.columns,
            stdout,
            talk: Talk::new(stderr, console.progress_after, console.columns),
        }
    }

    /// Reads and reports all files.
    pub(crate) fn read_all(mut self) -> io::Result<Exit> {
        let found = self.find();
        let layout = self.layout(&found);
        let reader = Reader {
            options: self.options,
            palette: self.palette,
            layout,
        };
        let mut report = Report::default();
        let all = count(found.items.len(), "file");
        let result = ordered::each(
            &found.items,
            |item| reader.answer(item),
            |event| {
                if let Event::Ready(answer) = event {
                    self.take(answer, layout, &mut report)?;
                }
                let done = report.exits.len();
                self.talk.progress(|| format!("{done} of {all} read"));
                Ok(())
            },
        );
        self.talk.erase();
        result?;
        self.finish(&found, layout, &report)?;
        Ok(report.exits.into_iter().max().unwrap_or(Exit::Applies))
    }

    /// Shows an answer, or keeps it for the table.
    fn take(&mut self, answer: Answer, layout: Layout, report: &mut Report) -> io::Result<()> {
        match answer.data {
            Data::Text(text) => {
                self.talk.erase();
                if report.has_text && layout != Layout::Json {
                    writeln!(self.stdout)?;
                }
                report.has_text = true;
                self.stdout.write_all(text.as_bytes())?;
            }
            Data::Row(row) => report.rows.push(row),
            Data::Nothing => {}
        }
        report.exits.push(answer.exit);
        match answer.trouble {
            // A table is not torn apart.
            Some(trouble) if layout == Layout::Table => report.troubles.push(trouble),
            Some(trouble) => self.say(&trouble)?,
            None => {}
        }
        Ok(())
    }

    /// The table, what is said after it, and the summary.
    fn finish(&mut self, found: &Found, layout: Layout, report: &Report) -> io::Result<()> {
        if layout == Layout::Table {
            let table = table::paint(&report.rows, self.columns, self.palette);
            self.stdout.write_all(table.as_bytes())?;
        }
        for trouble in &report.troubles {
            self.say(trouble)?;
        }
        self.stdout.flush()?;
        self.note_passed_over(found);
        if let Some(first) = found.links_out.first() {
            let (links, first) = (count(found.links_out.len(), "link"), Quoted::path(first));
            let text = format!("{links} out of the folder left unread, e.g. {first}");
            self.talk
                .say("note", &format!("{text}{HINT}name what they lead to"));
        }
        if found.items.len() > 1 && layout != Layout::Json && self.options.key.is_none() {
            let place = place(&table::home(&report.rows));
            let summary = summary(&report.exits);
            let files = count(report.exits.len(), "file");
            self.talk.line(&format!("{files}{place}: {summary}"));
        }
        Ok(())
    }

    /// Files that are not passed over without a word.
    fn note_passed_over(&mut self, found: &Found) {
        for form in Form::ALL {
            let mut own = found.passed_over.iter().filter(|(own, _)| *own == form);
            if let Some((_, first)) = own.next() {
                let (files, first) = (count(1 + own.count(), form.noun()), Quoted::path(first));
                let hint = form.hint();
                self.talk.say(
                    "note",
                    &format!("{files} passed over, e.g. {first}{HINT}{hint}"),
                );
            }
        }
    }

    fn find(&mut self) -> Found {
        let mut found = Found::default();
        for path in &self.options.paths {
            let (talk, before) = (&mut self.talk, found.sources);
            let sources = Sources::of(path, |more| {
                talk.progress(|| format!("{} found", count(before + more, "file")));
            });
            found.sources += sources.paths.len();
            found.is_folder |= sources.paths.len() > 1;
            let faults = sources.faults.into_iter().map(|(folder, fault)| {
                let message = format!("{}: {fault}", Quoted::path(&folder));
                Item::Fault(folder, message)
            });
            found.items.extend(faults);
            found
                .items
                .extend(sources.paths.into_iter().map(Item::Source));
            found.links_out.extend(sources.links_out);
            found.passed_over.extend(sources.passed_over);
        }
        self.talk.erase();
        found
    }

    fn layout(&self, found: &Found) -> Layout {
        match (self.options.format, &self.options.key) {
            (Format::Json, _) => Layout::Json,
            (Format::TextWithTensors, _) => Layout::Screens { with_tensors: true },
            (Format::Text, None) if found.is_folder || found.sources > MAX_SCREENS => Layout::Table,
            (Format::Text, _) => Layout::Screens {
                with_tensors: false,
            },
        }
    }

    fn say(&mut self, trouble: &Trouble) -> io::Result<()> {
        // What was said before this stays before it, where both reach one terminal.
        self.stdout.flush()?;
        self.talk.say("error", &trouble.message);
        for key in &trouble.nearest {
            self.talk.item(key);
        }
        Ok(())
    }
}

/// Turns items into answers; shared by the threads that read.
struct Reader<'r> {
    options: &'r Options,
    palette: Palette,
    layout: Layout,
}

impl Reader<'_> {
    fn answer(&self, item: &Item) -> Answer {
        match item {
            Item::Fault(path, message) => self.failure(path, message),
            Item::Source(path) => match (FilePlan::read(path), &self.options.key) {
                (Err(error), _) => self.failure(path, &error.to_string()),
                (Ok(plan), Some(key)) => self.explain(path, &plan, key),
                (Ok(plan), None) => self.report(path, &plan),
            },
        }
    }

    fn report(&self, path: &Path, plan: &FilePlan) -> Answer {
        let data = match self.layout {
            Layout::Screens { with_tensors } => {
                Data::Text(report::screen(path, plan, with_tensors).paint(self.palette))
            }
            Layout::Table => Data::Row(Row::new(path, Brief::of(plan))),
            Layout::Json => Data::Text(line(json::document(plan))),
        };
        Answer {
            exit: match plan.verdict() {
                Verdict::Apply => Exit::Applies,
                Verdict::Partial => Exit::Partial,
                Verdict::Reject => Exit::Rejected,
            },
            data,
            trouble: None,
        }
    }

    fn explain(&self, path: &Path, plan: &FilePlan, key: &str) -> Answer {
        let is_json = self.layout == Layout::Json;
        if let Some(explanation) = plan.explain(key) {
            let text = if is_json {
                line(explanation::document(path, &explanation))
            } else {
                explanation::screen(path, &explanation).paint(self.palette)
            };
            return Answer {
                exit: Exit::Applies,
                data: Data::Text(text),
                trouble: None,
            };
        }
        let nearest = plan.nearest_keys(key, MAX_NEAREST);
        let hint = if nearest.is_empty() {
            "`--all` lists its keys"
        } else {
            "its nearest keys are"
        };
        Answer {
            exit: Exit::NoSuchKey,
            data: if is_json {
                Data::Text(line(explanation::missing_document(path, key, &nearest)))
            } else {
                Data::Nothing
            },
            trouble: Some(Trouble {
                message: format!("{}{HINT}{hint}", explanation::missing(path, key)),
                nearest: nearest.into_iter().map(str::to_owned).collect(),
            }),
        }
    }

    fn failure(&self, path: &Path, message: &str) -> Answer {
        Answer {
            exit: Exit::Unreadable,
            data: match self.layout {
                Layout::Json => Data::Text(line(json::failure(path, message))),
                Layout::Table => Data::Row(Row::new(path, Brief::failure(message))),
                Layout::Screens { .. } => Data::Nothing,
            },
            trouble: Some(Trouble {
                message: message.to_owned(),
                nearest: Vec::new(),
            }),
        }
    }
}

fn line(mut text: String) -> String {
    text.push('\n');
    text
}

/// Words for the folder that all files are below; none where there is no such folder.
fn place(home: &Path) -> String {
    if home.as_os_str().is_empty() {
        String::new()
    } else {
        format!(" in {}", Quoted::path(home))
    }
}

/// `1 apply, 1 reject, 1 unreadable`.
fn summary(exits: &[Exit]) -> String {
    let kinds = [
        (Exit::Applies, "apply"),
        (Exit::Partial, "partial"),
        (Exit::Rejected, "reject"),
        (Exit::Unreadable, "unreadable"),
    ];
    let parts: Vec<String> = kinds
        .iter()
        .map(|(kind, name)| (exits.iter().filter(|exit| *exit == kind).count(), name))
        .filter(|(count, _)| *count > 0)
        .map(|(count, name)| format!("{count} {name}"))
        .collect();
    parts.join(", ")
}
