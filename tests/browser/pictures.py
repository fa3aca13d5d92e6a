"""Draws the pictures of the help pages and of the README: python -m tests.browser.pictures."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright
from tqdm import tqdm

from tests.browser.chromium import ARGUMENTS, find_or_install
from tests.browser.editor import Editor
from tools.environment import ROOT
from tools.examples import CLEAN, write_examples
from tools.host import Host

HELP = ROOT / "web/docs"
DOCS = ROOT / "docs"
SHOWN_IN = {
    "DiffRestorerDegradationClassifier": "restore_nano",
    "DiffRestorerPromptProcessor": "restore_nano",
    "DiffRestorerMeasure": "measure_restoration",
    "DiffRestorerTiledDiffusion": "restore_large",
}
"""Nodes that show something when they ran -> the workflow that they are drawn in."""
LEAST_WIDTH = 260


def draw_nodes(editor: Editor) -> None:
    """<HELP>/<node>/node.png of every node of the pack."""
    names = [path.name for path in HELP.iterdir()]
    # A new node would show what a node of its number showed in a workflow that ran before.
    for node in tqdm(sorted(names, key=SHOWN_IN.__contains__), unit="node", disable=None):
        if node in SHOWN_IN:
            editor.open_template(SHOWN_IN[node])
            editor.page.evaluate(
                """([node, name]) => {
                    const found = app.graph.nodes.find(each => each.title === "Clean photo");
                    if (found) found.widgets.find(each => each.name === "image").value = name;
                    const shown = app.graph.nodes.find(each => each.type === node);
                    shown.flags.collapsed = false;
                    shown.title = shown.constructor.title;
                }""",
                [node, CLEAN],
            )
            editor.run()
            editor.shown_pictures(node)
            editor.page.evaluate(
                """([node, scale]) => {
                    const found = app.graph.nodes.find(each => each.type === node);
                    app.canvas.ds.scale = scale;
                    app.canvas.ds.offset = [140 - found.pos[0], 140 - found.pos[1]];
                    app.graph.setDirtyCanvas(true, true);
                }""",
                [node, 1.0],
            )
        else:
            editor.page.evaluate(
                """([node, width]) => {
                    app.graph.clear();
                    const made = LiteGraph.createNode(node), [least, height] = made.computeSize();
                    made.setSize([Math.max(least, width), height]);
                    made.pos = [140, 140];
                    app.canvas.ds.scale = 1, app.canvas.ds.offset = [0, 0];
                    app.graph.add(made);
                }""",
                [node, LEAST_WIDTH],
            )
        clip = editor.place_of(node)
        colors = 256 if node in SHOWN_IN else 64
        few_colors(editor.screenshot(f"node_{node}", clip), HELP / node / "node.png", colors)


def draw_templates(editor: Editor) -> None:
    """The pack's page in the templates dialog."""
    editor.open_templates()
    editor.page.wait_for_timeout(3000)
    photo = Image.open(editor.screenshot("templates")).convert("RGB")
    photo.save(DOCS / "templates.jpg", quality=85)


def draw_workflow(editor: Editor) -> None:
    """A workflow after its run."""
    editor.open_template("restore_nano")
    editor.run()
    editor.shown_pictures("SaveImage")
    editor.fit()
    few_colors(editor.screenshot("workflow"), DOCS / "workflow.png", 256)


def few_colors(source: Path, target: Path, colors: int) -> None:
    """A palette makes a screenshot a third as large."""
    Image.open(source).convert("RGB").quantize(colors, dither=Image.Dither.NONE).save(
        target, optimize=True
    )


def main() -> None:
    """Start a server and a browser, and draw."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        write_examples(Path(folder) / "input")
        browser = playwright.chromium.launch(
            executable_path=find_or_install(), args=list(ARGUMENTS)
        )
        with Host(Path(folder)) as host:
            for draw in (draw_nodes, draw_templates, draw_workflow):
                editor = Editor(browser, host)
                draw(editor)
                editor.close()
        browser.close()


if __name__ == "__main__":
    sys.exit(main())
