"""The degradation-aware decode in tiles, with the result of the whole picture."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .detail import DetailPath
from .fusion import FusionBlocks
from .local import Condition, LocalPooled
from .maps import UNIT, Cut, Map
from .tiles import Function, Output, Plan, Stage
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
    levels: list[list[Stage]] = []
    first: Step | None = trunk.encoder_stem
    for level in trunk.encoder_levels:
        levels.append(_blocks(first, level))
        first = level.resample
    return levels


def plan_decode(
    trunk: VaeTrunk,
    extension: FusionBlocks | DetailPath | None,
    latent: Tensor,
    photo: Tensor,
    features: Mapping[int, Map],
    condition: Condition,
    fidelity: float,
    cut: Cut,
) -> Plan:
    """`aware_decode` in tiles: the last map that the plan yields is the image.

    With a detail path it is the image without `fidelity` times the photo, which the caller has with
    all its digits.

    Args:
        trunk: The VAE whose decoder is used (stock or finetuned).
        extension: What a file adds to the decoder; None decodes plainly.
        latent: Unscaled, (1, latent_channels, H/8, W/8).
        photo: LQ photo, (1, 3, H, W) in [-1, 1]; in any memory.
        features: The maps of `plan_features` at the extension's levels.
        condition: From the extension's `condition`, of one photo.
        fidelity: w in [0, 1], as in `aware_decode`.
        cut: The tiles.
    """
    local = ()
    if isinstance(condition, LocalPooled):
        local = tuple(Map(weight, 1) for weight in condition.weights)
    pixels = Map(photo, UNIT)
    fusion = extension if fidelity > 0 else None
    if isinstance(fusion, DetailPath):
        levels = _beside(trunk, fusion, pixels, features, condition, fidelity, local)
    else:
        levels = _decoder(trunk)
        for stages, level in zip(levels, reversed(range(len(levels))), strict=True):
            if fusion is not None and level in fusion.levels:
                fuse = _fuse(fusion, level, condition, fidelity)
                stages.append(Stage(fuse, (features[level], *local)))
        levels[-1].append(_head(trunk, fusion, pixels, condition, fidelity, local))
    return Plan(levels, Map(latent, 1), cut)


def _decoder(trunk: VaeTrunk) -> list[list[Stage]]:
    """The decoder's levels, the smallest first, without its head."""
    levels: list[list[Stage]] = []
    first: Step | None = None
    for level in reversed(trunk.decoder_levels):
        stages = _blocks(first, level)
        if first is None:
            stages = [Stage(trunk.decoder_stem), *map(_mid, trunk.decoder_mid), *stages]
        levels.append(stages)
        first = level.resample
    return levels


def _beside(
    trunk: VaeTrunk,
    detail: DetailPath,
    photo: Map,
    features: Mapping[int, Map],
    condition: Condition,
    fidelity: float,
    local: tuple[Map, ...],
) -> list[list[Stage]]:
    """The decoder, as far as it is needed, and then the levels of the detail path."""

    def stage(function: Function, *others: Map | Output) -> list[Stage]:
        count = len(others)

        def run(value: Tensor, *crops: Tensor) -> Tensor:
            return function(value, *crops[:count], _here(condition, crops[count:]))

        return [Stage(run, (*others, *local))]

    decoder = _decoder(trunk)
    number = {level: place for place, level in enumerate(reversed(range(len(decoder))))}
    if fidelity == 1:
        decoder = decoder[: number[min(detail.decoder_levels)] + 1]
    else:
        decoder[-1].append(Stage(trunk.decoder_head))
    first = len(decoder)
    d2, d3 = (Output(number[level]) for level in detail.decoder_levels)
    smooth, tone, half, quarter, eighth, finer = (Output(first + place) for place in range(6))

    def shrunk(_: Tensor, pixels: Tensor, here: Condition) -> Tensor:
        return detail.shrunk(pixels, here)

    def at_half(tone: Tensor, pixels: Tensor, smooth: Tensor, *rest: Any) -> Tensor:
        return detail.at_half(pixels, smooth, tone, *rest)

    def back_at_quarter(_: Tensor, *rest: Any) -> Tensor:
        return detail.back_at_quarter(*rest)

    def mixed(restored: Tensor, image: Tensor) -> Tensor:
        return torch.lerp(image, restored, fidelity)

    levels = [
        *decoder,
        stage(shrunk, photo),
        stage(detail.first_tone, d3),
        stage(at_half, photo, smooth, features[1]),
        stage(detail.at_quarter, features[2], d2),
        stage(detail.at_eighth, features[3], d3),
        stage(detail.finer_tone, tone),
        stage(back_at_quarter, eighth, quarter),
        stage(detail.back_at_half, half, photo, smooth, finer),
    ]
    if fidelity < 1:
        levels.append([Stage(mixed, (Output(first - 1),))])
    return levels


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
            tokens.flatten(2).transpose(1, 2)[:, None].contiguous()
            for tokens in (step.query(step.norm(value)), keys, values)
        )
        parts = [
            F.scaled_dot_product_attention(query[:, :, start : start + _QUERIES], key, value_rows)
            for start in range(0, query.shape[2], _QUERIES)
        ]
        attended = torch.cat(parts, dim=2)
        return value + step.out(attended[:, 0].transpose(1, 2).reshape(value.shape))

    return Stage(attend, summary=keys_and_values)


def _blocks(first: Step | None, level: Level) -> list[Stage]:
    """The blocks of a level, with the change of size before them."""

    def started(value: Tensor) -> Tensor:
        return level.blocks[0](value if first is None else first(value))

    return [Stage(started), *map(Stage, level.blocks[1:])]


def _fuse(fusion: FusionBlocks, level: int, condition: Condition, fidelity: float) -> Function:
    def fuse(value: Tensor, encoded: Tensor, *weights: Tensor) -> Tensor:
        return value + fidelity * fusion.fuse(level, encoded, value, _here(condition, weights))

    return fuse


def _head(
    trunk: VaeTrunk,
    fusion: FusionBlocks | None,
    photo: Map,
    condition: Condition,
    fidelity: float,
    local: tuple[Map, ...],
) -> Stage:
    if fusion is None or fusion.config.pixels is None:
        return Stage(trunk.decoder_head)

    def head(value: Tensor, pixels: Tensor, *weights: Tensor) -> Tensor:
        image, here = trunk.decoder_head(value), _here(condition, weights)
        return image + fidelity * fusion.fuse_pixels(pixels, image, value, here)

    return Stage(head, (photo, *local))


def _here(condition: Condition, weights: tuple[Tensor, ...]) -> Condition:
    """The condition in the part of the photo that these weights are cut from."""
    return condition if isinstance(condition, Tensor) else condition.within(*weights)
