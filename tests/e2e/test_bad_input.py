"""Bad input gives a clear error over the API, and the server goes on."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diff_restorer.checkpoint import write_checkpoint
from tests import toy_weights
from tests.e2e.graph import Graph, Runner
from tests.toy_weights import VaeSizes, VisionSizes
from tools.environment import ROOT
from tools.errors import ClientError, ExecutionError, PromptRejectedError

pytestmark = pytest.mark.comfy

SHIPPED = ROOT / "models/diff_restorer_nano.safetensors"
Change = Callable[[Graph, Path], None]


def write_damaged_files(folder: Path) -> None:
    """Everything that people put into models/diff_restorer by mistake."""
    folder.mkdir(parents=True, exist_ok=True)
    good = toy_weights.write_restorer(folder / "good.safetensors")
    toy_weights.write_truncated(folder / "truncated.safetensors", good)
    toy_weights.write_pickle(folder / "pickle.safetensors")
    toy_weights.write_wrong_kind(folder / "vae.safetensors")
    toy_weights.write_newer(folder / "newer.safetensors")
    (folder / "empty.safetensors").write_bytes(b"")


def write_other_models(path: Path) -> Path:
    """A self-contained file whose vision model is wider and whose VAE has 16 channels."""
    vision = replace(VisionSizes(), width=128)
    vae = replace(VaeSizes(), latent_channels=16)
    tensors = toy_weights.restorer_tensors() | toy_weights.base_tensors(vae=vae, vision=vision)
    write_checkpoint(path, tensors, toy_weights.info())
    return path


def write_kl_vae(path: Path) -> Path:
    """A self-contained file whose VAE is an AutoencoderKL, as Stable Diffusion's; Nano's is not."""
    tensors = toy_weights.restorer_tensors() | toy_weights.base_tensors()
    write_checkpoint(path, tensors, toy_weights.info())
    return path


def load_file(name: str) -> Change:
    def change(graph: Graph, models: Path) -> None:
        nano = graph.node("DiffRestorerNanoLoader")
        loader = graph.add("DiffRestorerLoader", file=name)
        graph.replace_link([nano, 3], [loader, 0])

    return change


BROUGHT = {
    1: ("clip_vision", ("DiffRestorerPromptProcessor",)),
    2: ("vae", ("DiffRestorerDegradationControl", "DiffRestorerAwareVAEDecode")),
}
"""Output of Nano -> the inputs that need no wire from it."""


def use_output_of(
    class_type: str, output: int, nano_output: int, file: str = "other.safetensors"
) -> Change:
    def change(graph: Graph, models: Path) -> None:
        inputs = {"path": str(models / file)} if class_type == "E2EToyModels" else {}
        loader = graph.add(class_type, **inputs)
        nano = graph.node("DiffRestorerNanoLoader")
        graph.replace_link([nano, nano_output], [loader, output])
        name, nodes = BROUGHT.get(nano_output, ("", ()))
        for node in nodes:
            graph.set(node, **{name: [loader, output]})

    return change


def break_image(graph: Graph, models: Path) -> None:
    loaded = graph.node("LoadImage")
    broken = graph.add("E2ENanImage", image=[loaded, 0])
    graph.replace_link([loaded, 0], [broken, 0])
    graph.nodes[broken]["inputs"]["image"] = [loaded, 0]


def set_input(class_type: str, **inputs: object) -> Change:
    def change(graph: Graph, models: Path) -> None:
        graph.set(class_type, **inputs)

    return change


CASES: dict[str, tuple[Change, tuple[str | tuple[str, ...], ...]]] = {
    "truncated file": (load_file("truncated.safetensors"), ("truncated.safetensors",)),
    "empty file": (load_file("empty.safetensors"), ("empty.safetensors",)),
    "pickle": (load_file("pickle.safetensors"), ("pickle.safetensors", "safetensors")),
    "file of another kind": (load_file("vae.safetensors"), ("vae.safetensors", "models/vae")),
    "file of a newer format": (load_file("newer.safetensors"), ("newer.safetensors", "99")),
    "missing file": (
        load_file("nowhere.safetensors"),
        # Newer hosts check the list themselves, before the loader can name its folder.
        ("nowhere.safetensors", ("diff_restorer", "file: 'nowhere.safetensors' not in")),
    ),
    "wrong CLIP width": (use_output_of("E2EToyModels", 1, 1), ("clip_vision", "128")),
    "VAE of another kind": (
        use_output_of("E2EToyModels", 2, 2, "kl.safetensors"),
        ("vae", "AutoencoderKL", "TAESD"),
    ),
    "VAE of 16 channels": (use_output_of("E2EToyModels", 2, 2), ("vae", "16")),
    "SDXL model": (use_output_of("E2ESdxlModel", 0, 0), ("model", "2048", "SDXL")),
    "NaN image": (break_image, ("image", "NaN")),
    # Which a host's own check of widgets lets pass.
    **{
        f"NaN {name}": (set_input(node, **{name: "nan"}), (f"{name}: nan, expected 0 to {most}",))
        for node, name, most in (
            ("DiffRestorerPromptProcessor", "semantic_strength", 2),
            ("DiffRestorerDegradationControl", "strength", 10),
            ("DiffRestorerDegradationControl", "start_percent", 1),
            ("DiffRestorerAwareVAEDecode", "fidelity", 1),
        )
    },
}


@pytest.fixture(scope="module")
def models(runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    write_damaged_files(runner.host.base / "models/diff_restorer")
    folder = tmp_path_factory.mktemp("other_models")
    write_other_models(folder / "other.safetensors")
    write_kl_vae(folder / "kl.safetensors")
    return folder


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_named_and_survived(runner: Runner, nano: Graph, models: Path, case: str):
    change, fragments = CASES[case]
    bad = nano.copy()
    change(bad, models)
    with pytest.raises(ClientError) as caught:
        runner.run(bad)
    assert isinstance(caught.value, ExecutionError | PromptRejectedError)
    message = str(caught.value)
    choices = [(each,) if isinstance(each, str) else each for each in fragments]
    assert [each for each in choices if not any(words in message for words in each)] == []
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
