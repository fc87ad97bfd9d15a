/** The reports that the server keeps of past runs, for the graph as it is on the canvas. */

import { allNodes } from "./graph.js";

const PATH = "/qwenlora/reports";

let route = true;

/** Whether the server answers at all: one that runs an older version of the pack does not. */
export function hasRoute() {
  return route;
}

/**
 * Reports by execution id; null where they cannot be asked for now.
 *
 * @param {Set<string>} classes the classes of nodes that have reports
 * @returns {Promise<Record<string, {line: string, text: string, complete: boolean}> | null>}
 */
export async function askServer(app, api, classes) {
  if (hasSideEffects(app, classes)) return null;
  const { output } = await app.graphToPrompt();
  const prompt = whatLeadsTo(output, classes);
  if (!Object.keys(prompt).length) return {};
  const answer = await api.fetchApi(PATH, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ prompt }),
  });
  if (answer.status === 404 || answer.status === 405) route = false;
  if (!answer.ok) return null;
  return (await answer.json()).reports ?? null;
}

/**
 * Whether making a prompt may do more than read: widgets that take a picture or send a file to the
 * server do so while their value is asked for, and are asynchronous.
 */
function hasSideEffects(app, classes) {
  for (const node of allNodes(app)) {
    if (classes.has(node.comfyClass)) continue;
    for (const widget of node.widgets ?? []) {
      if (widget.serializeValue?.constructor?.name === "AsyncFunction") return true;
    }
  }
  return false;
}

/** Our nodes and those before them, without what the server does not look at. */
function whatLeadsTo(prompt, classes) {
  const found = {};
  const ahead = Object.keys(prompt).filter((id) => classes.has(prompt[id].class_type));
  while (ahead.length) {
    const id = ahead.pop();
    if (id in found || !prompt[id]) continue;
    const { class_type, inputs } = prompt[id];
    found[id] = { class_type, inputs };
    for (const value of Object.values(inputs)) {
      if (Array.isArray(value) && value.length === 2) ahead.push(String(value[0]));
    }
  }
  return found;
}
