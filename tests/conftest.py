"""Fixtures that give the tests the real host."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.e2e.graph import Runner, with_own_nodes
from tools import environment, in_process
from tools.host import Host


@pytest.fixture(scope="session")
def comfyui_root() -> Path:
    """The ComfyUI checkout that the set-up made, or that COMFYUI_PATH names."""
    root = environment.comfyui_root()
    if not (root / "main.py").exists():
        pytest.fail(f"there is no ComfyUI in {root}: run `make test`, or set COMFYUI_PATH")
    return root


@pytest.fixture(scope="session")
def comfyui(comfyui_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ComfyUI importable in this process, on the CPU; its base directory, which has empty folders
    models, input, output and custom_nodes."""
    base = tmp_path_factory.mktemp("comfyui")
    in_process.import_host(comfyui_root, base, cpu=True)
    return base


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("toy")


@pytest.fixture(scope="session")
def pack(comfyui: Path) -> ModuleType:
    """The pack's root module, loaded by the host's own loader under the host's own name."""
    return in_process.load_pack()


@pytest.fixture(scope="session")
def runner(comfyui_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """A server with the pack and the tests' own nodes."""
    with Host(with_own_nodes(tmp_path_factory.mktemp("server"))) as host:
        yield Runner(host)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what asks for ComfyUI, and leaves out what this machine has no device for."""
    import torch

    no_gpu = not torch.cuda.is_available()
    for item in items:
        if "comfyui_root" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.comfy)
        if no_gpu and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU"))
