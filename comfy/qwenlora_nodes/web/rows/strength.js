/** The field of a strength: type it, drag it sideways, or step it with the arrows. */

import { word } from "../words.js";
import { element } from "./finder.js";
import { asStrength, stepped, strengthText } from "./value.js";

const STEP = 0.05;
const FINE_STEP = 0.01;
const PIXELS_PER_STEP = 4;
const DEAD_PIXELS = 3;

export class StrengthField {
  /** @param {(strength: number, isDone: boolean) => void} set */
  constructor(set) {
    this.set = set;
    this.value = 1;
    this.input = element("input", "qwenlora-strength");
    this.input.type = "text";
    this.input.inputMode = "decimal";
    this.input.title = word("rows.strength_hint");
    this.input.setAttribute("aria-label", word("rows.strength"));
    this.input.addEventListener("input", () => this.typed(false));
    this.input.addEventListener("blur", () => this.leave());
    this.input.addEventListener("focus", () => {
      this.before = this.value;
    });
    this.input.addEventListener("keydown", (event) => this.press(event));
    this.input.addEventListener("pointerdown", (event) => this.scrub(event));
    // A press may begin a drag: a click without one focuses.
    this.input.addEventListener("mousedown", (event) => {
      if (document.activeElement !== this.input) event.preventDefault();
    });
  }

  /** @param {number} value */
  draw(value) {
    this.value = value;
    const isTyping = document.activeElement === this.input && asStrength(this.input.value) === value;
    if (!isTyping) this.input.value = strengthText(value);
  }

  typed(isDone) {
    const value = asStrength(this.input.value);
    if (value !== null && (isDone || value !== this.value)) this.set(value, isDone);
    this.input.classList.toggle("wrong", value === null);
  }

  leave() {
    if (this.value !== this.before) this.set(this.value, true);
    this.input.classList.remove("wrong");
    this.input.value = strengthText(this.value);
  }

  press(event) {
    const sign = { ArrowUp: 1, ArrowDown: -1 }[event.key];
    if (sign && !event.altKey) {
      const step = event.shiftKey ? FINE_STEP : STEP;
      this.set(stepped(asStrength(this.input.value) ?? this.value, sign * step), true);
      this.before = this.value;
      this.input.value = strengthText(this.value);
    } else if (event.key === "Enter" && !event.ctrlKey && !event.metaKey) {
      this.typed(true);
      this.before = this.value;
      this.input.value = strengthText(this.value);
      this.input.select();
    } else {
      return;
    }
    event.preventDefault();
    event.stopPropagation();
  }

  /** @param {PointerEvent} start */
  scrub(start) {
    if (start.button !== 0 || document.activeElement === this.input) return;
    start.stopPropagation();
    const from = this.value;
    let isDragged = false;
    this.input.setPointerCapture(start.pointerId);
    const move = (event) => {
      const pixels = event.clientX - start.clientX;
      isDragged ||= Math.abs(pixels) > DEAD_PIXELS;
      const step = event.shiftKey ? FINE_STEP : STEP;
      if (isDragged) this.set(stepped(from, Math.round(pixels / PIXELS_PER_STEP) * step), false);
    };
    const end = (event) => {
      this.input.removeEventListener("pointermove", move);
      this.input.removeEventListener("pointerup", end);
      this.input.removeEventListener("pointercancel", end);
      if (isDragged) this.set(this.value, true);
      else if (event.type === "pointerup") this.input.select();
    };
    this.input.addEventListener("pointermove", move);
    this.input.addEventListener("pointerup", end);
    this.input.addEventListener("pointercancel", end);
  }
}
