"""Abstention with the shipped Nano: what is fine stays, what is not is restored as before."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from skimage import data

from diff_restorer.degradations import degrade
from tests import photos

pytestmark = pytest.mark.comfy


def psnr(image: torch.Tensor, reference: torch.Tensor) -> float:
    return -10 * math.log10(float((image - reference).square().mean().clamp_min(1e-10)))


@pytest.fixture(scope="module")
def restore(pack, run) -> Any:
    """The graph of restore_nano, or with `tiles` that of restore_large, in 2 steps."""
    host_nodes = importlib.import_module("nodes")

    def execute(image: torch.Tensor, tiles: bool = False, **switch: bool) -> torch.Tensor:
        model, clip_vision, vae, restorer = run("DiffRestorerNanoLoader", **switch)
        sockets = {"diff_restorer": restorer, "clip_vision": clip_vision, "image": image}
        *prompts, found = run("DiffRestorerPromptProcessor", **sockets)
        positive, negative, latent = run(
            "DiffRestorerDegradationControl", positive=prompts[0], negative=prompts[1],
            diff_restorer=restorer, degradation=found, image=image, vae=vae,
        )  # fmt: skip
        if tiles:
            size = {"tile_size": 256, "overlap": 64}
            model, _, found = run("DiffRestorerTiledDiffusion", model=model, **size, **sockets)
        (sampled,) = host_nodes.common_ksampler(
            model, 0, 2, 1.0, "euler", "sgm_uniform", positive, negative, latent
        )
        return run(
            "DiffRestorerAwareVAEDecode", samples=sampled, vae=vae, diff_restorer=restorer,
            degradation=found, image=image,
        )[0]  # fmt: skip

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


@pytest.mark.parametrize(("kind", "severity"), [("noise", 0.6), ("low_light", 0.6), ("haze", 0.9)])
def test_a_photo_that_is_bad_on_one_side_is_restored_there(
    restore, photo, kind: str, severity: float
) -> None:
    """One tile of three shows it; the fine side, apart from the seam, stays."""
    bad = degrade(kind, photo, severity, torch.Generator().manual_seed(0))
    image = torch.cat([bad[..., :256], photo[..., 256:]], dim=-1).movedim(1, -1).contiguous()
    clean = photo.movedim(1, -1)
    restored = restore(image, tiles=True)
    left, right = slice(0, 128), slice(384, 512)
    before = psnr(image[:, :, left], clean[:, :, left])
    assert psnr(restored[:, :, left], clean[:, :, left]) > before + 3
    assert psnr(restored[:, :, right], clean[:, :, right]) > 32
