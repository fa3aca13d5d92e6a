"""A small restoration network for comparison: same data, no diffusion, no degradation prompt.

Run: python -m training.evaluation.nafnet --data.photos folder --minutes 45 --out nafnet.safetensors
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from diff_restorer import zero_init

from ..common import DataConfig, git_revision, open_data
from ..data import StepSampler
from ..models import Sizes, psnr

log = logging.getLogger(__name__)
FORMAT = "diff-restorer-nafnet"


@dataclass(frozen=True)
class Config:
    """Train the comparison network for a given time."""

    data: DataConfig
    out: Path
    """safetensors file to write."""
    minutes: float = 45
    """Training time."""
    width: int = 32
    """Channels at full size."""
    blocks: tuple[int, ...] = (1, 2, 2, 4)
    """Blocks per level; the last number is the middle. The decoder mirrors the encoder."""
    batch_size: int = 8
    """Samples per step."""
    lr: float = 1e-3
    """Peak learning rate of AdamW; warm-up over 2 % of the time, then cosine to zero."""
    workers: int = 1
    """Data processes."""
    seed: int = 0
    """Seed of data and weights."""


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
    """Train and write the file."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(config.seed)
    samples, validation = open_data(config.data, Sizes(), config.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = NafNet(config.width, config.blocks).to(device)
    log.info("%.2f M parameters", sum(p.numel() for p in network.parameters()) / 1e6)
    optimizer = torch.optim.AdamW(network.parameters(), config.lr, betas=(0.9, 0.9))
    loader = iter(
        DataLoader(
            samples,
            batch_sampler=StepSampler(config.seed, batch_size=config.batch_size),
            num_workers=config.workers,
        )
    )
    begun, seconds, step = time.monotonic(), 60 * config.minutes, 0
    with tqdm(total=round(seconds), unit="s", mininterval=5) as bar:
        while (done := (time.monotonic() - begun) / seconds) < 1:
            optimizer.param_groups[0]["lr"] = config.lr * min(
                1.0, (done + 1e-3) / 0.02, 0.5 * (1 + math.cos(math.pi * done))
            )
            batch = next(loader)
            with torch.autocast(device.type, torch.bfloat16):
                restored = network(batch["lq"].to(device))
            loss = F.l1_loss(restored.float(), batch["gt"].to(device))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            step += 1
            bar.set_postfix(step=step, l1=f"{loss.item():.4f}", refresh=False)
            bar.update(round(time.monotonic() - begun) - bar.n)
    network.eval()
    with torch.no_grad():
        restored = network(validation["lq"].to(device)).cpu()
    before, after = (psnr(image, validation["gt"]) for image in (validation["lq"], restored))
    gain = (after - before).clamp(-20, 30)
    log.info("%d steps, gain on held-out crops %+.2f dB", step, float(gain.mean()))
    note = {
        "format": FORMAT,
        "width": str(config.width),
        "blocks": " ".join(map(str, config.blocks)),
        "minutes": str(config.minutes),
        "steps": str(step),
        "git_revision": git_revision(),
    }
    config.out.parent.mkdir(parents=True, exist_ok=True)
    state = {key: value.cpu().contiguous() for key, value in network.state_dict().items()}
    save_file(state, config.out, metadata=note)
    return config.out


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
