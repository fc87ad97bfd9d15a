//! Many files: a table with a line for each.

use std::path::{MAIN_SEPARATOR, Path, PathBuf};

use crate::brief::{Brief, Facts};
use crate::color::Palette;
use crate::escape;
use crate::screen::Tone;

/// Columns between two cells.
const GAP: usize = 2;
/// Columns of a name, and of what a file trains, that are always there.
const LEAST_NAME: usize = 12;
const LEAST_REMARK: usize = 10;

/// One file's line.
#[derive(Debug)]
pub(crate) struct Row {
    path: PathBuf,
    is_folder: bool,
    brief: Brief,
}

impl Row {
    /// The line of the file or PEFT folder at `path`.
    pub(crate) fn new(path: &Path, brief: Brief) -> Self {
        Self {
            path: path.to_owned(),
            is_folder: path.is_dir(),
            brief,
        }
    }

    /// The name below `home`, without the ending that all have.
    fn name(&self, home: &Path) -> String {
        let below = self.path.strip_prefix(home).unwrap_or(&self.path);
        let below = if below.as_os_str().is_empty() {
            &self.path
        } else {
            below
        };
        let name = escape::line(&below.to_string_lossy());
        if self.is_folder {
            return format!("{}{MAIN_SEPARATOR}", name.trim_end_matches(MAIN_SEPARATOR));
        }
        let stem = name.len().saturating_sub(ENDING.len());
        match name.split_at_checked(stem) {
            Some((stem, ending)) if !stem.is_empty() && ending.eq_ignore_ascii_case(ENDING) => {
                stem.to_owned()
            }
            _ => name,
        }
    }
}

const ENDING: &str = ".safetensors";

/// The folder that all the rows' files are below; empty where there is none.
pub(crate) fn home(rows: &[Row]) -> PathBuf {
    let mut folders = rows.iter().filter_map(|row| row.path.parent());
    let Some(first) = folders.next() else {
        return PathBuf::new();
    };
    folders.fold(first.to_owned(), |home, folder| {
        let same = home.components().zip(folder.components());
        same.take_while(|(a, b)| a == b)
            .map(|(part, _)| part)
            .collect()
    })
}

/// A column's place and text in one row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Align {
    Left,
    Right,
}

/// The columns of facts, in order: their title, their side, and their text.
type Column = (&'static str, Align, fn(&Facts) -> &str);

const FACTS: [Column; 3] = [
    ("KIND", Align::Left, |facts| &facts.adapter),
    ("RANK", Align::Right, |facts| &facts.rank),
    ("SCALE", Align::Right, |facts| &facts.scale),
];
const MARK: &str = "VERDICT";
const NAME: &str = "FILE";
const SIZE: &str = "SIZE";
const REMARK: &str = "TRAINS, OR WHY NOT";

/// Widths of the columns, in columns of the terminal.
#[derive(Debug)]
struct Layout {
    name: usize,
    size: usize,
    /// The width of each column of facts; none where no row has anything in it.
    facts: [Option<usize>; FACTS.len()],
    remark: usize,
}

impl Layout {
    fn of(rows: &[Row], names: &[String], columns: usize) -> Self {
        let widest = |widths: &mut dyn Iterator<Item = usize>| widths.max().unwrap_or(0);
        let size = widest(&mut rows.iter().map(|row| row.brief.size.len())).max(SIZE.len());
        let with_facts = || {
            rows.iter()
                .filter_map(|row| Some((row, row.brief.facts.as_ref()?)))
        };
        let facts = FACTS.map(|(title, _, text)| {
            let width = widest(&mut with_facts().map(|(_, facts)| escape::columns(text(facts))));
            (width > 0).then(|| width.max(title.len()))
        });
        let fixed: usize = facts.iter().flatten().map(|width| width + GAP).sum();
        let left = columns.saturating_sub(MARK.len() + GAP + GAP + size + GAP + fixed);
        let remark = widest(&mut with_facts().map(|(row, _)| escape::columns(&row.brief.remark)))
            .max(REMARK.len());
        let widest_name = widest(&mut names.iter().map(|name| escape::columns(name)));
        // What one does not need the other gets; where both need more, the name gets the better half.
        let room = left.saturating_sub(remark).max(left * 5 / 9);
        let name = widest_name.min(room.max(LEAST_NAME)).max(NAME.len());
        Self {
            name,
            size,
            facts,
            remark: left.saturating_sub(name).max(LEAST_REMARK),
        }
    }

    /// Columns of a remark that takes the place of the facts as well.
    fn whole_remark(&self) -> usize {
        let facts: usize = self.facts.iter().flatten().map(|width| width + GAP).sum();
        facts + self.remark
    }

    fn line(
        &self,
        name: &str,
        size: &str,
        facts: Option<[&str; FACTS.len()]>,
        remark: &str,
    ) -> String {
        let name = escape::short(name, self.name);
        let mut line = pad(&name, self.name, Align::Left);
        line.push_str(&pad(size, self.size, Align::Right));
        if let Some(cells) = facts {
            for ((cell, width), (_, align, _)) in cells.iter().zip(self.facts).zip(FACTS) {
                line.push_str(&width.map_or(String::new(), |width| pad(cell, width, align)));
            }
        }
        let room = facts.map_or(self.whole_remark(), |_| self.remark);
        line.push_str(&escape::start(remark, room));
        line.truncate(line.trim_end().len());
        line
    }
}

/// `cell` in so many columns, and the gap after it.
fn pad(cell: &str, width: usize, align: Align) -> String {
    let blank = " ".repeat(width.saturating_sub(escape::columns(cell)));
    match align {
        Align::Left => format!("{cell}{blank}{:GAP$}", ""),
        Align::Right => format!("{blank}{cell}{:GAP$}", ""),
    }
}

/// The table in so many columns, each line ended.
pub(crate) fn paint(rows: &[Row], columns: usize, palette: Palette) -> String {
    let home = home(rows);
    let names: Vec<String> = rows.iter().map(|row| row.name(&home)).collect();
    let layout = Layout::of(rows, &names, columns);
    let titles = layout.line(NAME, SIZE, Some(FACTS.map(|(title, _, _)| title)), REMARK);
    let mut out = palette.paint(Tone::Faint, &format!("{MARK}  {titles}"));
    out.push('\n');
    for (row, name) in rows.iter().zip(&names) {
        let brief = &row.brief;
        let cells = brief
            .facts
            .as_ref()
            .map(|facts| FACTS.map(|(_, _, text)| text(facts)));
        let (tone, mark) = brief.mark;
        out.push_str(&palette.paint(tone, mark));
        out.push_str(&" ".repeat((MARK.len() + GAP).saturating_sub(mark.len())));
        out.push_str(&layout.line(name, &brief.size, cells, &brief.remark));
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(path: &str) -> Row {
        Row::new(
            Path::new(path),
            Brief::failure("`x`: the file is empty\nhint: again"),
        )
    }

    #[test]
    fn names_are_those_below_the_common_folder() {
        let rows = ["loras/a/x.safetensors", "loras/b.SAFETENSORS", "loras/c.pt"].map(row);
        let home = home(&rows);
        assert_eq!(home, Path::new("loras"));
        let names = rows
            .each_ref()
            .map(|row| row.name(&home).replace('\\', "/"));
        assert_eq!(names, ["a/x", "b", "c.pt"]);
        assert_eq!(super::home(&[row("/a/x"), row("b/x")]), Path::new(""));
        assert_eq!(super::home(&[row("x"), row("b/x")]), Path::new(""));
        assert_eq!(row(".safetensors").name(Path::new("")), ".safetensors");
    }

    #[test]
    fn every_line_fits() {
        let long = format!("{}画像{}.safetensors", "a".repeat(90), "b".repeat(90));
        let rows = [
            row(&long),
            row("画.safetensors"),
            row("e\u{301}\u{202e}.safetensors"),
        ];
        for columns in [60, 80, 133] {
            for line in paint(&rows, columns, Palette::Plain).lines() {
                assert!(escape::columns(line) <= columns, "{columns}: {line}");
            }
        }
    }
}
