"""What is seen while the shipped Nano samples: the photo, in its colours."""

from __future__ import annotations

from types import ModuleType
from unittest import mock

import numpy as np
import pytest
import torch
from skimage import data
from torch.nn.functional import adaptive_avg_pool2d


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea"])
def test_a_preview_shows_the_photo(pack: ModuleType, run, name: str) -> None:
    """The host's own preview of a photo's latent, beside the decoded photo at its size."""
    import latent_preview
    from comfy.cli_args import args

    model, _, vae, _ = run("DiffRestorerNanoLoader")
    picture = torch.from_numpy(getattr(data, name)()[None, :256, :256]).float() / 255
    raw_latent = vae.encode(picture)
    with mock.patch.object(args, "preview_method", latent_preview.LatentPreviewMethod.Auto):
        previewer = latent_preview.get_previewer("cpu", model.model.latent_format)
    assert isinstance(previewer, latent_preview.Latent2RGBPreviewer)
    shown = previewer.decode_latent_to_preview(model.model.process_latent_in(raw_latent.float()))
    decoded = vae.decode(raw_latent).movedim(-1, 1)
    small = adaptive_avg_pool2d(decoded.float(), (shown.height, shown.width))[0].flatten(1)
    pixels = torch.from_numpy(np.array(shown)).movedim(-1, 0).flatten(1) / 255  # HWC -> CHW
    for one, other in zip(pixels, small, strict=True):
        assert torch.corrcoef(torch.stack([one, other]))[0, 1] > 0.9
    assert (pixels - small).abs().mean() < 0.1


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
