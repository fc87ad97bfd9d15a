/** The rows of one node, which several elements on the page may show at once. */

import { asRows, emptyRow } from "./value.js";
import { Names } from "./names.js";

/** @typedef {import("./value.js").Row} Row */

/** Tells by the event "change" that something of it is another. */
export class RowList extends EventTarget {
  /** @param {{names: string[], min: number, max: number}} options as the server declares them */
  constructor({ names = [], min = 1, max = 20 } = {}) {
    super();
    this.min = min;
    this.max = max;
    this.names = new Names(names);
    /** @type {Row[]} Never changed in place. */
    this.rows = [emptyRow()];
    /** @type {Map<number, string>} What the server found wrong, by the row's number. */
    this.faults = new Map();
  }

  /** Takes a value from outside; what holds no rows changes nothing. @param {unknown} value */
  read(value) {
    const rows = asRows(value);
    if (rows) this.replace(rows.length ? rows : [emptyRow()]);
  }

  /** @param {Row[]} rows */
  replace(rows) {
    if (rows === this.rows) return;
    this.rows = rows;
    this.faults.clear();
    this._tell();
  }

  /** @param {string[]} names */
  offer(names) {
    this.names = new Names(names);
    this._tell();
  }

  /** @param {Map<number, string>} faults */
  blame(faults) {
    this.faults = faults;
    this._tell();
  }

  _tell() {
    this.dispatchEvent(new Event("change"));
  }
}
