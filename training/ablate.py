"""What each part of Diff-Restorer is worth: one table, all variants on the same photos and noise.

    python -m training.ablate --data.clean CBSD68 --data.limit 10 --out ablation_out

Parts are switched off in the finished file: P_S by zeros, as training's dropout does; P_D by the
mean of the class prototypes. That says how much the model leans on a part; a model that never had
the part may do better, so give files that were trained without it where there are some:
--retrained no_ps a.safetensors no_ce b.safetensors. Such a file keeps its own P_S and P_D, as far
as it was trained with them (its metadata says what it leaves out).

Runs in PyTorch without ComfyUI: whole photos padded to multiples of 8, DDIM (Nano's workflows use
Euler). Writes table.md, ablation.json and ablation.png to --out; a run that was stopped goes on
where it was.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
import torch
import tyro
from tqdm import tqdm

from diff_restorer.degradations import KINDS
from tools.ending import in_words
from tools.environment import ROOT

from .common import Precision, autocast, git_revision, half, mixed_precision
from .evaluation import plots
from .evaluation.metrics import fidelity
from .evaluation.pictures import (
    digest,
    file_digest,
    pixel_digest,
    read_image,
    read_json,
    weights_digest,
    write_atomically,
)
from .evaluation.reading import open_file
from .evaluation.report import DEGRADED
from .evaluation.tables import SETTINGS, table
from .evaluation.testsets import Case, synthetic
from .evaluation.variants import VARIANTS, Photo, Variant
from .models import Models
from .pretrained import Sd15Config

log = logging.getLogger(__name__)
PARTS = ("no_ps", "no_pd_control", "no_pd_decoder", "stock_decoder", "no_diffusion", "no_ce")
"""Variants that decide whether a part of the method helps."""
CODE = (
    *sorted((ROOT / "diff_restorer").rglob("*.py")),
    *(ROOT / f"training/{name}.py" for name in ("data", "diffusion", "models", "networks")),
    ROOT / "training/pretrained.py",
    *(ROOT / f"training/evaluation/{name}.py" for name in ("metrics", "reading", "variants")),
)
"""What scores depend on."""
Scores = dict[str, dict[str, dict[str, float]]]
"""Case id -> variant -> `psnr`, `ssim`, `seconds`."""


@dataclass(frozen=True)
class AblationData:
    """Photos to compare on."""

    clean: Path
    """Clean photos to degrade: a folder, a text list or a CSV manifest."""
    limit: int = 10
    """Only the first photos; 0 takes all."""
    seed: int = 0
    """Seed of the degradations and of the sampler's noise."""
    kinds: tuple[str, ...] = KINDS
    """Test sets to run."""


@dataclass(frozen=True)
class Config:
    """Restore with parts left out, and compare with the full model photo by photo."""

    data: AblationData
    out: Path = Path("ablation_out")
    """Folder of the results."""
    file: Path = ROOT / "models/diff_restorer_nano.safetensors"
    """The full model: a finished file."""
    sd15: Sd15Config = field(default_factory=Sd15Config)
    """Base networks of a file for SD 1.5 (its workflows sample with `--steps 20`)."""
    retrained: dict[str, Path] = field(default_factory=dict)
    """Variant -> file that was trained that way."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Which to run; `full` always runs."""
    steps: int = 3
    """Sampling steps; Nano's workflows have 3."""
    precision: Precision = "auto"
    """Number format of the networks, as in training."""


def check_names(config: Config) -> None:
    """Raises ValueError for a variant or kind that does not exist."""
    for option, names, known in (
        ("--variants", config.variants, VARIANTS),
        ("--retrained", config.retrained, VARIANTS),
        ("--data.kinds", config.data.kinds, KINDS),
    ):
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"{option}: unknown {unknown}; known are {', '.join(known)}")


def chosen_variants(config: Config) -> dict[str, Variant]:
    """Variants that can run, `full` first; one that needs training needs its file, which leaves out
    by itself what it was trained without."""
    chosen: dict[str, Variant] = {}
    for name in ("full", *config.variants):
        variant = VARIANTS[name]
        if name in config.retrained:
            chosen[name] = replace(variant, semantic=True, degradation=True, pooled=True)
        elif not variant.retrained:
            chosen[name] = variant
    return chosen


def score_case(
    case: Case, models: Mapping[Path, Models], todo: Mapping[str, Variant], config: Config
) -> dict[str, dict[str, float]]:
    """Restores one photo in some variants; variant -> PSNR, SSIM and seconds."""
    lq, gt = read_image(case.lq), read_image(case.gt)
    photos: dict[Path, Photo] = {}
    scores: dict[str, dict[str, float]] = {}
    with torch.no_grad(), autocast(config.precision):
        for name, variant in todo.items():
            file = config.retrained.get(name, config.file)
            if file not in photos:
                photos[file] = Photo(models[file], lq, gt, (config.data.seed, case.id))
            begun = time.perf_counter()
            restored = photos[file].restore(variant, config.steps)
            seconds = time.perf_counter() - begun
            scores[name] = fidelity(restored, gt) | {"seconds": seconds}
    return scores


def run(config: Config, cases: Sequence[Case]) -> Scores:
    """Scores of every case, from the cache where they are still right."""
    variants = chosen_variants(config)
    files = {name: config.retrained.get(name, config.file) for name in variants}
    models = {file: open_file(file, config.sd15) for file in set(files.values())}
    code = file_digest(*CODE)
    marks = {file: digest(file_digest(file), code) for file in models}
    scores: Scores = {}
    for case in tqdm(cases, desc="ablation", unit="photo"):
        cache = config.out / "scores" / f"{case.id}.json"
        stored = read_json(cache)
        settings = f"{config.steps} {half(config.precision)} {config.data.seed}"
        photo = digest(pixel_digest(case.lq), pixel_digest(case.gt), settings)
        keys = {name: digest(photo, marks[files[name]], str(variants[name])) for name in variants}
        todo = {n: v for n, v in variants.items() if stored.get(n, {}).get("key") != keys[n]}
        if todo:
            fresh = score_case(case, models, todo, config)
            stored |= {name: {"key": keys[name], **values} for name, values in fresh.items()}
            write_atomically(cache, json.dumps(stored))
        scores[case.id] = {
            name: {key: value for key, value in stored[name].items() if key != "key"}
            for name in variants
        }
    return scores


def mean_difference(kinds: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Mean of paired differences, its `standard_error`, and `interval`, half the width of its 95 %
    confidence interval by Student's t; both None for a single pair.

    Several kinds weigh alike, as means of independent samples (Welch and Satterthwaite's degrees
    of freedom).
    """
    gap: dict[str, Any] = {"difference": math.nan, "standard_error": None, "interval": None}
    if kinds:
        gap["difference"] = float(np.mean([np.mean(values) for values in kinds]))
    if kinds and min(map(len, kinds)) > 1:
        free = np.array([len(values) - 1 for values in kinds])
        squares = np.array([np.var(values, ddof=1) / len(values) for values in kinds])
        error = math.sqrt(squares.sum()) / len(kinds)
        freedom = squares.sum() ** 2 / ((squares**2 / free).sum() or 1)
        gap["standard_error"] = error
        gap["interval"] = float(error * scipy.stats.t.ppf(0.975, max(freedom, 1)))
    return gap


def summarize(config: Config, cases: Sequence[Case], scores: Scores) -> dict[str, Any]:
    """Per variant: mean PSNR and SSIM, and paired differences to `full`, per kind and over all.

    The mean over kinds is that of the degraded ones, without `clean`.
    """
    rows: dict[str, Any] = {}
    kinds = [kind for kind in KINDS if any(case.set == kind for case in cases)]
    degraded = [kind for kind in kinds if kind in DEGRADED]
    for name, variant in chosen_variants(config).items():
        per_kind: dict[str, Any] = {}
        gaps: dict[str, list[float]] = {}
        for kind in kinds:
            ids = [case.id for case in cases if case.set == kind]
            gaps[kind] = [scores[i][name]["psnr"] - scores[i]["full"]["psnr"] for i in ids]
            per_kind[kind] = {
                "psnr": float(np.mean([scores[i][name]["psnr"] for i in ids])),
                "ssim": float(np.mean([scores[i][name]["ssim"] for i in ids])),
                **mean_difference([gaps[kind]]),
            }
        row: dict[str, Any] = {"title": variant.title, "kinds": per_kind}
        row["file"] = config.retrained.get(name, config.file).name
        row["retrained"] = name in config.retrained
        row["seconds"] = float(np.mean([scores[case.id][name]["seconds"] for case in cases]))
        for key in ("psnr", "ssim"):
            values = [per_kind[kind][key] for kind in degraded]
            row[key] = float(np.mean(values)) if values else math.nan
        rows[name] = row | mean_difference([gaps[kind] for kind in degraded])
    return rows


def verdict(row: Mapping[str, Any]) -> str:
    """One line that says whether the model is better for what this variant leaves out."""
    worth, error = -row["difference"], row["standard_error"]
    if error is None:
        known = "one photo only, no verdict"
    elif abs(worth) <= row["interval"]:
        known = "**no difference that these photos can show**"
    else:
        known = "yes" if worth > 0 else "**no, the model is better without it**"
    spread = "" if error is None else f" ± {error:.2f}"
    return f"- {row['title']}: the full model is {worth:+.2f}{spread} dB ahead: {known}"


def markdown(config: Config, rows: Mapping[str, Any], photos: int) -> str:
    """The table and how to read it."""
    kinds = list(rows["full"]["kinds"])
    precision = mixed_precision(config.precision).replace("no", "fp32")

    def shown(entry: Mapping[str, Any]) -> str:
        gap, error = entry["difference"], entry["standard_error"]
        if error is None:
            return f"{gap:+.2f}"
        star = "\\*" if abs(gap) > max(entry["interval"], 0.005) else ""
        return f"{gap:+.2f} ± {error:.2f}{star}"

    lines = []
    for name, row in rows.items():
        title = row["title"] + (" (retrained)" if row["retrained"] else "")
        cells = [title, f"{row['psnr']:.2f}", f"{row['ssim']:.3f}"]
        if name == "full":
            lines.append([*cells, "", *(f"{row['kinds'][kind]['psnr']:.2f}" for kind in kinds)])
        else:
            lines.append([*cells, shown(row), *(shown(row["kinds"][kind]) for kind in kinds)])
    verdicts = [verdict(rows[name]) for name in PARTS if name in rows]
    absent = [
        VARIANTS[name].title
        for name in VARIANTS
        if VARIANTS[name].retrained and name not in config.retrained
    ]
    parts = [
        "# Ablation",
        f"File `{config.file.name}` (tensors sha256 {weights_digest(config.file)[:16]}), code "
        f"{git_revision()}, {photos} photos of `{config.data.clean.name}` per kind, seed "
        f"{config.data.seed}, {config.steps} DDIM steps, {precision}. "
        f"{SETTINGS[0].upper()}{SETTINGS[1:]}.",
        "The first row is PSNR in dB; the others are paired differences to it in dB, ± their "
        "standard error. \\* marks those beyond chance (t test at 5 %). The mean is over the "
        "degraded kinds, without `clean`.",
        table(("variant", "PSNR", "SSIM", "difference", *kinds), lines),
    ]
    if verdicts:
        parts.append("Does each part help?\n\n" + "\n".join(verdicts))
    if absent:
        parts.append("Not trained, so not measured: " + ", ".join(absent) + ".")
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def ablate(config: Config) -> tuple[dict[str, Any], dict[str, str]]:
    """Runs and writes everything; returns the summary and the photos that failed."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    check_names(config)
    made = synthetic(config.data.clean, config.out / "testset", config.data.limit, config.data.seed)
    cases = [case for case in made.cases if case.set in config.data.kinds]
    if not cases:
        raise ValueError(f"no test photo can be used: {made.failed}")
    rows = summarize(config, cases, scores := run(config, cases))
    photos = len({case.name for case in cases})
    report = {
        "git_revision": git_revision(),
        "weights_sha256": weights_digest(config.file),
        "settings": json.loads(json.dumps(asdict(config), default=str)),
        "variants": rows,
        "photos": scores,
    }
    write_atomically(config.out / "ablation.json", json.dumps(report, indent=1) + "\n")
    text = markdown(config, rows, photos)
    write_atomically(config.out / "table.md", text)
    drawn = [{"name": row["title"], **row} for name, row in rows.items() if name != "full"]
    if drawn and not math.isnan(rows["full"]["psnr"]):
        title = f"mean over the degraded kinds, full model {rows['full']['psnr']:.2f} dB"
        plots.draw_differences(drawn, config.out / "ablation.png", title)
    log.info("\n%s", text)
    return rows, made.failed


@in_words
def main(config: Config) -> int:
    """Entry point; returns the exit code."""
    _, failed = ablate(config)
    for name, reason in failed.items():
        log.error("failed: %s: %s", name, reason)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))
