"""Degradations of storage: JPEG compression and low resolution."""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .compression import compress_jpeg
from .draw import Draw, geometric
from .resampling import rescale


def jpeg_codec(image: Tensor, quality: Tensor, subsampling: Tensor | None = None) -> Tensor:
    """Encodes and decodes with the real codec (Pillow, on the CPU), for fixed test sets.

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
    """JPEG at quality 92 (hardly visible), 32 at a quarter, 10 at severity 0.72, down to 5.

    Mostly with 4:2:0 chroma.
    """
    halve_chroma = Draw(image, generator).choice(0.25, 0.75).bool()
    return compress_jpeg(image, geometric(60, 5, severity, faint=92), halve_chroma)


def low_res(image: Tensor, severity: Tensor, generator: torch.Generator) -> Tensor:
    """Shrinks 1.05 times (2.3 at a quarter) to 8 times and enlarges again, with random filters."""
    draw = Draw(image, generator)
    shrink, enlarge = draw.chance(0.6), draw.chance(0.7)
    smooth = torch.ones_like(shrink)
    factor = 1 / geometric(1.5, 8.0, severity, faint=1.05)
    size = (draw.height, draw.width)
    return rescale(image, factor, size, draw, shrink, smooth, enlarge).clamp(0, 1)
