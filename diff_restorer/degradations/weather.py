"""Degradations of the air: haze, rain and snow."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .draw import Draw, geometric, lerp
from .filters import add_pixels, gaussian_blur, guided_filter, splat

_FLAKE_REACH = 3.0


def _plausible_depth(image: Tensor, draw: Draw) -> Tensor:
    """A depth map made by code, (B, 1, H, W), 0 (near) to 1 (far).

    Far is up, and bright, colourless parts tend to be sky; a guided filter makes the edges of the
    depth follow those of the photo.
    """
    size = [max(2, side // 4) for side in (draw.height, draw.width)]
    small = F.interpolate(image, size=size, mode="area")
    luminance = small.mean(1, keepdim=True)
    colourless = 1 - (small.amax(1, keepdim=True) - small.amin(1, keepdim=True))
    height = torch.linspace(1, 0, size[0], device=image.device).view(1, 1, -1, 1)
    depth = (
        draw.per_sample(draw.uniform(0.5, 1.0)) * height
        + draw.per_sample(draw.uniform(0.0, 0.4)) * luminance * colourless
        + draw.per_sample(draw.uniform(0.05, 0.25)) * draw.field(2, *size)
    )
    depth = guided_filter(luminance, depth, max(1, min(size) // 12), 1e-3)
    low, high = depth.amin((2, 3), keepdim=True), depth.amax((2, 3), keepdim=True)
    depth = (depth - low) / (high - low + 1e-6)
    return F.interpolate(depth, size=(draw.height, draw.width), mode="bilinear").clamp(0, 1)


def haze(image: Tensor, severity: Tensor, generator: torch.Generator) -> Tensor:
    """Atmospheric scattering, I = J t + A (1 - t) with t = exp(-beta d).

    Source: the model behind RESIDE (Li et al. 2018), which uses measured depth, A in [0.7, 1] and
    beta in [0.6, 1.8]; here the depth is made by code.
    """
    draw = Draw(image, generator)
    depth = _plausible_depth(image, draw)
    beta = draw.per_sample(lerp(0.2, 2.0, severity, faint=0.01))
    transmission = torch.exp(-beta * (0.15 + depth))
    # Haze is grey, a little blue, or yellow with dust.
    tint = draw.send(torch.tensor([1.0, 0.3, -1.3])).view(1, 3, 1, 1)
    airlight = (
        draw.per_sample(draw.uniform(0.7, 0.98)) + draw.per_sample(draw.uniform(-0.02, 0.05)) * tint
    )
    return (image * transmission + airlight * (1 - transmission)).clamp(0, 1)


def _streaks(draw: Draw, count: int, length: Tensor, angle: Tensor, strength: Tensor) -> Tensor:
    """Bright streaks of individual length, direction and brightness, (B, 1, H, W)."""
    shape = (draw.batch, count)
    points = 24
    along = torch.linspace(-0.5, 0.5, points, device=draw.device)
    own_length = draw.send(length[:, None] * (0.5 + draw.rand(*shape)))
    own_angle = draw.send(angle[:, None] + 0.04 * draw.randn(*shape))
    margin = 0.05 * draw.height
    x = draw.send(draw.rand(*shape)) * (draw.width + 2 * margin) - margin
    y = draw.send(draw.rand(*shape)) * (draw.height + 2 * margin) - margin
    reach = own_length[..., None] * along
    taper = 1 - (2 * along).abs() ** 3
    brightness = draw.send(strength[:, None] * (0.3 + 0.7 * draw.rand(*shape)))
    weight = brightness[..., None] * taper * (own_length[..., None] / points)
    x = x[..., None] + reach * own_angle.sin()[..., None]
    y = y[..., None] + reach * own_angle.cos()[..., None]
    return splat(x.flatten(1), y.flatten(1), weight.flatten(1), draw.height, draw.width)


def rain(image: Tensor, severity: Tensor, generator: torch.Generator) -> Tensor:
    """Streaks in two depth layers (far: many, short, thin; near: few, long, wide) and a veil."""
    draw = Draw(image, generator)
    scale = math.sqrt(min(draw.height, draw.width) / 320)
    area = draw.height * draw.width / scale**2
    angle = draw.uniform(-0.7, 0.7)
    near_angle = angle + 0.1 * draw.randn(draw.batch)
    strength = geometric(0.2, 1.8, severity, faint=0.015)
    far_length, near_length = draw.uniform(10, 24) * scale, draw.uniform(28, 64) * scale
    far = _streaks(draw, max(1, int(area / 80)), far_length, angle, strength)
    near = _streaks(draw, max(1, int(area / 500)), near_length, near_angle, 1.8 * strength)
    # Times scale: a wide streak is as bright in its middle as a narrow one.
    layer = (gaussian_blur(far, 0.6 * scale) + gaussian_blur(near, 1.1 * scale)) * scale
    layer = layer.clamp(0, 0.9)
    veil = draw.per_sample(lerp(0.0, 0.2, severity) * draw.uniform(0.3, 1.0))
    air = draw.per_sample(draw.uniform(0.7, 0.95))
    image = image + veil * (0.8 * air - image)
    return (image + layer * (air - image * 0.6)).clamp(0, 1)


def _flakes(draw: Draw, count: int, radius: Tensor, fall: Tensor, density: Tensor) -> Tensor:
    """Soft flakes, each with its own size, shape and opacity, drawn as small patches."""
    shape = (draw.batch, count)
    reach = math.ceil(_FLAKE_REACH * float(radius.max()))
    axis = torch.arange(-reach, reach + 1, device=draw.device)
    x, y = draw.rand(*shape) * draw.width, draw.rand(*shape) * draw.height
    own = radius[:, None] * (0.35 + 0.65 * draw.rand(*shape))
    longer = 1 + draw.uniform(0.2, 1.8)[:, None] * draw.rand(*shape)
    angle = fall[:, None] + 0.5 * draw.randn(*shape)
    opacity = (draw.rand(*shape) < density[:, None]) * (0.4 + 0.6 * draw.rand(*shape))
    x, y, own, longer, angle, opacity = (
        draw.send(value)[..., None, None] for value in (x, y, own, longer, angle, opacity)
    )
    column, row = x.long() + axis.view(1, 1, 1, -1), y.long() + axis.view(1, 1, -1, 1)
    dx, dy = column - x, row - y
    cos, sin = angle.cos() / own, angle.sin() / own
    distance = (((dx * sin + dy * cos) / longer) ** 2 + (dx * cos - dy * sin) ** 2).sqrt()
    patch = torch.sigmoid((1 - distance) * (1.5 + own)) * opacity
    # Fade to nothing at the border of the patch, which would show as a square otherwise.
    patch = patch * (_FLAKE_REACH - distance).clamp(0, 1)
    column, row = column.expand_as(patch), row.expand_as(patch)
    return add_pixels(column.flatten(1), row.flatten(1), patch.flatten(1), draw.height, draw.width)


def snow(image: Tensor, severity: Tensor, generator: torch.Generator) -> Tensor:
    """Flakes in three depth layers (many small, some, few large and out of focus) and a veil."""
    draw = Draw(image, generator)
    scale = math.sqrt(min(draw.height, draw.width) / 320)
    area = draw.height * draw.width / scale**2
    density = lerp(0.12, 1.0, severity, faint=0.01)
    fall = draw.uniform(-0.9, 0.9)
    layer = torch.zeros(draw.batch, 1, draw.height, draw.width, device=image.device)
    for radius, spacing in ((1.2, 130), (2.8, 500), (7.0, 3500)):
        own = draw.uniform(0.75, 1.35) * radius * scale
        layer = layer + _flakes(draw, max(1, int(area / spacing)), own, fall, density)
    layer = (layer * draw.per_sample(lerp(0.75, 1.0, severity, faint=0.1))).clamp(0, 1)
    veil = draw.per_sample(lerp(0.0, 0.15, severity) * draw.uniform(0.2, 1.0))
    white = draw.per_sample(draw.uniform(0.88, 1.0))
    image = image + veil * (0.85 - image)
    return torch.lerp(image, white.expand_as(image), layer).clamp(0, 1)
