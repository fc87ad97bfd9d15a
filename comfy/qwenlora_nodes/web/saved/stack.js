/** A stack of a saved workflow on the canvas: its values, and the rows that are in use. */

import { sameSeparators } from "../rows/names.js";
import { hide } from "./hide.js";
import { fieldOf, readSaved, rowOf } from "./layouts.js";

/** @typedef {import("./layouts.js").Layouts} Layouts */

const UNUSED = "None";
const MOST_ROWS = 99;

/** What saved nodes know of their class; the frontend has no place for it that it leaves alone. */
export class Stack {
  /** @type {WeakMap<object, Stack>} */
  static #stacks = new WeakMap();

  /**
   * @param {object} node
   * @param {Layouts} layouts
   * @param {Record<string, unknown>} defaults values of new widgets by name
   */
  constructor(node, layouts, defaults) {
    this.node = node;
    this.layouts = layouts;
    this.defaults = defaults;
    /** Rows that were asked for where no widget holds their count. */
    this.asked = 1;
    Stack.#stacks.set(node, this);
    this.#follow("lora_count", () => this.showRows());
    this.#follow("toggle_all", (value) => this.#switchAll(value));
    for (let row = 1; !this.isCounted && row <= this.size; row += 1) {
      this.#follow(`lora_name_${row}`, () => this.#showMore(this.shown));
    }
  }

  /** The stack of a node; undefined for other nodes. @returns {Stack | undefined} */
  static of(node) {
    return Stack.#stacks.get(node);
  }

  /** Whether a widget holds the number of rows in use. */
  get isCounted() {
    return this.widget("lora_count") !== undefined;
  }

  /** Whether it is of rows; the loader of one LoRA is not. */
  get hasRows() {
    return this.layouts.layouts.length > 0;
  }

  /** Rows that have widgets. */
  get size() {
    return Math.max(0, ...this.node.widgets.map((widget) => rowOf(widget.name)));
  }

  /** Rows in use; all where the count comes from elsewhere or is none. */
  get shown() {
    if (!this.isCounted) return Math.max(1, this.asked, this.#lastUsed());
    const count = Number(this.widget("lora_count").value);
    const isKnown = Number.isInteger(count) && count > 0 && !this.isLinked("lora_count");
    return isKnown ? Math.min(count, this.size) : this.size;
  }

  /** @param {string} name */
  widget(name) {
    return this.node.widgets.find((widget) => widget.name === name);
  }

  /** The value of a widget; undefined where there is none. @param {string} name */
  value(name) {
    return this.widget(name)?.value;
  }

  /** Tells if a widget's value comes from another node. @param {string} name */
  isLinked(name) {
    const input = this.node.inputs?.find((own) => (own.widget?.name ?? own.name) === name);
    return input?.link !== null && input?.link !== undefined;
  }

  /** The rows in use, as `QwenLoraStack` holds them. */
  rows() {
    return Array.from({ length: this.shown }, (_, index) => ({
      lora_name: String(this.value(`lora_name_${index + 1}`) ?? UNUSED),
      strength: Number(this.value(`lora_strength_${index + 1}`) ?? 1),
      enabled: this.value(`enabled_${index + 1}`) !== false,
    }));
  }

  /** Puts the values of a saved node into the widgets that they belong to. @param {object} saved */
  restore(saved) {
    const found = this.hasRows ? readSaved(saved, this.layouts) : null;
    if (found) {
      const rows = Math.min(found.rows, MOST_ROWS);
      while (!this.isCounted && this.size < rows) this.#addWidgets();
      for (const widget of this.node.widgets) this.#put(widget, found.values);
    }
    for (const widget of this.node.widgets) spellAsListed(widget);
    this.asked = 1;
    if (this.hasRows) this.showRows();
  }

  /** Shows one more row, for stacks that are not counted. */
  addRow() {
    if (this.shown >= MOST_ROWS) return;
    if (this.size === this.shown) this.#addWidgets();
    this.#showMore(this.shown + 1);
  }

  /** Hides the widgets of rows that are not in use: they keep their values and their places. */
  showRows() {
    const { node, shown } = this;
    const isUnused = ({ name }) => rowOf(name) > shown && !this.isLinked(name);
    const rows = node.widgets.filter((widget) => rowOf(widget.name) > 0);
    hide(node, new Map(rows.map((widget) => [widget, isUnused(widget)])));
    node.setSize([node.size[0], node.computeSize()[1]]);
    node.graph?.setDirtyCanvas(true, true);
  }

  /** Shows so many rows at least; a row that is emptied does not go under the person's hand. */
  #showMore(rows) {
    this.asked = rows;
    this.showRows();
  }

  #lastUsed() {
    const isUsed = ({ name, value }) => fieldOf(name) === "lora_name" && value !== UNUSED;
    return Math.max(0, ...this.node.widgets.filter(isUsed).map(({ name }) => rowOf(name)));
  }

  #put(widget, values) {
    if (widget.serialize === false || !(fieldOf(widget.name) in this.layouts.kinds)) return;
    let value = values[widget.name] ?? this.#default(widget.name);
    if (value === undefined) return;
    if (widget.name === "lora_count") value = Number(value);
    if (widget.value !== value) widget.value = value;
  }

  #default(name) {
    return this.defaults[name] ?? this.defaults[`${fieldOf(name)}_1`];
  }

  /** Widgets for one row more, after the model of the first. */
  #addWidgets() {
    const row = this.size + 1;
    const models = this.node.widgets.filter((widget) => rowOf(widget.name) === 1);
    for (const { name, type, options } of models) {
      const own = `${fieldOf(name)}_${row}`;
      const kept = { ...options, values: options.values };
      this.node.addWidget(type, own, this.#default(own), () => {}, kept);
    }
    const buttons = this.node.widgets.filter((widget) => widget.type === "button");
    this.node.widgets = [
      ...this.node.widgets.filter((widget) => !buttons.includes(widget)),
      ...buttons,
    ];
  }

  #follow(name, act) {
    const widget = this.widget(name);
    if (!widget) return;
    const { callback } = widget;
    widget.callback = (...args) => {
      const result = callback?.apply(widget, args);
      act(widget.value);
      return result;
    };
  }

  #switchAll(value) {
    for (let row = 1; row <= this.shown; row += 1) {
      const widget = this.widget(`enabled_${row}`);
      if (widget) widget.value = value === true;
    }
  }
}

/** Writes a file's name as the list has it, whose separators may be another system's. */
function spellAsListed(widget) {
  const names = widget.options?.values;
  if (fieldOf(widget.name) !== "lora_name" || !Array.isArray(names)) return;
  if (typeof widget.value !== "string" || names.includes(widget.value)) return;
  const path = sameSeparators(widget.value);
  const found = names.find((name) => sameSeparators(name) === path);
  if (found !== undefined) widget.value = found;
}
