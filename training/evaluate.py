"""Scores the shipped Nano, or any workflow, on photos with fixed seeds and on real pairs.

    python -m training.evaluate --data.clean CBSD68 --data.pairs pairs --out eval_out

Degrades every clean photo by the nine kinds, restores it through ComfyUI's API (a server of its
own, or --server), and writes to --out: table.md, metrics.json, scores.json (for training.export
--scores), bars.png, confusion.png, tsne.png, sheet.jpg and sheets/. A pair set is a folder
<pairs>/<set>/{lq,gt} with the same file names in both, named after its kind (noise_real,
lowlight_real, ...); or --data.pairs is one published set, in a layout that training reads. The
same command goes on where a run was stopped, and makes again only what a changed photo, seed,
workflow or weights file concerns.

Exit code: 0; 1 if a photo failed (it is named in table.md); 2 with --check if a quality bar is
missed.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from diff_restorer.checkpoint import read_checkpoint
from diff_restorer.degradations import KINDS
from tools.client import Client, ClientError, load_workflow
from tools.environment import ROOT
from tools.host import Host, HostError, exit_on_termination
from tools.restore import NANO_WORKFLOW

from .common import git_revision
from .evaluation import baselines, nafnet, plots, report, tables
from .evaluation.competing import best_baseline, read_photo, run_baselines
from .evaluation.metrics import Learned, fidelity
from .evaluation.pictures import (
    digest,
    file_digest,
    pixel_digest,
    read_image,
    read_note,
    save_picture,
    to_picture,
    weights_digest,
    write_atomically,
)
from .evaluation.reading import open_file
from .evaluation.reading import read_photo as read_prompts
from .evaluation.report import PhotoScore, Summary
from .evaluation.restoring import Batch, Job, run_batch, vae_round_trip
from .evaluation.testsets import REAL, Case, Cases, real, synthetic
from .models import NANO, SD15
from .pretrained import Sd15Config

log = logging.getLogger(__name__)
TITLES = {NANO: "Nano", SD15: "Diff-Restorer"}


@dataclass(frozen=True)
class PhotoSets:
    """Photos to test on; at least one of the two."""

    clean: Path | None = None
    """Clean photos to degrade, e.g. CBSD68: a folder, a text list or a CSV manifest."""
    pairs: Path | None = None
    """Folder of pair sets, <set>/{lq,gt}, or of one published set such as LOL."""
    limit: int = 0
    """Only the first photos of each set; 0 takes all."""
    seed: int = 0
    """Seed of severities and degradations."""


@dataclass(frozen=True)
class Config:
    """Restore the test sets, measure, and write the report."""

    data: PhotoSets = field(default_factory=PhotoSets)
    out: Path = Path("eval_out")
    """Folder of the report, and of everything that a later run can use again."""
    workflow: Path = NANO_WORKFLOW
    """Workflow in API format, with nodes titled `Degraded photo` and `Restored`."""
    file: Path = ROOT / "models/diff_restorer_nano.safetensors"
    """The file that the workflow loads: Nano's, which the server that is started is given, or one
    for SD 1.5, which lies in the `models/diff_restorer` of the server that `--server` names. Its
    digest and t-SNE features go into the report."""
    sd15: Sd15Config = field(default_factory=Sd15Config)
    """Base networks of a file for SD 1.5, for the t-SNE; without them it is left out."""
    server: str | None = None
    """URL of a ComfyUI with this pack; without it, one is started."""
    gpu: bool = False
    """Let the server that is started use a GPU."""
    nafnet: Path | None = None
    """File of `python -m training.evaluation.nafnet`, to compare with."""
    weights: Path | None = None
    """Folder with the networks of LPIPS, DISTS and FID; by default torch hub's cache. Nothing is
    downloaded: a metric whose file is missing says so."""
    workers: int = 0
    """Processes of the classical baselines; 0 takes one per CPU core."""
    sheet_photos: int = 3
    """Photos per set on the side-by-side sheets."""
    check: bool = False
    """End with exit code 2 if a quality bar is missed."""


def open_cases(config: Config) -> Cases:
    """The test sets, made or found in the cache.

    Raises:
        ValueError: No set is asked for, or one is empty.
    """
    data, found = config.data, Cases([], {})
    if data.clean is None and data.pairs is None:
        raise ValueError("name test photos: --data.clean FOLDER, --data.pairs FOLDER, or both")
    cache = config.out / "testset"
    sources: list[tuple[Path | None, Callable[..., Cases], tuple[int, ...]]] = [
        (data.clean, synthetic, (data.limit, data.seed)),
        (data.pairs, real, (data.limit,)),
    ]
    for source, make, arguments in sources:
        if source is not None:
            made = make(source, cache, *arguments)
            found.cases.extend(made.cases)
            found.failed.update(made.failed)
    if not found.cases:
        raise ValueError(f"no test photo can be used: {found.failed}")
    return found


def restored_path(config: Config, case: Case) -> Path:
    """Where the restored photo is kept."""
    return config.out / "restored" / f"{case.id}.png"


def vae_path(config: Config, case: Case) -> Path:
    """Where the round trip of the clean photo is kept; the synthetic sets share it."""
    name = case.id if case.set.startswith(REAL) else f"clean/{case.name}"
    return config.out / "vae" / f"{name}.png"


def server_work(config: Config, cases: list[Case]) -> list[Batch]:
    """What the server has to do: restore every LQ, and send every GT through the stock VAE."""
    workflow, model = load_workflow(config.workflow), weights_digest(config.file)
    shared = {vae_path(config, case): case for case in cases}
    round_trips = tuple(Job(case.id, case.gt, path) for path, case in shared.items())
    jobs = tuple(Job(case.id, case.lq, restored_path(config, case)) for case in cases)
    return [
        Batch("restore", workflow, jobs, model),
        Batch("VAE round trip", vae_round_trip(workflow), round_trips, model, 8),
    ]


def restore_all(config: Config, cases: list[Case]) -> dict[str, str]:
    """Restores through the server what is not restored yet; returns failed photo -> reason."""
    batches = server_work(config, cases)
    pending = [batch.pending() for batch in batches]
    failed: dict[str, str] = {}
    if not any(pending):
        return failed
    server: AbstractContextManager[Host | None] = nullcontext()
    if config.server is None:
        log.info("starting ComfyUI ...")
        server = Host(cpu=not config.gpu, log=config.out / "host.log", nano=config.file)
    with server as host:
        client = Client(host.url if host else config.server or "")
        for batch, todo in zip(batches, pending, strict=True):
            failed |= run_batch(client, batch, todo)
    return failed


def run_nafnet(config: Config, cases: list[Case]) -> None:
    """Restores the photos of the synthetic sets with the comparison network."""
    if config.nafnet is None:
        return
    network = nafnet.load_nafnet(config.nafnet)
    model = file_digest(config.nafnet, Path(nafnet.__file__))
    for case in tqdm(cases, desc="NAFNet", unit="photo"):
        path = config.out / "nafnet" / f"{case.id}.png"
        key = digest(model, pixel_digest(case.lq))
        if read_note(path).get("key") != key:
            with torch.no_grad():
                save_picture(path, to_picture(network(read_image(case.lq))), {"key": key})


def score_all(
    config: Config, cases: list[Case], tried: dict[str, dict[str, dict[str, float]]]
) -> tuple[list[PhotoScore], Learned]:
    """Measures every photo that was restored."""
    learned = Learned(config.weights)
    photos: list[PhotoScore] = []
    for case in tqdm(cases, desc="scores", unit="photo"):
        results = {"lq": case.lq, "restored": restored_path(config, case)}
        if config.nafnet is not None:
            results["nafnet"] = config.out / "nafnet" / f"{case.id}.png"
        if vae_path(config, case).is_file():
            results["vae"] = vae_path(config, case)
        if not results["restored"].is_file():
            continue
        gt, scores = read_image(case.gt), {}
        for name, path in results.items():
            image = read_image(path)
            scores[name] = fidelity(image, gt)
            if name in ("lq", "restored"):
                scores[name] |= learned.score(image, gt)
        note = read_note(results["restored"])
        photos.append(
            PhotoScore(
                set=case.set,
                name=case.name,
                kind=case.kind,
                size=(gt.shape[-1], gt.shape[-2]),
                scores=scores,
                severity=case.severity,
                baselines={name: got["psnr"] for name, got in tried.get(case.id, {}).items()},
                probabilities=note["probabilities"],
                seconds=note["seconds"],
            )
        )
    return photos, learned


def add_fid(config: Config, cases: list[Case], learned: Learned, summary: Summary) -> None:
    """Adds FID per set, where its network is at hand and a set has two photos."""
    if "fid" in learned.missing:
        return
    for name, row in summary["sets"].items():
        chosen = [c for c in cases if c.set == name and restored_path(config, c).is_file()]
        if len(chosen) < 2:
            continue
        for column in ("lq", "restored"):
            files = [c.lq if column == "lq" else restored_path(config, c) for c in chosen]
            pairs = zip(map(read_image, files), (read_image(c.gt) for c in chosen), strict=True)
            row[column]["fid"] = learned.fid(pairs)


def draw_features(config: Config, cases: list[Case]) -> str | None:
    """t-SNE of what the model reads from the degraded photos; returns why it was not drawn."""
    try:
        models = open_file(config.file, config.sd15)
    except (ValueError, OSError) as error:
        return f"t-SNE: {error}"
    chosen = [case for case in cases if case.set in KINDS]
    clip: list[NDArray[np.float32]] = []
    degradation: list[NDArray[np.float32]] = []
    for case in tqdm(chosen, desc="features", unit="photo"):
        prompt, tokens = read_prompts(models, read_image(case.lq))
        clip.append(tokens.mean(dim=(0, 1)).cpu().numpy())
        degradation.append(prompt.pooled[0].cpu().numpy())
    if len(chosen) < 5:
        return "t-SNE: needs at least five photos"
    features = {
        "P_CLIP (mean over tokens)": np.stack(clip),
        "P_D (pooled)": np.stack(degradation),
    }
    plots.draw_tsne(features, [case.set for case in chosen], config.out / "tsne.png")
    return None


def draw_sheets(
    config: Config, cases: list[Case], photos: list[PhotoScore], summary: Summary
) -> None:
    """Clean, degraded, restored and the best baseline, for the first photos of every set."""
    scores = {f"{photo.set}/{photo.name}": photo for photo in photos}
    overview: list[tuple[str, list[plots.Cell]]] = []
    for index, (name, row) in enumerate(summary["sets"].items()):
        chosen = [case for case in cases if case.set == name and case.id in scores]
        best = best_baseline(row["baselines"])
        rows: list[tuple[str, list[plots.Cell]]] = []
        for case in chosen[: max(config.sheet_photos, 1)]:
            photo = scores[case.id]
            gt, lq, restored = (
                Image.open(path) for path in (case.gt, case.lq, restored_path(config, case))
            )
            before, after = photo.scores["lq"]["psnr"], photo.scores["restored"]["psnr"]
            cells: list[plots.Cell] = [
                ("clean", gt),
                (f"degraded, {report.decibel(before)} dB", lq),
                (f"restored, {report.decibel(after)} dB", restored),
            ]
            if best:
                found = plots.as_picture(baselines.restore(best, read_photo(case.lq)))
                cells.append((f"best baseline, {photo.baselines[best]:.2f} dB", found))
            seen = f", seen as {photo.predicted}" if photo.predicted else ""
            rows.append((f"{name}{seen}{f'; best baseline: {best}' if best else ''}", cells))
        plots.draw_sheet(rows, config.out / "sheets" / f"{name.replace('/', '_')}.jpg")
        if name in KINDS:  # each kind on another photo
            overview.append(rows[index % len(rows)])
    plots.draw_sheet(overview, config.out / "sheet.jpg", window=(320, 240))


def evaluate(config: Config) -> tuple[Summary, dict[str, str]]:
    """Runs everything and writes the report; returns the summary and the failed photos."""
    nodes = {node["class_type"] for node in load_workflow(config.workflow).values()}
    if "DiffRestorerLoader" in nodes and config.file == Config.file:
        raise ValueError("--file: name the file that --workflow loads; the report tells of it")
    base_model = read_checkpoint(config.file).info.base_model
    config.out.mkdir(parents=True, exist_ok=True)
    found = open_cases(config)
    cases, failed = found.cases, dict(found.failed)
    failed |= restore_all(config, cases)
    tried, lost = run_baselines(cases, config.out / "baselines", config.workers)
    failed |= lost
    cases = [case for case in cases if case.id not in failed]
    run_nafnet(config, cases)
    photos, learned = score_all(config, cases, tried)
    if not photos:
        raise ValueError(f"no photo was restored: {failed}")
    summary = report.summarize(photos)
    add_fid(config, cases, learned, summary)
    bars = report.quality_bars(summary)
    about: dict[str, Any] = {
        "file": config.file.name,
        "weights_sha256": weights_digest(config.file),
        "workflow": config.workflow.name,
        "git_revision": git_revision(),
        "clean": config.data.clean.name if config.data.clean else None,
        "pairs": config.data.pairs.name if config.data.pairs else None,
        "seed": config.data.seed,
        "limit": config.data.limit,
        "definition": tables.SETTINGS,
        "sizes": sorted({photo.size for photo in photos}),
        "server": config.server or "started by this program",
    }
    missing = dict(learned.missing)
    if reason := draw_features(config, cases):
        missing["tsne"] = reason
    metrics = {
        "about": about,
        "bars": [vars(bar) for bar in bars],
        **summary,
        "not_available": missing,
        "failed": failed,
        "photos": [vars(photo) for photo in photos],
        "baseline_seconds": baseline_seconds(tried),
    }
    write_atomically(config.out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    scores = report.compact_scores(summary, about)
    write_atomically(config.out / "scores.json", json.dumps(scores, indent=1) + "\n")
    write_atomically(
        config.out / "table.md", tables.markdown(summary, bars, about, missing, failed)
    )
    plots.draw_bars(summary, config.out / "bars.png", f"{TITLES[base_model]} (blind)")
    plots.draw_confusion(
        summary["confusion"], summary["overall"]["accuracy"], config.out / "confusion.png"
    )
    draw_sheets(config, cases, photos, summary)
    log.info("\n%s", tables.bars_table(bars))
    return summary, failed


def baseline_seconds(tried: dict[str, dict[str, dict[str, float]]]) -> dict[str, float]:
    """Mean time of each baseline per photo, seconds."""
    times: dict[str, list[float]] = {}
    for scores in tried.values():
        for name, got in scores.items():
            times.setdefault(name, []).append(got["seconds"])
    return {name: float(np.mean(values)) for name, values in sorted(times.items())}


def main(config: Config) -> int:
    """Entry point; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    exit_on_termination()
    try:
        summary, failed = evaluate(config)
    except (ClientError, HostError, ValueError, OSError) as error:
        log.error("error: %s", error)
        return 1
    log.info("report: %s", config.out / "table.md")
    for name, reason in failed.items():
        log.error("failed: %s: %s", name, reason)
    if failed:
        return 1
    missed = [bar.name for bar in report.quality_bars(summary) if bar.passed is False]
    return 2 if config.check and missed else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))
