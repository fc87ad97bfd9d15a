//! The modules that a file trains, kind by kind, and the blocks in which it does.

use std::collections::HashSet;

use qwenlora_core::model::{self, KnownModule, ModuleKind, Section};
use qwenlora_core::plan::FilePlan;

/// More stretches of blocks than this are cut short.
const MAX_STRETCHES: usize = 6;

/// The work of a module in the model; the order is the report's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    Attention,
    Mlp,
    Modulation,
    Norm,
    TopLevel,
}

const CLASSES: [(Class, &str); 5] = [
    (Class::Attention, "attention"),
    (Class::Mlp, "mlp"),
    (Class::Modulation, "modulation"),
    (Class::Norm, "norms"),
    (Class::TopLevel, "top level"),
];

/// The same, where there is little room.
const SHORT: [(Class, &str); 5] = [
    (Class::Attention, "attn"),
    (Class::Mlp, "mlp"),
    (Class::Modulation, "mod"),
    (Class::Norm, "norm"),
    (Class::TopLevel, "top"),
];

/// One module of the model's blocks, over all of them.
#[derive(Debug)]
struct Kind {
    class: Class,
    /// The blocks' name, as `transformer_blocks`; empty at top level.
    group: &'static str,
    /// The path inside a block.
    name: &'static str,
    /// How many blocks have it.
    total: usize,
    /// Blocks in which it is trained.
    blocks: Vec<u32>,
}

/// The trained kinds in few words: `attn mlp mod`, and the number of blocks where not all are.
pub(crate) fn brief(plan: &FilePlan) -> String {
    let kinds = kinds(plan);
    let mut words: Vec<String> = SHORT
        .iter()
        .filter(|(class, _)| kinds.iter().any(|kind| kind.class == *class))
        .map(|(_, name)| (*name).to_owned())
        .collect();
    let blocks: HashSet<_> = kinds
        .iter()
        .filter(|kind| !kind.group.is_empty())
        .flat_map(|kind| kind.blocks.iter().map(|block| (kind.group, *block)))
        .collect();
    let mut totals: Vec<_> = kinds
        .iter()
        .filter(|kind| !kind.group.is_empty())
        .map(|kind| (kind.group, kind.total))
        .collect();
    // Of a group's modules those that every block has tell how many blocks there are.
    totals.sort_unstable();
    let total: usize = totals
        .chunk_by(|(a, _), (b, _)| a == b)
        .filter_map(|group| Some(group.last()?.1))
        .sum();
    if blocks.len() < total {
        words.push(format!("{}/{total}", blocks.len()));
    }
    words.join(" ")
}

/// The kinds of module that a file trains.
fn kinds(plan: &FilePlan) -> Vec<Kind> {
    let trained: HashSet<usize> = plan.modules().iter().map(|module| module.id).collect();
    let mut kinds: Vec<Kind> = Vec::new();
    for (id, module) in model::table().modules().iter().enumerate() {
        add(&mut kinds, module, trained.contains(&id));
    }
    kinds.retain(|kind| !kind.blocks.is_empty());
    kinds
}

/// Rows of (label, text): what is trained, compactly.
pub(crate) fn rows(plan: &FilePlan) -> Vec<(&'static str, String)> {
    let kinds = kinds(plan);
    let mut rows = Vec::new();
    for (class, label) in CLASSES {
        let mut left: Vec<&Kind> = kinds.iter().filter(|kind| kind.class == class).collect();
        let mut label = label;
        while let Some(first) = left.first().copied() {
            let is_alike = |kind: &&Kind| kind.group == first.group && kind.blocks == first.blocks;
            let names: Vec<&str> = left
                .iter()
                .copied()
                .filter(is_alike)
                .map(|k| k.name)
                .collect();
            left.retain(|kind| !is_alike(kind));
            rows.push((label, format!("{}{}", extent(first), names.join(" "))));
            label = "";
        }
    }
    rows
}

fn add(kinds: &mut Vec<Kind>, module: &'static KnownModule, is_trained: bool) {
    let (group, name) = match module.block {
        Some(_) => {
            let (group, rest) = module.path.split_once('.').unwrap_or(("", &module.path));
            (group, rest.split_once('.').map_or(rest, |(_, name)| name))
        }
        None => ("", module.path.as_str()),
    };
    let block = module.block.unwrap_or(0);
    let at = kinds
        .iter()
        .position(|kind| kind.group == group && kind.name == name);
    let blocks = if is_trained { vec![block] } else { Vec::new() };
    match at.and_then(|at| kinds.get_mut(at)) {
        Some(kind) => {
            kind.total += 1;
            kind.blocks.extend(blocks);
        }
        None => kinds.push(Kind {
            class: class_of(module),
            group,
            name,
            total: 1,
            blocks,
        }),
    }
}

fn class_of(module: &KnownModule) -> Class {
    if module.block.is_none() {
        Class::TopLevel
    } else if matches!(module.kind, ModuleKind::Norm { .. }) {
        Class::Norm
    } else {
        match module.section {
            Section::Mlp => Class::Mlp,
            Section::Modulation => Class::Modulation,
            Section::Attention | Section::Other => Class::Attention,
        }
    }
}

/// `60/60 blocks: `, with the blocks where not all are there; nothing at top level.
fn extent(kind: &Kind) -> String {
    let Some(blocks) = model::block_kinds().find(|blocks| blocks.path == kind.group) else {
        return String::new();
    };
    let group = blocks.title;
    let (count, total) = (kind.blocks.len(), kind.total);
    if count == total {
        format!("{count}/{total} {group}: ")
    } else {
        format!("{count}/{total} {group} ({}): ", stretches(&kind.blocks))
    }
}

/// `0-18, 40` of ascending numbers.
fn stretches(blocks: &[u32]) -> String {
    let runs: Vec<&[u32]> = blocks.chunk_by(|a, b| a + 1 == *b).collect();
    let mut parts: Vec<String> = runs
        .iter()
        .take(MAX_STRETCHES)
        .map(|run| match run {
            [first, .., last] => format!("{first}-{last}"),
            [only] => only.to_string(),
            [] => String::new(),
        })
        .collect();
    if runs.len() > MAX_STRETCHES {
        parts.push("…".to_owned());
    }
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stretches_of_blocks() {
        assert_eq!(stretches(&[0, 1, 2, 5, 7, 8]), "0-2, 5, 7-8");
        assert_eq!(stretches(&[0, 2, 4, 6, 8, 10, 12]), "0, 2, 4, 6, 8, 10, …");
    }
}
