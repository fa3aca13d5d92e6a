"""The shipped Nano: what is fine stays, what is not is restored, each side of a photo by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from skimage import data

from benchmarks import stage
from diff_restorer.degradations import add_gaussian_noise, degrade
from diff_restorer.similarity import psnr
from tests import photos
from tests.photos import seeded


@pytest.fixture(scope="module")
def restore(pack, run) -> Any:
    """The graph of restore_nano, or with `locality` that of restore_large, in few steps."""

    def execute(
        image: torch.Tensor, locality: float | None = None, steps: int = 2, **switch: bool
    ) -> torch.Tensor:
        graph = stage.Graph(*run("DiffRestorerNanoLoader", **switch))
        controlled, model = graph.control(image), graph.model
        if locality is not None:
            model, degradation = graph.tiled(image, tile_size=256, overlap=64, locality=locality)
            controlled = replace(controlled, degradation=degradation)
        prompts = controlled.positive, controlled.negative
        latent = stage.sample(model, *prompts, controlled.latent, steps, seed=0)
        return graph.decode(controlled, latent)

    return execute


def grey_photo(name: str) -> torch.Tensor:
    grey = torch.from_numpy(getattr(data, name)()[:256, :256].copy()).float() / 255
    return grey[None, ..., None].expand(-1, -1, -1, 3).contiguous()


@pytest.mark.parametrize("name", ["clock", "gravel", "brick", "coins"])
def test_a_grey_photo_stays_as_it_is(restore, name: str) -> None:
    """The lowest, brick and clock, are at 36.8 and 38.7 dB to themselves."""
    image = grey_photo(name)
    assert psnr(restore(image), image) > 36


def test_what_is_not_evident_is_not_acted_on(restore) -> None:
    """Gravel is taken for something else as well: 43.6 dB to itself as it is read."""
    image = grey_photo("gravel")
    assert psnr(restore(image), image) > 50 > psnr(restore(image, abstain=False), image)


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    """The astronaut, (1, 3, 256, 512)."""
    return photos.photo("astronaut")[:, :, :256].contiguous()


def bad_on_the_left(bad: torch.Tensor, fine: torch.Tensor) -> torch.Tensor:
    """The halves of two photos, (1, 3, 256, 512), side by side: (1, 256, 512, 3)."""
    return torch.cat([bad[..., :256], fine[..., 256:]], dim=-1).movedim(1, -1).contiguous()


@pytest.fixture(scope="module")
def half_noisy(photo: torch.Tensor) -> torch.Tensor:
    """The astronaut with noise on the left half, (1, 256, 512, 3)."""
    return bad_on_the_left(add_gaussian_noise(photo, torch.tensor([50 / 255]), seeded()), photo)


@pytest.mark.parametrize(("kind", "severity"), [("noise", 0.6), ("low_light", 0.6), ("haze", 0.9)])
def test_a_photo_that_is_bad_on_one_side_is_restored_there(
    restore, photo, kind: str, severity: float
) -> None:
    """One tile of three shows it; the fine side, apart from the seam, stays."""
    image = bad_on_the_left(degrade(kind, photo, severity, seeded()), photo)
    clean = photo.movedim(1, -1)
    restored = restore(image, locality=1.0)
    left, right = slice(0, 128), slice(384, 512)
    before = psnr(image[:, :, left], clean[:, :, left])
    assert psnr(restored[:, :, left], clean[:, :, left]) > before + 3
    assert psnr(restored[:, :, right], clean[:, :, right]) > 32


def test_each_side_is_seen_as_what_it_is(pack, run, half_noisy) -> None:
    _, clip_vision, _, restorer = run("DiffRestorerNanoLoader")
    left, right = (
        run("DiffRestorerDegradationClassifier", diff_restorer=restorer, clip_vision=clip_vision,
            image=part.contiguous())[0]
        for part in half_noisy.chunk(2, dim=2)
    )  # fmt: skip
    assert left == "noise"
    assert right != "noise"


def test_the_noisy_side_is_better_by_its_own_degradation(restore, photo, half_noisy) -> None:
    """Locality 1 against 0, each side apart from the seam of the tiles.

    The clean side may lose a little by a look of its own, when it is taken for something mild.
    """
    clean, left, right = photo.movedim(1, -1), slice(0, 192), slice(320, 512)
    local, shared = (restore(half_noisy, locality, steps=5) for locality in (1.0, 0.0))
    before, by_its_own, by_all = (
        psnr(image[:, :, left], clean[:, :, left]) for image in (half_noisy, local, shared)
    )
    assert by_its_own > before + 5
    assert by_its_own > by_all
    assert psnr(local[:, :, right], clean[:, :, right]) > 35


def test_a_vae_of_stable_diffusion_is_refused(run, toy) -> None:
    """Nano's latents are those of a TAESD, which no size tells."""
    _, clip_vision, _, restorer = run("DiffRestorerNanoLoader")
    image = torch.zeros(1, 64, 64, 3)
    positive, negative, degradation = run(
        "DiffRestorerPromptProcessor", diff_restorer=restorer, clip_vision=clip_vision, image=image
    )
    with pytest.raises(ValueError, match=r"vae: found an AutoencoderKL, but .* with a TAESD"):
        run(
            "DiffRestorerDegradationControl", positive=positive, negative=negative,
            degradation=degradation, vae=toy.vae,
        )  # fmt: skip
