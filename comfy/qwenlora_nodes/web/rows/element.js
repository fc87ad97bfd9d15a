/** The element that shows rows: `<qwenlora-rows>`. */

import { word } from "../words.js";
import { forwardToCanvas } from "./canvas.js";
import { element } from "./finder.js";
import { RowLine } from "./line.js";
import { added, moved, removed, toggledAll } from "./value.js";

const TAG = "qwenlora-rows";

/** Pixels at zoom 1; `style.css` has the same. */
const LINE = 26;
const HEADING = 22;
const FOOTING = 28;

/** How high the element is. @param {number} count of rows */
export function heightOf(count) {
  return HEADING + LINE * count + FOOTING;
}

/**
 * One place where rows are shown.
 *
 * The frontends move a widget's element into whatever shows it last: the panel takes it out of the
 * node. Then the place that it left, if it is still on the page, gets an element of its own.
 */
class RowsElement extends HTMLElement {
  /**
   * @param {import("./list.js").RowList} list
   * @param {any} node the node on the canvas
   * @param {(rows: import("./value.js").Row[], isDone?: boolean) => void} change tells the node;
   *   not done while a person is still typing or dragging.
   */
  show(list, node, change) {
    this.list = list;
    this.node = node;
    this.change = change;
    /** @type {RowLine[]} */
    this.lines = [];
    this.drawn = () => this.draw();
    this.build();
    forwardToCanvas(this, node);
    return this;
  }

  connectedCallback() {
    if (!this.list) return;
    const left = this.place;
    this.place = this.parentNode;
    if (left && left !== this.place && left.isConnected && !left.querySelector(TAG)) {
      left.append(document.createElement(TAG).show(this.list, this.node, this.change));
    }
    for (const other of this.place.querySelectorAll(`:scope > ${TAG}`)) {
      if (other !== this) other.remove();
    }
    this.list.addEventListener("change", this.drawn);
    this.draw();
  }

  disconnectedCallback() {
    this.list?.removeEventListener("change", this.drawn);
  }

  /** Puts another element of these rows in the place of a canvas. @param {HTMLCanvasElement} canvas */
  showAlsoAt(canvas) {
    const place = canvas.parentElement;
    canvas.style.visibility = "hidden";
    canvas.style.pointerEvents = "none";
    if (place.querySelector(`:scope > ${TAG}`)) return;
    place.append(document.createElement(TAG).show(this.list, this.node, this.change));
  }

  build() {
    const heading = element("div", "qwenlora-heading");
    this.all = element("button", "qwenlora-switch");
    this.all.addEventListener("click", () => this.change(toggledAll(this.list.rows)));
    const title = element("span", "qwenlora-title", word("rows.heading"));
    const strength = element("span", "qwenlora-title", word("rows.strength"));
    heading.append(this.all, title, strength);
    this.box = element("div", "qwenlora-lines");
    this.box.setAttribute("role", "list");
    this.adder = element("button", "qwenlora-add", `+ ${word("rows.add")}`);
    this.adder.addEventListener("click", () => this.add());
    const footing = element("div", "qwenlora-footing");
    footing.append(this.adder);
    this.append(heading, this.box, footing);
    // A canvas behind takes the keys that nothing stops.
    this.addEventListener("keydown", (event) => this.press(event));
  }

  draw() {
    const { rows, max } = this.list;
    while (this.lines.length > rows.length) this.lines.pop().node.remove();
    while (this.lines.length < rows.length) {
      const line = new RowLine(this, this.lines.length);
      this.lines.push(line);
      this.box.append(line.node);
    }
    this.lines.forEach((line) => line.draw());
    const on = rows.filter((row) => row.enabled).length;
    this.all.setAttribute("role", "switch");
    this.all.setAttribute("aria-checked", on === rows.length ? "true" : on ? "mixed" : "false");
    this.all.title = word(on === rows.length ? "rows.all_off" : "rows.all_on");
    this.adder.disabled = rows.length >= max;
    this.adder.title = this.adder.disabled ? word("rows.full", { max }) : "";
  }

  add() {
    this.change(added(this.list.rows, this.list.max));
    this.lines.at(-1).find();
  }

  /** @param {number} index */
  remove(index) {
    const had = this.contains(document.activeElement);
    this.change(removed(this.list.rows, index, this.list.min));
    if (had) this.focusLine(Math.min(index, this.lines.length - 1));
  }

  /** @param {number} from @param {number} to */
  move(from, to) {
    const rows = moved(this.list.rows, from, to);
    if (rows !== this.list.rows) this.change(rows);
  }

  /** @param {number} index */
  focusLine(index) {
    this.lines[index]?.node.focus();
  }

  /** Keys on a line that has the focus itself, none of its fields. @param {KeyboardEvent} event */
  press(event) {
    const index = this.lines.findIndex((line) => line.node === event.target);
    const action = index < 0 ? this.fieldKey(event) : this.lineKey(event, index);
    if (!action) return;
    event.preventDefault();
    event.stopPropagation();
    action();
  }

  lineKey(event, index) {
    if (event.ctrlKey || event.metaKey) return null;
    const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (step && event.altKey) {
      return () => {
        this.move(index, index + step);
        this.focusLine(Math.max(0, Math.min(index + step, this.lines.length - 1)));
      };
    }
    if (step) return () => this.focusLine(index + step);
    const line = this.lines[index];
    const actions = {
      Delete: () => this.remove(index),
      Backspace: () => this.remove(index),
      Enter: () => line.find(),
      " ": () => line.toggle(),
      Escape: () => line.node.blur(),
    };
    return actions[event.key] ?? null;
  }

  fieldKey(event) {
    const line = this.lines.find((own) => own.node.contains(event.target));
    if (!line) return null;
    if (event.key === "Escape") return () => line.node.focus();
    if (event.altKey && ["ArrowUp", "ArrowDown"].includes(event.key)) {
      return this.lineKey(event, this.lines.indexOf(line));
    }
    // Else the frontends delete the node.
    if (["Delete", "Backspace"].includes(event.key)) event.stopPropagation();
    return null;
  }
}

if (!customElements.get(TAG)) customElements.define(TAG, RowsElement);

/** Makes an element for rows; the arguments are those of `show`. */
export function rowsElement(list, node, change) {
  return document.createElement(TAG).show(list, node, change);
}
