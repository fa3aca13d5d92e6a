"""The degradation-aware decode in tiles, with the result of the whole picture."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from .decoder import FusionBlocks
from .tiles import UNIT, Cut, Function, Map, Plan, Stage
from .vae_trunk import Level, Step, VaeTrunk


def plan_features(trunk: VaeTrunk, photo: Tensor, levels: Collection[int], cut: Cut) -> Plan:
    """`encoder_features` in tiles: the n-th map that the plan yields is that of level n.

    Args:
        trunk: The VAE.
        photo: (1, 3, H, W) in [-1, 1], H and W multiples of 8; in any memory.
        levels: VAE levels that are needed; the encoder runs no further.
        cut: The tiles.
    """
    found: list[list[Stage]] = []
    first: Step | None = trunk.encoder_stem
    for level in trunk.encoder_levels[: 1 + max(levels)]:
        found.append(_blocks(first, level))
        first = level.resample
    return Plan(found, Map(photo, UNIT), cut)


def plan_decode(
    trunk: VaeTrunk,
    fusion: FusionBlocks | None,
    stem: Tensor,
    photo: Tensor,
    features: Mapping[int, Map],
    pooled: Tensor,
    fidelity: float,
    cut: Cut,
) -> Plan:
    """`aware_decode` in tiles: the last map that the plan yields is the image.

    Args:
        trunk: The VAE whose decoder is used (stock or finetuned).
        fusion: Fusion blocks; None decodes plainly.
        stem: The trunk's `decoder_stem` of the latent, (1, C, H/8, W/8): attention joins all of it.
        photo: LQ photo, (1, 3, H, W) in [-1, 1]; in any memory.
        features: The maps of `plan_features` at the fusion blocks' levels.
        pooled: Pooled P_D, (1, context_width).
        fidelity: w in [0, 1], as in `aware_decode`.
        cut: The tiles.
    """
    fused = fusion if fidelity > 0 else None
    levels: list[list[Stage]] = []
    first: Step | None = None
    for index in reversed(range(len(trunk.decoder_levels))):
        level = trunk.decoder_levels[index]
        stages = _blocks(first, level)
        if fused is not None and index in fused.levels:
            stages.append(Stage(_fuse(fused, index, pooled, fidelity), (features[index],)))
        if index == 0:
            stages.append(_head(trunk, fused, photo, pooled, fidelity))
        levels.append(stages)
        first = level.resample
    return Plan(levels, Map(stem, 1), cut)


def _blocks(first: Step | None, level: Level) -> list[Stage]:
    """The blocks of a level, with the change of size before them."""

    def started(value: Tensor) -> Tensor:
        return level.blocks[0](value if first is None else first(value))

    return [Stage(started), *map(Stage, level.blocks[1:])]


def _fuse(fusion: FusionBlocks, level: int, pooled: Tensor, fidelity: float) -> Function:
    def fuse(value: Tensor, encoded: Tensor) -> Tensor:
        return value + fidelity * fusion.fuse(level, encoded, value, pooled)

    return fuse


def _head(
    trunk: VaeTrunk, fusion: FusionBlocks | None, photo: Tensor, pooled: Tensor, fidelity: float
) -> Stage:
    if fusion is None or fusion.config.pixels is None:
        return Stage(trunk.decoder_head)

    def head(value: Tensor, pixels: Tensor) -> Tensor:
        image = trunk.decoder_head(value)
        return image + fidelity * fusion.fuse_pixels(pixels, image, value, pooled)

    return Stage(head, (Map(photo, UNIT),))
