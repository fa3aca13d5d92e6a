"""Degradations of the lens: blur and drops on the glass."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .draw import Draw, geometric, lerp, members, presence
from .filters import convolve, gaussian_blur
from .kernels import disk_kernels, gaussian_kernels, motion_kernels

_MAX_DROPS = 72
_CLIPPED = 0.96


def blur(
    image: Tensor, severity: Tensor, generator: torch.Generator, uneven_share: float = 0.35
) -> Tensor:
    """Motion, defocus, Gaussian or anisotropic Gaussian blur.

    Lengths are in pixels of a picture whose short side is about 320. A share of the photos is
    blurred as a camera does it, `_uneven`, the others by one kernel, as in the test sets.
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
    uneven = draw.chance(uneven_share)
    blurred = torch.empty_like(image)
    if len(chosen := members(uneven, 0)):
        place = draw.send(chosen)
        blurred[place] = convolve(image[place], draw.send(kernel[chosen]))
    if len(chosen := members(uneven, 1)):
        place, defocus = draw.send(chosen), mode[chosen] == 1
        blurred[place] = _uneven(image[place], kernel[chosen], defocus, severity[chosen], generator)
    return blurred.clamp_(0, 1)


def _uneven(
    image: Tensor, kernel: Tensor, defocus: Tensor, severity: Tensor, generator: torch.Generator
) -> Tensor:
    """Two kernels, each for its part of the photo, in linear light with clipped highlights.

    The second is another path (the camera rolls, an object moves on its own) or, with `defocus`,
    another depth. Light adds up in linear space, and what was clipped was brighter than it looks,
    so that bright spots become streaks.
    """
    draw = Draw(image, generator)
    weaker = severity * draw.uniform(0.4, 1.0)
    path = motion_kernels(draw, geometric(4.0, 34.0, weaker, faint=0.7))
    depth = disk_kernels(geometric(1.2, 8.0, weaker, faint=0.6))
    other = torch.where(defocus[:, None, None], depth, path)
    # Soft borders where the camera rolls, sharp ones around an object.
    border = draw.per_sample(geometric(1.0, 20.0, draw.rand(draw.batch)))
    share = torch.sigmoid(border * (draw.field(2) + draw.per_sample(draw.uniform(-0.8, 0.8))))
    headroom = draw.per_sample(draw.uniform(0.0, 3.0) * presence(severity))
    linear = image**2.2
    peak = image.amax(1, keepdim=True)
    linear = linear * (1 + headroom * ((peak - _CLIPPED) / (1 - _CLIPPED)).clamp(min=0))
    first, second = (convolve(linear, draw.send(which)) for which in (kernel, other))
    return torch.lerp(first, second, share).clamp_(0, 1) ** (1 / 2.2)


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
