"""What clean photos may look like without being damaged."""

import torch
from torch import Tensor

from .draw import Draw

_LUMA = (0.299, 0.587, 0.114)
_SEPIA = (1.0, 0.9, 0.72)
"""A brown print, as factors of grey."""


def random_look(image: Tensor, generator: torch.Generator, share: float = 0.65) -> Tensor:
    """Gives clean photos other looks, so that contrast, brightness or colour alone tell no damage.

    Each photo draws on its own: half of the changed ones get another exposure (up to 1.5 stops),
    half another white balance, gamma or contrast (down to a third, around any grey); one in six is
    of low contrast as a whole, as fog-like walls, skies, snow and paper are; 15 % are black and
    white, a fifth of these sepia. What is too bright is compressed, not clipped.

    Args:
        image: (B, 3, H, W), float32 in [0, 1], on any device.
        generator: of the CPU.
        share: of the photos that change at all, in [0, 1].

    Returns:
        (B, 3, H, W) in [0, 1]; in steps of 1/255 where it changed.
    """
    draw = Draw(image, generator)

    def sometimes(probability: float, values: Tensor, usual: float) -> Tensor:
        return draw.per_sample(torch.where(draw.chance(probability), values, usual))

    changed = draw.per_sample(draw.chance(share))
    exposure = 2 ** sometimes(0.5, draw.uniform(-1.5, 0.7), 0.0)
    warmth = sometimes(0.5, 0.12 * draw.randn(draw.batch), 0.0)
    tint = sometimes(0.5, 0.06 * draw.randn(draw.batch), 0.0)
    balance = torch.cat((warmth, tint, -warmth), 1).exp()
    linear = image.clamp(0, 1) ** 2.2 * exposure * balance
    # What leaves the range is rolled off so that white stays white; with white = 1 all stays.
    # Source: Reinhard et al., "Photographic Tone Reproduction" (2002), equation 4.
    white = (exposure * balance).clamp(min=1)
    linear = linear * (1 + linear / white**2) / (1 + linear)
    look = linear.clamp(0, 1) ** (sometimes(0.5, 2 ** draw.uniform(-0.7, 0.7), 1.0) / 2.2)

    contrast = sometimes(0.5, draw.uniform(1 / 3, 1.15), 1.0)
    pivot = draw.per_sample(draw.uniform(0.1, 0.9))
    flat = draw.per_sample(draw.chance(1 / 6))
    contrast = torch.where(flat, draw.per_sample(draw.uniform(0.08, 0.35)), contrast)
    pivot = torch.where(flat, draw.per_sample(draw.uniform(0.35, 0.97)), pivot)
    look = pivot + contrast * (look - pivot)

    luma = (look * draw.send(torch.tensor(_LUMA))[:, None, None]).sum(1, keepdim=True)
    toned = draw.per_sample(draw.chance(0.2))
    factors = draw.send(torch.tensor(_SEPIA))[:, None, None]
    paper = luma * torch.where(toned, factors, 1.0)
    look = torch.where(draw.per_sample(draw.chance(0.15)), paper, look)
    return torch.where(changed, (look.clamp(0, 1) * 255).round() / 255, image)
