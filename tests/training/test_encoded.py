"""Stage 1 on what was encoded before: the same numbers, and refused where they would be others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training import toy_sd15
from training import encode_control_data, train_control
from training.common import DataConfig, ModelConfig, data_for, open_models
from training.encode_control_data import encoded, read_encoded
from training.loop import LoopConfig
from training.models import Models

SAMPLES, BATCH = 5, 2


@pytest.fixture(scope="module")
def config(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> encode_control_data.Config:
    """A folder of a toy SD 1.5."""
    out = tmp_path_factory.mktemp("encoded")
    made = encode_control_data.Config(
        DataConfig(photos, crop=32, held_out=3, validation_samples=8),
        out / "batches",
        toy_sd15.model_config(out),
        samples=SAMPLES,
        batch_size=BATCH,
    )
    encode_control_data.main(made)
    return made


def training(config: encode_control_data.Config, out: Path, **changes: Any) -> train_control.Config:
    loop = LoopConfig(out, steps=4, batch_size=BATCH, warmup=1, workers=0, precision="no")
    made = train_control.Config(
        loop, config.data, config.model, encoded=config.out, validation_steps=1
    )
    return replace(made, **changes)


def test_the_loss_is_that_of_the_photos(config: encode_control_data.Config) -> None:
    models, _ = open_models(config.model)
    reads = {"gt", "lq", "clip_view"}
    photos, _ = data_for(models, config.data, config.seed, reads)
    photos = photos.sized(BATCH)
    held = read_encoded(config.out, photos, models)
    assert len(held) == 6  # in whole batches
    train_control.prepare(models, training(config, Path("never")))
    loss = train_control.make_loss(models, training(config, Path("never")))
    order = torch.randperm(3, generator=encode_control_data.seeded(config.seed, 5, 0)).tolist()
    for number, file in enumerate(order):
        fresh = photos.finish(photos[file], torch.device("cpu"))
        stored = held.finish(held[number], torch.device("cpu"))
        assert "gt" not in stored
        seen, again = encoded(models, fresh), encoded(models, stored)
        assert again.whole is again.close
        for a, b in zip(seen, again, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3)  # fp16
        terms, others = (loss(b, torch.Generator().manual_seed(7)) for b in (fresh, stored))
        for name in ("loss", "mse", "ce"):
            torch.testing.assert_close(others[name], terms[name], rtol=5e-3, atol=1e-3)


def test_stage_1_trains_on_it_for_several_epochs(
    config: encode_control_data.Config, tmp_path: Path
) -> None:
    made = train_control.main(training(config, tmp_path))
    models, loaded = open_models(replace(config.model, init=(made,)))
    assert {"control.", "prompt_processor."} <= loaded
    assert isinstance(models, Models)
    assert any(value.any() for value in models.control.controlnet_mid_block.state_dict().values())


def test_a_killed_run_makes_what_is_missing(config: encode_control_data.Config) -> None:
    files = sorted(config.out.glob("*.safetensors"))
    before = [file.read_bytes() for file in files]
    files[1].unlink()
    times = {file: file.stat().st_mtime_ns for file in (files[0], files[2])}
    encode_control_data.main(config)
    assert [file.read_bytes() for file in files] == before
    assert {file: file.stat().st_mtime_ns for file in times} == times


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"crop": 64}}, "made with part 32, this run has 64"),
        ({"data": {"looks": 0.5}}, r"made with looks 0\.0, this run has 0\.5"),
        ({"loop": {"batch_size": 1}}, "made with batch_size 2, this run has 1"),
        ({"encoded": Path("nowhere")}, "nowhere holds no batches, or not all of them"),
    ],
)
def test_other_settings_are_refused(
    config: encode_control_data.Config, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    settings = training(config, tmp_path)
    inner = {
        name: replace(getattr(settings, name), **value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train_control.main(replace(settings, **inner))


def test_another_vae_is_refused(config: encode_control_data.Config, tmp_path: Path) -> None:
    other: ModelConfig = toy_sd15.model_config(tmp_path)
    models, _ = open_models(other)
    with torch.no_grad():
        next(models.vae.parameters()).add_(1.0)
    photos, _ = data_for(models, config.data, config.seed, {"gt", "lq"})
    with pytest.raises(ValueError, match="made with another VAE or vision tower"):
        read_encoded(config.out, photos.sized(BATCH), models)


def test_nano_s_two_views_and_crops_of_a_part_are_kept(photos: Path, tmp_path: Path) -> None:
    from tests.training.test_programs import TOY

    data = DataConfig(photos, part=48, crop=32, crops_per_part=2, held_out=3, validation_samples=9)
    models = Models(TOY, ("noise", "clean"))
    train, _ = data_for(models, data, 0, {"gt", "lq", "clip_view", "native_view"})
    batch = train.sized(4).finish(train.sized(4)[0], torch.device("cpu"))
    seen = encoded(models, batch)
    assert [len(value) for value in seen] == [4, 4, 2, 2]
    assert not torch.equal(seen.whole, seen.close)
    held = {name: value.half() for name, value in seen._asdict().items()}
    torch.testing.assert_close(encoded(models, held).close, seen.close, rtol=1e-3, atol=1e-3)
