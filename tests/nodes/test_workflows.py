"""The shipped workflows load without a missing node, and both formats say the same."""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.e2e.graph import AFTER_RUN, expand_blueprint, expand_subgraph, inputs_of
from tools.environment import ROOT

FOLDER = ROOT / "workflows"
(BLUEPRINT,) = (ROOT / "subgraphs").glob("*.json")
NAMES = (
    "compare_decoders", "measure_restoration", "restore_by_kind", "restore_folder",
    "restore_frames", "restore_if_degraded", "restore_large", "restore_nano", "restore_override",
    "restore_photo", "restore_sd15", "restore_upscale_x2",
)  # fmt: skip
WIRES = {"restore_photo": 2, "restore_nano": 13}
SIMPLE = "restore_photo"
"""A note, the blueprint as one node, and Save."""
# What programs cannot send a degraded photo to.
OTHER_INPUTS = {
    "measure_restoration": ("Clean photo", "LoadImage"),
    "restore_folder": ("Folder of photos", "DiffRestorerFolderPhoto"),
    "restore_frames": ("Folder of frames", "LoadImageDataSetFromFolder"),
}
NOTES = ("Note", "MarkdownNote")
# Files of the host's comfy_extras whose nodes the workflows use.
EXTRAS = ("dataset", "images", "latent", "preview_any", "rebatch", "string", "video")
# What the front end stores beside the widgets of the schema.
UPLOAD = {"upload": "image"}


@pytest.fixture(scope="module")
def info(pack: ModuleType, comfyui_root: Path) -> Any:
    """/object_info of one node."""
    import nodes

    for name in EXTRAS:
        file = str(comfyui_root / f"comfy_extras/nodes_{name}.py")
        assert asyncio.run(nodes.load_custom_node(file, module_parent="comfy_extras"))  # type: ignore

    def of(node_type: str) -> dict[str, Any]:
        node = nodes.NODE_CLASS_MAPPINGS[node_type]  # type: ignore
        if hasattr(node, "GET_NODE_INFO_V1"):
            found = node.GET_NODE_INFO_V1()
            return {"input": found["input"], "output": list(found["output"])}
        return {"input": node.INPUT_TYPES(), "output": list(node.RETURN_TYPES)}

    return of


def entries_of(info: dict[str, Any]) -> dict[str, tuple[Any, bool]]:
    """Input name -> (type, required)."""
    return {
        name: (entry[0], part == "required")
        for part in ("required", "optional")
        for name, entry in info["input"].get(part, {}).items()
    }


def is_widget(kind: Any) -> bool:
    return isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def described(node: dict[str, Any], graph: dict[str, Any], info: Any) -> dict[str, Any]:
    """Inputs and outputs of a node, which may be a subgraph of the workflow's own."""
    for inner in graph.get("definitions", {}).get("subgraphs", ()):
        if inner["id"] == node["type"]:
            inputs = {entry["name"]: (entry["type"],) for entry in inner["inputs"]}
            outputs = [entry["type"] for entry in inner["outputs"]]
            return {"input": {"required": inputs}, "output": outputs}
    return info(node["type"])


def load(name: str, api: bool = False) -> dict[str, Any]:
    return json.loads((FOLDER / ("api" if api else "") / f"{name}.json").read_text())


def test_all_workflows_are_known() -> None:
    for folder in (FOLDER, FOLDER / "api"):
        assert sorted(path.stem for path in folder.glob("*.json")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_api_format(info, name: str) -> None:
    graph = load(name, api=True)
    for node_id, node in graph.items():
        entries = entries_of(info(node["class_type"]))
        assert set(node["inputs"]) <= set(entries), node_id
        required = {key for key, (_, needed) in entries.items() if needed}
        assert required <= set(node["inputs"]), node_id
        for key, value in node["inputs"].items():
            kind = entries[key][0]
            if isinstance(value, list):
                source, slot = value
                found = info(graph[source]["class_type"])["output"][slot]
                assert kind in (found, "*"), (node_id, key)
            else:
                assert is_widget(kind), (node_id, key)


@pytest.mark.parametrize("name", NAMES)
def test_what_programs_rely_on(name: str) -> None:
    graph = load(name, api=True)
    titles = {
        node["_meta"]["title"]: node["class_type"] for node in graph.values() if "_meta" in node
    }
    title, start = OTHER_INPUTS.get(name, ("Degraded photo", "LoadImage"))
    assert titles[title] == start
    assert titles["Restored"] == "SaveImage"
    assert ("DiffRestorerDegradationClassifier" in titles.values()) == (name != SIMPLE)
    nodes = {node["class_type"]: node for node in graph.values()}
    sampler = nodes["KSampler"]["inputs"]
    settings = [sampler[key] for key in ("sampler_name", "scheduler", "steps", "cfg", "denoise")]
    nano = ["euler", "sgm_uniform", 3, 1.0, 1.0]
    assert settings == (["euler", "simple", 20, 1.0, 1.0] if name == "restore_sd15" else nano)
    latent, slot = sampler["latent_image"]
    if graph[latent]["class_type"] == "LatentBatchSeedBehavior":
        latent, slot = graph[latent]["inputs"]["samples"]
    assert (graph[latent]["class_type"], slot) == ("DiffRestorerDegradationControl", 2)


@pytest.mark.parametrize("name", NAMES)
def test_ui_format(info, name: str) -> None:
    """Sockets, slots and links agree with the nodes, and every required socket has a link."""
    graph = load(name)
    nodes = {node["id"]: node for node in graph["nodes"]}
    links = {link[0]: link for link in graph["links"]}
    assert graph["last_node_id"] >= max(nodes)
    assert graph["last_link_id"] >= max(links)
    assert any(node["type"] in NOTES for node in graph["nodes"])
    for number, source, out_slot, target, in_slot, kind in links.values():
        assert nodes[target]["inputs"][in_slot]["link"] == number
        assert number in nodes[source]["outputs"][out_slot]["links"]
        assert nodes[source]["outputs"][out_slot]["type"] == kind
        assert nodes[target]["inputs"][in_slot]["type"] in (kind, "*")
    for node in nodes.values():
        if node["type"] in NOTES:
            continue
        schema = described(node, graph, info)
        entries = entries_of(schema)
        sockets = [entry for entry in node["inputs"] if "widget" not in entry]
        expected = [key for key, (kind, _) in entries.items() if not is_widget(kind)]
        assert sorted(entry["name"] for entry in sockets) == sorted(expected), node["type"]
        for entry in sockets:
            assert entry["type"] == entries[entry["name"]][0]
            assert entry["link"] is not None or not entries[entry["name"]][1], entry["name"]
        outputs = [entry["type"] for entry in node["outputs"]]
        # Newer hosts have added outputs to nodes of theirs.
        ours = node["type"].startswith("DiffRestorer")
        assert outputs == schema["output"][: None if ours else len(outputs)]


@pytest.mark.parametrize("name", NAMES)
def test_both_formats_describe_one_graph(name: str) -> None:
    ui, api = load(name), load(name, api=True)
    links = {number: [str(origin), slot] for number, origin, slot, *_ in ui["links"]}
    rebuilt = {}
    for node in ui["nodes"]:
        if node["type"] in NOTES:
            continue
        inputs = inputs_of(node, links.__getitem__)
        if node["type"] == "LoadImage":
            inputs = {
                key: value for key, value in inputs.items() if (key, value) not in UPLOAD.items()
            }
        rebuilt[str(node["id"])] = (node["type"], inputs)
    for inner in ui.get("definitions", {}).get("subgraphs", ()):
        (outer,) = (node for node in ui["nodes"] if node["type"] == inner["id"])
        _, given = rebuilt.pop(str(outer["id"]))
        nodes, output = expand_subgraph(outer, inner, given)
        rebuilt |= {key: (node["class_type"], node["inputs"]) for key, node in nodes.items()}
        for _, inputs in rebuilt.values():
            for key, value in inputs.items():
                if value == [str(outer["id"]), 0]:
                    inputs[key] = output
    assert rebuilt == {key: (node["class_type"], node["inputs"]) for key, node in api.items()}


@pytest.mark.parametrize("name", NAMES)
def test_widgets_are_in_the_order_of_the_schema(info, name: str) -> None:
    """The front end stores widget values by position."""
    graph = load(name)
    for node in graph["nodes"]:
        if node["type"] in NOTES:
            continue
        stored = [entry["name"] for entry in node["inputs"] if "widget" in entry]
        expected = [
            key
            for key, (kind, _) in entries_of(described(node, graph, info)).items()
            if is_widget(kind)
        ]
        assert [key for key in stored if key not in UPLOAD] == expected
        after = sum(key in AFTER_RUN for key in stored)
        assert len(node["widgets_values"]) == len(stored) + after, node["type"]


TITLE, COLLAPSED, STUB = 30, 150, 15
"""Pixels: height of a title, width of a collapsed node, straight piece at the end of a wire."""


def box_of(node: dict[str, Any]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of what is drawn of a node."""
    (left, top), (width, height) = node["pos"], node["size"]
    if node["flags"].get("collapsed"):
        width, height = COLLAPSED, 0
    return left, top - TITLE, left + width, top + height


@pytest.mark.parametrize("name", NAMES)
def test_nodes_do_not_overlap(name: str) -> None:
    boxes = [box_of(node) for node in load(name)["nodes"]]
    for index, one in enumerate(boxes):
        for other in boxes[:index]:
            apart = (one[2] <= other[0], other[2] <= one[0], one[3] <= other[1], other[3] <= one[1])
            assert any(apart), (one, other)


def socket_of(node: dict[str, Any], slot: int, output: bool) -> tuple[float, float]:
    """Where a wire begins or ends, a little apart from its node."""
    left, top, right, _ = box_of(node)
    x = right + STUB if output else left - STUB
    if node["flags"].get("collapsed"):
        return x, top + TITLE / 2
    entries = node["outputs" if output else "inputs"]
    row = sum("widget" not in entry for entry in entries[:slot])
    return x, top + TITLE + 14 + 20 * row


def crosses(start: Any, end: Any, box: tuple[float, float, float, float]) -> bool:
    """Whether a straight line runs behind a box."""
    x, y = np.linspace(start, end, 201).T
    return bool(((box[0] < x) & (x < box[2]) & (box[1] < y) & (y < box[3])).any())


@pytest.mark.parametrize("name", NAMES)
def test_no_wire_runs_behind_a_node(name: str) -> None:
    graph = load(name)
    assert len(graph["links"]) <= WIRES.get(name, 19)
    nodes = {node["id"]: node for node in graph["nodes"]}
    bends = {bend["id"]: bend for bend in graph["extra"].get("reroutes", ())}
    last = {each["id"]: each["parentId"] for each in graph["extra"].get("linkExtensions", ())}
    for number, source, out_slot, target, in_slot, _ in graph["links"]:
        path, place = [socket_of(nodes[target], in_slot, False)], last.get(number)
        while place is not None:
            assert number in bends[place]["linkIds"]
            path.append(bends[place]["pos"])
            place = bends[place].get("parentId")
        path.append(socket_of(nodes[source], out_slot, True))
        for node in nodes.values():
            for piece in itertools.pairwise(path):
                assert not crosses(*piece, box_of(node)), (number, node["type"], piece)


@pytest.mark.parametrize("name", NAMES)
def test_all_is_legible_when_a_workflow_opens(name: str) -> None:
    """The front end fits it into three quarters of the screen; below 60 % it draws no text.

    Newer ones leave 10 pixels around it, and count what a collapsed node would be.
    """
    graph = load(name)
    boxes = [box_of(node | {"flags": {}}) for node in graph["nodes"]]
    for group in graph["groups"]:
        left, top, width, height = group["bounding"]
        boxes.append((left, top, left + width, top + height))
    left, top, right, bottom = (
        pick(edges)
        for pick, edges in zip((min, min, max, max), zip(*boxes, strict=True), strict=True)
    )
    assert min(0.75 * 1440 / (right - left + 20), 0.75 * 900 / (bottom - top + 20)) > 0.6
    assert graph["extra"]["ds"]["scale"] >= 0.6


@pytest.mark.parametrize("name", NAMES)
def test_the_note_is_seen_first(name: str) -> None:
    """Top left, light on dark; the front end draws words in backticks blue on blue."""
    nodes = load(name)["nodes"]
    (note,) = (node for node in nodes if node["type"] in NOTES)
    assert note["pos"][0] == min(
        box_of(node)[0] for node in nodes if box_of(node)[1] < box_of(note)[3]
    )
    assert (note["color"], note["bgcolor"]) == ("#222", "#000")
    assert "`" not in note["widgets_values"][0]


def test_no_node_shows_what_another_workflow_made() -> None:
    """The front end knows by the id alone whose a picture is."""
    ids = [set(load(name, api=True)) for name in NAMES]
    assert len(set.union(*ids)) == sum(map(len, ids))


@pytest.mark.parametrize("name", NAMES)
def test_thumbnails(name: str) -> None:
    with Image.open(FOLDER / f"{name}.jpg") as picture:
        assert picture.format == "JPEG"
        assert min(picture.size) >= 200


def test_blueprint() -> None:
    """One node at the root, links that agree with their ends, and the graph of restore_nano."""
    blueprint = json.loads(BLUEPRINT.read_text())
    (outer,), (inner,) = blueprint["nodes"], blueprint["definitions"]["subgraphs"]
    assert outer["type"] == inner["id"]
    for outside, inside in (("inputs", "inputs"), ("outputs", "outputs")):
        assert [(each["name"], each["type"]) for each in outer[outside]] == [
            (each["name"], each["type"]) for each in inner[inside]
        ]
    nodes = {node["id"]: node for node in inner["nodes"]}
    assert len({link["id"] for link in inner["links"]}) == len(inner["links"])
    assert inner["state"]["lastLinkId"] == max(link["id"] for link in inner["links"])
    for link in inner["links"]:
        number, kind = link["id"], link["type"]
        if link["origin_id"] == inner["inputNode"]["id"]:
            start = inner["inputs"][link["origin_slot"]]
            assert number in start["linkIds"]
        else:
            start = nodes[link["origin_id"]]["outputs"][link["origin_slot"]]
            assert number in start["links"]
        if link["target_id"] == inner["outputNode"]["id"]:
            end = inner["outputs"][link["target_slot"]]
            assert number in end["linkIds"]
        else:
            end = nodes[link["target_id"]]["inputs"][link["target_slot"]]
            assert number == end["link"]
        assert start["type"] == end["type"] == kind
    assert load(SIMPLE)["definitions"] == blueprint["definitions"]
    for word in ("denoise", "deblur", "dehaze", "derain", "old photo"):
        assert word in BLUEPRINT.stem, "all that ComfyUI 0.3.75 searches"
        assert word in blueprint["extra"]["BlueprintSearchAliases"]
    assert inner["category"] == "restoration/diff-restorer"
    assert inner["description"] == blueprint["extra"]["BlueprintDescription"]
    expanded, output = expand_blueprint(blueprint, image=["101", 0])
    full = load("restore_nano", api=True)
    assert output == [f"1:{full['110']['inputs']['images'][0]}", 0]
    for name in ("101", "106", "110"):
        del full[name]
    expected = {}
    for node_id, node in full.items():
        inputs = {
            key: [f"1:{value[0]}", value[1]]
            if isinstance(value, list) and value != ["101", 0]
            else value
            for key, value in node["inputs"].items()
        }
        expected[f"1:{node_id}"] = {"class_type": node["class_type"], "inputs": inputs}
    assert expanded == expected
