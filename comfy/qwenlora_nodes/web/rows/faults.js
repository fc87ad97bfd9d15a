/** What the server says about single rows. */

const ROW = /loras\.(\d+)\.lora_name: (.*)/g;

/**
 * Finds the rows that an error names.
 *
 * @param {unknown} text
 * @returns {Map<number, string>} what it says by the row's number.
 */
export function faultsOf(text) {
  const found = String(text ?? "").matchAll(ROW);
  return new Map([...found].map(([, index, reason]) => [Number(index), reason]));
}
