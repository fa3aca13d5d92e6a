"""Tools of the tests: graphs that can be changed, photos, and one call to run and fetch."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tools.client import Client, Progress, Result
from tools.host import Host
from tools.restoration import NANO_WORKFLOW, OUTPUT_TITLE
from tools.workflow import Workflow, find_node, load_workflow

OWN_NODES = Path(__file__).parent / "host_nodes"
OnProgress = Callable[[Progress], None]
AFTER_RUN = {"seed": "fixed", "index": "increment"}
"""What the front end does with a number after a run."""


@dataclass
class Graph:
    """A workflow in API format that tests change before they queue it."""

    nodes: Workflow
    added: int = 0

    @classmethod
    def load(cls, path: Path = NANO_WORKFLOW, photo: str = "") -> Graph:
        graph = cls(load_workflow(path))
        if photo:
            graph.set("LoadImage", image=photo)
        return graph

    def copy(self) -> Graph:
        return copy.deepcopy(self)

    def node(self, class_type: str) -> str:
        """Id of the one node of a class."""
        return find_node(self.nodes, class_type)

    def set(self, class_type: str, **inputs: Any) -> Graph:
        """Changes inputs of the one node of a class; returns the graph."""
        known = self.nodes[self.node(class_type)]["inputs"]
        known.update(inputs)
        return self

    def input(self, class_type: str, name: str) -> Any:
        return self.nodes[self.node(class_type)]["inputs"][name]

    def add(self, class_type: str, **inputs: Any) -> str:
        """Adds a node and returns its id."""
        self.added += 1
        node_id = f"added{self.added}"
        self.nodes[node_id] = {"class_type": class_type, "inputs": inputs}
        return node_id

    def replace_link(self, old: list[Any], new: list[Any]) -> Graph:
        """Moves everything that hangs on one output to another; returns the graph."""
        for node_id, node in self.nodes.items():
            for name, value in node["inputs"].items():
                if value == old and node_id != new[0]:
                    node["inputs"][name] = list(new)
        return self


def inputs_of(node: dict[str, Any], source: Callable[[int], Any]) -> dict[str, Any]:
    """The inputs of a node of the UI's format, as the API has them: a widget's values stand in the
    order of the widgets, and `source` tells what the link of a number gives."""
    inputs: dict[str, Any] = {}
    values = iter(node["widgets_values"])
    for entry in node["inputs"]:
        if "widget" in entry:
            inputs[entry["name"]] = next(values)
            if entry["name"] in AFTER_RUN:
                assert next(values) == AFTER_RUN[entry["name"]]
        if entry["link"] is not None:
            inputs[entry["name"]] = source(entry["link"])
    assert not list(values)
    return inputs


def expand_blueprint(blueprint: dict[str, Any], **sockets: Any) -> tuple[Workflow, list[Any]]:
    """What the front end queues for the node of a blueprint, whose inputs are connected so: the
    inner nodes in API format, named as by the front end, and the link to the node's only output."""
    (outer,), (inner,) = blueprint["nodes"], blueprint["definitions"]["subgraphs"]
    return expand_subgraph(outer, inner, sockets)


def expand_subgraph(
    outer: dict[str, Any], inner: dict[str, Any], sockets: dict[str, Any]
) -> tuple[Workflow, list[Any]]:
    """`expand_blueprint` for a node of any workflow and the subgraph that is its type."""
    widgets = [entry["name"] for entry in outer["inputs"] if "widget" in entry]
    given = dict(zip(widgets, outer["widgets_values"], strict=True)) | sockets
    links = {link["id"]: link for link in inner["links"]}

    def source(number: int) -> Any:
        link = links[number]
        if link["origin_id"] == inner["inputNode"]["id"]:
            return given[inner["inputs"][link["origin_slot"]]["name"]]
        return [f"{outer['id']}:{link['origin_id']}", link["origin_slot"]]

    nodes: Workflow = {}
    for node in inner["nodes"]:
        inputs = inputs_of(node, source)
        nodes[f"{outer['id']}:{node['id']}"] = {"class_type": node["type"], "inputs": inputs}
    (output,) = inner["outputs"]
    return nodes, source(output["linkIds"][0])


def with_own_nodes(base: Path) -> Path:
    """A base directory for a server that is to have the tests' own nodes; returns it."""
    folder = base / "custom_nodes"
    folder.mkdir(parents=True)
    (folder / "e2e_host_nodes").symlink_to(OWN_NODES, target_is_directory=True)
    return base


class Runner:
    """Uploads, runs and fetches, on one server."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.client = Client(host.url)

    def upload(self, picture: Image.Image, name: str) -> str:
        stream = io.BytesIO()
        picture.save(stream, "PNG")
        return self.client.upload(stream.getvalue(), name)

    def executed(self, graph: Graph) -> tuple[set[str], Result]:
        """Runs a graph; the classes of the nodes that did not come from the cache."""
        seen: set[str] = set()
        result = self.run(graph, lambda report: seen.add(report.node))
        return {graph.nodes[node]["class_type"] for node in seen}, result

    def run(self, graph: Graph, on_progress: OnProgress | None = None) -> Result:
        return self.client.run(graph.nodes, on_progress)

    def pictures(self, graph: Graph, on_progress: OnProgress | None = None) -> list[np.ndarray]:
        """Runs a graph; its saved pictures as (H, W, C) in [0, 255]."""
        result = self.run(graph, on_progress)
        target = find_node(graph.nodes, "SaveImage", OUTPUT_TITLE)
        return [np.asarray(picture, np.float32) for picture in self.client.images(result, target)]


def make_photo(width: int = 96, height: int = 72, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """A smooth random picture with some noise."""
    noise = np.random.default_rng(seed)
    channels = len(Image.new(mode, (1, 1)).getbands())
    coarse = noise.integers(0, 256, (5, 5, channels), dtype=np.uint8).squeeze()
    picture = Image.fromarray(coarse, mode).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(picture) + noise.normal(0, 8, np.asarray(picture).shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8), mode)
