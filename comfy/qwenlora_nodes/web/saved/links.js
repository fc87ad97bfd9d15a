/** Links of a node that is to be replaced, and the same links at the one in its place. */

/**
 * One end of a link: a slot of a node, or of the subgraph around it.
 *
 * @typedef {{node: object | null, slot: number}} End node is null at the subgraph's edge
 * @typedef {{from: End, to: End, reroute: number | undefined}} Link
 */

/** The links into a node's input. @param {string} name @returns {Link | null} */
export function linkInto(node, name) {
  const slot = slotNamed(node.inputs, name);
  const id = node.inputs?.[slot]?.link;
  return id === null || id === undefined ? null : ends(node.graph, id);
}

/** The links out of a node's output. @param {number} slot @returns {Link[]} */
export function linksOutOf(node, slot) {
  const ids = [...(node.outputs?.[slot]?.links ?? [])];
  return ids.map((id) => ends(node.graph, id)).filter(Boolean);
}

/** The slot of a name; -1 where there is none. */
export function slotNamed(slots, name) {
  return (slots ?? []).findIndex((slot) => slot.name === name);
}

/** Tells if two ends can be linked: an edge of the subgraph cannot be linked to an edge. */
export function canConnect(from, to) {
  return from.node !== null || to.node !== null;
}

/**
 * Draws a link; what was linked to the input before gives way.
 *
 * @param {object} graph
 * @param {End} from
 * @param {End} to
 * @param {number} [reroute] the last of the points that it runs through
 */
export function connect(graph, from, to, reroute) {
  if (from.node === null) {
    graph.inputNode.slots[from.slot].connect(to.node.inputs[to.slot], to.node, reroute);
  } else if (to.node === null) {
    graph.outputNode.slots[to.slot].connect(from.node.outputs[from.slot], from.node, reroute);
  } else {
    from.node.connect(from.slot, to.node, to.slot, reroute);
  }
}

function ends(graph, id) {
  const link = graph.getLink?.(id) ?? graph.links.get?.(id) ?? graph.links[id];
  if (!link) return null;
  const end = (nodeId, slot) => ({ node: graph.getNodeById(nodeId) ?? null, slot });
  return {
    from: end(link.origin_id, link.origin_slot),
    to: end(link.target_id, link.target_slot),
    reroute: link.parentId,
  };
}
