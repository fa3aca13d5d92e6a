"""The trunk walks a VAE with the very result of the library's own encode and decode."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from torch import nn

from diff_restorer import UnsupportedVaeError, VaeTrunk, aware_decode, encode_with_features
from tests.toy_models import autoencoder_kl


@pytest.fixture(params=[autoencoder_kl, AutoencoderTiny], ids=["AutoencoderKL", "AutoencoderTiny"])
def vae(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return request.param()


@torch.no_grad()
def test_walking_the_trunk_equals_the_library(vae: Any) -> None:
    pixels = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    trunk = VaeTrunk.of(vae)
    moments, features = encode_with_features(trunk, pixels, range(4))
    latent = moments[:, : trunk.latent_channels]
    encoded = vae.encode(pixels)
    own = encoded.latents if isinstance(vae, AutoencoderTiny) else encoded.latent_dist.mode()
    assert torch.equal(latent, own)
    for level, channels in enumerate(trunk.channels):
        assert features[level].shape == (2, channels, 32 >> level, 48 >> level)
    decoded = aware_decode(trunk, None, 5 * latent, {}, torch.zeros(2, 1))
    expected: Any = vae.decode(5 * latent)
    torch.testing.assert_close(decoded, expected.sample, atol=1e-6, rtol=0)


def test_other_networks_are_refused() -> None:
    with pytest.raises(UnsupportedVaeError, match="found a Linear"):
        VaeTrunk.of(nn.Linear(1, 1))
