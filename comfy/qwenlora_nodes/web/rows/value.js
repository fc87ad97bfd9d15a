/**
 * The value of a stack: its rows, as they are saved and sent to the server.
 *
 * @typedef {{lora_name: string, strength: number, enabled: boolean}} Row
 *   `lora_name` is empty where no file is chosen.
 */

export const MAX_STRENGTH = 100;

/** @returns {Row} */
export function emptyRow() {
  return { lora_name: "", strength: 1, enabled: true };
}

/**
 * Reads a value that came from a file, a prompt or another node.
 *
 * @param {unknown} value
 * @returns {Row[] | null} null where it holds no rows.
 */
export function asRows(value) {
  const list = value && typeof value === "object" && "__value__" in value ? value.__value__ : value;
  if (!Array.isArray(list) || !list.every((row) => row && typeof row === "object")) return null;
  return list.map(asRow);
}

/**
 * Reads one row, under any of its fields' names.
 *
 * @param {Record<string, unknown>} fields
 * @returns {Row}
 */
export function asRow(fields) {
  const name = fields.lora_name ?? fields.lora ?? "";
  const strength = asStrength(fields.strength ?? fields.lora_strength ?? 1);
  return {
    lora_name: typeof name === "string" && name !== "None" ? name : "",
    strength: strength ?? 1,
    enabled: (fields.enabled ?? fields.on ?? true) !== false,
  };
}

/**
 * Reads a strength as a person types it: with a point or a comma.
 *
 * @param {unknown} text
 * @returns {number | null} within the limits; null where it is no number.
 */
export function asStrength(text) {
  const digits = String(text).trim().replace(",", ".");
  const number = Number(digits);
  if (digits === "" || !Number.isFinite(number)) return null;
  return Math.min(MAX_STRENGTH, Math.max(-MAX_STRENGTH, number));
}

/** @param {number} strength */
export function strengthText(strength) {
  const rounded = Number(strength.toFixed(4));
  return Number.isInteger(rounded * 100) ? rounded.toFixed(2) : String(rounded);
}

/** One step up or down, without the digits that binary fractions add. */
export function stepped(strength, step) {
  return asStrength((strength + step).toFixed(4));
}

// ---- each gives a new list ----

/** @param {Row[]} rows @param {number} index @param {Partial<Row>} change @returns {Row[]} */
export function changed(rows, index, change) {
  return rows.map((row, i) => (i === index ? { ...row, ...change } : row));
}

/** @param {Row[]} rows @param {number} max @returns {Row[]} the same list where it is full. */
export function added(rows, max) {
  return rows.length < max ? [...rows, emptyRow()] : rows;
}

/** @param {Row[]} rows @param {number} index @param {number} min @returns {Row[]} */
export function removed(rows, index, min) {
  const left = rows.filter((_, i) => i !== index);
  return left.length < min ? [...left, emptyRow()] : left;
}

/** @param {Row[]} rows @param {number} from @param {number} to @returns {Row[]} */
export function moved(rows, from, to) {
  if (from === to || to < 0 || to >= rows.length) return rows;
  const others = rows.filter((_, i) => i !== from);
  return [...others.slice(0, to), rows[from], ...others.slice(to)];
}

/** On where any is off, else off. @param {Row[]} rows @returns {Row[]} */
export function toggledAll(rows) {
  const enabled = !rows.every((row) => row.enabled);
  return rows.map((row) => ({ ...row, enabled }));
}
