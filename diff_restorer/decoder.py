"""Degradation-aware decoder: the VAE decoder with encoder features of the LQ image fused in."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator
from itertools import islice

import torch
from torch import Tensor

from .detail import DetailPath
from .fusion import FusionBlocks
from .local import Condition
from .vae_trunk import VaeTrunk

PIXELS = -1
"""The photo itself, beside the VAE's levels 0, 1, ..."""
Features = dict[int, Tensor]
"""The LQ image by level: (B, C, H / 2**level, W / 2**level) of the encoder, PIXELS (B, 3, H, W)."""


def _encoder_levels(trunk: VaeTrunk, pixels: Tensor) -> Iterator[Tensor]:
    """The encoder's features level by level, each before its downsampling."""
    h = trunk.encoder_stem(pixels)
    for level in trunk.encoder_levels:
        for block in level.blocks:
            h = block(h)
        yield h
        if level.resample is not None:
            h = level.resample(h)


def encoder_features(trunk: VaeTrunk, pixels: Tensor, levels: Collection[int]) -> Features:
    """What `aware_decode` needs of the LQ image; the encoder runs no further than that.

    Args:
        trunk: The VAE.
        pixels: (B, 3, H, W) in [-1, 1]; H and W multiples of 8.
        levels: VAE levels to keep.
    """
    encoded = enumerate(islice(_encoder_levels(trunk, pixels), 1 + max(levels, default=PIXELS)))
    return {PIXELS: pixels} | {level: h for level, h in encoded if level in levels}


def encode_with_features(
    trunk: VaeTrunk, pixels: Tensor, levels: Collection[int]
) -> tuple[Tensor, Features]:
    """Encode, and keep what `encoder_features` gives on the way.

    Returns:
        Moments (B, 2 * latent_channels, H/8, W/8), of which the first `latent_channels` are the
        mean (TAESD: the latent itself), and the features.
    """
    encoded = dict(enumerate(_encoder_levels(trunk, pixels)))
    h = encoded[len(encoded) - 1]
    for step in trunk.encoder_mid:
        h = step(h)
    moments = trunk.encoder_head(h)
    return moments, {PIXELS: pixels} | {level: encoded[level] for level in levels}


def aware_decode(
    trunk: VaeTrunk,
    extension: FusionBlocks | DetailPath | None,
    raw_latent: Tensor,
    features: Features,
    condition: Condition,
    fidelity: float = 1.0,
) -> Tensor:
    """Decode a latent with the LQ image's own detail: h + w * fuse(encoded, h, P_D) at each level.

    Args:
        trunk: The VAE whose decoder is used (stock or finetuned).
        extension: What a file adds to the decoder; None decodes plainly.
        raw_latent: Unscaled latent, (B, latent_channels, H/8, W/8).
        features: From `encoder_features` on the LQ image, at the extension's levels; PIXELS may
            have more digits than the networks compute in.
        condition: From the extension's `condition`: P_D of the photos, or of each place of them.
        fidelity: w in [0, 1]; 0 is the plain decode, bit for bit.

    Returns:
        Pixels (B, 3, H, W) around [-1, 1], not clamped.

    Source: Diff-Restorer, degradation-aware decoder; w as in StableSR (arXiv 2305.07015, eq. 3).
    """
    fusion = extension if fidelity > 0 else None
    if isinstance(fusion, DetailPath):
        return _decode_beside(trunk, fusion, raw_latent, features, condition, fidelity)

    def fused(level: int, h: Tensor) -> Tensor:
        if fusion is None or level not in fusion.levels:
            return h
        return h + fidelity * fusion.fuse(level, features[level], h, condition)

    levels = decoder_levels(trunk, raw_latent, fused)
    ((_, h),) = deque(levels, maxlen=1)  # the last, and no other is kept
    image = trunk.decoder_head(h)
    if fusion is not None and fusion.config.pixels is not None:
        photo = features[PIXELS].to(image.dtype)
        image = image + fidelity * fusion.fuse_pixels(photo, image, h, condition)
    return image


def _decode_beside(
    trunk: VaeTrunk,
    detail: DetailPath,
    raw_latent: Tensor,
    features: Features,
    condition: Condition,
    fidelity: float,
) -> Tensor:
    """The photo and what the detail path adds to it, mixed with the plain decode."""
    photo, decoded, h = features[PIXELS].float(), {}, raw_latent
    for level, h in decoder_levels(trunk, raw_latent):
        decoded[level] = h
        if fidelity == 1 and level == min(detail.decoder_levels):
            break
    added = detail(photo, features, decoded, condition).float()
    if fidelity == 1:
        return photo + added
    return torch.lerp(trunk.decoder_head(h).float(), photo + added, fidelity)


def decoder_levels(
    trunk: VaeTrunk,
    raw_latent: Tensor,
    change: Callable[[int, Tensor], Tensor] = lambda _, h: h,
) -> Iterator[tuple[int, Tensor]]:
    """Levels from small to large with the decoder's features there, before its upsampling.

    `change` has the last word on the features of a level.
    """
    h = trunk.decoder_stem(raw_latent)
    for step in trunk.decoder_mid:
        h = step(h)
    for index in reversed(range(len(trunk.decoder_levels))):
        level = trunk.decoder_levels[index]
        for block in level.blocks:
            h = block(h)
        h = change(index, h)
        yield index, h
        if level.resample is not None:
            h = level.resample(h)
