"""Files: what goes in comes out, lazily; damage is named."""

from __future__ import annotations

import copy
import json
import os
import time
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
    CheckpointValuesError,
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


OVERWRITE: dict[str, Callable[[Path, bytes], object]] = {
    "cut to nothing": lambda path, data: os.truncate(path, 0),
    "shorter": lambda path, data: path.write_bytes(data[: len(data) // 2]),
    "as long": lambda path, data: path.write_bytes(bytes(len(data))),
}


@pytest.mark.parametrize("how", OVERWRITE)
def test_a_file_overwritten_in_place_leaves_what_was_read(
    nano: Path, tmp_path: Path, how: str
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(nano.read_bytes())
    state = read_checkpoint(path).state("control.")
    before = {key: tensor.clone() for key, tensor in load_file(nano).items()}
    OVERWRITE[how](path, nano.read_bytes())
    assert all(torch.equal(before[f"control.{key}"], tensor) for key, tensor in state.items())


@pytest.mark.parametrize("how", OVERWRITE)
def test_a_file_that_changes_before_its_tensors_are_read(
    nano: Path, tmp_path: Path, how: str
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(nano.read_bytes())
    checkpoint = read_checkpoint(path)
    os.utime(path, (1, 1))
    OVERWRITE[how](path, nano.read_bytes())
    with pytest.raises(UnsupportedCheckpointError, match=r"a\.safetensors: changed while"):
        checkpoint.state("control.")


def test_shapes_without_values(nano: Path) -> None:
    checkpoint = read_checkpoint(nano)
    shapes, state = checkpoint.shapes("control."), checkpoint.state("control.")
    assert [(k, t.shape, t.dtype) for k, t in shapes.items()] == [
        (k, t.shape, t.dtype) for k, t in state.items()
    ]
    assert {tensor.device.type for tensor in shapes.values()} == {"meta"}


def test_converted_as_it_is_read(nano: Path) -> None:
    checkpoint = read_checkpoint(nano)
    converted = checkpoint.state("control.", torch.bfloat16)
    for key, tensor in checkpoint.state("control.").items():
        assert torch.equal(converted[key], tensor.to(torch.bfloat16))


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


@pytest.mark.parametrize("begin", [640, 896, 1152, 1408])
def test_a_header_may_be_as_long_as_a_pickle_begins(nano: Path, tmp_path: Path, begin: int) -> None:
    content = nano.read_bytes()
    length = int.from_bytes(content[:8], "little")
    longer = length + (begin - length) % 2**16
    path = tmp_path / "padded.safetensors"
    header = content[8 : 8 + length].ljust(longer)
    path.write_bytes(longer.to_bytes(8, "little") + header + content[8 + length :])
    found, expected = (read_checkpoint(file).state("") for file in (path, nano))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


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
        ("types", "[" * 100_000, "'types' is not JSON .nested too deeply"),
        ("scores", '{"a":' * 100_000, "'scores' is not JSON .nested too deeply"),
        ("types", '["noise", "noise"]', "'types' is .*not names that all differ"),
        ("latent_scale", "nan", "'latent_scale' is nan, not a number above 0"),
        ("latent_scale", "0", "'latent_scale' is 0.0"),
        ("latent_scale", "-inf", "'latent_scale' is -inf"),
        ("latent_scale", "1e999", "'latent_scale' is inf"),
        ("format_version", "-1", "'format_version' is -1"),
        ("prediction", "x" * 100_000, r"'x{60}\.\.\. \(100,000 characters\)'"),
        ("clip", '{"image_size": 0}', "image_size 0, not 1 to 4096"),
        ("clip", '{"std": [0, 1, 1]}', "std .*not three finite numbers above 0"),
        ("clip", '{"mean": [NaN, 1, 1]}', "mean .*not three finite numbers"),
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
    with pytest.raises(UnsupportedCheckpointError, match=message) as caught:
        read_checkpoint(path)
    assert len(str(caught.value)) < 1000


def _write_raw(path: Path, header: dict | bytes, body: bytes = b"") -> Path:
    """A file whose header says what it likes; metadata are right."""
    if isinstance(header, dict):
        header = json.dumps({"__metadata__": toy_weights.info().to_metadata()} | header).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + body)
    return path


def _entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


KEY = "control.time_embed.0.weight"
HEADERS: dict[str, tuple[dict | bytes, str]] = {
    "integers": ({KEY: _entry("I32")}, "is of type I32, expected one of F16, BF16"),
    "truth values": ({KEY: _entry("BOOL", [8])}, "is of type BOOL"),
    "complex numbers": ({KEY: _entry("C64", [1])}, "is of type C64"),
    "unknown type": ({KEY: _entry("x" * 10**5)}, r"is of type x+\.\.\. \(100,000"),
    "no values": ({KEY: _entry(shape=[0])}, r"has the shape \[0\]"),
    "many dimensions": ({KEY: _entry(shape=[1] * 50 + [2])}, "has the shape"),
    "wrong sum of bytes": ({KEY: _entry(shape=[3])}, r"has 8 bytes, which its shape \[3\]"),
    "enormous shape": ({KEY: _entry(shape=[10**30])}, "has 8 bytes, which its shape"),
    "negative size": ({KEY: _entry(shape=[-2])}, "are no whole numbers"),
    "fractional size": ({KEY: _entry(shape=[2.0])}, "are no whole numbers"),
    "no shape": ({KEY: {"dtype": "F32", "data_offsets": [0, 8]}}, "has no dtype, shape and two"),
    "no object": ({KEY: 3}, "cannot be read"),
    "shape without end": ({KEY: _entry(shape=3)}, "cannot be read"),
    "three offsets": ({KEY: _entry(offsets=[0, 4, 8])}, "cannot be read"),
    "bytes told backwards": ({KEY: _entry(offsets=[8, 0])}, "overlap others or leave a gap"),
    "a gap": ({KEY: _entry(offsets=[4, 8])}, "overlap others or leave a gap"),
    "overlap": ({KEY: _entry(), "control.b": _entry()}, "overlap others or leave a gap"),
    "more bytes than told": ({KEY: _entry(shape=[1], offsets=[0, 4])}, "4 bytes follow after"),
    "fewer bytes than told": ({KEY: _entry(shape=[9], offsets=[0, 36])}, r"of [\d,]+ are there"),
    "long name": ({f"control.{'x' * 10**5}": _entry()}, r"tensor control\.x.*more than 200 ch"),
    "layer without end": ({"control.9999.weight": _entry()}, "number 9999 in its name"),
    "number without end": ({f"control.{'9' * 5000}": _entry()}, "more than 200 characters"),
    "unknown part": ({"optimizer.a": _entry()}, r"unexpected: optimizer\.a"),
    "too many": (
        {f"control.{i}.a": _entry("F16", [], [2 * i, 2 * i + 2]) for i in range(9000)},
        "9,000 tensors",
    ),
    "deep": (b'{"a":' * 100_000, "nested too deeply"),
    "no JSON": (b"{no}     ", "header cannot be read"),
    "a list": (b"[1, 2]", "begins with b'\\['"),
    "numbers as metadata": (b'{"__metadata__": {"format": 1}}', "metadata of strings"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_the_header_alone_decides(tmp_path: Path, case: str) -> None:
    header, message = HEADERS[case]
    body = bytes(18_000 if case == "too many" else 8 if isinstance(header, dict) else 0)
    path = _write_raw(tmp_path / "odd.safetensors", header, body)
    began = time.process_time()  # however busy the machine is
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(path, ())
    assert time.process_time() - began < 0.5
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_more_than_fits_into_memory(tmp_path: Path) -> None:
    """A sparse file of a terabyte, which its header tells truly."""
    path = _write_raw(tmp_path / "sparse.safetensors", {KEY: _entry("F32", [2**38], [0, 2**40])})
    os.truncate(path, path.stat().st_size + 2**40)
    with pytest.raises(UnsupportedCheckpointError, match="1,099,511,627,776 bytes"):
        read_checkpoint(path, ())


def test_a_header_of_many_megabytes(tmp_path: Path) -> None:
    path = _write_raw(tmp_path / "wide.safetensors", b"{" + b" " * 10**7)
    with pytest.raises(UnsupportedCheckpointError, match="header is 10,000,001 bytes long"):
        read_checkpoint(path, ())


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.safetensors")
    for path in (tmp_path, tmp_path / "fifo.safetensors"):
        with pytest.raises(UnsupportedCheckpointError, match="a folder or device, expected"):
            read_checkpoint(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_are_numbers(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    path, weights = tmp_path / "a.safetensors", torch.ones(100, dtype=dtype)
    weights[50] = value
    write_checkpoint(path, {KEY: weights}, toy_weights.info())
    with pytest.raises(CheckpointValuesError, match=rf"{KEY} holds NaN or infinite values"):
        read_checkpoint(path, ()).state("control.")


def test_large_weights_are_numbers(tmp_path: Path) -> None:
    """Whose sum overflows their format."""
    path, weights = tmp_path / "a.safetensors", torch.full((1000,), 6e4, dtype=torch.float16)
    write_checkpoint(path, {KEY: weights}, toy_weights.info())
    assert torch.equal(read_checkpoint(path, ()).state("control.")["time_embed.0.weight"], weights)


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_weights_of_many_pieces(tmp_path: Path, dtype: torch.dtype | None) -> None:
    """Which are read in pieces, into memory of another kind."""
    path, weights = tmp_path / "a.safetensors", torch.randn(3, 2**20 + 1).half()
    write_checkpoint(path, {KEY: weights, "control.a": torch.ones(())}, toy_weights.info())
    read = read_checkpoint(path, ()).state("control.", dtype)
    found = read["time_embed.0.weight"]
    assert torch.equal(found, weights.to(dtype or weights.dtype))
    assert read["a"] == 1
    assert torch.equal(copy.deepcopy(found).mul_(2), found * 2)
    found.zero_()
    assert not found.any()
    weights[2, -1] = float("nan")
    write_checkpoint(path, {KEY: weights}, toy_weights.info())
    with pytest.raises(CheckpointValuesError):
        read_checkpoint(path, ()).state("control.", dtype)


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
