"""Degradation-aware decoder: the VAE decoder with encoder features of the LQ image fused in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .control import zero_init
from .vae_trunk import VaeTrunk

Features = dict[int, Tensor]
"""Encoder features of the LQ image by VAE level: {level: (B, C, H / 2**level, W / 2**level)}."""


@dataclass(frozen=True)
class FusionConfig:
    """Sizes of the fusion blocks, all of which can be read back from their weights."""

    channels: tuple[tuple[int, int], ...]
    """(level, channels) pairs; encoder and decoder of an AutoencoderKL agree on the channels."""
    growth: int
    """Channels that each conv of the residual dense block adds."""
    depth: int
    """Number of convs in the residual dense block."""
    context_width: int
    """Width of pooled P_D."""

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> FusionConfig:
        """Read the sizes from tensor shapes.

        Args:
            state: Weights without the `decoder.fusion.` prefix.

        Raises:
            KeyError: A tensor that carries a size is missing; the message is its key.
        """
        levels = sorted({int(key.split(".")[0]) for key in state})
        first = levels[0] if levels else 0
        depth = len([key for key in state if key.startswith(f"{first}.dense.") and "bias" in key])
        return cls(
            channels=tuple((level, state[f"{level}.out.weight"].shape[0]) for level in levels),
            growth=state[f"{first}.dense.0.weight"].shape[0],
            depth=depth,
            context_width=state[f"{first}.film.weight"].shape[1],
        )


class FusionBlock(nn.Module):
    """Residual dense block on (encoder, decoder) features, modulated by pooled P_D.

    Source: Diff-Restorer (arXiv 2407.03636), degradation-aware decoder: encoder features, RDB
    blocks and the degradation embedding. The paper does not say how they meet; our choice is the
    controllable feature wrapping of StableSR (arXiv 2305.07015) with FiLM, (1 + gamma) h + beta,
    on the dense block's output. The block has no normalisation, so that the brightness of the
    LQ image survives and tiles see the same function as the whole image.
    """

    def __init__(
        self,
        channels: int,
        growth: int,
        depth: int,
        context_width: int,
        ops: Any = nn,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()

        def conv(channels_in: int, channels_out: int) -> nn.Module:
            return ops.Conv2d(channels_in, channels_out, 3, padding=1, device=device, dtype=dtype)

        self.merge = conv(2 * channels, channels)
        self.dense = nn.ModuleList(conv(channels + i * growth, growth) for i in range(depth))
        self.squeeze = conv(channels + depth * growth, channels)
        self.film = zero_init(
            ops.Linear(context_width, 2 * channels, device=device, dtype=dtype)
        )
        self.out = zero_init(conv(channels, channels))

    def forward(self, encoded: Tensor, decoded: Tensor, pooled: Tensor) -> Tensor:
        """The residual to add to `decoded`.

        Args:
            encoded: Encoder features of the LQ image, (B, C, h, w).
            decoded: Decoder features at the same level, (B, C, h, w).
            pooled: Pooled P_D, (B, context_width).
        """
        h = F.leaky_relu(self.merge(torch.cat([encoded, decoded], dim=1)), 0.2)
        grown = [h]
        for conv in self.dense:
            grown.append(F.leaky_relu(conv(torch.cat(grown, dim=1)), 0.2))
        h = h + self.squeeze(torch.cat(grown, dim=1))
        gamma, beta = self.film(pooled)[:, :, None, None].chunk(2, dim=1)
        return self.out(F.leaky_relu((1 + gamma) * h + beta, 0.2))


class FusionBlocks(nn.ModuleDict):
    """One `FusionBlock` per VAE level, under the level's number as its key."""

    def __init__(
        self,
        config: FusionConfig,
        ops: Any = nn,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__({
            str(level): FusionBlock(
                channels, config.growth, config.depth, config.context_width, ops, device, dtype
            )
            for level, channels in config.channels
        })  # fmt: skip
        self.config = config

    @property
    def levels(self) -> tuple[int, ...]:
        """VAE levels that are fused, ascending."""
        return tuple(level for level, _ in self.config.channels)

    def fuse(self, level: int, encoded: Tensor, decoded: Tensor, pooled: Tensor) -> Tensor:
        """The residual of `level`, see `FusionBlock.forward`."""
        return cast(Tensor, self[str(level)](encoded, decoded, pooled))


def encode_with_features(
    trunk: VaeTrunk, pixels: Tensor, levels: Iterable[int]
) -> tuple[Tensor, Features]:
    """Encode and keep what the encoder knows at each wanted level, before downsampling.

    Args:
        trunk: The frozen VAE.
        pixels: (B, 3, H, W) in [-1, 1]; H and W multiples of 8.
        levels: VAE levels to keep.

    Returns:
        Moments (B, 2 * latent_channels, H/8, W/8), of which the first half is the mean, and the
        features.
    """
    wanted = set(levels)
    features: Features = {}
    h = trunk.encoder_stem(pixels)
    for index, level in enumerate(trunk.encoder_levels):
        for block in level.blocks:
            h = block(h)
        if index in wanted:
            features[index] = h
        if level.resample is not None:
            h = level.resample(h)
    return trunk.encoder_head(h), features


def aware_decode(
    trunk: VaeTrunk,
    fusion: FusionBlocks | None,
    raw_latent: Tensor,
    features: Features,
    pooled: Tensor,
    fidelity: float = 1.0,
) -> Tensor:
    """Decode a latent with the LQ image's own detail.

    Args:
        trunk: The VAE whose decoder is used (stock or finetuned).
        fusion: Fusion blocks; None decodes plainly.
        raw_latent: Unscaled latent, (B, latent_channels, H/8, W/8).
        features: From `encode_with_features` on the LQ image, at the fusion blocks' levels.
        pooled: Pooled P_D, (B, context_width).
        fidelity: w in [0, 1]; 0 is the plain decode, bit for bit.

    Returns:
        Pixels (B, 3, H, W) around [-1, 1], not clamped.

    Source: Diff-Restorer, degradation-aware decoder; w as in StableSR (arXiv 2305.07015, eq. 3).
    """
    fused = fusion.levels if fusion is not None and fidelity > 0 else ()
    h = trunk.decoder_stem(raw_latent)
    for index in reversed(range(len(trunk.decoder_levels))):
        level = trunk.decoder_levels[index]
        for block in level.blocks:
            h = block(h)
        if fusion is not None and index in fused:
            h = h + fidelity * fusion.fuse(index, features[index], h, pooled)
        if level.resample is not None:
            h = level.resample(h)
    return trunk.decoder_head(h)
