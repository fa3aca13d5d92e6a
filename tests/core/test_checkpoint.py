"""Files: what goes in comes out, lazily; damage is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diff_restorer.abstention import Abstention
from diff_restorer.checkpoint import (
    CheckpointError,
    CheckpointInfo,
    CheckpointKeysError,
    NewerCheckpointError,
    TruncatedCheckpointError,
    UnsupportedCheckpointError,
    read_checkpoint,
    write_checkpoint,
)
from tests import toy_weights


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_weights.write_nano(tmp_path_factory.mktemp("files") / "nano.safetensors")


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"types": ("noise", "clean"), "fusion_levels": (1,), "tuned_decoder": True},
        {"clip_width": 128, "fusion_levels": ()},
    ],
)
def test_tensors_and_metadata_survive(tmp_path: Path, sizes: dict) -> None:
    tensors = toy_weights.restorer_tensors(**sizes)
    types = sizes.get("types", toy_weights.TYPES)
    info = toy_weights.info(
        types=types,
        config={"lr": 1e-5},
        git_revision="abc",
        scores={"psnr": 20.5},
        latent_scale=0.7,
    )
    write_checkpoint(tmp_path / "a.safetensors", tensors, info)
    checkpoint = read_checkpoint(tmp_path / "a.safetensors")
    assert checkpoint.info == info
    assert checkpoint.keys == tensors.keys()
    assert checkpoint.has("decoder.fusion.") == bool(sizes.get("fusion_levels", True))
    assert checkpoint.has("decoder.vae.") == sizes.get("tuned_decoder", False)
    state = checkpoint.state("control.")
    assert all(torch.equal(tensors[f"control.{key}"], tensor) for key, tensor in state.items())
    assert not checkpoint.self_contained


def test_abstention_is_an_entry_that_old_files_lack(tmp_path: Path) -> None:
    tensors = toy_weights.restorer_tensors(types=("noise", "clean"))
    info = toy_weights.info(types=("noise", "clean"))
    path = tmp_path / "a.safetensors"
    write_checkpoint(path, tensors, info)
    assert "abstention" not in info.to_metadata()
    assert read_checkpoint(path).info.abstention is None
    abstention = Abstention(
        types=("noise", "clean"), exclusive=True, thresholds={"noise": (0.25, 0.75)}
    )
    write_checkpoint(path, tensors, replace(info, abstention=abstention))
    assert read_checkpoint(path).info.abstention == abstention
    assert read_checkpoint(path).info.format_version == info.format_version
    metadata = replace(info, abstention=abstention).to_metadata() | {"abstention": "[]"}
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(UnsupportedCheckpointError, match=r"a\.safetensors: abstention: '\[\]'"):
        read_checkpoint(path)


def test_a_detail_path_asks_for_the_second_format(tmp_path: Path) -> None:
    """So that older packs refuse the file, instead of decoding without it."""
    for name, version in (("decoder.fusion.1.film.bias", 1), ("decoder.detail.out.bias", 2)):
        tensors = {name: torch.zeros(1)}
        write_checkpoint(tmp_path / "made.safetensors", tensors, toy_weights.info())
        assert read_checkpoint(tmp_path / "made.safetensors", ()).info.format_version == version


def test_self_contained(nano: Path) -> None:
    checkpoint = read_checkpoint(nano)
    assert checkpoint.self_contained
    assert checkpoint.state("base.unet.")["out.2.weight"].dtype == torch.float16
    assert checkpoint.state("nothing.") == {}


def test_tensors_are_views_of_the_file(nano: Path) -> None:
    """Two tensors lie in memory as far apart as in the file: nothing was copied."""
    header_size = int.from_bytes(nano.read_bytes()[:8], "little")
    header = json.loads(nano.read_bytes()[8 : 8 + header_size])
    state = read_checkpoint(nano).state("control.")
    first, second = "middle_block_out.0.weight", "time_embed.0.weight"
    offsets = [header[f"control.{key}"]["data_offsets"][0] for key in (first, second)]
    addresses = [state[key].data_ptr() for key in (first, second)]
    assert addresses[1] - addresses[0] == offsets[1] - offsets[0]


def test_changing_a_view_leaves_the_file_alone(nano: Path) -> None:
    key = "middle_block_out.0.weight"
    tensor = read_checkpoint(nano).state("control.")[key]
    before = tensor.clone()
    tensor.zero_()
    assert torch.equal(read_checkpoint(nano).state("control.")[key], before)


@pytest.mark.parametrize("share", [0, 0.0001, 0.01, 0.5, 0.999])
def test_truncated(nano: Path, tmp_path: Path, share: float) -> None:
    path = toy_weights.write_truncated(tmp_path / "cut.safetensors", nano, share)
    with pytest.raises(
        TruncatedCheckpointError, match=r"cut\.safetensors: incomplete, only [\d,]+ b"
    ):
        read_checkpoint(path)


def _garbage(path: Path) -> Path:
    path.write_bytes(b"<!DOCTYPE html><html>404</html>" * 50)
    return path


@pytest.mark.parametrize(
    ("write", "error", "message"),
    [
        (toy_weights.write_pickle, UnsupportedCheckpointError, "pickle.*Only safetensors"),
        (toy_weights.write_wrong_kind, UnsupportedCheckpointError, "found a VAE .*models/vae"),
        (_garbage, UnsupportedCheckpointError, "not a safetensors file"),
        (toy_weights.write_newer, NewerCheckpointError, "version 99.*up to version 2.*Update"),
    ],
)
def test_wrong_files(
    tmp_path: Path, write: Callable[[Path], Path], error: type[Exception], message: str
) -> None:
    path = write(tmp_path / "wrong.safetensors")
    with pytest.raises(error, match=message) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)
    assert isinstance(caught.value, CheckpointError)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors: no such file"):
        read_checkpoint(tmp_path / "none.safetensors")


def test_part_missing(tmp_path: Path) -> None:
    tensors = {k: t for k, t in toy_weights.restorer_tensors().items() if "control." not in k}
    write_checkpoint(tmp_path / "a.safetensors", tensors, toy_weights.info())
    with pytest.raises(CheckpointKeysError, match=r"missing: control\.\*"):
        read_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("types", "[", "'types' is not JSON"),
        ("types", "{}", "'types' is not a JSON list"),
        ("latent_scale", "big", "big"),
        ("format_version", "one", "one"),
        ("clip", None, "'clip' is missing"),
    ],
)
def test_damaged_metadata(tmp_path: Path, entry: str, value: str | None, message: str) -> None:
    metadata = toy_weights.info().to_metadata() | {entry: value}
    metadata = {key: text for key, text in metadata.items() if text is not None}
    path = tmp_path / "a.safetensors"
    save_file(toy_weights.restorer_tensors(), path, metadata=metadata)
    with pytest.raises(UnsupportedCheckpointError, match=message):
        read_checkpoint(path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_checkpoint(path, {"control.a": torch.ones(3)}, toy_weights.info())
    shared = torch.ones(4)
    with pytest.raises(RuntimeError, match="share memory"):
        write_checkpoint(path, {"control.a": shared, "control.b": shared}, toy_weights.info())
    assert torch.equal(load_file(path)["control.a"], torch.ones(3))
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


def test_write_makes_strided_tensors_plain(tmp_path: Path) -> None:
    strided = torch.arange(6.0).reshape(2, 3).T
    write_checkpoint(tmp_path / "sub/a.safetensors", {"control.a": strided}, toy_weights.info())
    assert torch.equal(load_file(tmp_path / "sub/a.safetensors")["control.a"], strided)


def test_defaults_describe_stable_diffusion() -> None:
    info = CheckpointInfo(types=("noise",), base_model="sd15", clip={})
    assert (info.latent_scale, info.format_version) == (0.18215, 1)
