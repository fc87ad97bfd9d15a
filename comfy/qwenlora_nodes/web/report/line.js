/** The line on a node: a widget that is neither saved nor sent, and opens the whole report. */

import { word } from "../words.js";
import { openPanel } from "./panel.js";

const NAME = "qwenlora_report";
const LINE = 20;
const MARGIN = 3;

/** @type {WeakMap<object, ReportLine>} */
const lines = new WeakMap();

/** The line of a node, if it has one. */
export function lineOf(node) {
  return lines.get(node);
}

/** Put a line below a node's widgets. */
export function addLine(app, node) {
  if (lines.has(node) || typeof node.addDOMWidget !== "function") return;
  const line = new ReportLine(node);
  const height = LINE + 2 * MARGIN;
  const widget = node.addDOMWidget(NAME, NAME, line.element, {
    serialize: false,
    hideOnZoom: false,
    hideInPanel: true,
    margin: MARGIN,
    getMinHeight: () => height,
    getMaxHeight: () => height,
    getHeight: () => height,
    getValue: () => "",
    setValue: () => {},
  });
  widget.serialize = false;
  widget.label = "";
  // The canvas below zooms, whatever the pointer is over.
  line.element.addEventListener("wheel", (event) => app.canvas?.processMouseWheel?.(event), {
    passive: true,
  });
  lines.set(node, line);
  node.setSize?.([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
}

/** What a node tells of its last run. */
class ReportLine {
  constructor(node) {
    this.node = node;
    /** @type {{line: string, text: string, complete: boolean} | null} */
    this.report = null;
    this.stale = false;
    this.blocked = false;
    this.button = document.createElement("button");
    this.button.type = "button";
    this.button.addEventListener("click", () => this.#open());
    this.element = document.createElement("div");
    this.element.className = "qwenlora-report";
    this.element.append(this.button);
    this.#draw();
  }

  /** Show the report of a run with these inputs. */
  show(report) {
    this.report = report;
    this.stale = false;
    this.#draw();
  }

  /** Say why the node cannot run at all. */
  block(fault) {
    this.blocked = true;
    this.show({ line: fault, text: fault, complete: false });
  }

  /** Mark what is shown as of other inputs. */
  expire() {
    if (!this.report || this.stale) return;
    this.stale = true;
    this.#draw();
  }

  /** What it says of the whole: "none", "complete", "amber", "stale", "blocked". */
  get state() {
    if (this.blocked) return "blocked";
    if (!this.report) return "none";
    if (this.stale) return "stale";
    return this.report.complete ? "complete" : "amber";
  }

  #open() {
    if (this.report) openPanel(this.node.title, this.report, this.state);
  }

  #draw() {
    const { button, report, state } = this;
    this.element.dataset.state = state;
    button.disabled = !report;
    button.textContent = report?.line ?? word("report.none");
    const hint = word(state === "stale" || state === "blocked" ? `report.${state}` : "report.open");
    button.title = report ? `${report.line}\n${hint}` : "";
  }
}
