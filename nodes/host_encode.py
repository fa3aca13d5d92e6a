"""Encoding photos of any size by the host's VAE, with the features that the decode fuses."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..diff_restorer import UnsupportedVaeError, VaeTrunk, encode_with_features
from ..diff_restorer.decoder import Features
from ..diff_restorer.maps import UNIT
from ..diff_restorer.tiled_vae import plan_encode
from ..diff_restorer.tiles import HiddenNormError
from .host import at_once, check_interrupt
from .host_models import DiffRestorer
from .host_vae import AUTO_TILE, Report, check_vae, cut, in_smaller_tiles, load, try_whole
from .images import digest, pad_to_multiple

MOST_FEATURES = 2**30
"""Bytes of encoder features that all LATENTs of a file may carry together, such as those of a
folder of photos; more are made again by the decode."""


@dataclass(frozen=True, eq=False)
class PhotoFeatures:
    """What the VAE's encoder saw in photos; travels with their latent to the decode."""

    KEY = "diff_restorer_features"
    """Of a LATENT, which samplers hand on with all its entries."""

    vae: weakref.ref[Any]
    photos: bytes
    """Digest of the padded photos."""
    by_level: Features

    def get_ram_usage(self) -> int:
        """In bytes; newer hosts clear their cache by it."""
        return sum(features.nbytes for features in self.by_level.values())

    def fits(self, vae: Any, padded: Tensor, levels: Collection[int]) -> bool:
        """Whether they are those of this VAE and these photos, at all these levels."""
        has_all = set(levels) <= set(self.by_level)
        return self.vae() is vae and has_all and self.photos == digest(padded)


def encode_photo(
    vae: Any, rgb: Tensor, restorer: DiffRestorer
) -> tuple[Tensor, Tensor, PhotoFeatures | None]:
    """Pad photos and encode them, once for control and decode.

    Args:
        vae: The host's VAE.
        rgb: (B, H, W, 3) in [0, 1].
        restorer: Whose control module and fusion blocks will read what is encoded.

    Returns:
        The padded photos (B, H', W', 3); their unscaled latent (B, C, H'/8, W'/8), the mean of the
        VAE's distribution; and the encoder's features for Aware VAE Decode, None where they are
        not needed or would take too much memory.

    Raises:
        ValueError: The VAE is of another kind.
    """
    check_vae(vae, restorer)
    padded = pad_to_multiple(rgb, UNIT)
    levels = restorer.fusion.model.levels if restorer.fusion is not None else ()
    try:
        trunk = VaeTrunk.of(vae.first_stage_model)
    except UnsupportedVaeError:  # the decode will say so, where one is asked for
        levels = ()
    if not levels:
        return padded, vae.encode(padded), None
    carried = sum(features.get_ram_usage() for features in restorer.carried)
    if carried + _features_bytes(trunk, levels, padded, vae.vae_dtype) > MOST_FEATURES:
        levels = ()
    latent, by_level = _encode(vae, trunk, padded, levels)
    if not by_level:
        return padded, latent, None
    features = PhotoFeatures(weakref.ref(vae), digest(padded), by_level)
    restorer.carried.add(features)
    return padded, latent, features


def _features_bytes(
    trunk: VaeTrunk, levels: Collection[int], padded: Tensor, dtype: torch.dtype
) -> int:
    numbers = sum(trunk.channels[level] / 4**level for level in levels)
    return int(numbers * padded[..., 0].numel() * dtype.itemsize)


def _encode(
    vae: Any, trunk: VaeTrunk, padded: Tensor, levels: Collection[int]
) -> tuple[Tensor, Features]:
    """The host's own encode, step by step, with the features on the way; in tiles if need be."""
    pixels = padded.movedim(-1, 1)
    needed = vae.memory_used_encode((1, *pixels.shape[1:]), vae.vae_dtype)
    in_a_tile = vae.memory_used_encode((1, 3, AUTO_TILE, AUTO_TILE), vae.vae_dtype)
    load(vae, [], needed, in_a_tile)
    whole = try_whole(
        at_once(needed, vae.device, vae.patcher),
        lambda count: _encode_whole(vae, trunk, pixels, levels, count),
        "Degradation Control",
    )
    if whole is not None:
        return whole
    try:
        return in_smaller_tiles(
            AUTO_TILE,
            lambda side: _encode_tiled(vae, trunk, pixels, levels, side),
            "Degradation Control: encoded in exact",
        )
    except HiddenNormError as error:
        logging.warning("Degradation Control: %s. Using the host's tiles.", error)
        return vae.encode_tiled(padded), {}


def _encode_whole(
    vae: Any, trunk: VaeTrunk, pixels: Tensor, levels: Collection[int], count: int
) -> tuple[Tensor, Features]:
    dtype, device, home = vae.vae_dtype, vae.device, vae.output_device
    latents, parts = [], []
    for some in pixels.split(count):
        check_interrupt()
        moments, features = encode_with_features(
            trunk, vae.process_input(some).to(dtype).to(device), levels
        )
        latents.append(moments[:, : trunk.latent_channels].to(home).float())
        parts.append({level: features[level].to(home) for level in levels})
    return torch.cat(latents), _joined(parts)


def _joined(parts: Sequence[Features]) -> Features:
    """Features of batches as those of one; a single one is not copied."""
    if len(parts) == 1:
        return parts[0]
    return {level: torch.cat([part[level] for part in parts]) for level in parts[0]}


def _encode_tiled(
    vae: Any, trunk: VaeTrunk, pixels: Tensor, levels: Collection[int], tile: int
) -> tuple[Tensor, Features]:
    """Tiles that give the same as the whole picture."""
    pixels = vae.process_input(pixels)
    report, home = Report(len(pixels)), vae.output_device
    latents, parts = [], []
    for index in range(len(pixels)):
        tiles = cut(vae, trunk, pixels, tile, report)
        plan = plan_encode(trunk, pixels[index : index + 1], tiles)
        report.start(plan, index, 0.0, 1.0)
        kept: Features = {}
        for level, encoded in enumerate(plan.run()):
            if level in levels:
                kept[level] = encoded.whole().to(home)
        parts.append(kept)
        latents.append(encoded.whole()[:, : trunk.latent_channels].to(home).float())
    report.finish()
    return torch.cat(latents), _joined(parts)
