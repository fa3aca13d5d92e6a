"""Degradations born in the sensor: noise and low light."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .draw import Draw, geometric, lerp, members, presence
from .raw import camera_noise


def add_gaussian_noise(image: Tensor, sigma: Tensor, generator: torch.Generator) -> Tensor:
    """Adds independent Gaussian noise to every pixel and channel; sigma (B,) in units of [0, 1]."""
    draw = Draw(image, generator)
    return (image + draw.per_sample(sigma) * draw.noise(*image.shape)).clamp(0, 1)


def noise(image: Tensor, severity: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise (colour or grey), Poisson noise, film grain, blotches or camera noise.

    Sigma runs from 1/255 over 22.5/255 at a quarter to 75/255; the benchmark's 50/255 lies at
    severity 0.64. Blotches and camera noise have a third of it.
    """
    draw = Draw(image, generator)
    sigma = lerp(5 / 255, 75 / 255, severity, faint=1 / 255)
    mode = draw.choice(0.33, 0.06, 0.09, 0.05, 0.12, 0.35)
    noisy = image + draw.noise(*image.shape) * draw.per_sample(sigma)
    for index, variant in ((1, _grey), (2, _photons), (3, _grain), (4, _developed)):
        if len(place := members(mode, index)):
            chosen = draw.send(place)
            photo, own = image[chosen], draw.per_sample(sigma[place])
            noisy[chosen] = photo + variant(noisy[chosen] - photo, photo, own, generator)
    if len(place := members(mode, 5)):
        chosen = draw.send(place)
        noisy[chosen] = camera_noise(image[chosen], severity[place], generator)
    return noisy.clamp_(0, 1)


def _grey(added: Tensor, image: Tensor, sigma: Tensor, generator: torch.Generator) -> Tensor:
    return added[:, :1]


def _photons(added: Tensor, image: Tensor, sigma: Tensor, generator: torch.Generator) -> Tensor:
    """Poisson noise: its variance is proportional to brightness, and sigma^2 at mid grey.

    Counts are made of the normal noise by the expansion of Cornish and Fisher, whose mean, variance
    and skewness are Poisson's, since torch draws Poisson numbers slowly and not on every device.
    """
    normal = added / sigma
    gain = 2 * sigma**2
    expected = image / gain
    counts = expected + expected.sqrt() * normal + (normal**2 - 1) / 6
    return counts.round_().clamp_(min=0) * gain - image


def _grain(added: Tensor, image: Tensor, sigma: Tensor, generator: torch.Generator) -> Tensor:
    """Film grain: a little coarser than a pixel, nearly grey, strongest in the mid-tones."""
    grey = added[:, :1]
    coarse = grey + 0.7 * (grey.roll(1, -1) + grey.roll(1, -2)) + 0.3 * added
    return coarse * (4 * image * (1 - image)).clamp(0.15).sqrt() / 1.6


def _developed(added: Tensor, image: Tensor, sigma: Tensor, generator: torch.Generator) -> Tensor:
    """What a camera's denoising and demosaicing leave: mild blotches of many sizes, mostly grey.

    Fitted to twelve pairs of PolyU (arXiv 1804.02603), whose noise correlates by 0.65, 0.4, 0.2 and
    0.1 at a distance of 1, 2, 4 and 8 px and by 0.3 to 0.85 between the channels.
    """
    draw = Draw(added, generator)
    shared = draw.per_sample(draw.uniform(0.3, 0.85))
    grey = draw.noise(draw.batch, 1, draw.height, draw.width) * sigma
    added = shared.sqrt() * grey + (1 - shared).sqrt() * added
    across = added + added.roll(1, -1)
    blotches = draw.per_sample(draw.uniform(0.4, 0.8)) * (across + across.roll(1, -2))
    for side, weight in ((2, 0.45), (4, 0.5), (8, 0.45)):
        coarse = F.avg_pool2d(added, side, ceil_mode=True)
        coarse = F.interpolate(coarse, size=added.shape[-2:], mode="bilinear")
        blotches = blotches + side * weight * coarse
    return blotches / 5 * (0.4 + 1.2 * image).clamp(max=1)


def low_light(image: Tensor, severity: Tensor, generator: torch.Generator) -> Tensor:
    """A short exposure: darkened in linear light, tinted, with shot and read noise, in 8 bits.

    By 0.1 stops at severity 0, 2.1 at a quarter; the last quarter of the severities reaches down to
    the darkness of LOL, 7 stops.
    """
    draw = Draw(image, generator)
    share = presence(severity)
    stops = lerp(1.0, 5.5, severity, faint=0.1) + 6 * (severity - 0.75).clamp_min(0)
    stops = stops + share * draw.uniform(-0.4, 0.4)
    exposure = draw.per_sample(2.0**-stops)
    tint = 0.15 * lerp(0.3, 1.0, severity, faint=0.02)
    cast = draw.send(torch.exp(tint[:, None] * draw.randn(draw.batch, 3)))
    linear = image.clamp(0, 1) ** 2.2 * exposure * cast[:, :, None, None]
    shot = geometric(2e-5, 4e-4, severity, faint=1e-6) * draw.uniform(0.4, 1.6)
    read = geometric(2e-4, 2e-3, severity, faint=2e-5) * draw.uniform(0.4, 1.6)
    noise = draw.noise(*image.shape)
    linear = linear + (draw.per_sample(shot) * linear + draw.per_sample(read) ** 2).sqrt() * noise
    gamma = draw.per_sample(1 + share * (draw.uniform(1.0, 1.15) - 1))
    encoded = linear.clamp(0, 1) ** (gamma / 2.2)
    return (encoded * 255).round() / 255
