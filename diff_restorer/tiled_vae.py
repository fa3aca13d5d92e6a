"""The degradation-aware decode in tiles, with the result of the whole picture."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from .decoder import FusionBlocks, LocalPooled
from .tiles import UNIT, Cut, Function, Map, Plan, Stage
from .vae_trunk import Attention, Level, Step, VaeTrunk

_QUERIES = 1024
"""Rows of attention that are computed at once."""


def plan_features(trunk: VaeTrunk, photo: Tensor, levels: Collection[int], cut: Cut) -> Plan:
    """`encoder_features` in tiles: the n-th map that the plan yields is that of level n.

    Args:
        trunk: The VAE.
        photo: (1, 3, H, W) in [-1, 1], H and W multiples of 8; in any memory.
        levels: VAE levels that are needed; the encoder runs no further.
        cut: The tiles.
    """
    return Plan(_encoder(trunk)[: 1 + max(levels)], Map(photo, UNIT), cut)


def plan_encode(trunk: VaeTrunk, photo: Tensor, cut: Cut) -> Plan:
    """`encode_with_features` in tiles: like `plan_features`, and the last map is the moments."""
    last = [*map(_mid, trunk.encoder_mid), Stage(trunk.encoder_head)]
    return Plan([*_encoder(trunk), last], Map(photo, UNIT), cut)


def _encoder(trunk: VaeTrunk) -> list[list[Stage]]:
    """The encoder's levels."""
    found: list[list[Stage]] = []
    first: Step | None = trunk.encoder_stem
    for level in trunk.encoder_levels:
        found.append(_blocks(first, level))
        first = level.resample
    return found


def plan_decode(
    trunk: VaeTrunk,
    fusion: FusionBlocks | None,
    latent: Tensor,
    photo: Tensor,
    features: Mapping[int, Map],
    pooled: Tensor | LocalPooled,
    fidelity: float,
    cut: Cut,
) -> Plan:
    """`aware_decode` in tiles: the last map that the plan yields is the image.

    Args:
        trunk: The VAE whose decoder is used (stock or finetuned).
        fusion: Fusion blocks; None decodes plainly.
        latent: Unscaled, (1, latent_channels, H/8, W/8).
        photo: LQ photo, (1, 3, H, W) in [-1, 1]; in any memory.
        features: The maps of `plan_features` at the fusion blocks' levels.
        pooled: Pooled P_D of the photo, (1, context_width), or of each place of it.
        fidelity: w in [0, 1], as in `aware_decode`.
        cut: The tiles.
    """
    fused = fusion if fidelity > 0 else None
    local = ()
    if isinstance(pooled, LocalPooled):
        local = tuple(Map(each, 1) for each in pooled.weights)
    levels: list[list[Stage]] = []
    first: Step | None = None
    for index in reversed(range(len(trunk.decoder_levels))):
        level = trunk.decoder_levels[index]
        stages = _blocks(first, level)
        if first is None:
            stages = [Stage(trunk.decoder_stem), *map(_mid, trunk.decoder_mid), *stages]
        if fused is not None and index in fused.levels:
            stages.append(Stage(_fuse(fused, index, pooled, fidelity), (features[index], *local)))
        if index == 0:
            stages.append(_head(trunk, fused, photo, pooled, fidelity, local))
        levels.append(stages)
        first = level.resample
    return Plan(levels, Map(latent, 1), cut)


def _mid(step: Step | Attention) -> Stage:
    """A block; or attention, where the pixels of a tile attend to all others."""
    if not isinstance(step, Attention):
        return Stage(step)

    def keys_and_values(value: Tensor) -> Tensor:
        normed = step.norm(value)
        return torch.cat([step.key(normed), step.value(normed)], dim=1)

    def attend(value: Tensor, others: Tensor) -> Tensor:
        keys, values = others.chunk(2, dim=1)
        # Contiguous rows, else torch builds the whole matrix; in parts, where it does so anyway.
        query, key, value_rows = (
            each.flatten(2).transpose(1, 2)[:, None].contiguous()
            for each in (step.query(step.norm(value)), keys, values)
        )
        parts = [
            F.scaled_dot_product_attention(query[:, :, start : start + _QUERIES], key, value_rows)
            for start in range(0, query.shape[2], _QUERIES)
        ]
        found = torch.cat(parts, dim=2)
        return value + step.out(found[:, 0].transpose(1, 2).reshape(value.shape))

    return Stage(attend, summary=keys_and_values)


def _blocks(first: Step | None, level: Level) -> list[Stage]:
    """The blocks of a level, with the change of size before them."""

    def started(value: Tensor) -> Tensor:
        return level.blocks[0](value if first is None else first(value))

    return [Stage(started), *map(Stage, level.blocks[1:])]


def _fuse(
    fusion: FusionBlocks, level: int, pooled: Tensor | LocalPooled, fidelity: float
) -> Function:
    def fuse(value: Tensor, encoded: Tensor, *weights: Tensor) -> Tensor:
        return value + fidelity * fusion.fuse(level, encoded, value, _here(pooled, weights))

    return fuse


def _head(
    trunk: VaeTrunk,
    fusion: FusionBlocks | None,
    photo: Tensor,
    pooled: Tensor | LocalPooled,
    fidelity: float,
    local: tuple[Map, ...],
) -> Stage:
    if fusion is None or fusion.config.pixels is None:
        return Stage(trunk.decoder_head)

    def head(value: Tensor, pixels: Tensor, *weights: Tensor) -> Tensor:
        image, here = trunk.decoder_head(value), _here(pooled, weights)
        return image + fidelity * fusion.fuse_pixels(pixels, image, value, here)

    return Stage(head, (Map(photo, UNIT), *local))


def _here(pooled: Tensor | LocalPooled, weights: tuple[Tensor, ...]) -> Tensor | LocalPooled:
    """Pooled P_D in the part of the photo that these weights are cut from."""
    return pooled if isinstance(pooled, Tensor) else pooled.within(*weights)
