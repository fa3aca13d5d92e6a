"""A linear fit that trains in milliseconds, for tests that start, share and kill runs.

As a program: python -m tests.training.toys '{"out": "folder", "steps": 6}'
"""

from __future__ import annotations

import io
import json
import logging
import sys
import tarfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from training.data import Batches, to_device
from training.loop import LoopConfig, Stage, run
from training.progress import read_table


class Points(Dataset[dict[str, Tensor]]):
    """Sample i is a function of i, and a batch the next so many samples."""

    def __init__(self, batch_size: int = 1) -> None:
        self.batch_size = batch_size

    def __len__(self) -> int:
        return 12

    def sized(self, batch_size: int) -> Points:
        return type(self)(batch_size)

    def sample(self, index: int) -> Tensor:
        return torch.randn(4, generator=torch.Generator().manual_seed(index))

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        first = number * self.batch_size
        x = torch.stack([self.sample(first + place) for place in range(self.batch_size)])
        return {"x": x, "y": x.sum(dim=1, keepdim=True)}

    def finish(self, item: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        return {name: to_device(value, device) for name, value in item.items()}


def config(out: Path, **changes: Any) -> LoopConfig:
    settings = {
        "steps": 6, "batch_size": 2, "lr": 1e-2, "warmup": 2, "precision": "no", "workers": 0,
        "checkpoint_every": 2, "validate_every": 6, "log_every": 1, "ema": 0.5, "threads": 1,
    }  # fmt: skip
    return LoopConfig(out=out, **(settings | changes))


def stage(stop_at: int | None = None, scale: float = 1.0) -> Stage:
    """A fit with noise from the step's generator, dropout and a frozen part, which stops at a batch
    like a killed process."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 1))
    frozen = nn.Linear(4, 4).requires_grad_(False)
    seen = 0

    def loss(batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        nonlocal seen
        seen += 1
        if seen == stop_at:
            raise KeyboardInterrupt
        noise = 0.1 * torch.randn(batch["y"].shape, generator=generator)
        error = model(batch["x"] + frozen(batch["x"])) + noise - batch["y"]
        even = error[batch["x"][:, :1] > 0].square().mean()  # NaN in batches without such x
        return {"loss": scale * error.square().mean(), "even": even.detach()}

    def validate(step: int, folder: Path) -> dict[str, float]:
        return {"weight": float(model.state_dict()["0.weight"].sum())}

    def export(path: Path, settings: dict[str, Any]) -> None:
        save_file(model.state_dict(), path)

    def check(path: Path) -> None:
        if not same(load_file(path), model.state_dict()):
            raise ValueError(f"{path}: reads back other than it was written")

    hidden = (model.get_parameter("0.weight"),)
    return Stage(model, loss, validate, export, hidden=hidden, check=check)


TIMED = ("samples_per_s", "wait_share", "peak_gb", "eta_s")


def untimed(path: Path) -> list[dict[str, str]]:
    """Rows of a table without what a clock and the machine have a say in."""
    return [{k: v for k, v in row.items() if k not in TIMED} for row in read_table(path)]


def drawn(batches: Batches, number: int) -> dict[str, Tensor]:
    """A batch on the CPU."""
    return batches.finish(batches[number], torch.device("cpu"))


def occurs(crop: Tensor, photo: Tensor) -> bool:
    """Whether a crop is a window of the photo, pixel by pixel."""
    side = crop.shape[-1]
    windows = photo.unfold(1, side, 1).unfold(2, side, 1)  # (3, rows, columns, side, side)
    return bool((windows == crop[:, None, None]).all(-1).all(-1).all(0).any())


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    """An uncompressed tar of these files."""
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def train(settings: dict[str, Any]) -> Path:
    """One run in this process."""
    return run(stage(), Points(), config(**(settings | {"out": Path(settings["out"])})))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    train(json.loads(sys.argv[1]))
