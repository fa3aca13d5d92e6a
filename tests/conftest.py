"""Fixtures that give the tests the real host."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from tools import environment


@pytest.fixture(scope="session")
def comfyui_root() -> Path:
    """The ComfyUI checkout that the set-up made, or that COMFYUI_PATH names."""
    root = environment.comfyui_root()
    if not (root / "main.py").exists():
        pytest.fail(f"there is no ComfyUI in {root}: run `make test`, or set COMFYUI_PATH")
    return root


@pytest.fixture(scope="session")
def comfyui(comfyui_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ComfyUI importable in this process, on the CPU, with an empty base directory.

    Returns the base directory, which has models, input, output and custom_nodes.
    """
    # Before the pack's own `nodes` folder, which would hide the host's nodes.py.
    sys.path.insert(0, str(comfyui_root))
    import comfy.cli_args

    base = tmp_path_factory.mktemp("comfyui")
    comfy.cli_args.args.cpu = True
    comfy.cli_args.args.base_directory = str(base)
    import folder_paths

    assert Path(folder_paths.base_path) == base, "ComfyUI was imported before this fixture"
    for name in ("models", "input", "output", "custom_nodes"):
        (base / name).mkdir(exist_ok=True)
    # As main.py does: nodes.py puts comfy/ in front, whose utils.py would hide this package.
    importlib.import_module("utils.install_util")
    import nodes

    assert Path(nodes.__file__).parent == comfyui_root
    return base


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out what this machine has no device for."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))
