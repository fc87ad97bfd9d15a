//! One file in a few words: the cells of its line in a table.

use std::cmp::Reverse;

use qwenlora_core::adapter::Adapter;
use qwenlora_core::adapter::module::{Fault, Module};
use qwenlora_core::plan::check::ModelCheck;
use qwenlora_core::plan::{FilePlan, Verdict};

use crate::coverage;
use crate::losses::Losses;
use crate::report::is_bound;
use crate::screen::Tone;
use crate::talk::HINT;
use crate::tally::{count, counted, rounded, size_short};

/// Digits of a scale.
const SCALE_DIGITS: usize = 3;

/// A file's line in the table.
#[derive(Debug)]
pub(crate) struct Brief {
    /// The verdict in one word.
    pub(crate) mark: (Tone, &'static str),
    /// The file's size; empty where it could not be read.
    pub(crate) size: String,
    /// Its make; none where it is no known model's.
    pub(crate) facts: Option<Facts>,
    /// The modules that it trains; where it does not apply whole, the reason.
    pub(crate) remark: String,
}

/// A file's make.
#[derive(Debug)]
pub(crate) struct Facts {
    /// The commonest kind of adapter.
    pub(crate) adapter: String,
    /// Ranks; `≤` where only a bound can be told.
    pub(crate) rank: String,
    /// Scales at strength 1; empty where all are 1.
    pub(crate) scale: String,
}

/// The word for a verdict, and its tone.
pub(crate) fn mark(verdict: Verdict) -> (Tone, &'static str) {
    match verdict {
        Verdict::Apply => (Tone::Good, "APPLY"),
        Verdict::Partial => (Tone::Warning, "PARTIAL"),
        Verdict::Reject => (Tone::Bad, "REJECT"),
    }
}

impl Brief {
    /// The line of a file that could be read.
    pub(crate) fn of(plan: &FilePlan) -> Self {
        let facts = matches!(plan.check(), ModelCheck::Known(_)).then(|| Facts::of(plan));
        Self {
            mark: mark(plan.verdict()),
            size: size_short(plan.size_bytes()),
            facts,
            remark: remark(plan),
        }
    }

    /// The line of a file that could not be read; the message is said in full elsewhere.
    pub(crate) fn failure(message: &str) -> Self {
        let first = message.split(HINT).next().unwrap_or_default();
        // Messages begin with the file's name, which the line has anyway.
        let remark = match first.split_once("`: ") {
            Some((name, rest)) if name.starts_with('`') => rest,
            _ => first,
        };
        Self {
            mark: (Tone::Bad, "ERROR"),
            size: String::new(),
            facts: None,
            remark: remark.to_owned(),
        }
    }
}

impl Facts {
    fn of(plan: &FilePlan) -> Self {
        let whole: Vec<&Module> = plan
            .modules()
            .iter()
            .filter(|module| !matches!(module.fault, Some(Fault::Broken(_))))
            .collect();
        Self {
            adapter: adapters(&whole),
            rank: ranks(&whole),
            scale: scales(&whole),
        }
    }
}

/// `LoRA`; `LoRA+` with others beside it.
fn adapters(modules: &[&Module]) -> String {
    let mut kinds = counted(modules.iter().map(|m| m.adapter).collect(), Ord::cmp);
    kinds.sort_by_key(|(_, count)| Reverse(*count));
    match kinds.as_slice() {
        [] => String::new(),
        [(only, _)] => short_title(*only).to_owned(),
        [(first, _), ..] => format!("{}+", short_title(*first)),
    }
}

fn short_title(adapter: Adapter) -> &'static str {
    match adapter {
        Adapter::Full | Adapter::Norm | Adapter::Set => adapter.name(),
        _ => adapter.title(),
    }
}

/// `16`, `4-128`, `≤64`, or `full` where nothing bounds it.
fn ranks(modules: &[&Module]) -> String {
    let ranks = || modules.iter().filter_map(|module| module.rank);
    let (Some(low), Some(high)) = (ranks().min(), ranks().max()) else {
        return String::new();
    };
    let mut bounds = modules
        .iter()
        .filter(|module| module.rank == Some(high) && is_bound(module.adapter));
    match bounds.next() {
        Some(module) if module.shape.is_some_and(|(out, inp)| out.min(inp) <= high) => {
            "full".to_owned()
        }
        Some(_) => format!("≤{high}"),
        None if low == high => high.to_string(),
        None => format!("{low}-{high}"),
    }
}

/// `0.5`, `0.25-1`.
fn scales(modules: &[&Module]) -> String {
    let ranked = modules.iter().filter(|module| module.rank.is_some());
    let scales = counted(ranked.map(|module| module.scale).collect(), f64::total_cmp);
    let show = |scale: f64| rounded(scale, SCALE_DIGITS);
    match scales.as_slice() {
        [] => String::new(),
        [(only, _)] if only.total_cmp(&1.0).is_eq() => String::new(),
        [(only, _)] => show(*only),
        [(low, _), .., (high, _)] => format!("{}-{}", show(*low), show(*high)),
    }
}

fn remark(plan: &FilePlan) -> String {
    match plan.verdict() {
        Verdict::Apply => {
            let trains = coverage::brief(plan);
            match plan.notes().len() {
                0 => trains,
                notes => format!("{trains}, {}", count(notes, "note")),
            }
        }
        Verdict::Partial | Verdict::Reject => why(plan),
    }
}

/// Why a file is not applied whole: the reason that concerns the most of it.
fn why(plan: &FilePlan) -> String {
    if plan.model().is_none() {
        let reason = plan.reason().unwrap_or_default();
        return until(&reason, &[" (", ": "]).to_owned();
    }
    let losses = Losses::of(plan);
    let (all, applied) = (plan.modules().len(), plan.applied_modules().count());
    let Some(loss) = losses.modules.first() else {
        let first = losses
            .tensors
            .first()
            .map(|loss| until(&loss.text, &[" `"]));
        return format!("left out: {}", first.unwrap_or_default());
    };
    let reason = until(&loss.text, &[": "]);
    if applied > 0 {
        return format!("{} of {all} lost: {reason}", all - applied);
    }
    // The line names the kind already.
    match reason.strip_suffix(" is not supported") {
        Some(_) => "not supported".to_owned(),
        None => reason.to_owned(),
    }
}

/// The text before the first of these.
fn until<'t>(text: &'t str, ends: &[&str]) -> &'t str {
    let end = ends.iter().filter_map(|end| text.find(end)).min();
    end.and_then(|end| text.get(..end)).unwrap_or(text)
}
