"""Aware decoder and VAE trunk against diffusers' own autoencoder, at toy width."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from torch import nn

from diff_restorer import (
    FusionBlocks,
    FusionConfig,
    UnsupportedVaeError,
    VaeTrunk,
    aware_decode,
    encode_with_features,
    encoder_features,
)
from training.networks import Sizes, build_vae

KL, TINY = Sizes(vae_channels=(32, 32, 64, 64), vae_layers=1), Sizes(vae_channels=())
CONFIGS = [
    FusionConfig(channels=((1, 32), (2, 64)), growth=4, depth=2, context_width=6),
    FusionConfig(channels=((0, 32), (1, 32), (2, 64)), growth=8, depth=3, context_width=16),
    FusionConfig(channels=((2, 64),), growth=5, depth=1, context_width=3, pixels=(32, 8)),
    FusionConfig(channels=(), growth=4, depth=2, context_width=3, pixels=(32, 6)),
]


@pytest.fixture(scope="module")
def vae() -> Any:
    torch.manual_seed(0)
    return build_vae(KL).eval()


def trained_fusion(config: FusionConfig) -> FusionBlocks:
    """Fusion blocks whose zero-initialised layers are not zero any more."""
    fusion = FusionBlocks(config)
    for parameter in fusion.parameters():
        nn.init.normal_(parameter, std=0.1)
    return fusion


@pytest.mark.parametrize("config", CONFIGS)
def test_sizes_are_read_back_from_weights(config: FusionConfig) -> None:
    assert FusionConfig.from_state_dict(FusionBlocks(config).state_dict()) == config


@torch.no_grad()
def test_features_alone_run_the_encoder_no_further_than_needed(vae: Any) -> None:
    pixels, ran = torch.randn(1, 3, 32, 32), []
    hooks = [
        block.resnets[-1].register_forward_hook(lambda *_, level=level: ran.append(level))
        for level, block in enumerate(vae.encoder.down_blocks)
    ]
    alone = encoder_features(VaeTrunk.of(vae), pixels, (1,))
    for hook in hooks:
        hook.remove()
    assert ran == [0, 1]
    _, features = encode_with_features(VaeTrunk.of(vae), pixels, (1,))
    torch.testing.assert_close(alone, features, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS)
def test_untrained_fusion_and_fidelity_0_are_identities(vae: Any, config: FusionConfig) -> None:
    trunk, pixels = VaeTrunk.of(vae), torch.randn(1, 3, 32, 48)
    moments, features = encode_with_features(trunk, pixels, [i for i, _ in config.channels])
    latent, pooled = moments[:, :4], torch.randn(1, config.context_width)
    plain = vae.decode(latent).sample
    untrained = aware_decode(trunk, FusionBlocks(config), latent, features, pooled)
    assert torch.equal(untrained, plain)
    trained = trained_fusion(config)
    assert torch.equal(aware_decode(trunk, trained, latent, features, pooled, 0.0), plain)
    assert not torch.allclose(aware_decode(trunk, trained, latent, features, pooled), plain)


@torch.no_grad()
def test_decode_depends_on_lq_features_and_on_p_d(vae: Any) -> None:
    config = CONFIGS[0]
    trunk, fusion = VaeTrunk.of(vae), trained_fusion(config)
    moments, features = encode_with_features(trunk, torch.randn(1, 3, 32, 32), (1, 2))
    latent, pooled = moments[:, :4], torch.randn(1, config.context_width)
    image = aware_decode(trunk, fusion, latent, features, pooled)
    assert not torch.allclose(aware_decode(trunk, fusion, latent, features, -pooled), image)
    other = {level: -feature for level, feature in features.items()}
    assert not torch.allclose(aware_decode(trunk, fusion, latent, other, pooled), image)


def test_every_fusion_parameter_learns(vae: Any) -> None:
    config = CONFIGS[1]
    trunk, fusion = VaeTrunk.of(vae), trained_fusion(config)
    with torch.no_grad():
        moments, features = encode_with_features(trunk, torch.randn(2, 3, 32, 32), fusion.levels)
    image = aware_decode(trunk, fusion, moments[:, :4], features, torch.randn(2, 16))
    image.square().mean().backward()
    for name, parameter in fusion.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@torch.no_grad()
@pytest.mark.parametrize("sizes", [KL, TINY], ids=["AutoencoderKL", "AutoencoderTiny"])
def test_walking_the_trunk_equals_the_library(sizes: Sizes) -> None:
    torch.manual_seed(0)
    vae = build_vae(sizes).eval()
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
