/** The stack's rows in ComfyUI's frontend: one widget whose value is the list of rows. */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { heightOf, rowsElement } from "./rows/element.js";
import { faultsOf } from "./rows/faults.js";
import { RowList } from "./rows/list.js";
import { inTodaysLayout } from "./rows/restore.js";
import { word } from "./words.js";

const TYPE = "QWENLORA_ROWS";
const STACK = "QwenLoraStack";
const MARGIN = 6;
const LEAST_WIDTH = 340;

/** @type {WeakMap<object, RowList>} The rows by their node. */
const lists = new WeakMap();

/** @type {WeakSet<object>} Nodes that a file is read into: it has their size, too. */
const opening = new WeakSet();

const style = document.createElement("link");
style.rel = "stylesheet";
style.href = new URL("./rows/style.css", import.meta.url).href;
document.head.append(style);

/** The widget, as the frontend asks for one of our type. */
function rowsWidget(node, name, [, options]) {
  const list = new RowList(options);
  lists.set(node, list);
  let widget;
  try {
    widget = elementWidget(node, name, list);
  } catch (error) {
    console.warn("qwenlora: the rows of a stack cannot be drawn", error);
    widget = noticeWidget(node, name, list);
  }
  return { widget, minWidth: LEAST_WIDTH };
}

function elementWidget(node, name, list) {
  const element = rowsElement(list, node, (rows, isDone = true) => change(node, list, rows, isDone));
  let height = heightOf(list.rows.length);
  const outerHeight = () => heightOf(list.rows.length) + 2 * MARGIN;
  list.addEventListener("change", () => {
    const more = heightOf(list.rows.length) - height;
    height += more;
    if (!opening.has(node)) grow(node, more);
  });
  const widget = node.addDOMWidget(name, TYPE, element, {
    getValue: () => list.rows,
    setValue: (value) => list.read(value),
    getMinHeight: outerHeight,
    getMaxHeight: outerHeight,
    margin: MARGIN,
    // A subgraph that took over its input would not draw it, and 1.58 could not save that workflow.
    socketless: true,
  });
  showInPanels(widget, element);
  return widget;
}

/** Panels beside the canvas have a small canvas of their own for widgets that they do not know. */
function showInPanels(widget, element) {
  const draw = widget.draw;
  widget.draw = function (context, ...others) {
    const small = context.canvas;
    const isGraphs = small === app.canvas?.canvas || small === app.canvas?.bgcanvas;
    if (isGraphs || !small?.isConnected) draw?.call(this, context, ...others);
    else element.showAlsoAt(small);
  };
  // They set it to their own width, which the node's widget must not take.
  Object.defineProperty(widget, "width", { get: () => undefined, set: () => {} });
}

/** Keeps the value where the frontend has no room for an element. */
function noticeWidget(node, name, list) {
  const widget = node.addWidget("button", name, null, () => {}, { socketless: true });
  widget.label = word("rows.fallback");
  Object.defineProperty(widget, "value", {
    get: () => list.rows,
    set: (value) => list.read(value),
  });
  return widget;
}

/** Takes what a person has changed; the frontend can undo it once it is done. */
function change(node, list, rows, isDone) {
  const canvas = app.canvas;
  if (isDone) canvas?.emitBeforeChange?.();
  try {
    list.replace(rows);
    node.widgets?.find((widget) => widget.type === TYPE)?.callback?.(rows);
    node.graph?.setDirtyCanvas?.(true, true);
  } finally {
    if (isDone) canvas?.emitAfterChange?.();
  }
}

/** Makes room for rows that came, and takes that of rows that went. */
function grow(node, pixels) {
  if (pixels) makeRoom(node, pixels);
}

/** Changes the height by so many pixels, to what the node needs at the least. */
function makeRoom(node, pixels) {
  if (!node.size || !node.computeSize) return;
  const least = node.computeSize();
  node.setSize([Math.max(node.size[0], least[0]), Math.max(least[1], node.size[1] + pixels)]);
  node.setDirtyCanvas?.(true, true);
}

/** What a file has of a node, in today's layout; as it is where that cannot be told. */
function readable(saved) {
  try {
    return inTodaysLayout(saved);
  } catch (error) {
    console.warn("qwenlora: a saved stack cannot be read", error);
    return saved;
  }
}

/** All nodes, those in subgraphs too. */
function* nodesOf(graph) {
  for (const node of graph?.nodes ?? graph?._nodes ?? []) {
    yield node;
    if (node.subgraph) yield* nodesOf(node.subgraph);
  }
}

function eachList(action) {
  for (const node of nodesOf(app.rootGraph ?? app.graph)) {
    const list = lists.get(node);
    if (list) action(list, node);
  }
}

/** The rows of the node that a run calls by its place: `5:12` is node 12 in subgraph node 5. */
function listAt(place) {
  let graph = app.rootGraph ?? app.graph;
  let node;
  for (const id of String(place).split(":")) {
    node = graph?.getNodeById?.(id) ?? graph?.getNodeById?.(Number(id));
    graph = node?.subgraph;
  }
  return node && lists.get(node);
}

api.addEventListener("execution_start", () => {
  eachList((list) => list.faults.size && list.blame(new Map()));
});
api.addEventListener("execution_error", ({ detail }) => {
  listAt(detail?.node_id)?.blame(faultsOf(detail?.exception_message));
});

app.registerExtension({
  name: "qwenlora.rows",
  getCustomWidgets: () => ({ [TYPE]: rowsWidget }),
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== STACK) return;
    const configure = nodeType.prototype.configure;
    nodeType.prototype.configure = function (saved, ...others) {
      const today = readable(saved);
      opening.add(this);
      try {
        return configure.call(this, today, ...others);
      } finally {
        opening.delete(this);
        // The size was that of the other layout, or is written by hand.
        if (today.widgets_values !== saved.widgets_values) this.setSize(this.computeSize());
        else makeRoom(this, 0);
      }
    };
  },
  refreshComboInNodes(definitions) {
    const input = definitions?.[STACK]?.input;
    const names = (input?.required?.loras ?? input?.optional?.loras)?.[1]?.names;
    if (names) eachList((list) => list.offer(names));
  },
});
