"""Degradations of storage: JPEG compression and low resolution."""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from .draw import Draw, geometric


def jpeg_codec(image: Tensor, quality: Tensor, subsampling: Tensor | None = None) -> Tensor:
    """Encodes and decodes with the real codec (Pillow, on the CPU).

    Args:
        image: (B, 3, H, W) in [0, 1].
        quality: (B,), 1 to 95.
        subsampling: (B,), 0 = 4:4:4, 2 = 4:2:0 (the default).

    Returns:
        (B, 3, H, W) in [0, 1].
    """
    pixels = (image * 255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
    decoded: list[Tensor] = []
    for index, sample in enumerate(pixels):
        chroma = 2 if subsampling is None else int(subsampling[index])
        with io.BytesIO() as stream:
            Image.fromarray(sample).save(
                stream, "JPEG", quality=round(float(quality[index])), subsampling=chroma
            )
            decoded.append(torch.as_tensor(np.array(Image.open(stream))))
    return torch.stack(decoded).permute(0, 3, 1, 2).to(image.device).float() / 255


def jpeg(image: Tensor, severity: Tensor, generator: torch.Generator) -> Tensor:
    """JPEG at quality 60 down to 5 (10 lies at severity 0.72), mostly with 4:2:0 chroma."""
    draw = Draw(image, generator)
    subsampling = draw.choice(0.25, 0.75) * 2
    return jpeg_codec(image, geometric(60, 5, severity).clamp(1, 95), subsampling)


def low_res(image: Tensor, severity: Tensor, generator: torch.Generator) -> Tensor:
    """Shrinks 1.5 to 8 times and enlarges again, each with a random filter."""
    draw = Draw(image, generator)
    factors = geometric(1.5, 8.0, severity)
    shrink, enlarge = draw.chance(0.6), draw.chance(0.7)
    samples: list[Tensor] = []
    for index, factor in enumerate(factors):
        small = [max(1, round(side / float(factor))) for side in (draw.height, draw.width)]
        sample = F.interpolate(
            image[index : index + 1], size=small, mode=_filter(shrink[index]), antialias=True
        )
        size = (draw.height, draw.width)
        samples.append(F.interpolate(sample, size=size, mode=_filter(enlarge[index])))
    return torch.cat(samples).clamp(0, 1)


def _filter(bicubic: Tensor) -> str:
    return "bicubic" if bicubic else "bilinear"
