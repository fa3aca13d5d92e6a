"""ComfyUI and this pack inside one Python process, for tests and benchmarks of single nodes."""

from __future__ import annotations

import asyncio
import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from tools.environment import ROOT


def import_host(root: Path, base: Path, *, cpu: bool) -> None:
    """Make the ComfyUI in `root` importable, with its models, inputs and outputs below `base`.

    Raises:
        RuntimeError: Another ComfyUI was imported before, or this pack's `nodes` in its place.
    """
    # Before the pack's own `nodes` folder, which would hide the host's nodes.py.
    sys.path.insert(0, str(root))
    import comfy.cli_args

    comfy.cli_args.args.cpu = cpu
    comfy.cli_args.args.base_directory = str(base)
    import folder_paths

    if Path(folder_paths.base_path) != base:
        raise RuntimeError(f"ComfyUI was imported before, for {folder_paths.base_path}")
    for name in ("models", "input", "output", "custom_nodes"):
        (base / name).mkdir(exist_ok=True)
    # As main.py does: nodes.py puts comfy/ in front, whose utils.py would hide this package.
    importlib.import_module("utils.install_util")
    host_nodes = importlib.import_module("nodes")
    if Path(str(host_nodes.__file__)).parent != root:
        raise RuntimeError(f"`nodes` is {host_nodes.__file__} instead of ComfyUI's")


def load_pack() -> ModuleType:
    """The pack's root module, loaded by the host's own loader under the host's own name."""
    host_nodes: Any = importlib.import_module("nodes")
    if not asyncio.run(host_nodes.load_custom_node(str(ROOT))):
        raise RuntimeError(f"ComfyUI could not load {ROOT}; see its log")
    return sys.modules[str(ROOT).replace(".", "_x_")]


def execute(node_id: str, **inputs: Any) -> tuple[Any, ...]:
    """Run a V3 node by id as the executor does: on a locked clone, with defaults filled in."""
    host_nodes: Any = importlib.import_module("nodes")
    node = host_nodes.NODE_CLASS_MAPPINGS[node_id]
    defaults = {
        entry.id: entry.default
        for entry in node.GET_SCHEMA().inputs
        if getattr(entry, "default", None) is not None
    }
    clone = node.PREPARE_CLASS_CLONE(None)
    return clone.EXECUTE_NORMALIZED(**(defaults | inputs)).args
