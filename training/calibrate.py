"""How sure a finished file must be before it acts: fit abstention, write it into the metadata.

    python -m training.calibrate --photos clean_photos --rows calibration.jsonl

Clean photos become near-clean looks, that a restoration should leave alone, and degraded ones, by
each kind from mild to strong and by two at once. Each is restored twice: by P_D as it is read, and
by the prototype of clean photos. The thresholds per kind that make the most of both, where a lost
dB counts several times a gained one, go into the file's metadata, which the nodes go by
(`diff_restorer.abstention`); its tensors stay as they are.

Give photos that neither training nor a test uses: a classifier is surer of what it was trained on.
Restores as `training.ablate` does, on centre crops. A run that was stopped goes on with the rows
that it has; 48 photos, 19 rows each, take a core half an hour.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from diff_restorer.abstention import CLEAN, Abstention, draw
from diff_restorer.checkpoint import ONE_KIND, read_checkpoint, write_checkpoint
from diff_restorer.similarity import psnr
from tools.environment import ROOT

from .calibration import Gains, Row, Sample, degraded, fit, near_clean, start_for
from .checkpoints import compare_file, require_space
from .common import Precision, autocast, half
from .config import run_program
from .data import seeded
from .evaluation.pictures import digest, weights_digest
from .evaluation.reading import open_file
from .evaluation.testsets import read_upright
from .evaluation.variants import VARIANTS, Photo
from .models import Models
from .photos import PhotoFile, list_photos
from .pretrained import Sd15Config

log = logging.getLogger(__name__)
SMALLEST = 128
"""Photos with a shorter side than this, in pixels, are left out."""


@dataclass(frozen=True)
class Config:
    """Measure, fit, write."""

    photos: Path
    """Clean photos: a folder, a text list or a CSV manifest."""
    file: Path = ROOT / "models/diff_restorer_nano.safetensors"
    """A finished file that knows `clean`."""
    out: Path | None = None
    """File to write; none replaces `file`."""
    rows: Path = Path("calibration.jsonl")
    """What was measured, a line for each restored photo; a run that was stopped goes on there."""
    limit: int = 48
    """Take so many photos, spread evenly over all; 0 takes all."""
    crop: int = 256
    """Side of the centre crop, in pixels."""
    steps: int = 3
    """Sampling steps; Nano's workflows have 3."""
    seed: int = 0
    """Seed of the degradations and of the sampler's noise."""
    loss: float = 4.0
    """How many gained dB make up for a lost one."""
    sd15: Sd15Config = field(default_factory=Sd15Config)
    """Base networks of a file for SD 1.5 (its workflows sample with `--steps 20`)."""
    precision: Precision = "auto"
    """Number format of the networks, as in training."""


def main(config: Config) -> Path:
    """Fit the file's abstention and write it.

    Raises ValueError where the file does not know `clean` or has no prototypes, a setting cannot
    be, or there is no photo of at least `SMALLEST` pixels, and DiskError where the file has no
    room.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if config.loss < 1 or config.steps < 1 or config.limit < 0 or config.crop < SMALLEST:
        raise ValueError(
            f"--loss {config.loss} --steps {config.steps} --limit {config.limit} --crop "
            f"{config.crop}: expected at least 1, 1, 0 and {SMALLEST}"
        )
    checkpoint = read_checkpoint(config.file)
    info = checkpoint.info
    if CLEAN not in info.types:
        raise ValueError(
            f"--file: {config.file} knows {', '.join(info.types)}, but not {CLEAN!r}, so that it "
            "has nothing to turn to where it is not sure"
        )
    rows = measure(config, open_file(config.file, config.sd15))
    if not rows:
        raise ValueError(f"--photos: {config.photos} has no photo of {SMALLEST} px or more")
    gains = Gains.of(rows)
    abstention = fit(gains, start_for(info.types, info.classification == ONE_KIND), config.loss)
    log.info("%s", report(gains, abstention))
    out = config.out or config.file
    tensors = checkpoint.state("")
    require_space(out.parent, sum(value.nbytes for value in tensors.values()), "its tensors")
    write_checkpoint(out, tensors, replace(info, abstention=abstention))
    compare_file(out, tensors)
    return out


def measure(config: Config, models: Models) -> list[Row]:
    """Rows of all samples; those that `config.rows` has are not made again."""
    if not models.prompt.prototypes.any():
        raise ValueError(
            f"--file: {config.file} holds no class prototypes; `python -m training.export` adds "
            "them"
        )
    settings = f"{config.crop} {config.steps} {config.seed} {half(config.precision)}"
    weights = weights_digest(config.file)
    known = _known(config.rows)
    rows: list[Row] = []
    paths = _spread(list_photos(config.photos), config.limit)
    config.rows.parent.mkdir(parents=True, exist_ok=True)
    with config.rows.open("a", encoding="utf-8") as file:
        for place, path in enumerate(tqdm(paths, desc="restored twice", unit="photo")):
            name = Path(path.name).name
            for sample in _samples(path, place, models.types, config):
                pixels = (image.numpy().tobytes() for image in (sample.lq, sample.gt))
                mark = digest(weights, settings, *pixels)
                if (row := known.get(mark)) is None:
                    row = restore_twice(models, sample, name, config)
                    file.write(json.dumps({"mark": mark, **asdict(row)}) + "\n")
                    file.flush()
                rows.append(row)
    return rows


def _known(path: Path) -> dict[str, Row]:
    """Rows of earlier runs, by digest of weights, settings and pixels."""
    known: dict[str, Row] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # cut off where a run was stopped
        mark = entry.pop("mark")
        lists = {name: tuple(entry[name]) for name in ("kinds", "probabilities")}
        known[mark] = Row(**(entry | lists))
    return known


def _spread(paths: Sequence[PhotoFile], limit: int) -> list[PhotoFile]:
    count = min(limit or len(paths), len(paths))
    return [paths[place * len(paths) // count] for place in range(count)]


def _samples(path: PhotoFile, place: int, types: Sequence[str], config: Config) -> Iterator[Sample]:
    photo = read_upright(path)
    height, width = photo.shape[-2:]
    if min(height, width) < SMALLEST:
        return
    top, left = (max(0, side - config.crop) // 2 for side in (height, width))
    crop = photo[..., top : top + config.crop, left : left + config.crop].contiguous()
    yield from near_clean(crop, seeded(config.seed, place))
    yield from degraded(crop, [name for name in types if name != CLEAN], place, config.seed)


def restore_twice(models: Models, sample: Sample, photo: str, config: Config) -> Row:
    """One photo by its P_D as read and by the prototype of clean photos, with the same noise."""
    with torch.no_grad(), autocast(config.precision):
        as_read = Photo(models, sample.lq, sample.gt, (config.seed, photo))
        restored = as_read.restore(VARIANTS["full"], config.steps)
        untouched = with_trust(as_read, 0.0).restore(VARIANTS["full"], config.steps)

    def to_gt(image: Tensor) -> float:
        return round(float(psnr(image, sample.gt)), 4)

    in_full = as_read.prompt._replace(logits=as_read.prompt.logits.float())
    probabilities = in_full.probabilities(models.classification)[0].tolist()
    return Row(
        photo,
        sample.name,
        sample.kinds,
        tuple(round(value, 6) for value in probabilities),
        *map(to_gt, (sample.lq, restored, untouched)),
    )


def with_trust(photo: Photo, trust: float) -> Photo:
    """The same photo with its P_D drawn towards that of clean photos."""
    drawn, models, prompt = copy.copy(photo), photo.models, photo.prompt
    clean = models.prompt.prototypes[models.types.index(CLEAN)]
    share = torch.full((len(prompt.pooled),), trust, device=clean.device)
    tokens, pooled = draw(prompt.degradation, prompt.pooled, clean, share)
    drawn.prompt = prompt._replace(degradation=tokens, pooled=pooled)
    drawn._latents = {}  # the others were sampled by P_D as read
    return drawn


def report(gains: Gains, abstention: Abstention) -> str:
    """What the thresholds are and what they change on the photos that they were fitted on."""
    lines = [f"{name}: {low} to {high}" for name, (low, high) in abstention.thresholds.items()]
    trusts = {
        "as read": torch.ones_like(gains.read),
        "abstaining": abstention.trust(gains.probabilities),
        "always clean": torch.zeros_like(gains.read),
    }
    for name, trust in trusts.items():
        gain = gains.under(trust)
        near, rest = gain[gains.near_clean], gain[~gains.near_clean]
        lines.append(
            f"{name}: near-clean photos {near.mean():+.2f} dB, {(near < -1).float().mean():.1%} "
            f"lose over 1 dB; degraded ones {rest.mean():+.2f} dB, "
            f"{(rest < -1).float().mean():.1%}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_program(main, Config, __doc__)
