"""Tiled Diffusion with the shipped Nano: a photo that is noisy on one side only."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch

from diff_restorer.degradations import add_gaussian_noise
from tests.photos import photo

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def halves() -> tuple[torch.Tensor, torch.Tensor]:
    """The astronaut with noise on the left half, and without: (1, 256, 512, 3) each."""
    clean = photo("astronaut")[:, :, :256]
    noisy = add_gaussian_noise(clean, torch.tensor([50 / 255]), torch.Generator().manual_seed(0))
    mixed = torch.cat([noisy[..., :256], clean[..., 256:]], dim=-1)
    return mixed.movedim(1, -1).contiguous(), clean.movedim(1, -1).contiguous()


@pytest.fixture(scope="module")
def restored(pack, run, halves) -> Any:
    """locality -> the restored photo, and what each tile was found to suffer from."""
    host_nodes = importlib.import_module("nodes")
    model, clip_vision, vae, restorer = run("DiffRestorerNanoLoader")
    image, _ = halves
    positive, negative, degradation = run(
        "DiffRestorerPromptProcessor", diff_restorer=restorer, clip_vision=clip_vision, image=image
    )
    controlled = run(
        "DiffRestorerDegradationControl", positive=positive, negative=negative,
        diff_restorer=restorer, degradation=degradation, image=image, vae=vae,
    )  # fmt: skip

    def restore(locality: float) -> torch.Tensor:
        tiled, _, local = run(
            "DiffRestorerTiledDiffusion", model=model, diff_restorer=restorer,
            clip_vision=clip_vision, image=image, tile_size=256, overlap=64, locality=locality,
        )  # fmt: skip
        (latent,) = host_nodes.common_ksampler(
            tiled, 0, 5, 1.0, "euler", "sgm_uniform", *controlled
        )
        return run(
            "DiffRestorerAwareVAEDecode", samples=latent, vae=vae, diff_restorer=restorer,
            degradation=local, image=image,
        )[0]  # fmt: skip

    with torch.inference_mode():
        return {locality: restore(locality) for locality in (0.0, 1.0)}


def psnr(image: torch.Tensor, reference: torch.Tensor) -> float:
    return -10 * math.log10(float((image - reference).square().mean()))


def test_each_side_is_seen_as_what_it_is(pack, run, halves) -> None:
    _, clip_vision, _, restorer = run("DiffRestorerNanoLoader")
    image, _ = halves
    left, right = (
        run("DiffRestorerDegradationClassifier", diff_restorer=restorer, clip_vision=clip_vision,
            image=part.contiguous())[0]
        for part in image.chunk(2, dim=2)
    )  # fmt: skip
    assert left == "noise"
    assert right != "noise"


def test_the_noisy_side_is_better_by_its_own_degradation(halves, restored) -> None:
    """Locality 1 against 0, each side apart from the seam of the tiles.

    The clean side may lose a little by a look of its own, when it is taken for something mild.
    """
    image, clean = halves
    found = {
        (locality, side): psnr(picture[:, :, columns], clean[:, :, columns])
        for locality, picture in restored.items()
        for side, columns in (("left", slice(0, 192)), ("right", slice(320, 512)))
    }
    assert found[1.0, "left"] > psnr(image[:, :, :192], clean[:, :, :192]) + 5
    assert found[1.0, "left"] > found[0.0, "left"]
    assert found[1.0, "right"] > 35
