/** Values of saved files, read by the layouts in which past versions wrote their widgets. */

/**
 * @typedef {{layouts: string[][], kinds: Record<string, string>}} Layouts what the server tells of a
 *   node: names of widgets in the order of today, then of past versions; kinds of values by field
 * @typedef {{values: Record<string, unknown>, rows: number}} Found values by widget, and how many
 *   rows there are
 */

const HOLDS = {
  name: (value) => typeof value === "string",
  strength: (value) => typeof value === "number",
  count: (value) => Number.isInteger(value) || (typeof value === "string" && /^\d+$/.test(value)),
  offload: (value) => ["auto", "enable", "disable"].includes(value),
  flag: (value) => typeof value === "boolean",
};

/** The number of the row that a widget belongs to; 0 for the others. @param {string} name */
export function rowOf(name) {
  return Number(/_(\d+)$/.exec(name)?.[1] ?? 0);
}

/** A widget's name without its number. @param {string} name */
export function fieldOf(name) {
  return name.replace(/_\d+$/, "");
}

/**
 * The values that a saved node brings, by the names of today's widgets.
 *
 * @param {{widgets_values?: unknown, widgets_values_named?: unknown}} saved
 * @param {Layouts} layouts
 * @returns {Found | null} null where no layout tells them
 */
export function readSaved(saved, layouts) {
  const values = saved.widgets_values;
  const named = saved.widgets_values_named ?? (Array.isArray(values) ? null : values);
  const listed = Array.isArray(values) ? values : [];
  return readNames(named, layouts) ?? readObjects(listed, layouts) ?? readList(listed, layouts);
}

/** Tells if a value is of the kind that a widget holds. */
function holds(name, value, { kinds }) {
  return HOLDS[kinds[fieldOf(name)]]?.(value) ?? false;
}

/** Newer frontends save values by their names, too; those of rows that were objects among them. */
function readNames(named, layouts) {
  if (!isObject(named)) return null;
  const today = new Set(layouts.layouts[0].map(fieldOf));
  const own = Object.entries(named).filter(([name]) => today.has(fieldOf(name)));
  if (!own.every(([name, value]) => holds(name, value, layouts))) return null;
  const objects = Object.values(named).filter(isRow);
  const values = Object.fromEntries(own);
  if (objects.length > 0) return withObjects(values, objects, layouts);
  const rows = Math.max(0, ...own.map(([name]) => rowOf(name)));
  return rows > 0 ? { values, rows } : null;
}

/** Rows that are objects stand by themselves; the values before them are today's, in order. */
function readObjects(listed, layouts) {
  const first = listed.findIndex(isRow);
  if (first < 0) return null;
  const head = layouts.layouts[0].filter((name) => rowOf(name) === 0);
  const values = {};
  for (const [index, name] of head.slice(0, first).entries()) {
    if (!holds(name, listed[index], layouts)) return null;
    values[name] = listed[index];
  }
  return withObjects(values, listed.filter(isRow), layouts);
}

function withObjects(values, objects, layouts) {
  const found = { ...values };
  for (const [index, object] of objects.entries()) {
    const row = {
      enabled: object.enabled ?? object.on ?? true,
      lora_name: object.lora_name ?? object.lora ?? "None",
      lora_strength: object.lora_strength ?? object.strength ?? 1,
    };
    if (!Object.entries(row).every(([field, value]) => holds(field, value, layouts))) return null;
    for (const [field, value] of Object.entries(row)) found[`${field}_${index + 1}`] = value;
  }
  return { values: found, rows: objects.length };
}

/** Of the layouts that fit the one that names most values, the first of equals. */
function readList(listed, layouts) {
  let best = null;
  for (const layout of layouts.layouts) {
    const found = readLayout(listed, layout, layouts);
    if (found && Object.keys(found.values).length > Object.keys(best?.values ?? {}).length) {
      best = found;
    }
  }
  return best;
}

function readLayout(listed, layout, layouts) {
  const begin = layout.findIndex((name) => rowOf(name) === 1);
  const head = layout.slice(0, begin);
  if (!head.every((name, index) => holds(name, listed[index], layouts))) return null;
  const values = Object.fromEntries(head.map((name, index) => [name, listed[index]]));
  const fields = layout.filter((name) => rowOf(name) === 1).map(fieldOf);
  // Stacks without a count have as many rows as were saved, others those that are named.
  const most = head.includes("lora_count") ? Math.max(...layout.map(rowOf)) : Infinity;
  let rows = 0;
  for (let at = begin; rows < most; at += fields.length) {
    const row = listed.slice(at, at + fields.length);
    // What follows the saved rows is what new widgets begin with, in another order.
    if (row.length < fields.length) break;
    if (!fields.every((field, index) => holds(field, row[index], layouts))) break;
    rows += 1;
    for (const [index, field] of fields.entries()) values[`${field}_${rows}`] = row[index];
  }
  return rows > 0 ? { values, rows } : null;
}

function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function isRow(value) {
  return isObject(value) && ("lora_name" in value || "lora" in value);
}
