"""Degradation-aware decoder: the VAE decoder with encoder features of the LQ image fused in."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .control import zero_init
from .vae_trunk import VaeTrunk

PIXELS = -1
"""The photo itself, beside the VAE's levels 0, 1, ..."""
Features = dict[int, Tensor]
"""The LQ image by level: (B, C, H / 2**level, W / 2**level) of the encoder, PIXELS (B, 3, H, W)."""


@dataclass(frozen=True, eq=False)
class LocalPooled:
    """Pooled P_D of each place: that of tiles, blended with weights that sum to 1.

    Tiles and weights instead of the blend itself, which would have `context_width` numbers for each
    place of a large photo.
    """

    tiles: Tensor
    """(B, context_width, R, K): a grid of R x K tiles."""
    rows: Tensor
    """(R, h): how much the tiles of a row count at each height; h in latent pixels."""
    columns: Tensor
    """(K, w), likewise."""

    def blend(self, values: Tensor) -> Tensor:
        """(B, C, R, K), a value for each tile, to (B, C, h, w)."""
        rows, columns = self.rows.to(values), self.columns.to(values)
        return torch.einsum("bcrk,rh,kw->bchw", values, rows, columns)

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        """Rows (1, R, h, w) and columns (1, K, h, w), in no more memory than they have."""
        height, width = self.rows.shape[1], self.columns.shape[1]
        rows = self.rows[None, :, :, None].expand(-1, -1, -1, width)
        return rows, self.columns[None, :, None].expand(-1, -1, height, -1)

    def to(self, like: Tensor) -> LocalPooled:
        """On the device and in the dtype of another tensor."""
        return replace(self, tiles=self.tiles.to(like))

    def __getitem__(self, photos: slice) -> LocalPooled:
        """Of some of the photos."""
        return replace(self, tiles=self.tiles[photos])

    def within(self, rows: Tensor, columns: Tensor) -> LocalPooled:
        """The same in a part of the photo, from that part of both `weights`."""
        return replace(self, rows=rows[0, :, :, 0], columns=columns[0, :, 0])


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

    def forward(self, inputs: Tensor, pooled: Tensor | LocalPooled) -> Tensor:
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
        if isinstance(pooled, LocalPooled):
            film = pooled.blend(self.film(pooled.tiles.movedim(1, -1)).movedim(-1, 1))
            film = F.interpolate(film, h.shape[-2:])
        else:
            film = self.film(pooled)[:, :, None, None]
        gamma, beta = film.chunk(2, dim=1)
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

    def fuse(
        self, level: int, encoded: Tensor, decoded: Tensor, pooled: Tensor | LocalPooled
    ) -> Tensor:
        """The residual for the decoder's features (B, C, h, w) of `level`."""
        return cast(Tensor, self[str(level)](torch.cat([encoded, decoded], dim=1), pooled))

    def fuse_pixels(
        self, photo: Tensor, image: Tensor, decoded: Tensor, pooled: Tensor | LocalPooled
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
    found = enumerate(islice(_encoder_levels(trunk, pixels), 1 + max(levels, default=PIXELS)))
    return {PIXELS: pixels} | {level: h for level, h in found if level in levels}


def encode_with_features(
    trunk: VaeTrunk, pixels: Tensor, levels: Collection[int]
) -> tuple[Tensor, Features]:
    """Encode, and keep what `encoder_features` gives on the way.

    Returns:
        Moments (B, 2 * latent_channels, H/8, W/8), of which the first `latent_channels` are the
        mean (TAESD: the latent itself), and the features.
    """
    found = dict(enumerate(_encoder_levels(trunk, pixels)))
    h = found[len(found) - 1]
    for step in trunk.encoder_mid:
        h = step(h)
    moments = trunk.encoder_head(h)
    return moments, {PIXELS: pixels} | {level: found[level] for level in levels}


def aware_decode(
    trunk: VaeTrunk,
    fusion: FusionBlocks | None,
    raw_latent: Tensor,
    features: Features,
    pooled: Tensor | LocalPooled,
    fidelity: float = 1.0,
) -> Tensor:
    """Decode a latent with the LQ image's own detail.

    Args:
        trunk: The VAE whose decoder is used (stock or finetuned).
        fusion: Fusion blocks; None decodes plainly.
        raw_latent: Unscaled latent, (B, latent_channels, H/8, W/8).
        features: From `encoder_features` on the LQ image, at the fusion blocks' levels.
        pooled: Pooled P_D of the photos, (B, context_width), or of each place of them.
        fidelity: w in [0, 1]; 0 is the plain decode, bit for bit.

    Returns:
        Pixels (B, 3, H, W) around [-1, 1], not clamped.

    Source: Diff-Restorer, degradation-aware decoder; w as in StableSR (arXiv 2305.07015, eq. 3).
    """
    fused = fusion.levels if fusion is not None and fidelity > 0 else ()
    h = trunk.decoder_stem(raw_latent)
    for step in trunk.decoder_mid:
        h = step(h)
    for index in reversed(range(len(trunk.decoder_levels))):
        level = trunk.decoder_levels[index]
        for block in level.blocks:
            h = block(h)
        if fusion is not None and index in fused:
            h = h + fidelity * fusion.fuse(index, features[index], h, pooled)
        if level.resample is not None:
            h = level.resample(h)
    image = trunk.decoder_head(h)
    if fusion is not None and fidelity > 0 and fusion.config.pixels is not None:
        image = image + fidelity * fusion.fuse_pixels(features[PIXELS], image, h, pooled)
    return image
