"""diffusers' networks at toy width, which training has at full size only."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKL


def autoencoder_kl(channels: tuple[int, ...] = (32, 32, 64, 64), layers: int = 1) -> Any:
    """An AutoencoderKL with 8x8 compression and random weights.

    `Any`: its annotations are too loose to be checked against.
    """
    levels = len(channels)
    arguments: dict[str, Any] = {
        "block_out_channels": channels,
        "layers_per_block": layers,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    return AutoencoderKL(**arguments).eval()
