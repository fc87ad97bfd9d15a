/**
 * Each node's report on the node itself: one line after a run, amber where something was left out.
 *
 * A node that runs sends its report. For one whose result is cached, and after a reload, the server is
 * asked which reports it has for the graph as it is on the canvas: what it has none for is stale.
 * A node whose server cannot run it says why instead, and the server is not asked.
 */

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

import { askServer, hasRoute } from "./report/kept.js";
import { allNodes, nodeOfExecution } from "./report/graph.js";
import { addLine, lineOf } from "./report/line.js";

const PACK = decodeURIComponent(new URL(import.meta.url).pathname.split("/extensions/")[1] ?? "");
const MODULE = `custom_nodes.${PACK.split("/")[0]}`;
const UI_KEY = "qwenlora";
const AFTER_RUN_MS = 50;
const AFTER_EDIT_MS = 400;

/** Ids of our classes whose nodes have a report. */
const classes = new Set();

/** @type {Map<string, string>} Ids of those that cannot run, and why. */
const faults = new Map();

const style = document.createElement("link");
style.rel = "stylesheet";
style.href = new URL("./report/style.css", import.meta.url).href;
document.head.append(style);

let timer;
let asked = 0;

/** Whether a node has the report of a run, or may get one. */
function isReporting(node) {
  return classes.has(node.comfyClass) && lineOf(node) !== undefined;
}

/** Why the server cannot run the nodes of a class; it says so in the options of an input. */
function faultOf({ input }) {
  const options = Object.values(input?.required ?? {}).map((spec) => spec[1]);
  return options.find((own) => own?.qwenlora_fault)?.qwenlora_fault;
}

/** Ask the server once things have settled. */
function askSoon(delay) {
  clearTimeout(timer);
  timer = setTimeout(() => ask().catch(warn), delay);
}

async function ask() {
  const nodes = [...allNodes(app)].filter(isReporting);
  if (!hasRoute() || !nodes.length) return;
  const own = ++asked;
  const reports = await askServer(app, api, classes);
  if (own !== asked || reports === null) return;
  const fresh = new Set();
  for (const [id, report] of Object.entries(reports)) {
    const node = nodeOfExecution(app, id);
    if (!node || !isReporting(node)) continue;
    lineOf(node).show(report);
    fresh.add(node);
  }
  for (const node of nodes) if (!fresh.has(node)) lineOf(node).expire();
}

/** Ask after an edit, where there is a report that it may make stale, or bring back. */
function askAfterEdit() {
  for (const node of allNodes(app)) {
    if (isReporting(node) && lineOf(node).report) return askSoon(AFTER_EDIT_MS);
  }
}

/** What is ours never breaks a node or the page. */
function warn(error) {
  console.warn("qwenlora: reports on nodes:", error);
}

function guarded(action) {
  return function (...values) {
    try {
      return action.apply(this, values);
    } catch (error) {
      warn(error);
    }
  };
}

const receive = guarded((node, output) => {
  const report = output?.[UI_KEY]?.[0];
  if (report) lineOf(node)?.show(report);
});

app.registerExtension({
  name: "qwenlora.report",

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.python_module !== MODULE) return;
    if (!nodeData.output_name?.includes("report")) return;
    const fault = faultOf(nodeData);
    if (fault) {
      faults.set(nodeData.name, fault);
      return;
    }
    classes.add(nodeData.name);
    const { onExecuted } = nodeType.prototype;
    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      receive(this, output);
    };
  },

  nodeCreated: guarded((node) => {
    const fault = faults.get(node.comfyClass);
    if (fault || classes.has(node.comfyClass)) addLine(app, node);
    if (fault) lineOf(node)?.block(fault);
  }),

  afterConfigureGraph() {
    askSoon(AFTER_EDIT_MS);
  },

  setup() {
    const ended = ["execution_success", "execution_error", "execution_interrupted"];
    for (const event of ["execution_cached", ...ended]) {
      api.addEventListener(event, () => askSoon(AFTER_RUN_MS));
    }
    api.addEventListener("graphChanged", guarded(askAfterEdit));
  },
});
