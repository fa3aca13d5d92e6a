"""The dry run: at toy size in seconds, at SD 1.5's with `make test-all`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from skimage import data

from diff_restorer.checkpoint import read_checkpoint
from tests import toy_weights
from tests.training import toy_sd15
from training import check, encode_control_data, sample_decoder_data, train_control, train_decoder
from training.common import DataConfig, ModelConfig
from training.config import load, parse
from training.pretrained import Sd15Config


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six, of which one is small, one compressed and one no photo."""
    folder = tmp_path_factory.mktemp("photos")
    for name in ("astronaut", "chelsea", "coffee"):
        Image.fromarray(getattr(data, name)()).save(folder / f"{name}.png")
    Image.fromarray(data.rocket()).resize((48, 32)).save(folder / "small.png")
    Image.fromarray(data.rocket()).save(folder / "poor.jpg", quality=50)
    (folder / "torn.png").write_bytes(b"torn")
    return folder


@pytest.mark.comfy
def test_a_dry_run_tells_what_a_training_takes(
    comfyui_root: Path, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    model = toy_sd15.model_config(tmp_path)
    shots = DataConfig(photos, crop=64, held_out=3)
    file = tmp_path / "tried.safetensors"
    found = check.main(check.Config(shots, model, batches=(2,), price=2.0, out=file))
    assert read_checkpoint(file).has("decoder.fusion.")
    assert found.photos == 5
    told = "\n".join(found.wrong)
    for words in ("1 photos cannot be read", "1 of 5 photos are smaller", "1 of 5 photos are JPEGs",
                  "5 photos are few"):  # fmt: skip
        assert words in told
    assert list(found.tried) == ["stage 1", "stage 2", "latents"]
    assert all([row.batch for row in rows] == [2] for rows in found.tried.values())
    assert found.largest("stage 1") == 2
    fast = found.hours["fast"]
    speed = found.fastest("stage 1")
    assert fast["stage 1"] == pytest.approx(30000 * 64 / speed / 3600)
    # 100 epochs of five photos: 32 steps of 16.
    assert found.hours["paper"]["stage 1"] == pytest.approx(32 * 16 / speed / 3600)
    assert found.nodes.startswith("opened with the nodes")
    whole = sum(fast.values())
    assert f"fast: {whole:.3g} hours" in caplog.text
    assert f"which costs {2 * whole:.2f}" in caplog.text


@pytest.mark.parametrize("preset", check.Config.presets)
def test_a_preset_s_stored_batches_are_those_of_its_stages(preset: str) -> None:
    latents = load(sample_decoder_data.Config, preset, {"out": "never", "data": {}})
    decoder = load(train_decoder.Config, preset, {"loop": {"out": "never"}, "data": {}})
    assert latents.batch_size == decoder.loop.batch_size
    assert latents.data == decoder.data
    encoded = load(encode_control_data.Config, preset, {"out": "never", "data": {}})
    control = load(train_control.Config, preset, {"loop": {"out": "never"}, "data": {}})
    assert encoded.batch_size == control.loop.batch_size
    assert encoded.data == control.data


def test_what_is_missing_is_named(photos: Path, tmp_path: Path) -> None:
    config = parse(check.Config, args=["--config", "fast", "--data.photos", str(photos)])
    assert config.data.crop == 512
    with pytest.raises(ValueError, match=r"--model\.sd15\.checkpoint: missing"):
        check.main(config)
    nothing = replace(config.data, photos=tmp_path / "nothing")
    with pytest.raises(ValueError, match="nothing does not exist; give a folder"):
        check.main(replace(config, data=nothing, model=toy_sd15.model_config(tmp_path)))


def test_a_file_that_the_nodes_refuse_is_an_error(comfyui_root: Path, tmp_path: Path) -> None:
    whole = toy_weights.write_restorer(tmp_path / "whole.safetensors")
    truncated = toy_weights.write_truncated(tmp_path / "cut.safetensors", whole)
    with pytest.raises(ValueError, match=r"cut\.safetensors: Load Diff-Restorer refuses it"):
        check.opened_by_nodes(truncated)


@pytest.mark.slow
@pytest.mark.comfy
def test_a_dry_run_at_full_size(comfyui_root: Path, photos: Path, tmp_path: Path) -> None:
    """All networks of SD 1.5 with random weights; 64 px, as a CPU has all day for no more."""
    files = toy_weights.write_sd15(tmp_path)
    base = Sd15Config(files["checkpoints"], clip=str(files["clip_vision"]))
    shots = DataConfig(photos, crop=64, held_out=3)
    found = check.main(check.Config(shots, ModelConfig(sd15=base)))
    assert found.largest("stage 1") == found.largest("stage 2") == 1
    assert found.nodes.startswith("opened with the nodes")
