"""P_D that differs from place to place of a photo, and the modulation by it.

    P_D(y, x) = sum over tiles (r, k) of rows[r, y] * columns[k, x] * P_D[r, k]

with the weights of each place adding up to 1. For the decoder: the sampler's tiles each have their
own P_D, and their predictions are blended (nodes/host_tiled.py). What the decoder makes of P_D is
made for each tile and blended then; of linear layers that is the same. Ours: the paper has one P_D
for a photo.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F


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

    def of_parts(self, photo: Tensor, measure: Callable[[Tensor], Tensor]) -> Tensor:
        """(B, R, K, N): `measure`, (B, N), of the part of a photo that each tile has a say in."""
        scales = (photo.shape[-2] // self.rows.shape[1], photo.shape[-1] // self.columns.shape[1])
        rows, columns = (
            [_reach(weights, scale) for weights in shares]
            for shares, scale in zip((self.rows, self.columns), scales, strict=True)
        )
        grid = [[measure(photo[..., row, column]) for column in columns] for row in rows]
        return torch.stack([torch.stack(line, dim=1) for line in grid], dim=1)

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        """Rows (1, R, h, w) and columns (1, K, h, w), in no more memory than they have."""
        height, width = self.rows.shape[1], self.columns.shape[1]
        rows = self.rows[None, :, :, None].expand(-1, -1, -1, width)
        return rows, self.columns[None, :, None].expand(-1, -1, height, -1)

    def to(self, like: Tensor) -> LocalPooled:
        """With tiles on the device and in the dtype of another tensor; `blend` moves the rest."""
        return replace(self, tiles=self.tiles.to(like))

    def __getitem__(self, photos: slice) -> LocalPooled:
        """Of some of the photos."""
        return replace(self, tiles=self.tiles[photos])

    def within(self, rows: Tensor, columns: Tensor) -> LocalPooled:
        """The same in a part of the photo, from that part of both `weights`."""
        return replace(self, rows=rows[0, :, :, 0], columns=columns[0, :, 0])


def _reach(weights: Tensor, scale: int) -> slice:
    """From the first to the last place that counts, in pixels."""
    places = weights.nonzero().flatten()
    return slice(int(places[0]) * scale, (int(places[-1]) + 1) * scale)


Condition = Tensor | LocalPooled
"""What modulates a decoder, (B, C), or of each place of the photos."""


def film(layer: Callable[[Tensor], Tensor], condition: Condition, like: Tensor) -> Tensor:
    """What a layer makes of the condition, at each place where it differs: as a rule the gamma and
    beta of FiLM, (1 + gamma) h + beta.

    Args:
        layer: (..., C) to (..., N), such as 2 * width for FiLM.
        condition: (B, C), or of each place.
        like: What it is for, (B, ..., h, w).

    Returns:
        (B, N, 1, 1), or (B, N, h, w) where it differs from place to place.
    """
    if not isinstance(condition, LocalPooled):
        return layer(condition)[:, :, None, None]
    tiles = layer(condition.tiles.movedim(1, -1)).movedim(-1, 1)
    return F.interpolate(condition.blend(tiles), like.shape[-2:])
