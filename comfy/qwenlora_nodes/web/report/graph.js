/** Nodes of a workflow, those in subgraphs included. */

/** The outermost graph; older frontends know no other name for it. */
function rootOf(app) {
  return app.rootGraph ?? app.graph;
}

/**
 * All nodes, each once, however often its subgraph is used.
 *
 * @returns {Generator<object>}
 */
export function* allNodes(app) {
  const root = rootOf(app);
  if (!root) return;
  yield* root.nodes ?? root._nodes ?? [];
  for (const subgraph of root.subgraphs?.values() ?? []) yield* subgraph.nodes ?? [];
}

/**
 * The node of an execution id: its own id after those of the subgraphs' nodes that it lies in.
 *
 * @param {string} id for example "7", or "12:7"
 * @returns {object | undefined}
 */
export function nodeOfExecution(app, id) {
  const path = String(id).split(":");
  let graph = rootOf(app);
  for (const outer of path.slice(0, -1)) {
    graph = nodeIn(graph, outer)?.subgraph;
    if (!graph) return undefined;
  }
  return nodeIn(graph, path.at(-1));
}

/** Ids are numbers in most files, and texts in some. */
function nodeIn(graph, id) {
  return graph.getNodeById(Number(id)) ?? graph.getNodeById(id) ?? undefined;
}
