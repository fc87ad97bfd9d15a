/** Dragging a row by its grip: a line shows where it will be put. */

/**
 * Follows the pointer until it is let go; Escape leaves the rows as they were.
 *
 * @param {PointerEvent} start
 * @param {any} owner the element with the lines
 * @param {number} from
 */
export function startDrag(start, owner, from) {
  if (start.button !== 0) return;
  start.preventDefault();
  start.stopPropagation();
  const grip = start.currentTarget;
  const nodes = owner.lines.map((line) => line.node);
  let to = from;
  grip.setPointerCapture(start.pointerId);
  nodes[from].classList.add("dragged");

  const move = (event) => {
    to = placeOf(event.clientY, nodes);
    nodes.forEach((node, index) => {
      node.classList.toggle("drop-before", index === to && to < from);
      node.classList.toggle("drop-after", index === to && to > from);
    });
  };
  const end = (event) => {
    grip.removeEventListener("pointermove", move);
    grip.removeEventListener("pointerup", end);
    grip.removeEventListener("pointercancel", end);
    document.removeEventListener("keydown", cancel, true);
    nodes.forEach((node) => node.classList.remove("dragged", "drop-before", "drop-after"));
    if (event.type === "pointerup") owner.move(from, to);
  };
  const cancel = (event) => {
    if (event.key !== "Escape") return;
    event.stopPropagation();
    end(event);
  };
  grip.addEventListener("pointermove", move);
  grip.addEventListener("pointerup", end);
  grip.addEventListener("pointercancel", end);
  document.addEventListener("keydown", cancel, true);
}

/** The number of the line at a height, or of the nearest. @param {number} y @param {Element[]} nodes */
function placeOf(y, nodes) {
  const below = nodes.findIndex((node) => y < node.getBoundingClientRect().bottom);
  return below < 0 ? nodes.length - 1 : below;
}
