"""`training.nano.grade`: what the last step of a detail path learns from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diff_restorer.checkpoint import read_checkpoint
from diff_restorer.grade import grade_input, with_grade
from diff_restorer.similarity import psnr
from tests.photos import write
from tests.training.test_programs import TOY
from training.common import DataConfig, ModelConfig, checkpoint_info
from training.models import Models
from training.nano import grade


def test_moments_are_enough_to_know_what_a_grade_makes() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 4, 3, 16, 24, generator=generator)
    change, strength = (
        0.1 * torch.randn(4, 6, generator=generator),
        torch.tensor([[1.0, 0.5, 0.1, 0]]).T,
    )
    flat = x.flatten(2), y.flatten(2)
    products = (flat[0], flat[0] ** 2, flat[0] * flat[1], flat[1], flat[1] ** 2)
    means = torch.stack([value.mean(dim=2) for value in products], dim=1)
    expected = -10 * (with_grade(x, change, strength) - y).square().flatten(1).mean(dim=1).log10()
    torch.testing.assert_close(grade.Moments(x, strength, means).psnr(change), expected)


def test_it_learns_to_stretch_what_is_flat() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.rand(64, 3, 32, 32, generator=generator)
    share = 0.3 + 0.5 * torch.rand(64, 1, 1, 1, generator=generator)
    x = share * (y - 0.5) + 0.5 + 0.1 * torch.rand(64, 1, 1, 1, generator=generator)
    seen, strength = grade_input(x, x, torch.ones(64, 9)), torch.ones(64, 1)
    products = (x, x * x, x * y, y, y * y)
    means = torch.stack([value.mean(dim=(2, 3)) for value in products], dim=1)
    config = grade.Config(DataConfig(), ModelConfig(), Path("never"), epochs=300)
    step = grade.fit(grade.Moments(seen, strength, means), config)
    graded = with_grade(x, step(seen).detach(), strength)
    assert float(psnr(graded, y).mean()) > float(psnr(x, y).mean()) + 10


def test_all_else_stays_as_it_was(tmp_path: Path) -> None:
    photos = write(tmp_path / "photos", ("astronaut", "chelsea", "coffee"), (96, 80))
    models = Models(TOY, ("noise", "low_light", "clean"))
    models.start_decoder()
    finished = tmp_path / "finished.safetensors"
    parts = ("base.unet.", "base.vae.", "base.clip_vision.", "control.", "prompt_processor.")
    models.save(finished, (*parts, "decoder.detail."), checkpoint_info(models, {}), torch.float32)
    config = grade.Config(
        DataConfig(photos, part=48, crop=32, held_out=3, validation_samples=1),
        ModelConfig((finished,), TOY),
        tmp_path / "graded.safetensors",
        samples=16,
        steps=1,
        epochs=20,
        precision="no",
    )
    made = read_checkpoint(grade.main(config))
    before = read_checkpoint(finished).state("")
    after = made.state("")
    assert made.info.format_version == 3
    assert all(torch.equal(after[name], value) for name, value in before.items())
    added = after.keys() - before.keys()
    assert {name.split(".")[2] for name in added} == {"grade"}
    again = grade.Config(**{**vars(config), "model": ModelConfig((made.path,), TOY)})
    assert (
        read_checkpoint(grade.main(again)).info.format_version == 3
    )  # one that has it learns anew
    fused = ModelConfig(sizes=TOY.__class__(**{**vars(TOY), "detail_widths": ()}))
    other = Models(fused.sizes, ("noise", "clean"))
    other.save(finished, (*parts, "decoder.fusion."), checkpoint_info(other, {}), torch.float32)
    with pytest.raises(ValueError, match="its decoder has no detail path"):
        grade.main(config)
