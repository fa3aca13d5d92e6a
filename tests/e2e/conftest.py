"""Graphs and photos for all end-to-end tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.graph import Graph, Runner, make_photo, with_own_nodes
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
    with Host(with_own_nodes(tmp_path / "server")) as host:
        yield host
