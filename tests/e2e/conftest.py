"""Graphs and photos for all end-to-end tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.graph import HOST_NODES, Graph, Runner, make_photo
from tests.e2e.holding import Holding
from tools.host import Host


@pytest.fixture(scope="session")
def photo(runner: Runner) -> str:
    """The name of an uploaded photo of 96 x 72."""
    return runner.upload(make_photo(), "photo.png")


@pytest.fixture
def nano(photo: str) -> Graph:
    """The shipped Nano workflow on the photo, with few steps."""
    return Graph.load(photo=photo).set("KSampler", steps=3)


@pytest.fixture
def holding(tmp_path: Path) -> Iterator[Holding]:
    """A workflow of its own, which never stays held."""
    folder = tmp_path / "holding"
    folder.mkdir()
    holding = Holding(folder)
    yield holding
    holding.release()


@pytest.fixture
def host(comfyui_root: Path, tmp_path: Path) -> Iterator[Host]:
    """A server that a test may kill."""
    base = tmp_path / "server"
    (base / "custom_nodes").mkdir(parents=True)
    (base / "custom_nodes/e2e_host_nodes").symlink_to(HOST_NODES, target_is_directory=True)
    with Host(base) as host:
        yield host
