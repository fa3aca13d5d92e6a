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
from safetensors.torch import save_file
from spandrel import ImageModelDescriptor, ModelLoader
from spandrel.architectures.NAFNet import NAFNet
from torch import Tensor, nn

from diff_restorer import zero_init

from ..common import DataConfig, git_revision, home, open_data, to_home
from ..config import run_program
from ..loop import LoopConfig, Stage, maybe_compile, run
from ..losses import psnr_loss
from ..models import psnr_gain
from ..networks import Sizes
from ..sheets import save_sheet


@dataclass(frozen=True)
class Config:
    """Train the comparison network on the photos and with the loss of Nano's decoder."""

    loop: LoopConfig
    data: DataConfig
    width: int = 32
    """Channels at full size."""
    blocks: tuple[int, ...] = (1, 2, 2, 4)
    """Blocks per level; the last number is the middle. The decoder mirrors the encoder."""


def new_nafnet(width: int, blocks: Sequence[int]) -> nn.Module:
    """NAFNet (Chen et al., arXiv 2204.04676) that starts as the identity, by spandrel."""
    *levels, middle = blocks
    network = NAFNet(
        width=width, enc_blk_nums=levels, middle_blk_num=middle, dec_blk_nums=levels[::-1]
    )
    zero_init(network.ending)
    return network


def load_network(path: Path) -> nn.Module:
    """Opens a network that restores photos at their size, (B, 3, H, W) in [0, 1], of this program
    or any that spandrel reads; raises ValueError for something else."""
    try:
        descriptor = ModelLoader(home()).load_from_file(path)
    except Exception as error:  # zip, pickle, safetensors, OS and spandrel's own errors alike
        raise ValueError(f"--nafnet: {path} is no network that spandrel reads ({error})") from error
    if not isinstance(descriptor, ImageModelDescriptor) or descriptor.scale != 1:
        name = descriptor.architecture.name
        raise ValueError(f"--nafnet: {path} is {name}, which does not keep size")
    return descriptor.model.eval().requires_grad_(False)


def main(config: Config) -> Path:
    """Train, and write a file for `python -m training.evaluate --nafnet`."""
    torch.manual_seed(config.loop.seed)
    train, validation = open_data(config.data, Sizes(), config.loop.seed, reads={"gt", "lq"})
    validation = to_home(validation)
    network = new_nafnet(config.width, config.blocks).to(home())
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
        note = {"config": json.dumps(settings), "git_revision": git_revision()}
        save_file(tensors(), path, metadata=note)

    def check(path: Path) -> None:
        stored = {key: value.cpu() for key, value in load_network(path).state_dict().items()}
        if wrong := [k for k, value in tensors().items() if not torch.equal(stored[k], value)]:
            raise ValueError(f"{path}: reads back other than it was written ({wrong[0]})")

    return run(Stage(network, loss, validate, export, check=check), train, config.loop, config)


if __name__ == "__main__":
    run_program(main, Config, __doc__)
