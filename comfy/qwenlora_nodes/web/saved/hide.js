/** Widgets that are hidden, in both renderers of every frontend. */

/** The height of nothing, whose gap to the next widget is taken back. */
const NO_HEIGHT = () => [0, -4];

/**
 * Hides some widgets of a node and shows others; all keep their values and places.
 *
 * @param {object} node
 * @param {Map<object, boolean>} isHidden by widget
 */
export function hide(node, isHidden) {
  // Older canvases leave room for hidden widgets.
  const leavesRoom = typeof node.getLayoutWidgets !== "function";
  for (const [widget, hidden] of isHidden) {
    // Nodes 2.0 looks at the options; where a widget has a state, it watches those of the state.
    const options = widget._state?.options ?? widget.options;
    if (options) options.hidden = hidden;
    widget.hidden = hidden;
    if (!leavesRoom) continue;
    if (hidden) widget.computeSize = NO_HEIGHT;
    else if (widget.computeSize === NO_HEIGHT) delete widget.computeSize;
  }
}
