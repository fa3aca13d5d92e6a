"""Random draws for a batch: every number comes from one generator, in one order."""

import torch
from torch import Tensor
from torch.nn import functional as F

Bound = float | Tensor


class Draw:
    """Draws per-sample parameters for a batch of images.

    Numbers are drawn on the generator's device and moved to the images' device, so that a CPU
    generator gives the same degradation on every device.
    """

    def __init__(self, image: Tensor, generator: torch.Generator) -> None:
        self.generator = generator
        self.device = image.device
        self.batch, _, self.height, self.width = image.shape

    def rand(self, *shape: int) -> Tensor:
        """Uniform [0, 1) numbers of the given shape."""
        values = torch.rand(shape, generator=self.generator, device=self.generator.device)
        return values.to(self.device)

    def randn(self, *shape: int) -> Tensor:
        """Standard normal numbers of the given shape."""
        values = torch.randn(shape, generator=self.generator, device=self.generator.device)
        return values.to(self.device)

    def uniform(self, low: Bound, high: Bound) -> Tensor:
        """One number per sample, (B,); bounds may be per sample."""
        return low + (high - low) * self.rand(self.batch)

    def chance(self, probability: float) -> Tensor:
        """One boolean per sample, (B,)."""
        return self.rand(self.batch) < probability

    def choice(self, *weights: float) -> Tensor:
        """One index per sample, (B,), drawn in proportion to `weights`."""
        edges = torch.tensor(weights, device=self.device).cumsum(0)
        return torch.bucketize(self.rand(self.batch) * edges[-1], edges[:-1], right=True)

    def field(self, cells: int, height: int | None = None, width: int | None = None) -> Tensor:
        """A smooth random field, (B, 1, H, W), roughly standard normal, some `cells` bumps wide."""
        size = (height or self.height, width or self.width)
        short = min(size)
        grid = [max(2, round(cells * side / short)) + 1 for side in size]
        coarse = self.randn(self.batch, 1, *grid)
        return F.interpolate(coarse, size=size, mode="bicubic", align_corners=True)


def per_sample(value: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1), to broadcast over images."""
    return value[:, None, None, None]


def lerp(low: float, high: float, severity: Tensor) -> Tensor:
    """Linear in severity: `low` at 0, `high` at 1."""
    return low + (high - low) * severity


def geometric(low: float, high: float, severity: Tensor) -> Tensor:
    """Geometric in severity: `low` at 0, `high` at 1, both positive."""
    return low * (high / low) ** severity
