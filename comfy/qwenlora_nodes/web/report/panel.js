/** The whole report, to read and to copy. */

import { word } from "../words.js";

const NOT_APPLIED = /^\s*(not applied|left out):/;
const COPIED_MS = 1500;

/**
 * Show a report over the page until it is closed.
 *
 * @param {string} title the node's
 * @param {{line: string, text: string, complete: boolean}} report
 * @param {"complete" | "amber" | "stale" | "blocked"} state
 */
export function openPanel(title, report, state) {
  const dialog = element("dialog", "qwenlora-panel");
  const head = element("header", "", title);
  const mark = element("span", "qwenlora-mark", word(`report.${state}`));
  mark.dataset.state = state;
  head.append(mark);
  const text = element("pre", "");
  text.tabIndex = 0;
  text.append(...report.text.split("\n").map(textLine));
  const copy = element("button", "", word("report.copy"));
  copy.addEventListener("click", async () => {
    await copyText(report.text, text);
    copy.textContent = word("report.copied");
    setTimeout(() => (copy.textContent = word("report.copy")), COPIED_MS);
  });
  const close = element("button", "", word("report.close"));
  close.addEventListener("click", () => dialog.close());
  const foot = element("footer", "");
  foot.append(copy, close);
  dialog.append(head, text, foot);
  // The page has shortcuts of its own, Delete among them.
  dialog.addEventListener("keydown", (event) => event.stopPropagation());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
  close.focus();
}

/** A line of the text; what was not applied stands out. */
function textLine(line) {
  const span = element("span", NOT_APPLIED.test(line) ? "qwenlora-left-out" : "", `${line}\n`);
  return span;
}

/** Copy a text; a page that is not served over https or locally has no clipboard. */
async function copyText(text, shown) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  window.getSelection().selectAllChildren(shown);
  document.execCommand("copy");
}

function element(kind, name, text = "") {
  const made = document.createElement(kind);
  made.className = name;
  made.textContent = text;
  if (kind === "button") made.type = "button";
  return made;
}
