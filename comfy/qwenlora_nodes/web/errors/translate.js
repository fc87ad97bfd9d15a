/** A message of the server in another language: line by line, by the templates of both. */

const ROW =
  /^(?:loras\.(?<index>\d+)\.lora_name|lora_stack, entry (?<entry>\d+)|lora(?:_name)?_(?<number>\d+)): (?<rest>.*)$/;
const PLACE = /\{(\w+)\}/g;

/**
 * Puts values into a template.
 *
 * @param {string} template with places such as `{name}`
 * @param {Record<string, string>} values
 */
function filled(template, values) {
  return template.replace(PLACE, (place, name) => values[name] ?? place);
}

/**
 * The values of a template's places in a line; null where the line is not made from it.
 *
 * @param {string} line
 * @param {string} template
 */
function valuesIn(line, template) {
  const pattern = template
    .split(PLACE)
    .map((part, at) => (at % 2 ? `(?<${part}>.+?)` : part.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")))
    .join("");
  const match = new RegExp(`^${pattern}$`).exec(line);
  return match && { ...match.groups };
}

/** A line without a row before it; null where no template fits. */
function lineIn(line, source, target) {
  for (const [key, template] of Object.entries(source.errors)) {
    const values = valuesIn(line, template);
    if (values && target.errors[key]) return filled(target.errors[key], values);
  }
  return null;
}

/**
 * A message in another language. Lines that no template fits stay as they are.
 *
 * @param {unknown} text
 * @param {{errors: Record<string, string>, row: string}} source the words in the text's language
 * @param {{errors: Record<string, string>, row: string}} target the same in the other language
 * @returns {string | null} null where no line is known.
 */
export function translated(text, source, target) {
  let isKnown = false;
  const lines = String(text ?? "").trim().split("\n").map((line) => {
    const row = ROW.exec(line)?.groups;
    const found = lineIn(row?.rest ?? line, source, target);
    if (found === null) return line;
    isKnown = true;
    if (!row) return found;
    const number = row.index === undefined ? (row.entry ?? row.number) : Number(row.index) + 1;
    return `${filled(target.row, { number })}: ${found}`;
  });
  return isKnown ? lines.join("\n") : null;
}
