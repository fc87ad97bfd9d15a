//! One file's screen.

use std::path::Path;

use qwenlora_core::adapter::Adapter;
use qwenlora_core::adapter::exactness::Exactness;
use qwenlora_core::adapter::module::{Fault, Module};
use qwenlora_core::plan::check::ModelCheck;
use qwenlora_core::plan::{FilePlan, Verdict};

use crate::brief;
use crate::coverage;
use crate::escape;
use crate::listing;
use crate::losses::{Loss, Losses};
use crate::producer;
use crate::screen::{Screen, TEXT_WIDTH, Tone};
use crate::tally::{count, counted, number, size, spread};

/// More reasons than this are summed up.
const MAX_REASONS: usize = 8;
/// Longest reason: it may quote a key of the file.
const REASON_CHARS: usize = 3 * TEXT_WIDTH;

/// The screen of a file; `with_tensors` adds the list of all of them.
pub(crate) fn screen(path: &Path, plan: &FilePlan, with_tensors: bool) -> Screen {
    let mut screen = Screen::default();
    let losses = Losses::of(plan);
    let (tone, word) = brief::mark(plan.verdict());
    screen.headline(tone, word, &path.to_string_lossy());
    screen.below(&escape::short(&sentence(plan), REASON_CHARS));
    loss_rows(&mut screen, tone, "lost", "module", &losses.modules);
    loss_rows(&mut screen, tone, "left out", "tensor", &losses.tensors);
    screen.blank();
    let facts = facts(plan).into_iter().chain(training(plan));
    for (label, text) in facts {
        screen.row(Tone::Faint, label, &text);
    }
    loss_rows(
        &mut screen,
        Tone::Faint,
        "ignored",
        "tensor",
        &losses.harmless,
    );
    for note in plan.notes() {
        screen.row(Tone::Warning, "note", &escape::short(note, REASON_CHARS));
    }
    if with_tensors {
        screen.blank();
        listing::add(&mut screen, plan);
    }
    screen
}

/// The verdict in words.
fn sentence(plan: &FilePlan) -> String {
    let (all, applied) = (plan.modules().len(), plan.applied_modules().count());
    let whole = match all {
        1 => "its one module is applied".to_owned(),
        _ => format!("all {all} modules are applied"),
    };
    match (plan.verdict(), plan.check()) {
        (Verdict::Apply, _) => whole,
        (Verdict::Partial, _) if applied == all => {
            format!("{whole}, but some tensors are left out")
        }
        (Verdict::Partial, _) => format!("{applied} of {all} modules are applied"),
        (Verdict::Reject, ModelCheck::Known(_)) => match all {
            1 => "its one module is not applied".to_owned(),
            _ => format!("none of its {all} modules is applied"),
        },
        (Verdict::Reject, _) => plan.reason().unwrap_or_default(),
    }
}

fn loss_rows(screen: &mut Screen, tone: Tone, label: &str, noun: &str, losses: &[Loss]) {
    let mut label = label;
    for loss in losses.iter().take(MAX_REASONS) {
        let text = format!("{}: {}", count(loss.count, noun), loss.text);
        screen.row(tone, label, &escape::short(&text, REASON_CHARS));
        screen.row(
            Tone::Faint,
            "  e.g.",
            &escape::short(&loss.example, TEXT_WIDTH),
        );
        label = "";
    }
    let rest = losses.get(MAX_REASONS..).unwrap_or_default();
    if !rest.is_empty() {
        let things = count(rest.iter().map(|loss| loss.count).sum(), noun);
        let reasons = count(rest.len(), "more reason");
        screen.below(&format!("{things} for {reasons}: `--all` lists them"));
    }
}

/// The rows on the file itself.
fn facts(plan: &FilePlan) -> Vec<(&'static str, String)> {
    let model = match plan.check() {
        ModelCheck::Known(model) => model.title(),
        ModelCheck::Other(_) | ModelCheck::OtherShapes(_) => "not supported",
        ModelCheck::Nothing(_) => "unknown",
    };
    vec![
        ("model", model.to_owned()),
        ("producer", producer::describe(plan)),
        ("file", file(plan)),
    ]
}

/// `281.5 MiB, 2520 tensors, BF16`.
fn file(plan: &FilePlan) -> String {
    let entries = plan.table().entries();
    let mut text = format!(
        "{}, {}",
        size(plan.size_bytes()),
        count(entries.len(), "tensor")
    );
    // Alphas often have another type, which matters to nobody.
    let large = entries.iter().filter(|entry| entry.elements() > 1);
    let dtypes = counted(
        large.map(|entry| entry.tensor.dtype.name()).collect(),
        Ord::cmp,
    );
    match dtypes.as_slice() {
        [] => {}
        [(only, _)] => text = format!("{text}, {only}"),
        several => {
            let parts: Vec<_> = several
                .iter()
                .map(|(name, n)| format!("{name} ({n})"))
                .collect();
            text = format!("{text}, {}", parts.join(", "));
        }
    }
    text
}

/// The rows on its modules, where it is a known model's.
fn training(plan: &FilePlan) -> Vec<(&'static str, String)> {
    if !matches!(plan.check(), ModelCheck::Known(_)) {
        return Vec::new();
    }
    let whole: Vec<&Module> = plan
        .modules()
        .iter()
        .filter(|m| !matches!(m.fault, Some(Fault::Broken(_))))
        .collect();
    let mut rows = Vec::new();
    let adapters = counted(whole.iter().map(|m| m.adapter).collect(), Ord::cmp);
    let named: Vec<_> = adapters
        .iter()
        .map(|(a, n)| format!("{} ({n})", a.title()))
        .collect();
    if !named.is_empty() {
        rows.push(("adapters", named.join(", ")));
    }
    let ranks = whole
        .iter()
        .filter_map(|m| Some((m.rank?, is_bound(m.adapter))))
        .collect();
    let show = |(rank, is_bound): &(u64, bool)| {
        if *is_bound {
            format!("up to {rank}")
        } else {
            rank.to_string()
        }
    };
    rows.extend(spread(&counted(ranks, Ord::cmp), show).map(|text| ("ranks", text)));
    let scaled = whole.iter().filter(|m| m.rank.is_some());
    let scales = counted(scaled.map(|m| m.scale).collect(), f64::total_cmp);
    rows.extend(spread(&scales, |scale| number(*scale)).map(|text| ("scales", text)));
    rows.extend(exactness(plan).map(|text| ("exactness", text)));
    rows.extend(slots(plan).map(|text| ("slots", text)));
    rows.extend(coverage::rows(plan));
    rows
}

/// `exact (20), norms estimated (4)`, where not all that is applied is exact.
fn exactness(plan: &FilePlan) -> Option<String> {
    let classes = plan.exactness().into_iter().map(|(_, class)| class);
    let counts = counted(classes.collect(), Ord::cmp);
    let parts = counts
        .iter()
        .map(|(class, count)| format!("{} ({count})", class.title()));
    let is_told = counts.iter().any(|(class, _)| *class != Exactness::Exact);
    is_told.then(|| parts.collect::<Vec<_>>().join(", "))
}

/// Whether the stored rank is only an upper bound of the delta's.
pub(crate) fn is_bound(adapter: Adapter) -> bool {
    !matches!(adapter, Adapter::Lora | Adapter::Dora | Adapter::Hra)
}

/// `480, rank at most 96 each`; no rank where it is a mere bound, as a Kronecker product's, which is
/// not carried as rank.
fn slots(plan: &FilePlan) -> Option<String> {
    let slots = plan.slot_rows();
    let highest = slots.iter().map(|slot| slot.rank).max()?;
    let is_told = highest > 0 && !plan.applied_modules().any(|m| is_bound(m.adapter));
    let rank = if is_told {
        format!(", rank at most {highest}")
    } else {
        String::new()
    };
    Some(match slots.as_slice() {
        [only] => format!("1{rank} (`{}`)", only.slot),
        _ if is_told => format!("{}{rank} each", slots.len()),
        _ => slots.len().to_string(),
    })
}

/// `16x3072`; a number without dimensions is `scalar`.
pub(crate) fn shape(shape: &[u64]) -> String {
    let sides: Vec<String> = shape.iter().map(u64::to_string).collect();
    if sides.is_empty() {
        "scalar".to_owned()
    } else {
        sides.join("x")
    }
}
