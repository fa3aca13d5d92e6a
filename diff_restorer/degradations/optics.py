"""Degradations of the lens: blur and drops on the glass."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .draw import Draw, geometric, lerp
from .filters import convolve, gaussian_blur
from .kernels import disk_kernels, gaussian_kernels, motion_kernels

_MAX_DROPS = 72


def blur(image: Tensor, severity: Tensor, generator: torch.Generator) -> Tensor:
    """Motion, defocus, Gaussian or anisotropic Gaussian blur.

    Lengths are in pixels of a picture whose short side is about 320.
    """
    draw = Draw(image, generator)
    mode = draw.choice(0.5, 0.2, 0.15, 0.15)
    motion = motion_kernels(draw, geometric(4.0, 34.0, severity, faint=0.7))
    disk = disk_kernels(geometric(1.2, 8.0, severity, faint=0.6))
    sigma = geometric(0.8, 4.5, severity, faint=0.3)
    narrow = sigma * draw.uniform(0.25, 0.6)
    gauss = gaussian_kernels(sigma, sigma, torch.zeros_like(sigma))
    skewed = gaussian_kernels(1.4 * sigma, narrow, draw.uniform(0, math.pi))
    stack = torch.stack((motion, disk, gauss, skewed))
    kernel = stack[mode, torch.arange(draw.batch)]
    return convolve(image, draw.send(kernel)).clamp(0, 1)


def raindrop(image: Tensor, severity: Tensor, generator: torch.Generator) -> Tensor:
    """Drops on the lens or a window: each shows a bent, blurred, upside-down piece of the scene.

    The drops are found at half size, where the nearest drop of every pixel gives the mask, the
    thickness and the place that the pixel looks at.
    """
    draw = Draw(image, generator)
    height, width = max(2, draw.height // 2), max(2, draw.width // 2)
    short = min(height, width)
    x = torch.arange(width, device=image.device)[None, None]
    y = torch.arange(height, device=image.device)[None, None]

    shape = (draw.batch, _MAX_DROPS)
    centre_x, centre_y = draw.rand(*shape) * width, draw.rand(*shape) * height
    present = draw.rand(*shape) < lerp(0.3, 1.0, severity, faint=0.03)[:, None]
    largest = lerp(0.055, 0.115, severity) * draw.uniform(0.6, 1.0)
    radius = short * (0.015 + largest[:, None] * draw.rand(*shape) ** 2.2) * present + 1e-3
    stretch = 1 + 0.5 * draw.rand(*shape)
    centre_x, centre_y, radius, stretch = map(draw.send, (centre_x, centre_y, radius, stretch))
    # Squared distance less squared radius, a sum of one term per axis: large drops swallow small.
    apart_x = (x - centre_x[..., None]) ** 2
    apart_y = ((y - centre_y[..., None]) / stretch[..., None]) ** 2 - radius[..., None] ** 2
    # One by one: all at once would take 72 pictures of memory, and more time.
    power = apart_y[:, 0, :, None] + apart_x[:, 0, None]
    owner = torch.zeros_like(power, dtype=torch.int64)
    for drop in range(1, _MAX_DROPS):
        own = apart_y[:, drop, :, None] + apart_x[:, drop, None]
        owner.masked_fill_(own < power, drop)
        power = torch.minimum(power, own)
    owner = owner.flatten(1)

    def of_owner(value: Tensor) -> Tensor:
        return value.gather(1, owner).view(-1, height, width)

    reach = of_owner(radius)
    wobble = 1 + 0.25 * draw.field(max(4, short // 10), height, width)[:, 0]
    rim = ((power / reach**2 + 1) * wobble.clamp(0.4)).clamp(0).sqrt()
    # The scene is in focus, so the drops are not: an edge as wide as a fair part of the drop.
    defocus = draw.per_sample(draw.uniform(0.2, 1.0))
    edge = 1 + 0.012 * short * defocus[:, 0]
    mask = ((1 - rim) * reach / edge).clamp(0, 1)[:, None]
    offset_x = x - of_owner(centre_x)
    offset_y = y.transpose(1, 2) - of_owner(centre_y)
    # A drop is a strong lens: it squeezes a wide, upside-down view into its disk.
    zoom = draw.per_sample(draw.uniform(1.0, 3.0))[:, 0] * (0.6 + 0.4 * rim.clamp(0, 1))
    look_x = (of_owner(centre_x) - zoom * offset_x) / max(1, width - 1) * 2 - 1
    look_y = (of_owner(centre_y) - zoom * offset_y) / max(1, height - 1) * 2 - 1
    half = F.interpolate(image, size=(height, width), mode="bilinear", antialias=True)
    sharp, soft = gaussian_blur(half, 0.012 * short), _strong_blur(half, 0.045 * short)
    seen = F.grid_sample(
        torch.lerp(sharp, soft, defocus),
        torch.stack((look_x, look_y), -1),
        padding_mode="reflection",
        align_corners=True,
    )
    # Light from above: the lower part of a drop shows the sky, the upper rim the dark ground.
    tilt = (offset_y / reach.clamp(1)).clamp(-1, 1) * rim.clamp(0, 1)
    glow = draw.per_sample(draw.uniform(0.0, 0.25))
    seen = gaussian_blur(seen, 0.8)
    seen = seen * (1 + 0.3 * tilt)[:, None] + glow * (0.5 + 0.5 * tilt)[:, None] * (1 - seen)
    size = (draw.height, draw.width)
    both = F.interpolate(torch.cat((seen, mask), 1), size=size, mode="bilinear")
    opacity = both[:, 3:] * draw.per_sample(lerp(0.75, 1.0, severity, faint=0.05))
    return torch.lerp(image, both[:, :3], opacity).clamp(0, 1)


def _strong_blur(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur by several pixels, made at a quarter of the size."""
    height, width = image.shape[-2:]
    small = F.interpolate(image, size=(max(1, height // 4), max(1, width // 4)), mode="area")
    return F.interpolate(gaussian_blur(small, sigma / 4), size=(height, width), mode="bicubic")
