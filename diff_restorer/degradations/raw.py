"""Noise as a camera makes it: born in the mosaic of the sensor, then developed with the photo."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .compression import compress_jpeg
from .draw import Draw, geometric, lerp, presence
from .filters import gaussian_blur

_XYZ_TO_CAMERA = torch.tensor(
    [
        [[1.0234, -0.2969, -0.2266], [-0.5625, 1.6328, -0.0469], [-0.0703, 0.2188, 0.6406]],
        [[0.4913, -0.0541, -0.0202], [-0.6130, 1.3513, 0.2906], [-0.1564, 0.2151, 0.7183]],
        [[0.8380, -0.2630, -0.0639], [-0.2887, 1.0725, 0.2496], [-0.0627, 0.1427, 0.5438]],
        [[0.6596, -0.2079, -0.0562], [-0.4782, 1.3016, 0.1933], [-0.0970, 0.1581, 0.5181]],
    ]
)
_RGB_TO_XYZ = torch.tensor(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)
_GAMMA = 2.2


def camera_noise(image: Tensor, severity: Tensor, generator: torch.Generator) -> Tensor:
    """Adds the noise of a small sensor, developed by its camera, and mostly the camera's JPEG.

    The photo is turned back into what the sensor saw: inverse tone curve, gamma, colour matrix and
    white balance. Shot and read noise are drawn on its Bayer mosaic. Interpolation of the mosaic,
    white balance and colour matrix are linear, so they are applied to the noise alone, which is
    then added to the photo in linear light; gamma and tone curve take both. Thus the photo itself
    stays as it is, without a demosaicked copy of it, and the difference is noise and JPEG only.
    Denoising and sharpening change the noise by bands: fine, middle and coarse. Severity decides
    the standard deviation of that difference before JPEG: 1/3 to 25 levels of 255, a third of what
    Gaussian noise has; PolyU's cameras (arXiv 1804.02603) have 5.5 to 9.3.

    Args:
        image: (B, 3, H, W) in [0, 1].
        severity: (B,) on the CPU, in [0, 1].
        generator: of the CPU.

    Returns:
        (B, 3, H, W) in [0, 1].

    Source: Brooks et al., "Unprocessing Images for Learned Raw Denoising" (2019), sections 3.1 to
    3.6 and its published ranges. Different: shot noise is bound to severity, and the strength is
    corrected to the standard deviation that it tells.
    """
    draw = Draw(image, generator)
    noise = _developed_noise(image, severity, draw)
    sigma = lerp(5 / 3, 25, severity, faint=1 / 3) / 255
    spread = noise.std((1, 2, 3), correction=0, keepdim=True).clamp(min=1e-6)
    noisy = (image + noise * (draw.per_sample(sigma) / spread)).clamp(0, 1)
    compressed = draw.chance(0.7)
    quality = 98 - 28 * presence(severity) * draw.rand(draw.batch)
    halve_chroma = draw.chance(0.6)
    place = compressed.nonzero()[:, 0]
    if len(place):
        index = draw.send(place)
        noisy[index] = compress_jpeg(noisy[index], quality[place], halve_chroma[place])
    return noisy


def _developed_noise(image: Tensor, severity: Tensor, draw: Draw) -> Tensor:
    """The noise of a photo that may have been reduced after it was taken; any strength."""
    size = image.shape[-2:]
    # One for all: sizes differ between calls, not between samples.
    scale = 1.0 if float(draw.rand()) < 0.5 else 0.5 + 0.5 * float(draw.rand())
    # Even sides, so that the mosaic can be interpolated around the edges.
    full = [2 * math.ceil(side / scale / 2) for side in size]
    photo = F.interpolate(image, size=full, mode="bilinear") if full != list(size) else image
    linear = _linear(photo)
    to_raw = _to_raw(draw)
    colour_planes = (draw.send(to_raw) @ linear.flatten(2)).view_as(linear).clamp_(0, 1)
    # The noise of a sensor varies by half a stop to either side of what severity asks for.
    shot = geometric(1e-4, 1.2e-2, severity) * 2 ** draw.uniform(-0.5, 0.5)
    read = torch.exp(2.18 * shot.log() + 1.2 + 0.26 * draw.randn(draw.batch))
    shift = [int(draw.rand() < 0.5) for _ in range(2)]
    mosaic = _mosaic(colour_planes, shift)
    variance = draw.per_sample(shot) * mosaic + draw.per_sample(read)
    noise = _demosaicked(variance.sqrt_() * draw.noise(*mosaic.shape), shift)
    noise = (draw.send(to_raw.inverse()) @ noise.flatten(2)).view_as(linear)
    # Half the difference of both signs: the curves would darken the mean, which cameras calibrate.
    brighter, darker = ((linear + sign * noise).clamp_(0, 1) for sign in (1, -1))
    noise = (_encoded(brighter) - _encoded(darker)) / 2
    noise = _cleaned(noise, draw)
    if photo is image:
        return noise
    return F.interpolate(noise, size=size, mode="bilinear", antialias=True)


def _linear(image: Tensor) -> Tensor:
    """Inverse of the tone curve, a smoothstep, and of the gamma."""
    inside = image.clamp(0, 1)  # a resized white is brighter by a rounding, and has no arcsine
    return (0.5 - ((1 - 2 * inside).asin() / 3).sin()).clamp_(0, 1) ** _GAMMA


def _encoded(linear: Tensor) -> Tensor:
    encoded = linear ** (1 / _GAMMA)
    return encoded * encoded * (3 - 2 * encoded)


def _to_raw(draw: Draw) -> Tensor:
    """From linear sRGB to the sensor's colours before white balance, (B, 3, 3) on the host."""
    weight = draw.rand(draw.batch, 4)
    weight = weight / weight.sum(1, keepdim=True)
    to_camera = torch.einsum("bk,kij,jl->bil", weight, _XYZ_TO_CAMERA, _RGB_TO_XYZ)
    to_camera = to_camera / to_camera.sum(2, keepdim=True)
    brighter = 1 / (0.8 + 0.1 * draw.randn(draw.batch)).clamp(0.5, 1.1)
    red, blue = draw.uniform(1.9, 2.4), draw.uniform(1.5, 1.9)
    gain = brighter[:, None] * torch.stack((red, torch.ones_like(red), blue), 1)
    return to_camera / gain[:, :, None]


def _mosaic(planes: Tensor, shift: list[int]) -> Tensor:
    """One colour at each pixel: red where row and column, less `shift`, are even; blue if odd."""
    mosaic = planes[:, 1:2].clone()
    for plane, parity in ((0, 0), (2, 1)):
        at = (..., slice(shift[0] ^ parity, None, 2), slice(shift[1] ^ parity, None, 2))
        mosaic[at] = planes[:, plane : plane + 1][at]
    return mosaic


def _demosaicked(mosaic: Tensor, shift: list[int]) -> Tensor:
    """Bilinear interpolation of a mosaic with even sides, (B, 1, H, W) -> (B, 3, H, W)."""
    colours = torch.zeros(len(mosaic), 3, *mosaic.shape[-2:], device=mosaic.device)
    colours[:, 1:2] = mosaic
    for plane, parity in ((0, 0), (2, 1)):
        at = (..., slice(shift[0] ^ parity, None, 2), slice(shift[1] ^ parity, None, 2))
        colours[:, plane : plane + 1][at] = mosaic[at]
        colours[:, 1:2][at] = 0
    green, others = colours[:, 1:2], colours[:, ::2]
    across = green.roll(1, -1) + green.roll(-1, -1) + green.roll(1, -2) + green.roll(-1, -2)
    colours[:, 1:2] = green + across / 4
    others = others + (others.roll(1, -1) + others.roll(-1, -1)) / 2
    colours[:, ::2] = others + (others.roll(1, -2) + others.roll(-1, -2)) / 2
    return colours


def _cleaned(noise: Tensor, draw: Draw) -> Tensor:
    """What denoising and sharpening leave: little or much fine grain, less colour, all blotches."""
    middle = gaussian_blur(noise, 0.8)
    coarse = F.avg_pool2d(middle, 4, ceil_mode=True)
    coarse = F.interpolate(coarse, size=noise.shape[-2:], mode="bilinear")
    fine = draw.per_sample(draw.uniform(0.1, 1.2)) * (noise - middle)
    grain = fine + draw.per_sample(draw.uniform(0.6, 1.2)) * (middle - coarse)
    coarse = draw.per_sample(draw.uniform(1.3, 2.6)) * coarse
    grain = _paler(grain, draw.per_sample(draw.uniform(0.0, 0.6)))
    return grain + _paler(coarse, draw.per_sample(draw.uniform(0.2, 0.8)))


def _paler(noise: Tensor, colour: Tensor) -> Tensor:
    """Keeps a share of the differences between the channels."""
    return torch.lerp(noise.mean(1, keepdim=True), noise, colour)
