"""A small restoration network for comparison: same data, no diffusion, no degradation prompt.

Run: python -m training.evaluation.nafnet --help
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from diff_restorer import zero_init

from ..common import DataConfig, git_revision, home, open_data, to_home
from ..config import run_program
from ..loop import LoopConfig, Stage, maybe_compile, run
from ..losses import psnr_loss
from ..models import Sizes, psnr_gain
from ..sheets import save_sheet

FORMAT = "diff-restorer-nafnet"


@dataclass(frozen=True)
class Config:
    """Train the comparison network on the photos and with the loss of Nano's decoder."""

    loop: LoopConfig
    data: DataConfig
    width: int = 32
    """Channels at full size."""
    blocks: tuple[int, ...] = (1, 2, 2, 4)
    """Blocks per level; the last number is the middle. The decoder mirrors the encoder."""


class ChannelNorm(nn.Module):
    """Layer norm over the channels of each pixel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, 1, 1))
        self.bias = nn.Parameter(torch.zeros(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        spread, mean = torch.var_mean(x, dim=1, keepdim=True, correction=0)
        return (x - mean) * torch.rsqrt(spread + 1e-6) * self.weight + self.bias


def simple_gate(x: Tensor) -> Tensor:
    """Half of the channels times the other half, in place of an activation."""
    first, second = x.chunk(2, dim=1)
    return first * second


class Block(nn.Module):
    """NAFNet's block. Source: Chen et al., arXiv 2204.04676, figure 2 (e)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(width), ChannelNorm(width)
        self.expand = nn.Conv2d(width, 2 * width, 1)
        self.spatial = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.attention = nn.Conv2d(width, width, 1)
        self.project = nn.Conv2d(width, width, 1)
        self.up, self.down = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(width, width, 1)
        self.beta = nn.Parameter(torch.zeros(width, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = simple_gate(self.spatial(self.expand(self.norm1(x))))
        h = h * self.attention(h.mean((2, 3), keepdim=True))
        x = x + self.beta * self.project(h)
        return x + self.gamma * self.down(simple_gate(self.up(self.norm2(x))))


class NafNet(nn.Module):
    """U-shaped stack of `Block`s that predicts what to add to the photo."""

    def __init__(self, width: int, blocks: Sequence[int]) -> None:
        super().__init__()
        *levels, middle = blocks
        widths = [width * 2**level for level in range(len(levels) + 1)]
        self.factor = 2 ** len(levels)
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.head = zero_init(nn.Conv2d(width, 3, 3, padding=1))
        self.encoders, self.decoders = nn.ModuleList(), nn.ModuleList()
        self.shrink, self.enlarge = nn.ModuleList(), nn.ModuleList()
        for count, fine, coarse in zip(levels, widths, widths[1:], strict=False):
            self.encoders.append(nn.Sequential(*(Block(fine) for _ in range(count))))
            self.decoders.append(nn.Sequential(*(Block(fine) for _ in range(count))))
            self.shrink.append(nn.Conv2d(fine, coarse, 2, stride=2))
            enlarge = nn.Sequential(nn.Conv2d(coarse, 4 * fine, 1, bias=False), nn.PixelShuffle(2))
            self.enlarge.append(enlarge)
        self.middle = nn.Sequential(*(Block(widths[-1]) for _ in range(middle)))

    def forward(self, image: Tensor) -> Tensor:
        """Restored photo, (B, 3, H, W), of one in [0, 1]; any size."""
        height, width = image.shape[-2:]
        edge = (0, -width % self.factor, 0, -height % self.factor)
        padded = F.pad(image, edge, mode="replicate")
        h, skips = self.stem(padded), []
        for encoder, shrink in zip(self.encoders, self.shrink, strict=True):
            h = encoder(h)
            skips.append(h)
            h = shrink(h)
        h = self.middle(h)
        for index in reversed(range(len(skips))):
            h = self.decoders[index](self.enlarge[index](h) + skips[index])
        return (padded + self.head(h))[..., :height, :width]


def load_nafnet(path: Path) -> NafNet:
    """Opens a file of this program.

    Raises:
        ValueError: It is something else.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            note = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"--nafnet: {path} cannot be read ({error})") from error
    if note.get("format") != FORMAT:
        raise ValueError(f"--nafnet: {path} is no file of `python -m training.evaluation.nafnet`")
    blocks = tuple(int(count) for count in note["blocks"].split())
    network = NafNet(int(note["width"]), blocks)
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)


def main(config: Config) -> Path:
    """Train, and write a file for `python -m training.evaluate --nafnet`."""
    torch.manual_seed(config.loop.seed)
    train, validation = open_data(config.data, Sizes(), config.loop.seed, reads={"gt", "lq"})
    validation = to_home(validation)
    network = NafNet(config.width, config.blocks).to(home())
    restore = maybe_compile(network.forward, config.loop)

    def loss(batch: dict[str, Tensor], _: torch.Generator) -> dict[str, Tensor]:
        restored = restore(batch["lq"]).float()
        gain = psnr_gain(restored.detach(), batch["lq"], batch["gt"])
        return {"loss": psnr_loss(restored, batch["gt"]), "psnr_gain": gain}

    @torch.no_grad()
    def validate(step: int, folder: Path) -> dict[str, float]:
        images = {name: validation[name] for name in ("lq", "gt")}
        images["restored"] = network(images["lq"]).float()
        save_sheet(folder / f"{step:07d}.jpg", {name: rows[:18] for name, rows in images.items()})
        return {"psnr_gain": float(psnr_gain(images["restored"], images["lq"], images["gt"]))}

    def tensors() -> dict[str, Tensor]:
        return {key: value.cpu().contiguous() for key, value in network.state_dict().items()}

    def export(path: Path, settings: dict[str, Any]) -> None:
        note = {
            "format": FORMAT,
            "width": str(config.width),
            "blocks": " ".join(map(str, config.blocks)),
            "config": json.dumps(settings),
            "git_revision": git_revision(),
        }
        save_file(tensors(), path, metadata=note)

    def check(path: Path) -> None:
        found = load_nafnet(path).state_dict()
        if wrong := [key for key, value in tensors().items() if not torch.equal(found[key], value)]:
            raise ValueError(f"{path}: reads back other than it was written ({wrong[0]})")

    return run(Stage(network, loss, validate, export, check=check), train, config.loop, config)


if __name__ == "__main__":
    run_program(main, Config, __doc__)
