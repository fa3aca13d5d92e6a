"""Ids, sockets and defaults are what saved workflows hold: they may only grow at the end. Each node
has a help page, and a Chinese name for all that the user sees of it."""

from __future__ import annotations

import json
from types import ModuleType
from typing import Any

import pytest

from tools.environment import ROOT

READING = {"diff_restorer": "DIFF_RESTORER", "clip_vision": "CLIP_VISION", "image": "IMAGE"}
PROMPTS = {"positive": "CONDITIONING", "negative": "CONDITIONING"}
NODES = {
    "DiffRestorerLoader": (
        "Load Diff-Restorer",
        {"file": "COMBO", "abstain": "BOOLEAN"},
        {"diff_restorer": "DIFF_RESTORER"},
    ),
    "DiffRestorerNanoLoader": (
        "Load Diff-Restorer Nano",
        {"abstain": "BOOLEAN"},
        {
            "model": "MODEL",
            "clip_vision": "CLIP_VISION",
            "vae": "VAE",
            "diff_restorer": "DIFF_RESTORER",
        },
    ),
    "DiffRestorerPromptProcessor": (
        "Diff-Restorer Prompt Processor",
        READING | {"text": "CONDITIONING", "semantic_strength": ("FLOAT", 1.0, 0.0, 2.0)},
        PROMPTS | {"degradation": "DEGRADATION"},
    ),
    "DiffRestorerDegradationControl": (
        "Degradation Control",
        {
            **PROMPTS,
            "diff_restorer": "DIFF_RESTORER",
            "degradation": "DEGRADATION",
            "image": "IMAGE",
            "vae": "VAE",
            "strength": ("FLOAT", 1.0, 0.0, 10.0),
            "start_percent": ("FLOAT", 0.0, 0.0, 1.0),
            "end_percent": ("FLOAT", 1.0, 0.0, 1.0),
        },
        PROMPTS | {"latent": "LATENT"},
    ),
    "DiffRestorerAwareVAEDecode": (
        "Aware VAE Decode",
        {
            "samples": "LATENT",
            "vae": "VAE",
            "diff_restorer": "DIFF_RESTORER",
            "degradation": "DEGRADATION",
            "image": "IMAGE",
            "fidelity": ("FLOAT", 1.0, 0.0, 1.0),
            "tile_size": ("INT", 0, 0, 4096),
            "overlap": ("INT", 64, 0, 1024),
            "tiling": "COMBO",
        },
        {"image": "IMAGE"},
    ),
    "DiffRestorerDegradationClassifier": (
        "Degradation Classifier",
        READING | {"degradation": "DEGRADATION"},
        {
            "label": "STRING",
            "confidence": "FLOAT",
            "probabilities": "STRING",
            "degradation": "DEGRADATION",
            "degraded": "BOOLEAN",
        },
    ),
    "DiffRestorerEditDegradation": (
        "Edit Degradation",
        {
            "degradation": "DEGRADATION",
            "type": "STRING",
            "mode": "COMBO",
            "weight": ("FLOAT", 0.5, -2.0, 2.0),
        },
        {"degradation": "DEGRADATION"},
    ),
    "DiffRestorerColorFix": (
        "Match Colors",
        {
            "image": "IMAGE",
            "reference": "IMAGE",
            "method": "COMBO",
            "strength": ("FLOAT", 1.0, 0.0, 1.0),
        },
        {"image": "IMAGE"},
    ),
    "DiffRestorerSimulateDegradation": (
        "Simulate Degradation",
        {
            "image": "IMAGE",
            "type": "COMBO",
            "severity": ("FLOAT", 0.5, 0.0, 1.0),
            "seed": ("INT", 0, 0, 2**64 - 1),
        },
        {"image": "IMAGE"},
    ),
    "DiffRestorerMeasure": (
        "Measure Restoration",
        {"image": "IMAGE", "reference": "IMAGE", "lq": "IMAGE", "view": "COMBO"},
        {
            "psnr": "FLOAT",
            "ssim": "FLOAT",
            "lpips": "FLOAT",
            "report": "STRING",
            "picture": "IMAGE",
        },
    ),
    "DiffRestorerTiledDiffusion": (
        "Tiled Diffusion",
        {
            "model": "MODEL",
            **READING,
            "tile_size": ("INT", 512, 64, 4096),
            "overlap": ("INT", 64, 0, 2048),
            "locality": ("FLOAT", 1.0, 0.0, 1.0),
            "degradation": "DEGRADATION",
        },
        {"model": "MODEL", "map": "IMAGE", "degradation": "DEGRADATION"},
    ),
    "DiffRestorerSwitch": (
        "Switch Image",
        {"switch": "BOOLEAN", "on_false": "IMAGE", "on_true": "IMAGE"},
        {"image": "IMAGE"},
    ),
    "DiffRestorerFolderPhoto": (
        "Load Photo from Folder",
        {"folder": "COMBO", "index": ("INT", 0, 0, 2**31 - 1)},
        {"image": "IMAGE", "name": "STRING", "progress": "STRING", "count": "INT"},
    ),
}
SHOWING = (
    "DiffRestorerPromptProcessor",
    "DiffRestorerDegradationClassifier",
    "DiffRestorerMeasure",
)
BROUGHT = ("diff_restorer", "clip_vision", "image", "degradation")
OPTIONAL = {
    ("DiffRestorerLoader", "abstain"),
    ("DiffRestorerNanoLoader", "abstain"),
    *(("DiffRestorerPromptProcessor", name) for name in ("clip_vision", "text")),
    *(("DiffRestorerDegradationControl", name) for name in ("diff_restorer", "image", "vae")),
    *(("DiffRestorerAwareVAEDecode", name) for name in ("vae", "diff_restorer", "image", "tiling")),
    *(("DiffRestorerTiledDiffusion", name) for name in BROUGHT),
    *(("DiffRestorerDegradationClassifier", name) for name in BROUGHT),
    ("DiffRestorerMeasure", "lq"),
}


def test_the_nodes_of_the_design(schemas: dict[str, Any]) -> None:
    assert list(schemas) == list(NODES)


@pytest.mark.parametrize("node_id", NODES)
def test_sockets_and_widgets(schemas: dict[str, Any], node_id: str) -> None:
    schema = schemas[node_id]
    name, inputs, outputs = NODES[node_id]
    assert schema.display_name == name
    assert schema.category == "restoration/diff-restorer"
    assert [entry.id for entry in schema.inputs] == list(inputs)
    for entry, expected in zip(schema.inputs, inputs.values(), strict=True):
        if isinstance(expected, tuple):
            found = (entry.get_io_type(), entry.default, entry.min, entry.max)
        else:
            found = entry.get_io_type()
        assert found == expected, entry.id
        assert entry.optional == ((node_id, entry.id) in OPTIONAL)
    assert {entry.display_name: entry.get_io_type() for entry in schema.outputs} == outputs


@pytest.mark.parametrize("node_id", NODES)
def test_everything_is_explained(schemas: dict[str, Any], node_id: str) -> None:
    schema = schemas[node_id]
    assert len(schema.description) > 60
    for entry in (*schema.inputs, *schema.outputs):
        assert entry.tooltip, f"{node_id}.{entry.id}"
        assert entry.tooltip.endswith(".")


def test_nodes_are_found_by_what_people_type(schemas: dict[str, Any], pack: ModuleType) -> None:
    words = ("denoise", "deblur", "dehaze", "derain", "jpeg artifacts", "low light", "old photo")
    assert set(words) <= set(pack.nodes.sockets.RESTORATION)
    nano = schemas["DiffRestorerNanoLoader"]
    assert [word for word in words[:-1] if word not in nano.description.lower()] == []
    if hasattr(nano, "search_aliases"):  # newer hosts
        assert all(schema.search_aliases for schema in schemas.values())
        assert set(words) <= set(nano.search_aliases)


def test_the_host_registered_them(pack: ModuleType) -> None:
    import nodes

    for node_id, (name, _, _) in NODES.items():
        assert nodes.NODE_DISPLAY_NAME_MAPPINGS[node_id] == name  # type: ignore
        info = nodes.NODE_CLASS_MAPPINGS[node_id].GET_NODE_INFO_V1()  # type: ignore
        assert info["output_node"] == (node_id in SHOWING)
        assert all(info["output_tooltips"])


def test_no_state_on_node_classes(schemas: dict[str, Any], toy, prepare, photo, pack) -> None:
    """What a run leaves behind must not hang on the classes, which all graphs share."""
    nodes = (
        pack.nodes.conditioning.DiffRestorerPromptProcessor,
        pack.nodes.loaders.DiffRestorerLoader,
    )
    before = [set(vars(node)) for node in nodes]
    prepare(photo())
    assert [set(vars(node)) for node in nodes] == before


def test_help_in_both_languages(schemas: dict[str, Any]) -> None:
    folder = ROOT / "web" / "docs"
    assert sorted(path.name for path in folder.iterdir()) == sorted(schemas)
    for node_id, schema in schemas.items():
        english = (folder / node_id / "en.md").read_text()
        assert english.startswith(f"# {schema.display_name}\n")
        for entry in schema.inputs:
            assert entry.id in english, (node_id, entry.id)
        assert (folder / node_id / "zh.md").read_text().startswith("# ")


def test_chinese_names_and_tooltips(schemas: dict[str, Any]) -> None:
    translated = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text())
    assert list(translated) == list(schemas)
    for node_id, schema in schemas.items():
        entry = translated[node_id]
        assert entry["display_name"]
        assert entry["description"]
        assert list(entry.get("inputs", {})) == [each.id for each in schema.inputs], node_id
        assert list(entry["outputs"]) == [str(i) for i in range(len(schema.outputs))], node_id
        for each in (*entry.get("inputs", {}).values(), *entry["outputs"].values()):
            assert each["name"]
            assert each["tooltip"]
