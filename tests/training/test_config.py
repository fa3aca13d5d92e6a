"""Presets and the command line: what is merged, what is refused, and what is written down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomllib
import torch
from safetensors.torch import load_file

from training import (
    common,
    encode_control_data,
    sample_decoder_data,
    train_control,
    train_decoder,
)
from training.common import DataConfig
from training.config import PRESETS, exit_after, load, parse, settings, table_name, write
from training.loop import LoopConfig, count_steps
from training.nano import autoencoder, vision

PROGRAMS = (
    *(train_control, train_decoder, sample_decoder_data, encode_control_data),
    *(autoencoder, vision),
)
GIVEN = ("--loop.out", "runs/a", "--data.photos", "photos")


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(
        """
        [common.loop]
        lr = 1          # whole numbers serve as floats
        warmup = 7
        [common.data]
        crop = 64
        [train_control]
        ce_weight = 0.3
        loop = {warmup = 9, batch_size = 5}
        model = {init = ["a.safetensors", "b.safetensors"], sizes = {unet_channels = [32, 64]}}
        [nano.vision.loop]
        steps = 12
        """
    )
    return path


def test_options_win_over_the_table_and_the_table_over_common(preset: Path) -> None:
    args = ["--config", str(preset), *GIVEN, "--loop.batch-size", "3"]
    config = parse(train_control.Config, args=args)
    assert (config.loop.lr, config.loop.warmup, config.loop.batch_size) == (1.0, 9, 3)
    assert isinstance(config.loop.lr, float)
    assert config.loop.out == Path("runs/a")
    assert config.ce_weight == 0.3
    assert config.data.crop == 64
    assert config.model.init == (Path("a.safetensors"), Path("b.safetensors"))
    assert config.model.sizes.unet_channels == (32, 64)
    assert config.semantic_dropout == train_control.Config.semantic_dropout  # its own default
    eyes = parse(vision.Config, args=["--config", str(preset), *GIVEN])
    assert (eyes.loop.steps, eyes.loop.warmup) == (12, 7)


def test_a_file_that_cannot_be_read_is_one_line_and_an_error_of_ours_is_not(
    tmp_path: Path,
) -> None:
    (tmp_path / "latents.safetensors").write_bytes(b"no tensors")
    with pytest.raises(SystemExit, match=r"error: .*eader"):
        exit_after(lambda: load_file(tmp_path / "latents.safetensors"))
    with pytest.raises(ValueError, match="invalid literal"):
        exit_after(lambda: int("no number of anyone's settings"))
    with pytest.raises(SystemExit) as end:
        exit_after(lambda: 7)
    assert not end.value.code


def test_without_a_preset_the_defaults_hold() -> None:
    config = parse(train_control.Config, args=list(GIVEN))
    assert config == train_control.Config(LoopConfig(Path("runs/a")), DataConfig(Path("photos")))


def test_common_tables_are_left_out_where_a_program_has_no_such_part(preset: Path) -> None:
    args = ["--config", str(preset), "--data.photos", "p", "--out", "latents.safetensors"]
    assert parse(sample_decoder_data.Config, args=args).data.crop == 64  # and it has no loop


def test_options_without_a_default_are_still_asked_for(
    preset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(train_control.Config, args=["--config", str(preset), "--data.photos", "p"])
    assert "--loop.out" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"\[train_control\.loop\] needs 'out'"):
        load(train_control.Config, preset, {"data": {"photos": Path("p")}})


def test_help_shows_the_presets_and_their_values(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(train_control.Config, "What it does.", args=["--config", "paper", "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for text in ("What it does.", "--config", "fast|nano|nano_gpu|paper", "1e-05", "512"):
        assert text in shown


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train_control]\nce = 1", r"\[train_control\] has no option 'ce'; accepted: loop, data"),
        ("[train_control.loop]\nlearn = 1", r"\[train_control\.loop\] has no .*'learn'.* lr,"),
        ("[common.loop]\nlearn = 1", r"loop\] has no option 'learn'; accepted: .*lr"),
        ("[common]\nlop = 1", r"\[common\] has no option 'lop'; accepted: loop, data, model"),
        ("[train_contol]\nx = 1", r"table \[train_contol\] belongs to no program"),
        ("[train_control.loop]\nlr = 'fast'", r"\[train_control\.loop\] lr: found 'fast', .*float"),
        ("[train_control.loop]\nsteps = 1.5", r"steps: found 1\.5, give int"),
        ("[train_control.loop]\ndecay = 1", r"decay: found 1, give bool"),
        ("[train_control.loop]\nprecision = 'fp8'", r"found 'fp8', give .*'no', 'bf16', 'fp16'"),
        ("[train_control\n", "is not TOML"),
    ],
)
def test_a_wrong_file_is_named_with_the_place(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        parse(train_control.Config, args=["--config", str(path), *GIVEN])
    assert str(path) in str(error.value)


def test_a_preset_that_does_not_exist_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"--config papr: no such preset .* fast, nano, nano_gpu, paper"
    ):
        parse(train_control.Config, args=["--config", "papr", *GIVEN])


@pytest.mark.parametrize("name", sorted(path.stem for path in PRESETS.glob("*.toml")))
def test_every_program_reads_every_preset(name: str) -> None:
    shared = {"data": {"photos": "p"}, "loop": {"out": "a", "steps": 3}, "out": "b"}
    for program in PROGRAMS:
        kind = program.Config
        own = {key: value for key, value in shared.items() if key in kind.__dataclass_fields__}
        config = load(kind, name, own)
        assert config.data.photos == Path("p")


def test_the_paper_preset_has_the_published_settings() -> None:
    given = {"loop": {"out": "a"}, "data": {"photos": "p"}}
    first = load(train_control.Config, "paper", given)
    second = load(train_decoder.Config, "paper", given)
    assert (first.loop.lr, first.loop.batch_size, first.loop.epochs) == (1e-5, 16, 100)
    assert (second.loop.lr, second.loop.batch_size, second.loop.epochs) == (1e-5, 4, 25)
    assert (first.ce_weight, first.data.crop, first.loop.precision) == (0.1, 512, "bf16")


def test_auto_precision_is_what_the_device_computes_in(monkeypatch) -> None:
    for native, name, dtype in ((True, "bf16", torch.bfloat16), (False, "no", torch.float32)):
        monkeypatch.setattr(common, "has_native_bf16", lambda _, native=native: native)
        assert (common.mixed_precision("auto"), common.half("auto")) == (name, dtype)
    assert (common.mixed_precision("fp16"), common.half("fp16")) == ("fp16", torch.float16)


def test_epochs_count_passes_over_the_photos_whoever_shares_them() -> None:
    config = LoopConfig(Path("a"), epochs=2.5, batch_size=4, accumulate=3, warmup=0)
    assert count_steps(config, photos=100, processes=2).steps == 11  # 250 / 24
    assert count_steps(LoopConfig(Path("a"), steps=7), 100, 1).steps == 7
    assert count_steps(LoopConfig(Path("a"), minutes=7), 100, 1).steps == 0
    for lengths, found in {
        (): "found none",
        ("steps", "minutes"): r"found --loop\.minutes 2 and --loop\.steps 2; give one of them",
    }.items():
        given: dict[str, Any] = dict.fromkeys(lengths, 2)
        with pytest.raises(ValueError, match=rf"--loop\.steps, .*: {found}"):
            count_steps(LoopConfig(Path("a"), **given), 100, 1)


def test_a_length_that_is_given_takes_the_place_of_the_preset_s() -> None:
    args = ["--config", "nano", "--data.photos", "p", "--loop.out", "a"]
    for given, expected in {
        (): (5000, 0, 0),
        ("--loop.minutes", "3"): (0, 0, 3),
        ("--loop.epochs=2",): (0, 2, 0),
    }.items():
        loop = parse(train_control.Config, args=[*args, *given]).loop
        assert (loop.steps, loop.epochs, loop.minutes) == expected
    overrides = {"data": {"photos": "p"}, "loop": {"out": "a", "minutes": 3}}
    loop = load(train_control.Config, "nano", overrides).loop
    assert (loop.steps, loop.minutes) == (0, 3)


def test_a_preset_may_start_from_another(preset: Path, tmp_path: Path) -> None:
    above = tmp_path / "above.toml"
    above.write_text(f'base = "{preset}"\n[train_control]\nloop = {{warmup = 3}}\n')
    found = parse(train_control.Config, args=["--config", str(above), *GIVEN])
    expected = parse(train_control.Config, args=["--config", str(preset), *GIVEN])
    assert (found.loop.warmup, expected.loop.warmup) == (3, 9)
    assert (found.ce_weight, found.loop.batch_size) == (expected.ce_weight, 5)


def test_what_is_written_down_reads_back(preset: Path, tmp_path: Path) -> None:
    config = parse(train_control.Config, args=["--config", str(preset), *GIVEN])
    path = tmp_path / "config.toml"
    write(config, path)
    assert parse(train_control.Config, args=["--config", str(path)]) == config
    assert tomllib.loads(path.read_text()) == {"train_control": settings(config)}
    assert table_name(vision.Config) == "nano.vision"
