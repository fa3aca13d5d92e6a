"""Fusion blocks: encoder features of the LQ image into the VAE's decoder, modulated by P_D."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .control import zero_init
from .local import Condition, film


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
    pixels: tuple[int, int] | None = None
    """(channels of the decoder at full size, width) of the block that fuses the photo's pixels."""

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> FusionConfig:
        """Read the sizes from tensor shapes.

        Args:
            state: Weights without the `decoder.fusion.` prefix.

        Raises:
            KeyError: A tensor that carries a size is missing; the message is its key.
        """
        names = {key.split(".")[0] for key in state}
        levels = sorted(int(name) for name in names if name != "pixels")
        first = levels[0] if levels else "pixels"
        depth = len([key for key in state if key.startswith(f"{first}.dense.") and "bias" in key])
        return cls(
            channels=tuple((level, state[f"{level}.out.weight"].shape[0]) for level in levels),
            growth=state[f"{first}.dense.0.weight"].shape[0],
            depth=depth,
            context_width=state[f"{first}.film.weight"].shape[1],
            pixels=_pixel_sizes(state["pixels.merge.weight"]) if "pixels" in names else None,
        )


def _pixel_sizes(merge: Tensor) -> tuple[int, int]:
    width, channels_in = merge.shape[:2]
    return channels_in - 6, width


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
        channels_in: int,
        width: int,
        channels_out: int,
        config: FusionConfig,
        ops: Any = nn,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        growth, depth = config.growth, config.depth

        def conv(channels_in: int, channels_out: int) -> nn.Module:
            return ops.Conv2d(channels_in, channels_out, 3, padding=1, device=device, dtype=dtype)

        self.merge = conv(channels_in, width)
        self.dense = nn.ModuleList(conv(width + i * growth, growth) for i in range(depth))
        self.squeeze = conv(width + depth * growth, width)
        self.film = zero_init(
            ops.Linear(config.context_width, 2 * width, device=device, dtype=dtype)
        )
        self.out = zero_init(conv(width, channels_out))

    def forward(self, inputs: Tensor, pooled: Condition) -> Tensor:
        """What to add to the decoder, (B, channels_out, h, w).

        Args:
            inputs: Features of the LQ image and of the decoder, (B, channels_in, h, w).
            pooled: Pooled P_D of the photos, (B, context_width), or of each place of them.
        """
        h = F.leaky_relu(self.merge(inputs), 0.2)
        grown = [h]
        for conv in self.dense:
            grown.append(F.leaky_relu(conv(torch.cat(grown, dim=1)), 0.2))
        h = h + self.squeeze(torch.cat(grown, dim=1))
        gamma, beta = film(self.film, pooled, h).chunk(2, dim=1)
        return self.out(F.leaky_relu((1 + gamma) * h + beta, 0.2))


class FusionBlocks(nn.ModuleDict):
    """One `FusionBlock` per VAE level, under the level's number, and one for the pixels.

    The block at level l adds to the decoder's features what it finds in the encoder's. The block
    `pixels` works on the decoded image: from the LQ photo, the image and the decoder's last
    features it computes a gate g and a residual r per pixel and channel; image + w (g (LQ - image)
    + r) lets undamaged detail of the photo through unchanged. The latter is our addition: a small
    VAE loses more than features at half size can bring back, and group norm before its last conv
    takes away the overall brightness, which the features before it still have.
    """

    def __init__(
        self,
        config: FusionConfig,
        ops: Any = nn,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        def block(channels_in: int, width: int, channels_out: int) -> FusionBlock:
            return FusionBlock(channels_in, width, channels_out, config, ops, device, dtype)

        blocks = {
            str(level): block(2 * channels, channels, channels)
            for level, channels in config.channels
        }
        if config.pixels is not None:
            channels, width = config.pixels
            blocks["pixels"] = block(channels + 6, width, 6)
        super().__init__(blocks)
        self.config = config

    @property
    def levels(self) -> tuple[int, ...]:
        """VAE levels that are fused, ascending."""
        return tuple(level for level, _ in self.config.channels)

    def condition(self, pooled: Condition, statistics: Tensor) -> Condition:
        """What modulates the blocks: P_D alone, whatever the tone of the photos."""
        return pooled

    def fuse(self, level: int, encoded: Tensor, decoded: Tensor, pooled: Condition) -> Tensor:
        """The residual for the decoder's features (B, C, h, w) of `level`."""
        return cast(Tensor, self[str(level)](torch.cat([encoded, decoded], dim=1), pooled))

    def fuse_pixels(
        self, photo: Tensor, image: Tensor, decoded: Tensor, pooled: Condition
    ) -> Tensor:
        """The residual for the decoded image, (B, 3, H, W), in fp32.

        Args:
            photo: LQ photo, (B, 3, H, W) in [-1, 1].
            image: Decoded image, likewise.
            decoded: The decoder's last features, (B, C, H, W).
            pooled: Pooled P_D, as in `FusionBlock.forward`.
        """
        inputs = torch.cat([photo, image, decoded], dim=1)
        gate, residual = cast(Tensor, self["pixels"](inputs, pooled)).float().chunk(2, dim=1)
        return gate * (photo.float() - image.float()) + residual
