"""ComfyUI's graph editor in a browser, as a user sees it."""

from __future__ import annotations

import base64
import io
import json
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Page, ViewportSize

from tools.environment import ROOT
from tools.host import PACK_NAME, Host

SCREENSHOTS = ROOT / "browser_out"
VIEW: ViewportSize = {"width": 1600, "height": 1000}
LAPTOP: ViewportSize = {"width": 1440, "height": 900}
NODES_2 = {"Comfy.VueNodes.Enabled": True}
SECONDS = 1000.0
READY = "window.app?.graph && window.app.extensionManager?.setting"
# What the front end itself asks of other servers, which this one forbids; the pack has no scripts.
HOST_NOISE = ("Content Security Policy", "Error fetching file size")


class Editor:
    """One tab on a server, with a graph of its own.

    Args:
        browser: The running browser.
        host: The running server.
        view: Size of the page.
        settings: Front-end settings, beside those that keep its greetings away.
    """

    def __init__(
        self, browser: Browser, host: Host, view: ViewportSize = VIEW, **settings: Any
    ) -> None:
        self.host = host
        greeted = {"Comfy.TutorialCompleted": True, "Comfy.InstalledVersion": "99.0.0"}
        self._send(
            "/settings",
            greeted | {"Comfy.Locale": "en", "Comfy.VueNodes.Enabled": False} | settings,
        )
        self.context = browser.new_context(viewport=view)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(60 * SECONDS)
        self.errors: list[str] = []
        self.page.on("console", self._listen)
        self.page.on("pageerror", lambda error: self._note(f"{error} {error.stack}"))
        self.page.goto(host.url)
        self.page.wait_for_function(READY)
        self.page.wait_for_load_state("networkidle")
        self.close_banner()
        self.errors.clear()  # what an empty ComfyUI complains of is not ours

    def close(self) -> None:
        """Close the tab and forget its graph."""
        self.context.close()

    def _send(self, path: str, content: dict[str, Any]) -> None:
        self._open(
            urllib.request.Request(
                self.host.url + path,
                json.dumps(content).encode(),
                {"Content-Type": "application/json"},
            )
        )

    def _fetch(self, path: str) -> bytes:
        return self._open(urllib.request.Request(self.host.url + path))

    def _open(self, request: urllib.request.Request) -> bytes:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=30) as reply:
            return reply.read()

    def _listen(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self._note(f"{message.text} {message.location.get('url', '')}")

    def _note(self, error: str) -> None:
        if not any(name in error for name in HOST_NOISE):
            self.errors.append(error)

    def close_banner(self) -> None:
        """Close an advertisement of the front end, where there is one."""
        banner = self.page.locator("button:has(.icon-\\[lucide--x\\]), .pi-times")
        if self.page.get_by_text("Nodes 2.0").count() and banner.count():
            banner.first.click()

    def open_templates(self) -> None:
        """Open the dialog of workflow templates on this pack's page."""
        self.page.get_by_label("Templates").first.click()
        dialog = self.page.get_by_role("dialog")  # nodes may wear a badge with the name
        dialog.get_by_text(PACK_NAME, exact=True).first.click()

    def open_template(self, name: str) -> None:
        """Open a workflow of this pack from the templates dialog, by clicking."""
        self.open_templates()
        self.page.get_by_role("dialog").get_by_text(name, exact=True).first.click()
        self.page.wait_for_function(
            "name => app.extensionManager.workflow.activeWorkflow?.filename?.startsWith(name)"
            " && app.graph.nodes.length > 0",
            arg=name,
        )

    def nodes(self) -> list[dict[str, Any]]:
        """Type, title and state of each node of the graph."""
        return self.page.evaluate(
            """() => app.graph.nodes.map(node => ({
                type: node.type, title: node.title, red: Boolean(node.has_errors),
                known: node.type in LiteGraph.registered_node_types,
                redSockets: (node.inputs ?? []).filter(socket => socket.hasErrors).length,
            }))"""
        )

    def run(self, timeout: float = 300.0) -> dict[str, Any]:
        """Click Run, and wait for the end.

        Args:
            timeout: Seconds.

        Returns:
            The server's entry of the history.

        Raises:
            TimeoutError: It is not finished by then.
        """
        before = set(self.host.get("/history"))
        self.page.get_by_test_id("queue-button").first.click()
        return self._wait_for_more(before, timeout)

    def run_by_api(self, workflow: dict[str, Any], timeout: float = 300.0) -> dict[str, Any]:
        """`run` of a workflow in API format, as a program would."""
        before = set(self.host.get("/history"))
        self._send("/prompt", {"prompt": workflow})
        return self._wait_for_more(before, timeout)

    def _wait_for_more(self, before: set[str], timeout: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            history = self.host.get("/history")
            if more := set(history) - before:
                return history[more.pop()]
            self.page.wait_for_timeout(250)  # lets the page work, as time.sleep would not
        raise TimeoutError(f"not finished after {timeout:.0f} s")

    def saved(self, entry: dict[str, Any]) -> list[bytes]:
        """The PNG files that a run has saved, in the order of its nodes."""
        found = [
            picture
            for _, shown in sorted(entry["outputs"].items())
            for picture in shown.get("images", ())
            if picture["type"] == "output" and picture["filename"].endswith(".png")
        ]
        return [self._fetch("/view?" + urllib.parse.urlencode(picture)) for picture in found]

    def pixels(self, entry: dict[str, Any]) -> list[np.ndarray]:
        """`saved`, as (H, W, 3) in [0, 255]."""
        return [np.asarray(Image.open(io.BytesIO(data))) for data in self.saved(entry)]

    def zoom(self) -> float:
        """At which the graph is shown; the front end draws no text below 0.6."""
        return self.page.evaluate("app.canvas.ds.scale")

    def drop(self, data: bytes, name: str) -> None:
        """Let go of a PNG file over the canvas."""
        self.page.evaluate(
            """([text, name]) => {
                const bytes = Uint8Array.from(atob(text), each => each.charCodeAt(0));
                const dataTransfer = new DataTransfer();
                dataTransfer.items.add(new File([bytes], name, {type: 'image/png'}));
                app.canvas.canvas.dispatchEvent(new DragEvent('drop', {
                    dataTransfer, bubbles: true, cancelable: true, clientX: 700, clientY: 450,
                }));
            }""",
            [base64.b64encode(data).decode(), name],
        )

    def shown_pictures(self, node_type: str) -> list[list[int]]:
        """Sizes (width, height) of the pictures that a node of that type shows, once there."""
        self.page.wait_for_function(
            "type => app.graph.nodes.some(node => node.type === type && node.imgs?.length"
            " && node.imgs.every(each => each.complete && each.naturalWidth))",
            arg=node_type,
        )
        return self.page.evaluate(
            """type => app.graph.nodes.filter(node => node.type === type && node.imgs)
                .flatMap(node => node.imgs.map(each => [each.naturalWidth, each.naturalHeight]))""",
            node_type,
        )

    def screenshot(self, name: str, clip: Any = None) -> Path:
        """Keep what is to be seen now."""
        SCREENSHOTS.mkdir(exist_ok=True)
        path = SCREENSHOTS / f"{name}.png"
        self.page.wait_for_timeout(500)  # the canvas draws on its own clock
        self.page.screenshot(path=path, clip=clip)
        return path

    def fit(self) -> None:
        """Show the whole graph."""
        self.page.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")

    def place_of(self, node_type: str) -> dict[str, float]:
        """Where a node of that type is on the page, as a clip for a screenshot."""
        return self.page.evaluate(
            """type => {
                const node = app.graph.nodes.find(each => each.type === type);
                const scale = app.canvas.ds.scale, [x, y] = app.canvas.ds.offset;
                const canvas = app.canvas.canvas.getBoundingClientRect(), edge = 6, title = 30;
                return {
                    x: canvas.x + (node.pos[0] + x - edge) * scale,
                    y: canvas.y + (node.pos[1] + y - edge - title) * scale,
                    width: (node.size[0] + 2 * edge) * scale,
                    height: (node.size[1] + 2 * edge + title) * scale,
                };
            }""",
            node_type,
        )
