//! The work of planning a stack: every module finds its slot or a reason.

use super::index::SlotIndex;
use super::piece::{self, Origin, Place};
use super::placed::{self, Placed, PlacedStack};
use super::route::Routes;
use super::uniform::{self, Summed};
use super::{
    LokrScale, LoraRow, Route, Skip, SkipKind, StackError, StackItem, StackOptions, dense,
};
use crate::adapter::PieceKind;
use crate::adapter::delta::Delta;
use crate::adapter::module::{Fault, Module, ScaleSource};
use crate::key::Foreign;
use crate::key::reason::Reason;
use crate::key::table::{Entry, KeyTable};
use crate::model::slot::{Slot, SlotKind};
use crate::model::{self, KnownModule};
use crate::plan::FilePlan;
use crate::plan::check::ModelCheck;
use crate::plan::fit;

/// A stack while it is being planned.
pub(super) struct Planner<'s> {
    pub(super) slots: &'s [Slot],
    pub(super) index: &'s SlotIndex,
    pub(super) options: StackOptions,
    pub(super) placed: Vec<Placed>,
    pub(super) skipped: Vec<Skip>,
}

impl<'s> Planner<'s> {
    /// Plans one LoRA; the number of its modules that are applied.
    pub(super) fn add(&mut self, lora: usize, item: &StackItem<'_>) -> Result<usize, StackError> {
        let refuse = |reason: String| StackError::OtherModel {
            lora: item.name.to_owned(),
            reason,
        };
        match &item.plan.check {
            ModelCheck::Known(model) => {
                let at_hand = self.index.model().filter(|at_hand| at_hand != model);
                if let Some(at_hand) = at_hand {
                    let (own, other) = (model.title(), at_hand.title());
                    return Err(refuse(format!("a {own} LoRA, and the model is {other}")));
                }
            }
            // Shapes are compared with the model at hand, below.
            ModelCheck::OtherShapes(_) => {}
            ModelCheck::Other(reason) | ModelCheck::Nothing(reason) => {
                return Err(refuse(reason.clone()));
            }
        }
        let first_skip = self.skipped.len();
        let mut applied = 0;
        for (at, module) in item.plan.modules.iter().enumerate() {
            match self.place((lora, at), item, module) {
                Ok(()) => {
                    applied += 1;
                    self.skip_parts(lora, module, item.plan.table.entries());
                }
                Err(skip) => self.skipped.push(skip),
            }
        }
        self.skip_foreign(lora, &item.plan.table);
        self.judge(item, applied, first_skip)?;
        Ok(applied)
    }

    /// Raises what cannot, or must not, be passed over.
    fn judge(&self, item: &StackItem<'_>, applied: usize, first: usize) -> Result<(), StackError> {
        let skips = self.skipped.get(first..).unwrap_or_default();
        let modules = || skips.iter().filter(|s| s.kind != SkipKind::Foreign);
        let turned_off = |s: &Skip| s.kind == SkipKind::TurnedOff;
        let lora = item.name.to_owned();
        // To turn off all that a LoRA has is the caller's wish, not the file's fault.
        if applied == 0 && !(modules().next().is_some() && modules().all(turned_off)) {
            let count = modules().count();
            let misfits = modules().filter(|s| s.kind == SkipKind::Shape).count();
            let reason = modules().find(|s| s.matters).map_or_else(
                || "it holds no module of this model".to_owned(),
                |s| {
                    let (name, reason) = (&s.name, &s.reason);
                    let modules = if count == 1 {
                        "module is"
                    } else {
                        "modules are"
                    };
                    format!("{count} {modules} left out, the first `{name}`: {reason}")
                },
            );
            return Err(if misfits > 0 && misfits * 2 >= count {
                StackError::OtherModel { lora, reason }
            } else {
                StackError::NothingApplicable { lora, reason }
            });
        }
        match skips.iter().find(|s| s.matters && !turned_off(s)) {
            Some(skip) if self.options.strict => Err(StackError::Strict {
                lora,
                name: skip.name.clone(),
                kind: skip.kind,
                reason: skip.reason.clone(),
            }),
            _ => Ok(()),
        }
    }

    /// Finds a module's slots and makes its deltas pieces of them.
    ///
    /// A module whose weight delta has no place is left out whole; what stands beside that delta
    /// is left out by itself.
    fn place(
        &mut self,
        (lora, module_at): (usize, usize),
        item: &StackItem<'_>,
        module: &Module,
    ) -> Result<(), Skip> {
        let known = model::table().module(module.id);
        let entries = item.plan.table.entries();
        let skip = |kind, reason: String| Skip {
            lora,
            name: known.path.clone(),
            kind,
            reason,
            piece: Some(module.adapter.piece()),
            matters: kind != SkipKind::TurnedOff,
            harmless: false,
        };
        match &module.fault {
            Some(Fault::Unsupported(text)) => {
                return Err(skip(SkipKind::Unsupported, text.clone()));
            }
            Some(Fault::Broken(text)) => return Err(skip(SkipKind::Broken, text.clone())),
            None => {}
        }
        let Some(places) = self.places_of(module) else {
            return Err(skip(
                SkipKind::Missing,
                "the model has no such module".to_owned(),
            ));
        };
        for place in &places {
            check_off(place.at, item).map_err(|(kind, text)| skip(kind, text))?;
            check_modulation(place.slot, item).map_err(|(kind, text)| skip(kind, text))?;
        }
        for (at, delta) in module.deltas.iter().enumerate() {
            let scale = self.scale(delta, module, item);
            let scaled = Delta { scale, ..*delta };
            let origin = Origin {
                lora,
                module: module_at,
                delta: at,
                part: None,
            };
            match self.pieces(&scaled, &places, origin) {
                Ok(placed) => self.placed.extend(placed),
                Err((kind, text)) if at == 0 => return Err(skip(kind, text)),
                Err((kind, text)) => {
                    let beside = skip_beside(lora, delta, entries, kind, text);
                    self.skipped.extend(beside);
                }
            }
        }
        Ok(())
    }

    /// The rows of slots that a module changes: those of one slot, or of several where the model
    /// has a fused module in parts.
    fn places_of(&self, module: &Module) -> Option<Vec<Place<'s>>> {
        let known = model::table().module(module.id);
        let place = |at: usize| {
            let slot = self.slots.get(at)?;
            Some(Place {
                at,
                slot,
                rows: self.rows_in(known, at),
                rank_limit: uniform::rank_limit(slot, self.options.max_rank, Route::Inside),
            })
        };
        if let Some(at) = self.index.slot_of(module.id) {
            return Some(vec![place(at)?]);
        }
        self.index
            .parts_of(module.id)?
            .into_iter()
            .map(place)
            .collect()
    }

    /// The rows that a module changes in the slot at this place.
    fn rows_in(&self, module: &KnownModule, at: usize) -> (u64, u64) {
        let all = self.slots.get(at).map_or(0, |slot| slot.out_features);
        let parts = module.place.parts as u64;
        if parts > 1 && self.index.module_of(at) == Some(module.place.module) {
            let rows = all / parts;
            (rows * module.place.part as u64, rows)
        } else {
            (0, all)
        }
    }

    /// Makes a delta pieces of its slots, where it fits.
    fn pieces(
        &self,
        delta: &Delta,
        places: &[Place<'_>],
        origin: Origin,
    ) -> Result<Vec<Placed>, (SkipKind, String)> {
        if !delta.scale.is_finite() {
            let text = format!("gives a scale of {}: it must be finite", delta.scale);
            return Err((SkipKind::Broken, text));
        }
        for place in places {
            let rows = places.iter().map(|place| place.rows.1).sum();
            if let Some(text) = fit::misfit_of(delta, (rows, place.slot.in_features), "the model") {
                return Err((SkipKind::Shape, text));
            }
        }
        match places {
            [place] => Ok(vec![piece::place(delta, place, origin, self.options)?]),
            _ => self.parted(delta, places, origin),
        }
    }

    /// Makes the rows of a delta pieces of the slots that they belong to.
    fn parted(
        &self,
        delta: &Delta,
        places: &[Place<'_>],
        origin: Origin,
    ) -> Result<Vec<Placed>, (SkipKind, String)> {
        let mut placed = Vec::new();
        let mut begin = 0;
        for place in places {
            let end = begin + place.rows.1;
            for run in delta.runs(begin..end) {
                let Some(part) = delta.part(&run) else {
                    let text = "cannot be cut into the parts that the model has of this module";
                    return Err((SkipKind::Unsupported, text.to_owned()));
                };
                let own = Place {
                    rows: (place.rows.0 + run.start - begin, run.end - run.start),
                    ..*place
                };
                let origin = Origin {
                    part: Some((run.start, run.end)),
                    ..origin
                };
                placed.push(piece::place(&part, &own, origin, self.options)?);
            }
            begin = end;
        }
        Ok(placed)
    }

    /// The scale of a delta, with the caller's rule for LoKr files that say nothing of it.
    fn scale(&self, delta: &Delta, module: &Module, item: &StackItem<'_>) -> f64 {
        let is_open = module.scale_source == ScaleSource::BothDirect
            && self.options.lokr_scale == LokrScale::Network
            && delta.adapter == module.adapter;
        let network = item.plan.network_scale().filter(|_| is_open);
        delta.scale * network.unwrap_or(1.0)
    }

    fn skip_parts(&mut self, lora: usize, module: &Module, entries: &[Entry]) {
        for (index, reason) in &module.left_out {
            // What is a delta has been compared with the model at hand.
            if module.deltas.iter().any(|delta| delta.holds(*index)) {
                continue;
            }
            if let Some(entry) = entries.get(*index) {
                self.skipped.push(Skip {
                    lora,
                    name: entry.tensor.key.clone(),
                    kind: SkipKind::Unsupported,
                    reason: reason.clone(),
                    piece: Some(PieceKind::Vector),
                    matters: true,
                    harmless: false,
                });
            }
        }
    }

    fn skip_foreign(&mut self, lora: usize, table: &KeyTable) {
        let whole_dump = table.has_base_weights();
        for entry in table.entries() {
            if let Some(reason) = &entry.reason {
                // In a dump of a wrapped model, the weights of its other layers are the base's.
                let is_base = whole_dump && *reason == Reason::Foreign(Foreign::PlainWeight);
                self.skipped.push(Skip {
                    lora,
                    name: entry.tensor.key.clone(),
                    kind: SkipKind::Foreign,
                    reason: reason.kind().to_owned(),
                    piece: None,
                    matters: reason.is_of_model() && !is_base,
                    harmless: reason.is_harmless() || is_base,
                });
            }
        }
    }

    /// Executes anew what runs beside its layer, where no kernel limits it.
    fn execute_beside(&mut self, routes: &Routes, plans: &[&FilePlan]) {
        for placed in &mut self.placed {
            let route = routes.of_slot(placed.slot);
            let (Route::Beside, Some(slot)) = (route, self.slots.get(placed.slot)) else {
                continue;
            };
            if let Some(delta) = placed.placed_delta(plans) {
                let place = Place {
                    at: placed.slot,
                    slot,
                    rows: placed.rows,
                    rank_limit: uniform::rank_limit(slot, self.options.max_rank, route),
                };
                placed.execution = piece::execution(&delta, &place, self.options);
            }
        }
    }

    /// The placed stack, slot by slot.
    pub(super) fn finish(
        mut self,
        items: &[StackItem<'_>],
        applied_modules: Vec<usize>,
    ) -> Result<PlacedStack, StackError> {
        let plans: Vec<&FilePlan> = items.iter().map(|item| item.plan).collect();
        placed::sort(&mut self.placed, &plans);
        let routes = Routes::of(&self.placed, self.slots, self.index);
        self.execute_beside(&routes, &plans);
        dense::keep_whole(
            &mut self.placed,
            &plans,
            self.slots,
            self.index,
            self.options,
        );
        let mut slots = Vec::new();
        let mut begin = 0;
        for own in self.placed.chunk_by(|a, b| a.slot == b.slot) {
            let end = begin + own.len();
            slots.push(Summed::new(
                self.slots,
                own,
                begin..end,
                &plans,
                self.options,
                own.first()
                    .map_or(Route::Inside, |own| routes.of_slot(own.slot)),
            )?);
            begin = end;
        }
        let uniform = uniform::form(self.slots, self.index, &mut slots);
        let added_bytes = uniform::added_bytes(self.slots, &slots, &uniform);
        let loras = items.iter().map(|item| LoraRow {
            name: item.name.to_owned(),
            strength: item.strength,
        });
        Ok(PlacedStack {
            loras: loras.collect(),
            placed: self.placed,
            slots: slots.into_iter().map(|summed| summed.slot).collect(),
            uniform,
            skipped: self.skipped,
            applied_modules,
            added_bytes,
        })
    }
}

/// Whether a slot gets anything of a LoRA.
fn check_off(slot: usize, item: &StackItem<'_>) -> Result<(), (SkipKind, String)> {
    if item.off.binary_search(&slot).is_err() {
        return Ok(());
    }
    let text = "blocks or kinds of layer are turned off".to_owned();
    Err((SkipKind::TurnedOff, text))
}

/// Whether a LoRA reaches an AWQ layer, and whether its rows are known there.
fn check_modulation(slot: &Slot, item: &StackItem<'_>) -> Result<(), (SkipKind, String)> {
    if slot.kind != SlotKind::Awq {
        return Ok(());
    }
    if !item.modulation {
        let text = "modulation layers are turned off".to_owned();
        return Err((SkipKind::TurnedOff, text));
    }
    if slot.row_order().is_none() {
        let text = "the row order of this AWQ layer is not known".to_owned();
        return Err((SkipKind::UnknownLayout, text));
    }
    Ok(())
}

/// A delta beside the weight's, by the key of its tensor.
fn skip_beside(
    lora: usize,
    delta: &Delta,
    entries: &[Entry],
    kind: SkipKind,
    reason: String,
) -> Option<Skip> {
    let (_, tensor) = delta.tensors().into_iter().next()?;
    Some(Skip {
        lora,
        name: entries.get(tensor.index)?.tensor.key.clone(),
        kind,
        reason,
        piece: Some(delta.piece_kind()),
        matters: true,
        harmless: false,
    })
}
