"""Bad input gives a clear error over the API, and the server goes on."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests import toy_weights
from tests.e2e.graph import Graph, Runner
from tools.environment import ROOT
from tools.errors import ClientError, ExecutionError, PromptRejectedError

SHIPPED = ROOT / "models/diff_restorer_nano.safetensors"
Change = Callable[[Graph], None]


def load_file(name: str) -> Change:
    def change(graph: Graph) -> None:
        nano = graph.node("DiffRestorerNanoLoader")
        loader = graph.add("DiffRestorerLoader", file=name)
        graph.replace_link([nano, 3], [loader, 0])

    return change


def break_widget(graph: Graph) -> None:
    graph.set("DiffRestorerPromptProcessor", semantic_strength="nan")


CASES: dict[str, tuple[Change, tuple[str, ...]]] = {
    "truncated file": (load_file("truncated.safetensors"), (r"truncated\.safetensors",)),
    # Newer hosts check the list themselves, before the loader can name its folder.
    "missing file": (
        load_file("nowhere.safetensors"),
        (r"nowhere\.safetensors", r"diff_restorer|file: 'nowhere\.safetensors' not in"),
    ),
    # Which a host's own check of widgets lets pass.
    "NaN in a widget": (break_widget, ("semantic_strength: nan, expected 0 to 2",)),
}
"""What is changed, and patterns that the message has."""


@pytest.fixture(scope="module", autouse=True)
def _truncated_file(runner: Runner) -> None:
    folder = runner.host.base / "models/diff_restorer"
    folder.mkdir(parents=True, exist_ok=True)
    toy_weights.write_truncated(folder / "truncated.safetensors", SHIPPED)


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_named_and_survived(runner: Runner, nano: Graph, case: str):
    change, patterns = CASES[case]
    bad = nano.copy()
    change(bad)
    with pytest.raises(ClientError) as caught:
        runner.run(bad)
    assert isinstance(caught.value, ExecutionError | PromptRejectedError)
    message = str(caught.value)
    assert [pattern for pattern in patterns if not re.search(pattern, message)] == []
    # What a programmer would have to translate is no message for a user.
    assert not any(name in message for name in ("KeyError", "AttributeError", "size mismatch"))
    (restored,) = runner.pictures(nano)
    assert np.isfinite(restored).all()


def test_missing_photo_is_refused_before_running(runner: Runner, nano: Graph):
    with pytest.raises(PromptRejectedError, match=r"nowhere\.png"):
        runner.run(nano.copy().set("LoadImage", image="nowhere.png"))
    assert runner.pictures(nano)


def test_damaged_photo_is_refused(runner: Runner, nano: Graph):
    stored = runner.client.upload(b"this is no picture", "damaged.png")
    with pytest.raises(ClientError, match="LoadImage"):
        runner.run(nano.copy().set("LoadImage", image=stored))
    assert runner.pictures(nano)


def test_unconnected_socket_is_named(runner: Runner, nano: Graph):
    bad = nano.copy()
    del bad.nodes[bad.node("DiffRestorerDegradationControl")]["inputs"]["degradation"]
    with pytest.raises(PromptRejectedError, match="degradation"):
        runner.run(bad)


def write_over(path: Path, content: bytes) -> None:
    """Block by block, without making the file shorter."""
    with path.open("r+b") as file:
        for start in range(0, len(content), 2**17):
            file.seek(start)
            file.write(content[start : start + 2**17])


OVERWRITE: dict[str, Callable[[Path, Path], object]] = {
    "cp": lambda path, other: subprocess.run(["cp", other, path], check=True),
    "wget -O, half way": lambda path, other: path.write_bytes(other.read_bytes()[: 2**20]),
    "rsync --inplace": lambda path, other: write_over(path, other.read_bytes()),
    "emptied": lambda path, other: os.truncate(path, 0),
}


@pytest.mark.parametrize("how", OVERWRITE)
def test_a_loaded_file_is_overwritten_in_place(
    runner: Runner, nano: Graph, tmp_path: Path, how: str
):
    """Mapped weights would kill the server, or change its pictures."""
    path, other = tmp_path / "nano.safetensors", tmp_path / "other.safetensors"
    shutil.copyfile(SHIPPED, path)
    other.write_bytes(bytes(path.stat().st_size))
    graph = nano.copy()
    loaded = graph.add("E2EToyModels", path=str(path))
    for output in range(4):
        graph.replace_link([graph.node("DiffRestorerNanoLoader"), output], [loaded, output])
    runner.pictures(graph)
    OVERWRITE[how](path, other)
    for each in (graph, nano):
        each.set("KSampler", seed=5)
    seen, _ = runner.executed(graph)
    assert "KSampler" in seen
    assert "E2EToyModels" not in seen
    (changed,), (expected,) = runner.pictures(graph), runner.pictures(nano)
    assert np.array_equal(changed, expected)
