"""Give a finished Nano's decoder its last step, `Grade`: `python -m training.nano.grade --help`."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from diff_restorer import DetailPath
from diff_restorer.grade import INPUTS, Grade, grade_input

from ..batch_files import require_one_process
from ..common import (
    DataConfig,
    ModelConfig,
    Precision,
    checkpoint_info,
    data_for,
    half,
    home,
    open_models,
)
from ..config import run_program, settings
from ..data import load, sampling_noise
from ..loop import LoopConfig
from ..models import Models
from ..train_decoder import Config as DecoderConfig
from ..train_decoder import DecoderLoss

log = logging.getLogger(__name__)

HELD_OUT = 8
"""Every which sample is held out."""


@dataclass(frozen=True)
class Config:
    """Restore degraded photos with a finished Nano, and learn from them where black and white were.

    Of each photo five moments of its colours are enough to know what any contrast and brightness
    would make of it, so that thousands of epochs take seconds.
    """

    data: DataConfig
    """Crops as large as photos: black and white points are of the whole."""
    model: ModelConfig
    """The finished file."""
    out: Path
    """File to write: all parts of it, and the new step."""
    samples: int = 1024
    """Degraded photos, in whole batches; one in eight is held out."""
    batch_size: int = 4
    """Photos at once."""
    steps: int = 3
    """Sampling steps."""
    width: int = 32
    """Hidden width."""
    epochs: int = 3000
    """Over all of them at once; the best on what is held out is taken."""
    lr: float = 3e-3
    """Learning rate, falling to 0."""
    weight_decay: float = 0.03
    """As AdamW's."""
    precision: Precision = "auto"
    """Mixed precision; auto is bf16 where the device computes in it, else no."""
    seed: int = 0
    """Of samples and weights."""


class Moments(NamedTuple):
    """What is known of N restored photos, x, and what they should be, y."""

    seen: Tensor
    """`grade_input`, (N, kinds + 30)."""
    strength: Tensor
    """(N, 1)."""
    means: Tensor
    """Of x, x x, x y, y and y y, of R, G and B: (N, 5, 3)."""

    def psnr(self, grade: Tensor) -> Tensor:
        """(N,) in dB, of a x + b for `grade` (N, 6) of `Grade`, without clipping."""
        gain, offset = (self.strength * grade).chunk(2, dim=1)
        a = gain.exp()
        b = 0.5 + offset - 0.5 * a
        x, xx, xy, y, yy = self.means.unbind(1)
        error = a * a * xx + 2 * a * b * x + b * b - 2 * a * xy - 2 * b * y + yy
        return -10 * error.mean(dim=1).clamp_min(1e-5).log10()


def main(config: Config) -> Path:
    """Restore, learn and write.

    Raises:
        ValueError: The file has no detail path, or several processes were started.
    """
    require_one_process()
    needed = ("base.vae.", "base.unet.", "base.clip_vision.", "control.", "prompt_processor.")
    models, parts = open_models(config.model, needed, config.seed)
    path = models.decoder.extension
    if not isinstance(path, DetailPath):
        raise ValueError("--model.init: its decoder has no detail path")
    path.grade = None  # it learns from what comes before
    path.grade = fit(_moments(config, models), config).to(home())
    info = checkpoint_info(models, {"nano.grade": settings(config)})
    models.save(config.out, tuple(sorted(parts)), info, torch.float32)
    return config.out


def fit(moments: Moments, config: Config) -> Grade:
    """The step that learnt from samples, as it was best on those that are held out."""
    torch.manual_seed(config.seed)
    held = torch.arange(len(moments.seen)) % HELD_OUT == 0
    train, held_out = (Moments(*(value[rows] for value in moments)) for rows in (~held, held))
    kinds = moments.seen.shape[1] - INPUTS
    step = Grade(kinds, config.width)
    optimizer = torch.optim.AdamW(step.parameters(), config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    best, weights = -torch.inf, step.state_dict()
    for epoch in range(config.epochs + 1):
        if epoch % 25 == 0:
            with torch.no_grad():
                score = float(held_out.psnr(step(held_out.seen)).mean())
            if score > best:
                best, weights = score, copy.deepcopy(step.state_dict())
            if epoch == 0:
                log.info("held out: %.2f dB before", score)
        loss = -train.psnr(step(train.seen)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    log.info("held out: %.2f dB, trained on: %.2f dB", best, -float(loss.detach()))
    step.load_state_dict(weights)
    return step


@torch.no_grad()
def _moments(config: Config, models: Models) -> Moments:
    """Of photos as `DecoderLoss.restored` restores them."""
    models.freeze(half(config.precision))
    loop = LoopConfig(config.out.parent, precision=config.precision)
    decoder = DecoderLoss(models, DecoderConfig(loop, config.data, config.model))
    reads = {"gt", "lq", "clip_view", "statistics", models.degradation_key}
    train, _ = data_for(models, config.data, config.seed, reads)
    train = train.sized(config.batch_size)
    numbers = range(-(-config.samples // config.batch_size))
    dtype, rows = half(config.precision), list[Moments]()
    path: Any = models.decoder.extension
    with tqdm(total=len(numbers) * config.batch_size, unit="photo", disable=None) as bar:
        for number, batch in zip(numbers, load(train, numbers, home()), strict=True):
            noise = sampling_noise(config.seed, number)
            with torch.autocast(home().type, dtype, enabled=dtype != torch.float32):
                image = decoder.restored(batch, config.steps, noise).float().clamp(0, 1)
                shares, strength = path.tone_shares(models.read_pooled(batch))
            seen = grade_input(batch["lq"], image, shares.float())
            x, y = image.flatten(2), batch["gt"].flatten(2)
            means = torch.stack([v.mean(dim=2) for v in (x, x * x, x * y, y, y * y)], dim=1)
            rows.append(Moments(*(v.float().cpu() for v in (seen, strength, means))))
            bar.update(config.batch_size)
    return Moments(*(torch.cat(values) for values in zip(*rows, strict=True)))


if __name__ == "__main__":
    run_program(main, Config, __doc__)
