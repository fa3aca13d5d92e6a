"""Random draws for a batch: every number comes from one generator, in one order."""

import torch
from torch import Tensor
from torch.nn import functional as F

Bound = float | Tensor

_KNEE = 0.25
"""Below this severity, strengths run down to what is hardly visible."""


class Draw:
    """Draws per-sample parameters for a batch of images.

    Parameters stay on the CPU, where the generator is, so that their values can decide on sizes and
    branches without waiting for a device, and a seed means the same on every device; `send` brings
    them to the images. Only noise as large as the images is drawn where they are.
    """

    def __init__(self, image: Tensor, generator: torch.Generator) -> None:
        self.generator = generator
        self.device = image.device
        self.batch, _, self.height, self.width = image.shape

    def send(self, values: Tensor) -> Tensor:
        """Brings host values to the images' device, without waiting for it."""
        return values.to(self.device, non_blocking=True)

    def per_sample(self, values: Tensor) -> Tensor:
        """Host values (B,) -> (B, 1, 1, 1) on the images' device, to broadcast over images."""
        return self.send(values)[:, None, None, None]

    def rand(self, *shape: int) -> Tensor:
        """Uniform [0, 1) numbers of the given shape, on the host."""
        return torch.rand(shape, generator=self.generator)

    def randn(self, *shape: int) -> Tensor:
        """Standard normal numbers of the given shape, on the host."""
        return torch.randn(shape, generator=self.generator)

    def noise(self, *shape: int) -> Tensor:
        """Standard normal numbers of the given shape, drawn on the images' device."""
        generator = self.generator
        if self.device.type not in ("cpu", "meta"):  # "meta" has shapes alone, and no generator
            seed = int(torch.randint(2**62, (), generator=generator))
            generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device)

    def uniform(self, low: Bound, high: Bound) -> Tensor:
        """One number per sample, (B,), on the host; bounds may be per sample."""
        return low + (high - low) * self.rand(self.batch)

    def chance(self, probability: Bound) -> Tensor:
        """One boolean per sample, (B,), on the host."""
        return self.rand(self.batch) < probability

    def choice(self, *weights: float) -> Tensor:
        """One index per sample, (B,), on the host, drawn in proportion to `weights`."""
        edges = torch.tensor(weights).cumsum(0)
        return torch.bucketize(self.rand(self.batch) * edges[-1], edges[:-1], right=True)

    def field(self, cells: int, height: int | None = None, width: int | None = None) -> Tensor:
        """A smooth random field, (B, 1, H, W), roughly standard normal, some `cells` bumps wide."""
        size = (height or self.height, width or self.width)
        short = min(size)
        grid = [max(2, round(cells * side / short)) + 1 for side in size]
        coarse = self.send(self.randn(self.batch, 1, *grid))
        return F.interpolate(coarse, size=size, mode="bicubic", align_corners=True)


def members(choice: Tensor, index: int) -> Tensor:
    """Which samples chose `index`: their places, int64, of a host tensor (B,)."""
    return (choice == index).nonzero()[:, 0]


def presence(severity: Tensor) -> Tensor:
    """0 at severity 0 to 1 from a quarter on: how much of what has no strength of its own."""
    return (severity / _KNEE).clamp(max=1)


def lerp(low: float, high: float, severity: Tensor, faint: float | None = None) -> Tensor:
    """Linear in severity: `low` at 0, `high` at 1; with `faint`, from that to the first quarter."""
    value = low + (high - low) * severity
    if faint is None:
        return value
    knee = low + (high - low) * _KNEE
    return torch.where(severity < _KNEE, faint + (knee - faint) * severity / _KNEE, value)


def geometric(low: float, high: float, severity: Tensor, faint: float | None = None) -> Tensor:
    """Geometric in severity: `low` at 0, `high` at 1, both positive; `faint` as in `lerp`."""
    value = low * (high / low) ** severity
    if faint is None:
        return value
    knee = low * (high / low) ** _KNEE
    return torch.where(severity < _KNEE, faint * (knee / faint) ** (severity / _KNEE), value)
