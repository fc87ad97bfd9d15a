/** The list of files that opens under a row: type to find, arrows and Enter to choose. */

import { word } from "../words.js";
import { parts, sameSeparators } from "./names.js";

const MOST_SHOWN = 200;
const MARGIN = 8;
const WIDTH = { least: 320, most: 640 };
const HEIGHT = 360;

let open = null;

/**
 * Opens the list at an element; one that is open elsewhere closes.
 *
 * @param {{
 *   anchor: HTMLElement,
 *   names: import("./names.js").Names,
 *   current: string,
 *   choose: (name: string) => void,
 *   closed: () => void,
 * }} options `choose` gets an empty name for "None"; `closed` is called after either.
 */
export function openFinder(options) {
  open?.close();
  open = new Finder(options);
}

class Finder {
  constructor({ anchor, names, current, choose, closed }) {
    Object.assign(this, { anchor, names, current, choose, closed });
    this.marked = 0;
    /** @type {string[]} What is shown; an empty name is "None". */
    this.shown = [];
    this.build();
    this.find("");
    document.body.append(this.box);
    this.place();
    this.input.focus({ preventScroll: true });
    this.outside = (event) => {
      if (!this.box.contains(event.target)) this.close();
    };
    // The frontends stop these events at the elements that they draw.
    document.addEventListener("pointerdown", this.outside, true);
    document.addEventListener("wheel", this.outside, true);
    window.addEventListener("resize", this.outside);
  }

  build() {
    this.box = element("div", "qwenlora-finder");
    this.input = element("input");
    this.input.type = "text";
    this.input.placeholder = word("rows.search");
    this.input.spellcheck = false;
    this.input.setAttribute("role", "combobox");
    this.input.setAttribute("aria-label", word("rows.search"));
    this.list = element("div", "qwenlora-finder-list");
    this.list.setAttribute("role", "listbox");
    this.note = element("div", "qwenlora-finder-note");
    this.box.append(this.input, this.list, this.note);
    this.input.addEventListener("input", () => this.find(this.input.value));
    this.box.addEventListener("keydown", (event) => this.press(event));
    this.box.addEventListener("focusout", (event) => {
      if (event.relatedTarget && !this.box.contains(event.relatedTarget)) this.close();
    });
    // Else the field loses the focus before the click.
    this.list.addEventListener("mousedown", (event) => event.preventDefault());
    this.list.addEventListener("click", (event) => {
      const option = event.target.closest("[role=option]");
      if (option) this.take(Number(option.dataset.index));
    });
  }

  /** @param {string} query */
  find(query) {
    const found = this.names.find(query);
    const all = query.trim() ? found : this.inOrder(found);
    this.shown = all.slice(0, MOST_SHOWN);
    this.list.replaceChildren(...this.shown.map((name, index) => this.option(name, index)));
    this.list.scrollTop = 0;
    const isLong = all.length > MOST_SHOWN;
    this.note.textContent = isLong
      ? word("rows.shown", { shown: MOST_SHOWN, all: all.length })
      : all.length
        ? ""
        : word("rows.nothing_found");
    const same = this.shown.findIndex((name) => this.isCurrent(name));
    this.mark(query.trim() ? 0 : Math.max(0, same));
  }

  /** "None", the file that is chosen, then the list as it is. @param {string[]} names */
  inOrder(names) {
    const current = names.find((name) => this.isCurrent(name));
    if (current === undefined) return ["", ...names];
    return ["", current, ...names.filter((name) => name !== current)];
  }

  isCurrent(name) {
    return sameSeparators(name) === sameSeparators(this.current);
  }

  option(name, index) {
    const option = element("div", "qwenlora-finder-option");
    option.setAttribute("role", "option");
    option.dataset.index = String(index);
    option.title = name;
    option.classList.toggle("current", this.isCurrent(name));
    if (name) option.append(...nameParts(name));
    else option.append(element("i", "", word("rows.none")));
    return option;
  }

  mark(index) {
    this.list.children[this.marked]?.removeAttribute("aria-selected");
    this.marked = Math.max(0, Math.min(index, this.shown.length - 1));
    const option = this.list.children[this.marked];
    option?.setAttribute("aria-selected", "true");
    option?.scrollIntoView({ block: "nearest" });
  }

  press(event) {
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10 };
    if (event.key in steps) this.mark(this.marked + steps[event.key]);
    else if (event.key === "Enter") this.take(this.marked);
    else if (event.key === "Escape" || event.key === "Tab") this.close();
    else {
      // The frontends' own keys are for the canvas.
      event.stopPropagation();
      return;
    }
    event.preventDefault();
    event.stopPropagation();
  }

  take(index) {
    const name = this.shown[index];
    if (name === undefined) return;
    this.close(() => this.choose(name));
  }

  close(before = () => {}) {
    if (open !== this) return;
    open = null;
    document.removeEventListener("pointerdown", this.outside, true);
    document.removeEventListener("wheel", this.outside, true);
    window.removeEventListener("resize", this.outside);
    this.box.remove();
    before();
    this.closed();
  }

  /** Under the anchor, or above it where there is more room. */
  place() {
    const at = this.anchor.getBoundingClientRect();
    const width = Math.min(WIDTH.most, Math.max(WIDTH.least, at.width));
    const below = window.innerHeight - at.bottom - MARGIN;
    const above = at.top - MARGIN;
    const isBelow = below >= Math.min(HEIGHT, above);
    const style = this.box.style;
    style.width = `${width}px`;
    style.left = `${Math.max(MARGIN, Math.min(at.left, window.innerWidth - width - MARGIN))}px`;
    style.maxHeight = `${Math.max(120, Math.min(HEIGHT, isBelow ? below : above))}px`;
    if (isBelow) style.top = `${at.bottom + 2}px`;
    else style.bottom = `${window.innerHeight - at.top + 2}px`;
  }
}

/** The folder, dimmed, and the name. @param {string} name @returns {HTMLElement[]} */
export function nameParts(name) {
  const { folder, base } = parts(name);
  const shown = element("span", "qwenlora-base", base);
  return folder ? [element("span", "qwenlora-folder", folder), shown] : [shown];
}

/** @param {string} tag @param {string} className @param {string} text @returns {any} */
export function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}
