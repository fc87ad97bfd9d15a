/** What takes the place of a saved node: the new node's values, and what is lost with the old. */

import { word } from "../words.js";

/** Rows that a `QwenLoraStack` holds. */
const MOST_ROWS = 20;

/** Blocks in which the modulation layers are left out. */
const WITHOUT_MODULATION = { blocks: "custom", custom_blocks: "mod:0" };

/**
 * @typedef {object} Replacement
 * @property {string} type the new node's
 * @property {Record<string, unknown>} values of its widgets by name
 * @property {string[]} losses what the person is asked about, a sentence each
 * @property {string | null} obstacle why it cannot be
 */

/**
 * The replacement of a stack.
 *
 * @param {import("./stack.js").Stack} stack
 * @returns {Replacement}
 */
export function replaceStack(stack) {
  const isOn = stack.value("stack_enabled") !== false;
  const rows = stack.rows().map((row) => ({ ...row, enabled: row.enabled && isOn }));
  const losses = commonLosses(stack);
  if (!isOn) losses.push(word("saved.stack_off"));
  const values = { loras: rows };
  if (stack.value("apply_awq_mod") === false) {
    if (canHold("QwenLoraStack", WITHOUT_MODULATION)) Object.assign(values, WITHOUT_MODULATION);
    else losses.push(word("saved.modulation"));
  }
  const tooMany = rows.length > MOST_ROWS;
  const obstacle = tooMany ? word("saved.too_many", { rows: rows.length, most: MOST_ROWS }) : null;
  return { type: "QwenLoraStack", values, losses, obstacle };
}

/** The replacement of a loader of one LoRA. @returns {Replacement} */
export function replaceLoader(stack) {
  const values = { lora_name: stack.value("lora_name"), strength: stack.value("lora_strength") };
  return { type: "QwenLoraLoader", values, losses: commonLosses(stack), obstacle: null };
}

/** Tells if a node has widgets for some values. */
function canHold(type, values) {
  const input = LiteGraph.registered_node_types[type]?.nodeData?.input;
  const names = Object.keys({ ...input?.required, ...input?.optional });
  return Object.keys(values).every((name) => names.includes(name));
}

function commonLosses(stack) {
  const losses = [];
  if (stack.value("cpu_offload") === "enable") losses.push(word("saved.offload"));
  for (const input of stack.node.inputs ?? []) {
    const name = input.widget?.name;
    if (name && stack.isLinked(name)) {
      losses.push(word("saved.linked", { name, value: String(stack.value(name)) }));
    }
  }
  return losses;
}
