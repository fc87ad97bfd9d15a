"""ComfyUI's page as a person uses it: nodes on a canvas, values, the mouse, the queue."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from .frontends import Frontend, Renderer

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

    from .comfy_process import ComfyProcess

SIZE = {"width": 1500, "height": 1000}
_PATIENCE = 90_000
"""Milliseconds that a page may take on a busy machine."""

_ADD = """([type, place, values]) => {
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
}"""

_LINK = """([from, output, to, input]) => {
    const [giver, taker] = [app.graph.getNodeById(from), app.graph.getNodeById(to)];
    const slot = taker.inputs.findIndex((own) => own.name === input);
    giver.connect(output, taker, slot);
}"""

_CLEAR = """async () => {
    // The oldest frontend starts without any workflow, whose changes it would follow.
    if (app.extensionManager.workflow?.activeWorkflow) app.graph.clear();
    else await app.loadGraphData(
        {version: 0.4, last_node_id: 0, last_link_id: 0, nodes: [], links: []});
}"""

_VALUES = """(id) => Object.fromEntries(
    app.graph.getNodeById(id).widgets.map((own) => [own.name, own.value])
)"""

_SETTLED = """() => new Promise((done) => {
    const idle = () => requestIdleCallback(done, {timeout: 5000});
    requestAnimationFrame(() => requestAnimationFrame(idle));
})"""

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
            page.route("**/*", bench._serve)
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
        shown = self.page.evaluate("() => !!LiteGraph.vueNodesMode")
        assert shown == (self.renderer is Renderer.NODES_2)

    def clear(self) -> None:
        """Take everything off the canvas, and forget the problems."""
        self.page.evaluate("() => app.graph.clear()")
        self.problems.clear()
        self.settle(50)

    # ---- nodes ----

    def add(self, node_type: str, place: tuple[int, int] = (300, 200), **values: Any) -> Any:
        """Put a node on the canvas, with values in its widgets; returns its id."""
        node = self.page.evaluate(_ADD, [node_type, list(place), values])
        self.settle()
        return node

    def link(self, giver: Any, output: int, taker: Any, name: str) -> None:
        """Draw a link from an output to an input."""
        self.page.evaluate(_LINK, [giver, output, taker, name])

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
        model = self.add("EmulatedModel", (20, 100), kind=kind)
        positive = self.add("EmulatedText", (20, 250), seed=1, kind=kind)
        negative = self.add("EmulatedText", (20, 400), seed=2, kind=kind)
        latent = self.add("EmptySD3LatentImage", (20, 550), width=64, height=64, batch_size=1)
        sampler = self.add(
            "KSampler",
            (900, 100),
            seed=5,
            steps=steps,
            cfg=2.0,
            sampler_name="euler",
            scheduler="simple",
        )
        shown = self.add("LatentHash", (1200, 100))
        giver = model
        for node in middle:
            self.link(giver, 0, node, "model")
            giver = node
        self.link(giver, 0, sampler, "model")
        self.link(positive, 0, sampler, "positive")
        self.link(negative, 0, sampler, "negative")
        self.link(latent, 0, sampler, "latent_image")
        self.link(sampler, 0, shown, "samples")
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

    def settle(self, milliseconds: int = 250) -> None:
        """Give the page time, and let it draw and finish what it has to do: busy ones take more."""
        self.page.wait_for_timeout(milliseconds)
        self.page.evaluate(_SETTLED)

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
