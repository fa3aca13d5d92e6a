"""What is seen while the shipped Nano samples: the photo, in its colours."""

from types import ModuleType
from unittest import mock

import numpy as np
import pytest
import torch
from skimage import data
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

LIKE, APART = 0.9, 0.1
"""Least correlation of a channel, and most of the mean difference in [0, 1]."""


def preview_of(model, vae, photo: Tensor) -> tuple[Tensor, Tensor]:
    """The host's own preview of a photo's latent, and the decoded photo at its size; (3, N)."""
    import latent_preview
    from comfy.cli_args import args

    raw_latent = vae.encode(photo)
    with mock.patch.object(args, "preview_method", latent_preview.LatentPreviewMethod.Auto):
        previewer = latent_preview.get_previewer("cpu", model.model.latent_format)
    assert isinstance(previewer, latent_preview.Latent2RGBPreviewer)
    shown = previewer.decode_latent_to_preview(model.model.process_latent_in(raw_latent.float()))
    decoded = vae.decode(raw_latent).movedim(-1, 1)
    small = adaptive_avg_pool2d(decoded.float(), (shown.height, shown.width))
    pixels = torch.from_numpy(np.array(shown)).movedim(-1, 0) / 255  # HWC -> CHW
    return pixels.flatten(1), small[0].flatten(1)


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea"])
def test_a_preview_shows_the_photo(pack: ModuleType, run, name: str) -> None:
    model, _, vae, _ = run("DiffRestorerNanoLoader")
    picture = torch.from_numpy(getattr(data, name)()[None, :256, :256]).float() / 255
    shown, decoded = preview_of(model, vae, picture)
    for one, other in zip(shown, decoded, strict=True):
        assert torch.corrcoef(torch.stack([one, other]))[0, 1] > LIKE
    assert (shown - decoded).abs().mean() < APART


def test_previews_cost_nothing_until_they_are_on(pack: ModuleType, toy, calls) -> None:
    encoded = calls(toy.vae, "encode")
    latent_format = toy.model.model.latent_format
    assert latent_format.scale_factor == toy.restorer.info.latent_scale
    assert encoded == []
    factors, again = latent_format.latent_rgb_factors, latent_format.latent_rgb_factors
    assert torch.tensor(factors).shape == (latent_format.latent_channels, 3)
    assert len(latent_format.latent_rgb_factors_bias) == 3
    assert factors == again
    assert len(encoded) == 1
