"""Detail path: the degradation-aware decoder with its compute at 1/2, 1/4 and 1/8 size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .control import zero_init
from .local import Condition, LocalPooled, film
from .photo_statistics import NOISE_LEVELS, STATISTICS
from .shrinkage import THRESHOLDS, shrink
from .tone import guided_tone, no_change, stretched, with_tone

HAZE = "haze"
SLOW = 0.1
"""Factor on what layers find that start with knowledge, and do not have it to learn: AdamW moves
all weights alike, which would undo that in the first steps."""


@dataclass(frozen=True)
class DetailConfig:
    """Sizes of a detail path, all of which can be read back from its weights."""

    widths: tuple[int, int, int] = (64, 112, 192)
    """Channels at 1/2, 1/4 and 1/8 size."""
    depths: tuple[int, int, int, int, int] = (2, 3, 6, 3, 2)
    """Blocks of the five groups: 1/2, 1/4, 1/8, 1/4, 1/2."""
    vae_channels: tuple[int, int, int] = (64, 64, 64)
    """Channels of the VAE's encoder and decoder at levels 1, 2 and 3."""
    context_width: int = 192
    """Width of pooled P_D."""
    kinds: int = 9
    """Heads: what they find is added up by how sure P_D is of the kind of damage of each."""

    @property
    def channels(self) -> tuple[tuple[int, int], ...]:
        """(level, channels) pairs of the VAE."""
        return tuple(zip(DetailPath.levels, self.vae_channels, strict=True))

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> DetailConfig:
        """Read the sizes from tensor shapes.

        Args:
            state: Weights without the `decoder.detail.` prefix.

        Raises:
            KeyError: A tensor that carries a size is missing; the message is its key.
        """

        def depth(group: int) -> int:
            shape = state[f"groups.{group}.squeeze.weight"].shape
            return shape[1] // shape[0]

        merged = [state[f"merge.{place}.weight"].shape for place in range(3)]
        return cls(
            widths=(merged[0][0], merged[1][0], merged[2][0]),
            depths=(depth(0), depth(1), depth(2), depth(3), depth(4)),
            vae_channels=(merged[0][1], merged[1][1] // 2, merged[2][1] // 2),
            context_width=state["norm.weight"].shape[0],
            kinds=state["kind.weight"].shape[0],
        )


class _Layers:
    """Makes the layers of a network with the host's casting operations, or torch's own."""

    def __init__(self, ops: Any, device: torch.device | None, dtype: torch.dtype | None) -> None:
        self.ops, self.place = ops, {"device": device, "dtype": dtype}

    def conv(self, channels_in: int, channels_out: int, size: int = 3) -> Any:
        """Convolution that keeps the resolution."""
        return self.ops.Conv2d(channels_in, channels_out, size, padding=size // 2, **self.place)

    def halve(self, channels_in: int, channels_out: int) -> Any:
        """2x2 convolution to half the size."""
        return self.ops.Conv2d(channels_in, channels_out, 2, stride=2, **self.place)

    def double(self, channels_in: int, channels_out: int) -> Any:
        """2x2 transposed convolution to twice the size."""
        return self.ops.ConvTranspose2d(channels_in, channels_out, 2, stride=2, **self.place)

    def linear(self, width_in: int, width_out: int) -> Any:
        """Linear layer."""
        return self.ops.Linear(width_in, width_out, **self.place)


class _Block(nn.Module):
    """Residual block of two convs, modulated between them by the condition: (1 + gamma) h + beta.

    FiLM starts from random weights: from zero ones P_D would have no say at first.
    """

    def __init__(self, width: int, condition: int, layers: _Layers) -> None:
        super().__init__()
        self.first, self.second = layers.conv(width, width), layers.conv(width, width)
        self.film = layers.linear(condition, 2 * width)

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        gamma, beta = film(self.film, condition, x).chunk(2, dim=1)
        h = F.leaky_relu(torch.addcmul(beta, self.first(x), 1 + gamma), 0.1)
        return x + self.second(h)


class _Group(nn.Module):
    """Residual dense group: all outputs of its blocks, squeezed by a 1x1 conv, and a skip."""

    def __init__(self, width: int, depth: int, condition: int, layers: _Layers) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(width, condition, layers) for _ in range(depth))
        self.squeeze = layers.conv(depth * width, width, 1)

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        h, seen = x, list[Tensor]()
        for block in self.blocks:
            h = block(h, condition)
            seen.append(h)
        return x + self.squeeze(torch.cat(seen, dim=1))


class DetailPath(nn.Module):
    """U-shaped network from the LQ photo and the VAE's features to what is wrong with the photo.

    It reads the photo itself at 1/2 size (pixel unshuffle), the encoder's features at 1/2, 1/4 and
    1/8, and those of the decoder, which has the sampled latent, at 1/8 and 1/4. P_D modulates every
    block, and has the last word: each kind of damage has a head, which counts by how sure P_D is of
    that kind. With one head for all, 140 steps teach no noise beside clean photos, which every step
    towards it harms; with several they do (docs/decoder.md). There is no norm and no pooling, so
    that tiles see the same function as the whole photo; what it needs of the whole is in the
    condition.

    Source: Diff-Restorer (arXiv 2407.03636), degradation-aware decoder: encoder features, residual
    dense blocks, degradation embedding. The arrangement is ours: at full size the same blocks cost
    three times as much per crop and see a third as far.
    """

    levels = (1, 2, 3)
    """VAE levels whose encoder features it reads."""
    decoder_levels = (2, 3)
    """VAE levels whose decoder features it reads."""

    def __init__(
        self,
        config: DetailConfig,
        ops: Any = nn,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config, layers = config, _Layers(ops, device, dtype)
        (half, quarter, eighth), width = config.widths, config.context_width
        vae = config.vae_channels
        self.norm = ops.LayerNorm(width, device=device, dtype=dtype)
        self.tone = nn.Sequential(
            layers.linear(width + STATISTICS, width), nn.SiLU(),
            layers.linear(width, width), nn.SiLU(),
        )  # fmt: skip
        self.kind = layers.linear(width, config.kinds)
        self.gauge = zero_init(layers.linear(width, 2))
        self.thresholds = nn.ModuleList(
            zero_init(layers.linear(config.kinds, THRESHOLDS)) for _ in range(2)
        )
        self.color = layers.conv(vae[2], 3, 1)
        self.toned = zero_init(layers.linear(config.kinds, 1))
        self.finer = zero_init(layers.conv(eighth, 6 * config.kinds, 1))
        self.stem = layers.conv(36, half)
        self.merge = nn.ModuleList([
            zero_init(layers.conv(vae[0], half, 1)),
            zero_init(layers.conv(2 * vae[1], quarter, 1)),
            zero_init(layers.conv(2 * vae[2], eighth, 1)),
        ])  # fmt: skip
        self.down = nn.ModuleList([layers.halve(half, quarter), layers.halve(quarter, eighth)])
        self.up = nn.ModuleList([layers.double(eighth, quarter), layers.double(quarter, half)])
        widths = (half, quarter, eighth, quarter, half)
        self.groups = nn.ModuleList(
            _Group(w, depth, width + NOISE_LEVELS + config.kinds, layers)
            for w, depth in zip(widths, config.depths, strict=True)
        )
        self.out = zero_init(layers.conv(half, 12 * config.kinds))
        self._start_small()

    def _start_small(self) -> None:
        """Residual branches start at a fifth, so that the sum of many of them is about as large."""
        for group in cast("list[Any]", list(self.groups)):
            for branch in (group.squeeze, *(block.second for block in group.blocks)):
                if not branch.weight.is_meta:
                    branch.weight.data.mul_(0.2)
                    nn.init.zeros_(branch.bias)

    def hidden(self) -> tuple[Tensor, ...]:
        """Weights of the convs between features, which know nothing at the start."""
        modules = (*self.groups.modules(), *self.down, *self.up)
        return tuple(m.weight for m in modules if isinstance(m, nn.Conv2d | nn.ConvTranspose2d))

    def condition(self, pooled: Condition, statistics: Tensor) -> Condition:
        """What modulates every block, from P_D and the photo's tone and noise; once per photo.

        Args:
            pooled: Pooled P_D, (B, context_width), or of each place of the photos.
            statistics: `photo_statistics` of the whole LQ photos, (B, 51), or `local_statistics`.
        """
        if isinstance(pooled, LocalPooled):
            tiles = pooled.tiles.movedim(1, -1)  # (B, R, K, C)
            if statistics.ndim == 2:
                statistics = statistics[:, None, None].expand(*tiles.shape[:-1], -1)
            return replace(pooled, tiles=self._condition(tiles, statistics).movedim(-1, 1))
        return self._condition(pooled, statistics)

    def _condition(self, pooled: Tensor, statistics: Tensor) -> Tensor:
        quantiles, levels = statistics[..., :-NOISE_LEVELS], statistics[..., -NOISE_LEVELS:]
        seen = torch.cat([4 * quantiles - 2, (255 * levels + 0.5).log()], dim=-1).to(pooled)
        tone = self.tone(torch.cat([self.norm(pooled), seen], dim=-1))
        return torch.cat([tone, levels.to(pooled), 2 * self.kind(pooled).sigmoid()], dim=-1)

    def without_haze(self, restored: Tensor, pooled: Tensor, types: Sequence[str]) -> Tensor:
        """Restored photos, `stretched` as far as P_D is sure of haze: fully from 0.45 on, and below
        0.35, where flat photos are that need nothing, not at all.

        The last step, for it needs the whole photo, which tiles do not see.

        Args:
            restored: (B, 3, H, W) in [0, 1].
            pooled: Pooled P_D, (B, context_width).
            types: Names of the kinds.
        """
        if HAZE not in types:
            return restored
        sure = self.kind(pooled).float().sigmoid()[:, types.index(HAZE)]
        return stretched(restored, (10 * sure - 3.5).clamp(0, 1))

    def forward(
        self,
        photo: Tensor,
        encoded: Mapping[int, Tensor],
        decoded: Mapping[int, Tensor],
        condition: Condition,
    ) -> Tensor:
        """What to add to the photo, (B, 3, H, W).

        Args:
            photo: LQ photo, (B, 3, H, W) in [-1, 1]; H and W multiples of 8.
            encoded: The VAE encoder's features of it at levels 1, 2 and 3.
            decoded: The VAE decoder's features of the sampled latent at levels 2 and 3.
            condition: From `condition`.
        """
        smooth = self.shrunk(photo, condition)
        tone = self.first_tone(smooth, decoded[3], condition)
        half = self.at_half(photo, smooth, tone, encoded[1], condition)
        quarter = self.at_quarter(half, encoded[2], decoded[2], condition)
        eighth = self.at_eighth(quarter, encoded[3], decoded[3], condition)
        tone = self.finer_tone(eighth, tone, condition)
        quarter = self.back_at_quarter(eighth, quarter, condition)
        return self.back_at_half(quarter, half, photo, smooth, tone, condition)

    def shrunk(self, photo: Tensor, condition: Condition) -> Tensor:
        """The photo, (B, 3, H, W), without what is as small as the noise or JPEG steps that P_D is
        sure of."""

        def thresholds(row: Tensor) -> Tensor:
            kinds, width = self.config.kinds, self.config.context_width
            seen, levels, shares = row[..., :width], row[..., width:-kinds], row[..., -kinds:]
            gauge = (SLOW * self.gauge(seen).float()).tanh().mul(2).exp()
            of_noise, of_jpeg = (
                (SLOW * layer(shares).float()).clamp_min(0) for layer in self.thresholds
            )
            noise = 2 * levels.float().repeat_interleave(THRESHOLDS // NOISE_LEVELS, dim=-1)
            return gauge[..., :1] * of_noise * noise + gauge[..., 1:] * of_jpeg

        return shrink(photo, film(thresholds, condition, photo[..., ::2, ::2]))

    def first_tone(self, smooth: Tensor, decoded: Tensor, condition: Condition) -> Tensor:
        """Gains and offsets, (B, 6, H/8, W/8), towards the colours of the sampled latent, as far as
        P_D is sure of kinds that change the tone."""
        kinds, tone = self.config.kinds, guided_tone(smooth, SLOW * self.color(decoded))

        def sure(row: Tensor) -> Tensor:
            return (SLOW * self.toned(row[..., -kinds:])).clamp(0, 1)

        share = film(sure, condition, tone)
        return no_change(tone) + share * (tone - no_change(tone))

    def at_half(
        self, photo: Tensor, smooth: Tensor, tone: Tensor, encoded: Tensor, condition: Condition
    ) -> Tensor:
        """(B, 3, H, W) to (B, widths[0], H/2, W/2)."""
        seen = torch.cat([photo, smooth, with_tone(smooth, tone)], dim=1)
        h = self.stem(F.pixel_unshuffle(seen, 2).to(encoded)) + self.merge[0](encoded)
        return self.groups[0](h, condition)

    def at_quarter(
        self, half: Tensor, encoded: Tensor, decoded: Tensor, condition: Condition
    ) -> Tensor:
        """To (B, widths[1], H/4, W/4)."""
        h = self.down[0](half) + self.merge[1](torch.cat([encoded, decoded], dim=1))
        return self.groups[1](h, condition)

    def at_eighth(
        self, quarter: Tensor, encoded: Tensor, decoded: Tensor, condition: Condition
    ) -> Tensor:
        """To (B, widths[2], H/8, W/8)."""
        h = self.down[1](quarter) + self.merge[2](torch.cat([encoded, decoded], dim=1))
        return self.groups[2](h, condition)

    def finer_tone(self, eighth: Tensor, tone: Tensor, condition: Condition) -> Tensor:
        """Gains and offsets after those that the features at 1/8 find missing."""
        a, b = tone.chunk(2, dim=1)
        change = (SLOW * self._of_kinds(self.finer(eighth), condition).float()).tanh()
        gain, offset = change.chunk(2, dim=1)
        return torch.cat([a + gain * a, b + gain * b + offset], dim=1)

    def back_at_quarter(self, eighth: Tensor, quarter: Tensor, condition: Condition) -> Tensor:
        """To (B, widths[1], H/4, W/4)."""
        return self.groups[3](self.up[0](eighth) + quarter, condition)

    def back_at_half(
        self,
        quarter: Tensor,
        half: Tensor,
        photo: Tensor,
        smooth: Tensor,
        tone: Tensor,
        condition: Condition,
    ) -> Tensor:
        """To what is added to the photo, (B, 3, H, W)."""
        h = self.groups[4](self.up[1](quarter) + half, condition)
        residual = F.pixel_shuffle(SLOW * self._of_kinds(self.out(h), condition), 2)
        return residual + (with_tone(smooth, tone) - photo)

    def _of_kinds(self, heads: Tensor, condition: Condition) -> Tensor:
        """What the heads found, (B, kinds * C, h, w), added up to (B, C, h, w)."""
        kinds = self.config.kinds
        shares = film(lambda row: row[..., -kinds:], condition, heads)
        by_kind = heads.reshape(len(heads), kinds, -1, *heads.shape[2:])
        return (by_kind * shares.unsqueeze(2)).sum(dim=1)
