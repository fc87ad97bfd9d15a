"""ComfyUI's page as a person uses it: nodes on a canvas, values, the mouse, the queue."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from .frontends import Frontend, Renderer

if TYPE_CHECKING:
    from collections.abc import Callable

    from playwright.sync_api import Browser, Page, Route

    from .comfy_process import ComfyProcess

SIZE = {"width": 1500, "height": 1000}
NOWHERE = (1250, 700)
"""A place on the page without anything that looks at the mouse."""
_CLEARED_IN = 4.0
"""Seconds in which what is shown of the test before goes by itself."""
_PATIENCE = 90_000
"""Milliseconds that a page may take on a busy machine."""

_ADD = """(wanted) => wanted.map(([type, place, values]) => {
    const node = LiteGraph.createNode(type);
    app.graph.add(node);
    node.pos = place;
    for (const widget of node.widgets ?? []) {
        // Else a seed is another after each run.
        if (widget.name === "control_after_generate") widget.value = "fixed";
    }
    for (const [name, value] of Object.entries(values)) {
        const widget = node.widgets.find((own) => own.name === name);
        widget.value = value;
        widget.callback?.(value);
    }
    return node.id;
})"""

_LINK = """(links) => {
    for (const [from, output, to, input] of links) {
        const [giver, taker] = [app.graph.getNodeById(from), app.graph.getNodeById(to)];
        const slot = taker.inputs.findIndex((own) => own.name === input);
        giver.connect(output, taker, slot);
    }
}"""

_EMPTY = "{version: 0.4, last_node_id: 0, last_link_id: 0, nodes: [], links: []}"

_CLOSE_OTHERS = """async () => {
    const {workflow} = app.extensionManager;
    for (const own of [...workflow.openWorkflows])
        if (own.path !== workflow.activeWorkflow.path) await workflow.closeWorkflow(own);
}"""

_CLEAR = f"""async () => {{
    // The oldest frontend starts without any workflow, whose changes it would follow.
    if (app.extensionManager.workflow?.activeWorkflow) app.graph.clear();
    else await app.loadGraphData({_EMPTY});
    await ({_CLOSE_OTHERS})();
}}"""

_AS_FRESH = f"""async (view) => {{
    const {{toast, dialog}} = app.extensionManager;
    for (const own of document.querySelectorAll("dialog[open]")) own.close();
    dialog.closeDialog?.();
    app.ui.dialog.close();
    for (const own of document.querySelectorAll(".graphdialog")) own.remove();
    LiteGraph.closeAllContextMenus?.();
    toast.removeAll?.();
    app.canvas.closeSubgraph?.();
    app.canvas.setGraph(app.rootGraph ?? app.graph);
    app.canvas.deselectAll();
    app.clean();
    // What is opened begins a history of its own.
    await app.loadGraphData({_EMPTY});
    await ({_CLOSE_OTHERS})();
    localStorage.clear();
    for (const [name, value] of Object.entries(view.kept)) localStorage.setItem(name, value);
    app.canvas.ds.scale = view.scale;
    app.canvas.ds.offset = view.offset;
    app.canvas.setDirty(true, true);
    document.activeElement?.blur();
}}"""

_KEPT = """() => ({
    scale: app.canvas.ds.scale,
    offset: [...app.canvas.ds.offset],
    kept: {...localStorage},
})"""

_STATE = r"""() => {
    const {workflow} = app.extensionManager;
    const {undoQueue, redoQueue} = workflow.activeWorkflow?.changeTracker ?? {};
    const graph = app.rootGraph ?? app.graph;
    const of = (selector) => document.querySelectorAll(selector).length;
    return {
        view: [app.canvas.ds.scale, ...app.canvas.ds.offset],
        isOutside: app.canvas.graph === graph && app.graph === graph,
        nodes: graph.serialize().nodes.length,
        links: graph.serialize().links.length,
        definitions: graph.serialize().definitions?.subgraphs?.length ?? 0,
        last: [graph.state?.lastNodeId, graph.state?.lastLinkId],
        steps: [undoQueue?.length ?? 0, redoQueue?.length ?? 0],
        errors: Object.keys(app.lastNodeErrors ?? {}).length,
        selected: app.canvas.selectedItems?.size ?? 0,
        open: of("dialog[open], [role=dialog], [role=menu], [role=listbox], .litecontextmenu"),
        ours: of("qwenlora-rows, .qwenlora-report"),
        classes: document.body.className,
        focused: document.activeElement?.tagName,
        kept: Object.keys(localStorage).sort(),
        // The number of a workflow without a name goes on; notices of the queue go by themselves.
        text: document.body.innerText.replace(/(Unsaved Workflow) \(\d+\)/g, "$1")
            .split("\n").filter((line) => !/^(Job queued|\d+ jobs? completed)$/.test(line)),
    };
}"""

_VALUES = """(id) => Object.fromEntries(
    app.graph.getNodeById(id).widgets.map((own) => [own.name, own.value])
)"""

_SETTLED = """([least, quiet, most]) => new Promise((done) => {
    const begun = performance.now();
    let changed = begun;
    const watch = new MutationObserver(() => { changed = performance.now(); });
    watch.observe(document.body,
        {subtree: true, childList: true, attributes: true, characterData: true});
    const look = () => {
        const now = performance.now();
        if (now - begun < most && (now - begun < least || now - changed < quiet)) {
            setTimeout(idle, 20);
            return;
        }
        watch.disconnect();
        done();
    };
    const idle = () => requestIdleCallback(look, {timeout: most});
    requestAnimationFrame(() => requestAnimationFrame(idle));
})"""
_QUIET = 50
"""Milliseconds without a change in the document after which nothing is under way."""
_RESTLESS = 5000
"""Milliseconds after which a page that changes all the time is taken as it is."""

_PROMPT = "async () => (await app.graphToPrompt()).output"


@dataclass
class Workbench:
    """One page.

    Attributes:
        comfy: The server behind it.
        page: Playwright's page, for clicks and keys.
        frontend: The version that is shown.
        renderer: What draws the nodes.
        problems: What the page's console called an error, and exceptions nobody caught.
    """

    comfy: ComfyProcess
    page: Page
    frontend: Frontend
    renderer: Renderer
    problems: list[str] = field(default_factory=list)
    _heard: list[tuple[Any, Callable[[Any], Any]]] = field(default_factory=list)
    _kept: dict[str, Any] = field(default_factory=dict)
    _fresh: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(
        cls, comfy: ComfyProcess, browser: Browser, frontend: Frontend, renderer: Renderer
    ) -> Workbench:
        """Load the page and clear its canvas."""
        context = browser.new_context(viewport=SIZE, locale="en-US")
        page = context.new_page()
        page.set_default_timeout(_PATIENCE)
        bench = cls(comfy, page, frontend, renderer)
        page.on("pageerror", lambda error: bench.problems.append(str(error)))
        # The server shows the newest; the files of others are laid over its own.
        if frontend is not Frontend.NEWEST:
            context.route("**/*", bench._serve)
        bench.reload()
        return bench

    def close(self) -> None:
        """Leave the page."""
        self.page.context.close()

    def reload(self) -> None:
        """Load the page anew, with an empty canvas."""
        # Pages of another renderer may have been opened since.
        self.comfy.choose(**{"Comfy.VueNodes.Enabled": self.renderer is Renderer.NODES_2})
        self.page.goto(self.comfy.url)
        self.page.wait_for_function(
            "() => window.app?.extensionManager && window.app.graph && window.app.canvas"
            " && Object.keys(LiteGraph.registered_node_types).includes('QwenLoraStack')",
            timeout=_PATIENCE,
        )
        self.page.evaluate(_CLEAR)
        self.settle(500)
        self._kept, self._fresh = self.page.evaluate(_KEPT), self.page.evaluate(_STATE)
        shown = self.page.evaluate("() => !!LiteGraph.vueNodesMode")
        assert shown == (self.renderer is Renderer.NODES_2)

    def reset(self) -> None:
        """Bring the page back to what it was when it was loaded.

        What a person sees and what the page holds is compared with what a fresh one has. Where they
        differ after a while, the page is loaded anew.
        """
        self.page.unroute_all(behavior="wait")
        for event, hear in self._heard:
            self.page.remove_listener(event, hear)
        self._heard.clear()
        self.page.mouse.move(*NOWHERE)
        self.page.evaluate(_AS_FRESH, self._kept)
        end = time.monotonic() + _CLEARED_IN
        while self.page.evaluate(_STATE) != self._fresh:
            if time.monotonic() > end:
                self.reload()
                break
            self.settle()
        self.problems.clear()

    def listen(self, event: Any, hear: Callable[[Any], Any]) -> None:
        """Hear of the page's events until it is brought back."""
        self.page.on(event, hear)
        self._heard.append((event, hear))

    # ---- nodes ----

    def add(self, node_type: str, place: tuple[int, int] = (300, 200), **values: Any) -> Any:
        """Put a node on the canvas, with values in its widgets; returns its id."""
        (node,) = self.add_all((node_type, place, values))
        return node

    def add_all(self, *wanted: tuple[str, tuple[int, int], dict[str, Any]]) -> list[Any]:
        """Put nodes on the canvas, each with its place and values; returns their ids."""
        nodes = self.page.evaluate(_ADD, [list(own) for own in wanted])
        self.settle()
        return nodes

    def link(self, giver: Any, output: int, taker: Any, name: str) -> None:
        """Draw a link from an output to an input."""
        self.page.evaluate(_LINK, [[giver, output, taker, name]])

    def values(self, node: Any) -> dict[str, Any]:
        """The values of a node's widgets by name."""
        return self.page.evaluate(_VALUES, node)

    def box(self, node: Any) -> tuple[float, float, float, float]:
        """Where a node is on the page: left, top, width, height, in pixels, its title included."""
        left, top, width, height = self.page.evaluate(
            """(id) => {
                const node = app.graph.getNodeById(id);
                const [x, y] = app.canvas.ds.convertOffsetToCanvas(
                    [node.pos[0], node.pos[1] - LiteGraph.NODE_TITLE_HEIGHT]);
                const box = app.canvas.canvas.getBoundingClientRect();
                const scale = app.canvas.ds.scale;
                return [box.x + x, box.y + y, node.size[0] * scale,
                        (node.size[1] + LiteGraph.NODE_TITLE_HEIGHT) * scale];
            }""",
            node,
        )
        return left, top, width, height

    def fit(self) -> None:
        """Bring all nodes into view."""
        self.page.evaluate("() => app.canvas.fitViewToSelectionAnimated?.() ?? app.resetView?.()")
        self.settle()

    def chain(self, *middle: Any, kind: str = "qwen-image", steps: int = 2) -> dict[str, Any]:
        """Put a loader, a sampler and what shows the latent round nodes that take a MODEL."""
        sampling = {"seed": 5, "steps": steps, "cfg": 2.0}
        sampling |= {"sampler_name": "euler", "scheduler": "simple"}
        model, positive, negative, latent, sampler, shown = self.add_all(
            ("EmulatedModel", (20, 100), {"kind": kind}),
            ("EmulatedText", (20, 250), {"seed": 1, "kind": kind}),
            ("EmulatedText", (20, 400), {"seed": 2, "kind": kind}),
            ("EmptySD3LatentImage", (20, 550), {"width": 64, "height": 64, "batch_size": 1}),
            ("KSampler", (900, 100), sampling),
            ("LatentHash", (1200, 100), {}),
        )
        way = [model, *middle, sampler]
        links = [[giver, 0, taker, "model"] for giver, taker in pairwise(way)]
        links += [
            [positive, 0, sampler, "positive"],
            [negative, 0, sampler, "negative"],
            [latent, 0, sampler, "latent_image"],
            [sampler, 0, shown, "samples"],
        ]
        self.page.evaluate(_LINK, links)
        return {"model": model, "sampler": sampler, "shown": shown}

    # ---- files ----

    def saved(self) -> dict[str, Any]:
        """The workflow as it would be saved."""
        # As text: what is undefined is left out of a file, and would come out of the page as null.
        return json.loads(self.page.evaluate("() => JSON.stringify(app.graph.serialize())"))

    def load(self, workflow: dict[str, Any]) -> None:
        """Open a workflow, as a file that is dropped on the canvas."""
        self.page.evaluate("(graph) => app.loadGraphData(graph)", json.loads(json.dumps(workflow)))
        self.settle()

    def prompt(self) -> dict[str, Any]:
        """What would be queued, in API format."""
        return self.page.evaluate(_PROMPT)

    def until(self, script: str, arg: Any = None) -> None:
        """Wait until a function says yes, and all that goes with it is drawn."""
        self.page.wait_for_function(script, arg=arg, timeout=_PATIENCE)
        self.settle()

    # ---- the queue ----

    def queue(self) -> dict[str, Any]:
        """Queue the workflow and wait for its end; returns its entry of the history.

        Raises:
            AssertionError: The server refused it, or it failed.
        """
        done = self.try_queue()
        assert done.get("status", {}).get("status_str") == "success", done
        return done

    def try_queue(self) -> dict[str, Any]:
        """Queue the workflow as the button does; its entry of the history, empty if refused."""
        before = set(self.comfy.request("/history"))
        self.page.evaluate("async () => { await app.queuePrompt(0, 1).catch(() => {}); }")
        end = time.monotonic() + _PATIENCE / 1000
        while time.monotonic() < end:
            history = self.comfy.request("/history")
            queue = self.comfy.request("/queue")
            new = [entry for name, entry in history.items() if name not in before]
            if new and not queue["queue_running"] and not queue["queue_pending"]:
                self.settle()
                return new[-1]
            if not new and not queue["queue_running"] and not queue["queue_pending"]:
                errors = self.page.evaluate("() => app.lastNodeErrors ?? null")
                if errors:
                    self.settle()
                    return {"node_errors": errors}
            time.sleep(0.1)
        raise AssertionError(f"nothing ran\n{self.comfy.log[-3000:]}")

    def hash_of(self, done: dict[str, Any]) -> str:
        """The hash that `LatentHash` showed; empty where it was kept from the run before."""
        texts = [out["text"][0] for out in done["outputs"].values() if "text" in out]
        return texts[0] if texts else ""

    # ---- the screen ----

    def settle(self, milliseconds: int = 60) -> None:
        """Let the page draw and finish what it has to do; it has at least this time for it."""
        self.page.evaluate(_SETTLED, [milliseconds, _QUIET, _RESTLESS])

    def screenshot(self, path: Path) -> None:
        """Write what is on the screen."""
        self.page.screenshot(path=str(path))

    def _serve(self, route: Route) -> None:
        path = urlsplit(route.request.url).path
        name = "index.html" if path == "/" else path.removeprefix("/")
        file = self.frontend.folder / name
        if not file.is_file():
            route.continue_()
            return
        route.fulfill(path=file)
