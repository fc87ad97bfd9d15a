/** Saved nodes into today's: the new node stands where the old one stood, with its links. */

import { app } from "../../../scripts/app.js";
import { word } from "../words.js";
import { canConnect, connect, linkInto, linksOutOf, slotNamed } from "./links.js";

/** @typedef {import("./replacement.js").Replacement} Replacement */

const LOOKS = ["mode", "color", "bgcolor", "shape"];

/**
 * Converts nodes, after a question where something would be lost.
 *
 * @param {{node: object, replacement: Replacement}[]} pairs
 * @returns {Promise<object[]>} the new nodes
 */
export async function convert(pairs) {
  const refused = pairs.filter(({ node, replacement }) => obstacleOf(node, replacement));
  for (const { node, replacement } of refused) {
    tell("warn", node.title, obstacleOf(node, replacement));
  }
  const able = pairs.filter((pair) => !refused.includes(pair));
  const losses = able.flatMap(({ node, replacement }) =>
    replacement.losses.map((loss) => `${node.title}: ${loss}`),
  );
  if (able.length === 0 || (losses.length > 0 && !(await agrees(losses)))) return [];
  return asOneChange(() => able.map(({ node, replacement }) => exchange(node, replacement)));
}

/** Puts the new node in the old one's place. */
function exchange(old, { type, values }) {
  const { graph } = old;
  const fresh = LiteGraph.createNode(type);
  if (!fresh) throw new Error(`there is no node ${type}`);
  graph.add(fresh);
  fresh.pos = [...old.pos];
  for (const look of LOOKS) if (old[look] !== undefined) fresh[look] = old[look];
  if (old.title !== old.constructor.title) fresh.title = old.title;
  setValues(fresh, values);
  fresh.setSize([Math.max(old.size[0], fresh.size[0]), fresh.computeSize()[1]]);
  moveInputs(old, fresh);
  for (const link of passedOn(old)) connect(graph, link.from, link.to, link.reroute);
  moveOutputs(old, fresh);
  graph.remove(old);
  if (old.flags?.collapsed) fresh.collapse?.();
  return fresh;
}

function setValues(node, values) {
  for (const [name, value] of Object.entries(values)) {
    const widget = node.widgets.find((own) => own.name === name);
    if (!widget) throw new Error(`${node.type} has no widget ${name}`);
    widget.value = value;
    widget.callback?.(value);
  }
}

function moveInputs(old, fresh) {
  for (const [slot, input] of fresh.inputs.entries()) {
    const link = input.widget ? null : linkInto(old, input.name);
    if (link) connect(old.graph, link.from, { node: fresh, slot }, link.reroute);
  }
}

/** Outputs are known by their types: files of other versions name them otherwise. */
function moveOutputs(old, fresh) {
  for (const [slot, output] of (old.outputs ?? []).entries()) {
    const own = fresh.outputs.findIndex((other) => other.type === output.type);
    if (own < 0) continue;
    for (const { to, reroute } of linksOutOf(old, slot)) {
      connect(old.graph, { node: fresh, slot: own }, to, reroute);
    }
  }
}

/** Links round the node: what only went through it, as a text encoder does. */
function passedOn(old) {
  const source = linkInto(old, "clip");
  const slot = (old.outputs ?? []).findIndex((output) => output.type === "CLIP");
  if (!source || slot < 0) return [];
  return linksOutOf(old, slot).map(({ to }) => ({ ...source, to }));
}

function obstacleOf(node, replacement) {
  if (replacement.obstacle) return replacement.obstacle;
  const isStuck = passedOn(node).some(({ from, to }) => !canConnect(from, to));
  return isStuck ? word("saved.clip_edge") : null;
}

/** Lets one Ctrl+Z take back all of it. */
function asOneChange(act) {
  app.canvas.emitBeforeChange();
  try {
    return act();
  } finally {
    app.canvas.emitAfterChange();
    app.canvas.setDirty(true, true);
  }
}

async function agrees(losses) {
  const title = word("saved.ask");
  const message = word("saved.ask_more");
  const { dialog } = app.extensionManager;
  if (dialog?.confirm) return (await dialog.confirm({ title, message, itemList: losses })) === true;
  return window.confirm([title, message, ...losses].join("\n"));
}

function tell(severity, summary, detail) {
  const { toast } = app.extensionManager;
  if (toast?.add) toast.add({ severity, summary, detail, life: 12000 });
  else console.warn(`qwenlora: ${summary}: ${detail}`);
}
