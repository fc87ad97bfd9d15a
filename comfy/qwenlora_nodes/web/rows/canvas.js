/** What the canvas behind an element needs to see of the mouse. */

import { app } from "../../../scripts/app.js";

/**
 * Hands on the wheel, the middle button and clicks where LiteGraph draws the node.
 *
 * @param {HTMLElement} element
 * @param {any} node
 */
export function forwardToCanvas(element, node) {
  const isOnCanvas = () => Boolean(element.closest?.(".dom-widget"));
  element.addEventListener("wheel", (event) => {
    if (!isOnCanvas()) return;
    event.preventDefault();
    app.canvas.processMouseWheel(event);
  });
  const middle = {
    pointerdown: "processMouseDown",
    pointermove: "processMouseMove",
    pointerup: "processMouseUp",
  };
  for (const [type, process] of Object.entries(middle)) {
    element.addEventListener(type, (event) => {
      const isMiddle = type === "pointermove" ? event.buttons & 4 : event.button === 1;
      if (isMiddle && isOnCanvas()) app.canvas[process](event);
    });
  }
  element.addEventListener("contextmenu", (event) => {
    if (!isOnCanvas() || event.target.tagName === "INPUT") return;
    event.preventDefault();
    app.canvas.processContextMenu?.(node, event);
  });
  element.addEventListener("click", () => {
    if (isOnCanvas() && !node.selected) app.canvas.selectNode?.(node);
  });
}
