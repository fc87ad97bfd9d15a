/** One row on the page: grip, switch, file, strength, arrows, remove. */

import { word } from "../words.js";
import { startDrag } from "./drag.js";
import { element, nameParts, openFinder } from "./finder.js";
import { StrengthField } from "./strength.js";
import { changed } from "./value.js";

export class RowLine {
  /** @param {any} owner the element that it is in @param {number} index */
  constructor(owner, index) {
    this.owner = owner;
    this.index = index;
    this.node = element("div", "qwenlora-line");
    this.node.tabIndex = 0;
    this.node.setAttribute("role", "listitem");
    this.grip = element("span", "qwenlora-grip", "⠿");
    this.grip.title = word("rows.drag");
    this.grip.addEventListener("pointerdown", (event) => startDrag(event, owner, this.index));
    this.switch = element("button", "qwenlora-switch");
    this.switch.setAttribute("role", "switch");
    this.switch.addEventListener("click", () => this.toggle());
    this.file = element("button", "qwenlora-file");
    this.file.addEventListener("click", () => this.find());
    this.strength = new StrengthField((strength, isDone) => this.set({ strength }, isDone));
    this.node.append(this.grip, this.switch, this.file, this.strength.input);
    this.node.append(this.arrows(), this.remover());
  }

  /** @returns {import("./value.js").Row} */
  get row() {
    return this.owner.list.rows[this.index];
  }

  arrows() {
    const box = element("span", "qwenlora-arrows");
    this.up = this.button("▲", "rows.up", () => this.owner.move(this.index, this.index - 1));
    this.down = this.button("▼", "rows.down", () => this.owner.move(this.index, this.index + 1));
    box.append(this.up, this.down);
    return box;
  }

  remover() {
    const remover = this.button("✕", "rows.remove", () => this.owner.remove(this.index));
    remover.classList.add("qwenlora-remove");
    remover.tabIndex = 0;
    return remover;
  }

  button(sign, key, action) {
    const button = element("button", "", sign);
    button.title = word(key);
    button.setAttribute("aria-label", word(key));
    // The keyboard has Alt with the arrows.
    button.tabIndex = -1;
    button.addEventListener("click", action);
    return button;
  }

  draw() {
    const { row } = this;
    const { list } = this.owner;
    const name = row.lora_name;
    const fault = list.faults.get(this.index);
    const isMissing = Boolean(name) && !list.names.has(name);
    this.node.classList.toggle("off", !row.enabled);
    this.node.classList.toggle("missing", isMissing);
    this.node.classList.toggle("fault", Boolean(fault));
    this.switch.setAttribute("aria-checked", String(row.enabled));
    this.switch.title = word(row.enabled ? "rows.on" : "rows.off");
    this.file.replaceChildren(
      ...(name ? nameParts(name) : [element("span", "qwenlora-empty", word("rows.choose"))]),
    );
    this.file.title = fault ?? (isMissing ? word("rows.missing", { name }) : name);
    this.node.setAttribute("aria-label", name || word("rows.choose"));
    this.strength.draw(row.strength);
    this.up.disabled = this.index === 0;
    this.down.disabled = this.index === list.rows.length - 1;
  }

  /** @param {Partial<import("./value.js").Row>} change @param {boolean} isDone */
  set(change, isDone = true) {
    this.owner.change(changed(this.owner.list.rows, this.index, change), isDone);
  }

  toggle() {
    this.set({ enabled: !this.row.enabled });
  }

  /** Opens the list of files. */
  find() {
    openFinder({
      anchor: this.file,
      names: this.owner.list.names,
      current: this.row.lora_name,
      choose: (lora_name) => this.set({ lora_name }),
      closed: () => this.file.focus({ preventScroll: true }),
    });
  }
}
