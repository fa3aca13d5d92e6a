"""Resampling in which each sample of a batch has its own size: products with matrices."""

import torch
from torch import Tensor

from .draw import Draw


def _triangle(distance: Tensor) -> Tensor:
    return (1 - distance).clamp(min=0)


def _keys(distance: Tensor) -> Tensor:
    """Cubic convolution with a = -0.5; Keys (1981), equation 8."""
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))


def resize_matrices(
    source: Tensor, target: Tensor, shape: tuple[int, int], cubic: Tensor, smooth: Tensor
) -> Tensor:
    """Matrices that resize one axis, each from and to its own number of pixels.

    Args:
        source, target: (B,), pixels before and after.
        shape: rows and columns of the matrices, at least the largest `target` and `source`; what is
            beyond a sample's own sizes is to be ignored, and ignored.
        cubic: (B,) booleans: bicubic or bilinear.
        smooth: (B,) booleans: average all the pixels that a smaller one covers (antialias).

    Returns:
        (B, rows, columns), each row that counts summing to one.
    """
    step = (source / target)[:, None, None]
    row = torch.arange(shape[0], device=source.device)[:, None]
    column = torch.arange(shape[1], device=source.device)
    # Pixels beyond the last row repeat it, so that every row has a sum to be divided by.
    place = (torch.minimum(row, target[:, None, None] - 1) + 0.5) * step - 0.5
    reach = torch.where(smooth[:, None, None], step.clamp(min=1), 1.0)
    distance = ((column - place) / reach).abs()
    weight = torch.where(cubic[:, None, None], _keys(distance), _triangle(distance))
    weight = weight * (column < source[:, None, None])
    return weight / weight.sum(-1, keepdim=True)


def rescale(
    image: Tensor, factor: Tensor, size: tuple[int, int], draw: Draw, *shrink: Tensor
) -> Tensor:
    """Brings each photo to `factor` times its size, then to a size that all share.

    Args:
        image: (B, C, H, W).
        factor: (B,) on the host, positive; sides are rounded to whole pixels.
        size: height and width of the result, pixels.
        draw: of the same batch; brings the settings to the photos.
        shrink: `cubic` and `smooth` of the first step and, if the second should not be the same but
            smooth, `cubic` of the second; (B,) booleans on the host.

    Returns:
        (B, C, *size), not clamped.
    """
    cubic, smooth, enlarge = (*shrink, shrink[0])[:3]
    axes: list[Tensor] = []
    for before, after in zip(image.shape[-2:], size, strict=True):
        middle = (before * factor).round().clamp(min=1)
        widest = int(middle.max())
        fixed = torch.full_like(middle, before), torch.full_like(middle, after)
        source, target, middle = draw.send(fixed[0]), draw.send(fixed[1]), draw.send(middle)
        first = resize_matrices(
            source, middle, (widest, before), draw.send(cubic), draw.send(smooth)
        )
        second = resize_matrices(
            middle, target, (after, widest), draw.send(enlarge), torch.ones_like(middle).bool()
        )
        axes.append((second @ first)[:, None])
    return axes[0] @ image @ axes[1].mT
