"""Degradations: pure functions of (image, severity, generator), shared by training and nodes."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.amp.autocast_mode import is_autocast_available

from .codec import jpeg, jpeg_codec, low_res
from .looks import random_look
from .mixes import MIXES, draw_mix
from .optics import blur, raindrop
from .second_order import second_order
from .sensor import add_gaussian_noise, low_light, noise
from .weather import haze, rain, snow

Degradation = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""Of images (B, 3, H, W) on any device, severities (B,) on the CPU and a generator of the CPU."""


def clean(image: Tensor, severity: Tensor, generator: torch.Generator) -> Tensor:
    """Returns the image as it is."""
    return image


_FUNCTIONS: dict[str, Degradation] = {
    "noise": noise,
    "blur": blur,
    "jpeg": jpeg,
    "low_light": low_light,
    "haze": haze,
    "rain": rain,
    "snow": snow,
    "raindrop": raindrop,
    "clean": clean,
    "low_res": low_res,
    "second_order": second_order,
}
ALL_KINDS: tuple[str, ...] = tuple(_FUNCTIONS)
"""Every kind that `degrade` knows."""
KINDS: tuple[str, ...] = ALL_KINDS[:9]
"""The default kinds: eight, which the paper counts and does not name (ours are those of DA-CLIP,
arXiv 2310.01018, without shadows and missing parts), and `clean`."""


PHYSICAL_ORDER = (
    "haze", "rain", "snow", "raindrop", "blur", "low_light", "low_res", "noise", "jpeg",
    "second_order", "clean",
)  # fmt: skip
"""The order in which a picture meets them."""


def sample_severity(generator: torch.Generator) -> float:
    """Draws a severity, uniform in [0, 1)."""
    return torch.rand((), generator=generator).item()


def degrade(
    kind: str, image: Tensor, severity: float | Tensor, generator: torch.Generator
) -> Tensor:
    """Degrades a batch of photos with one kind.

    Everything happens on the images' device, which the host never waits for. Another device gives
    the same picture but for noise as large as the picture, which is drawn where it is needed.

    Args:
        kind: one of `ALL_KINDS`.
        image: (B, 3, H, W), float32 in [0, 1], on any device.
        severity: one number or (B,) on the CPU, in [0, 1]; 0 is all but invisible, the middle half
            resembles the published test sets. Elsewhere it is fetched, which waits.
        generator: of the CPU, source of every random number; the same state gives the same result.

    Returns:
        (B, 3, H, W), float32 in [0, 1].

    Raises:
        ValueError: if the kind is unknown, or the image or a severity has the wrong shape or range.
    """
    if kind not in _FUNCTIONS:
        raise ValueError(f"kind: unknown degradation {kind!r}; known are {', '.join(ALL_KINDS)}")
    if image.ndim != 4 or image.shape[1] != 3 or image.dtype != torch.float32:
        given = f"{tuple(image.shape)} {image.dtype}"
        raise ValueError(f"image: expected (B, 3, H, W) float32 in [0, 1], found {given}")
    level = torch.as_tensor(severity, dtype=torch.float32).cpu()
    if level.ndim > 1 or (level.ndim == 1 and len(level) != len(image)):
        raise ValueError(
            f"severity: expected one number or {len(image)} numbers, found {tuple(level.shape)}"
        )
    if not ((level >= 0) & (level <= 1)).all():
        raise ValueError(f"severity: expected numbers in [0, 1], found {severity}")
    device = image.device.type
    castable = is_autocast_available(device)
    with torch.no_grad(), torch.autocast(device, enabled=False) if castable else nullcontext():
        return _FUNCTIONS[kind](image, level.expand(len(image)), generator)


def degrade_chain(
    kinds: Sequence[str], image: Tensor, severity: float | Tensor, generator: torch.Generator
) -> Tensor:
    """Degrades a batch with several kinds, in the order in which a picture meets them.

    The air comes first, then the glass, the lens, the sensor (low light brings noise of its own,
    which no lens blurs) and the file, whatever the order of `kinds`; so its labels are a set.

    Args:
        kinds: different members of `ALL_KINDS`.
        image: (B, 3, H, W), float32 in [0, 1].
        severity: one number, or (B,) for all kinds, or (B, len(kinds)) for each kind its own.
        generator: source of every random number.

    Returns:
        (B, 3, H, W), float32 in [0, 1].

    Raises:
        ValueError: as `degrade`, or if a kind is named twice or has no severity of its own.
    """
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"kinds: each kind may be named once, found {', '.join(kinds)}")
    level = torch.as_tensor(severity, dtype=torch.float32)
    if unknown := set(kinds) - set(ALL_KINDS):
        raise ValueError(f"kinds: unknown {sorted(unknown)}; known are {', '.join(ALL_KINDS)}")
    if level.ndim == 2 and level.shape[1] != len(kinds):
        raise ValueError(
            f"severity: expected a column for each of {len(kinds)} kinds, found {level.shape[1]}"
        )
    for kind in sorted(kinds, key=PHYSICAL_ORDER.index):
        own = level[:, list(kinds).index(kind)] if level.ndim == 2 else level
        image = degrade(kind, image, own, generator)
    return image


__all__ = [
    "ALL_KINDS",
    "KINDS",
    "MIXES",
    "PHYSICAL_ORDER",
    "add_gaussian_noise",
    "blur",
    "degrade",
    "degrade_chain",
    "draw_mix",
    "jpeg_codec",
    "random_look",
    "sample_severity",
]
