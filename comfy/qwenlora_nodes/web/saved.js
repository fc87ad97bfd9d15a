/** Nodes of saved workflows: their values under their widgets, and the way to today's nodes. */

import { app } from "../../scripts/app.js";
import { convert } from "./saved/convert.js";
import { replaceLoader, replaceStack } from "./saved/replacement.js";
import { Stack } from "./saved/stack.js";
import { word } from "./words.js";

const LOADER = "NunchakuQwenImageLoraLoader";

/** What the server tells of a saved node; of one LoRA there is nothing to be told. */
function layoutsOf(definition) {
  // Another pack's node of this id is not marked deprecated.
  if (definition.name === LOADER && definition.deprecated) return { layouts: [], kinds: {} };
  const options = definition.input?.required?.model?.[1];
  if (!Array.isArray(options?.qwenlora_layouts)) return null;
  return { layouts: options.qwenlora_layouts, kinds: options.qwenlora_kinds };
}

/** The values that new widgets have, by name. */
function defaultsOf({ input = {} }) {
  const all = Object.entries({ ...input.required, ...input.optional });
  const first = ([type, options]) => options?.default ?? (Array.isArray(type) ? type[0] : undefined);
  return Object.fromEntries(all.map(([name, spec]) => [name, first(spec)]));
}

/** Runs after the frontend's own; an exception leaves the node as the frontend made it. */
function after(type, name, act) {
  const own = type.prototype[name];
  type.prototype[name] = function (...args) {
    const result = own?.apply(this, args);
    try {
      act(this, ...args);
    } catch (error) {
      console.warn(`qwenlora: node ${this.id} stays as it is (${name})`, error);
    }
    return result;
  };
}

/** A button that neither files nor prompts know of. */
function addButton(node, label, act) {
  const widget = node.addWidget("button", label, null, act, { serialize: false });
  widget.serialize = false;
}

function isLoader(node) {
  return node.comfyClass === LOADER;
}

function pairOf(node) {
  const stack = Stack.of(node);
  return { node, replacement: isLoader(node) ? replaceLoader(stack) : replaceStack(stack) };
}

async function convertNodes(nodes) {
  try {
    const fresh = await convert(nodes.map(pairOf));
    if (fresh.length > 0) app.canvas.selectItems?.(fresh);
  } catch (error) {
    console.warn("qwenlora: not converted", error);
    const detail = word("saved.failed", { reason: error.message });
    app.extensionManager.toast?.add({ severity: "error", summary: "qwenlora", detail });
  }
}

/** All saved nodes of the workflow, those in subgraphs, too. */
function savedNodes(graph = app.rootGraph ?? app.graph, seen = new Set()) {
  if (seen.has(graph)) return [];
  seen.add(graph);
  return [...graph.nodes].flatMap((node) => {
    const inner = node.subgraph ? savedNodes(node.subgraph, seen) : [];
    return Stack.of(node) ? [node, ...inner] : inner;
  });
}

function convertAllItems() {
  const nodes = savedNodes();
  if (nodes.length < 2) return [];
  const content = word("saved.convert_all", { count: nodes.length });
  return [{ content, callback: () => convertNodes(nodes) }];
}

function convertLabel(node) {
  return word(isLoader(node) ? "saved.convert_loader" : "saved.convert_stack");
}

app.registerExtension({
  name: "qwenlora.saved",

  beforeRegisterNodeDef(type, definition) {
    const layouts = layoutsOf(definition);
    if (!layouts) return;
    const defaults = defaultsOf(definition);
    after(type, "onNodeCreated", (node) => {
      const stack = new Stack(node, layouts, defaults);
      if (stack.hasRows && !stack.isCounted) {
        addButton(node, word("saved.add"), () => stack.addRow());
      }
      addButton(node, convertLabel(node), () => convertNodes([node]));
      stack.showRows();
    });
    after(type, "onConfigure", (node, saved) => Stack.of(node)?.restore(saved));
  },

  getNodeMenuItems(node) {
    if (!Stack.of(node)) return [];
    const item = { content: convertLabel(node), callback: () => convertNodes([node]) };
    return [null, item, ...convertAllItems()];
  },

  getCanvasMenuItems() {
    const items = convertAllItems();
    return items.length > 0 ? [null, ...items] : [];
  },
});
