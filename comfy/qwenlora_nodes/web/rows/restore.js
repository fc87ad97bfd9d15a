/**
 * Stacks that were saved with widgets of other layouts than today's.
 *
 * - growing rows: their count, then name, strength and switch of each
 * - plain rows: name, strength and switch of each of ten
 * - by name: `loras.0.lora_name` or `lora_name_1`, and so on
 */

import { asRow, asRows, emptyRow } from "./value.js";

/** @typedef {import("./value.js").Row} Row */

const FLAT = /^loras\.(\d+)\.(lora_name|strength|enabled)$/;
const NUMBERED = /^(lora_name|strength|enabled)_(\d+)$/;
const FIELDS = 3;

/**
 * What a file has of a node, in today's layout: the rows are the value of the node's first widget.
 *
 * @param {Record<string, any>} saved A node as workflows have it.
 * @returns {Record<string, any>} the same object where its layout is today's.
 */
export function inTodaysLayout(saved) {
  const found = restored(saved.widgets_values, saved.widgets_values_named);
  const inputs = saved.inputs?.filter((input) => input.link != null || !isOfRows(input.name));
  if (!found) return inputs?.length === saved.inputs?.length ? saved : { ...saved, inputs };
  const named = saved.widgets_values_named && {
    ...Object.fromEntries(
      Object.entries(saved.widgets_values_named).filter(([key]) => !isCell(key)),
    ),
    loras: found.rows,
  };
  return {
    ...saved,
    inputs,
    widgets_values: [found.rows, ...found.rest],
    widgets_values_named: named,
  };
}

/**
 * Finds the rows of a layout that is not today's.
 *
 * @param {unknown} values `widgets_values`
 * @param {unknown} named `widgets_values_named`
 * @returns {{rows: Row[], rest: unknown[]} | null} `rest` is what was saved of the widgets behind
 *   the rows, in their order.
 */
function restored(values, named) {
  const positions = Array.isArray(values) ? values : [];
  if (asRows(positions[0])) return null;
  const found = growing(positions) ?? plain(positions);
  const rows = rowsByName(named) ?? found?.rows;
  return rows ? { rows: withoutUnused(rows), rest: found?.rest ?? [] } : null;
}

/** Tells if an input is the rows', or one cell's. @param {string} name */
function isOfRows(name) {
  return name === "loras" || isCell(name);
}

/** Tells if a widget's name is that of one cell of a row. @param {string} name */
function isCell(name) {
  return FLAT.test(name) || NUMBERED.test(name);
}

/** @param {unknown[]} values */
function growing(values) {
  const [count] = values;
  if (!Number.isInteger(count) || count < 0) return null;
  const { rows } = triples(values.slice(1, 1 + FIELDS * count));
  return rows.length === count ? { rows, rest: values.slice(1 + FIELDS * count) } : null;
}

/** @param {unknown[]} values */
function plain(values) {
  const { rows, rest } = triples(values);
  return rows.length ? { rows, rest } : null;
}

/** As many rows as a list begins with. @param {unknown[]} values */
function triples(values) {
  const rows = [];
  let at = 0;
  for (; at + FIELDS <= values.length; at += FIELDS) {
    const [lora_name, strength, enabled] = values.slice(at, at + FIELDS);
    const fits =
      (lora_name === null || typeof lora_name === "string") &&
      typeof strength === "number" &&
      typeof enabled === "boolean";
    if (!fits) break;
    rows.push(asRow({ lora_name, strength, enabled }));
  }
  return { rows, rest: values.slice(at) };
}

/** @param {unknown} named @returns {Row[] | null} */
function rowsByName(named) {
  if (!named || typeof named !== "object") return null;
  const today = asRows(named.loras);
  if (today) return today;
  /** @type {Map<number, Record<string, unknown>>} */
  const cells = new Map();
  for (const [key, value] of Object.entries(named)) {
    const flat = FLAT.exec(key);
    const numbered = NUMBERED.exec(key);
    if (!flat && !numbered) continue;
    const [index, field] = flat ? [flat[1], flat[2]] : [numbered[2], numbered[1]];
    cells.set(Number(index), { ...cells.get(Number(index)), [field]: value });
  }
  if (cells.size === 0) return null;
  return [...cells.keys()].sort((a, b) => a - b).map((index) => asRow(cells.get(index)));
}

/** Rows at the end that nobody filled are left out. @param {Row[]} rows @returns {Row[]} */
function withoutUnused(rows) {
  const last = rows.findLastIndex((row) => row.lora_name);
  return last < 0 ? [rows[0] ?? emptyRow()] : rows.slice(0, last + 1);
}
