"""Scores the shipped Nano, or any workflow, on photos with fixed seeds and on real pairs.

    python -m training.evaluate --data.clean CBSD68 --data.pairs pairs --out eval_out

Five suites (--data.suites): every clean photo degraded by the nine kinds; degradations that others
wrote; mixes of two and three; near-clean photos, to count what restoring harms; real pairs. All are
restored through ComfyUI's API (a server of its own, or --server). Writes to --out: table.md,
metrics.json, scores.json (for training.export --scores), bars.png, confusion.png, tsne.png,
sheet.jpg and sheets/, with the photos that were harmed most. A pair set is a folder
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
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from diff_restorer.checkpoint import read_checkpoint
from tools.client import Client
from tools.ending import in_words
from tools.environment import ROOT
from tools.host import Host, exit_on_termination
from tools.restoration import NANO_WORKFLOW
from tools.workflow import load_workflow

from .common import git_revision
from .evaluation import independent, plots, report, suites, tables
from .evaluation.anchors import run_bm3d, run_nafnet
from .evaluation.competing import mean_seconds, run_baselines
from .evaluation.harm import summarize_harm
from .evaluation.metrics import Learned
from .evaluation.pictures import weights_digest, write_atomically
from .evaluation.real_pairs import real
from .evaluation.report import PhotoScore, Summary
from .evaluation.restoring import (
    Task,
    Workload,
    restored_path,
    run_workload,
    vae_path,
    vae_round_trip,
)
from .evaluation.scoring import add_fid, score_all
from .evaluation.sheets import draw_sheets, draw_worst
from .evaluation.testsets import SUITES, Case, Cases, Suite, suite_of, synthetic
from .models import NANO, SD15
from .pretrained import Sd15Config

log = logging.getLogger(__name__)
TITLES = {NANO: "Nano", SD15: "Diff-Restorer"}


@dataclass(frozen=True)
class PhotoSets:
    """Photos to test on."""

    clean: Path | None = None
    """Clean photos to degrade, e.g. CBSD68: a folder, a text list or a CSV manifest."""
    pairs: Path | None = None
    """Folder of pair sets, <set>/{lq,gt}, or of one published set such as LOL."""
    harm: tuple[Path, ...] = ()
    """Folders for the harm table, by default `clean`: of clean photos, or with `lq` and `gt`
    inside, of mild real pairs."""
    suites: tuple[Suite, ...] = SUITES
    """What to measure, as far as its photos are named: the project's own degradations, those that
    others wrote, mixes of two and three, near-clean photos, real pairs."""
    limit: int = 0
    """Only the first photos of each set of `own` and `pairs`; 0 takes all."""
    limit_untouched: int = 12
    """Only the first photos of each set of `independent` and `mixes`, and of each folder of `harm`;
    0 takes all. These suites use photos that guided no decision (of CBSD68, the last 34)."""
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
    """Network to compare with: of `python -m training.evaluation.nafnet`, or any that spandrel
    reads and that keeps the size of photos."""
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
    """The test sets, made or found in the cache; raises ValueError where none is asked for, or all
    are empty."""
    data, cache = config.data, config.out / "testset"
    if not (data.clean or data.pairs or data.harm):
        raise ValueError("name test photos: --data.clean, --data.pairs or --data.harm FOLDER")
    clean = [] if data.clean is None else [data.clean]
    sources: dict[Suite, tuple[Callable[..., Cases], Sequence[Path], tuple[int, ...]]] = {
        "own": (synthetic, clean, (data.limit, data.seed)),
        "independent": (suites.by_others, clean, (data.limit_untouched, data.seed)),
        "mixes": (suites.mixes, clean, (data.limit_untouched, data.seed)),
        "harm": (suites.harm, data.harm or clean, (data.limit_untouched, data.seed)),
        "pairs": (real, [data.pairs] if data.pairs else [], (data.limit,)),
    }
    total = Cases()
    for suite in data.suites:
        make, folders, arguments = sources[suite]
        for folder in folders:
            total.add(make(folder, cache, *arguments))
    if not total.cases:
        raise ValueError(
            f"no test photo can be used in the suites {', '.join(data.suites)}: "
            f"{total.failed or dict(total.missing) or 'none of their folders is named'}"
        )
    return total


def server_work(config: Config, cases: Sequence[Case]) -> list[Workload]:
    """What the server has to do: restore every LQ, and send the clean photos of `own` and `pairs`
    through the stock VAE."""
    workflow, model = load_workflow(config.workflow), weights_digest(config.file)
    anchored = [case for case in cases if suite_of(case.set) in ("own", "pairs")]
    shared = {vae_path(config.out, case): case for case in anchored}
    round_trips = tuple(Task(case.id, case.gt, path) for path, case in shared.items())
    tasks = tuple(Task(case.id, case.lq, restored_path(config.out, case)) for case in cases)
    return [
        Workload("restore", workflow, tasks, model),
        Workload("VAE round trip", vae_round_trip(workflow), round_trips, model, 8),
    ]


def restore_all(config: Config, cases: Sequence[Case]) -> dict[str, str]:
    """Restores through the server what is not restored yet; returns failed photo -> reason."""
    workloads = server_work(config, cases)
    pending = [workload.pending() for workload in workloads]
    failed: dict[str, str] = {}
    if not any(pending):
        return failed
    server: AbstractContextManager[Host | None] = nullcontext()
    if config.server is None:
        log.info("starting ComfyUI ...")
        server = Host(cpu=not config.gpu, log=config.out / "host.log", nano=config.file)
    with server as host:
        client = Client(host.url if host else config.server or "")
        for workload, todo in zip(workloads, pending, strict=True):
            failed |= run_workload(client, workload, todo)
    return failed


def evaluate(config: Config) -> tuple[Summary, dict[str, str]]:
    """Runs everything and writes the report; returns the summary and the failed photos."""
    nodes = {node["class_type"] for node in load_workflow(config.workflow).values()}
    if "DiffRestorerLoader" in nodes and config.file == Config.file:
        raise ValueError("--file: name the file that --workflow loads; the report tells of it")
    base_model = read_checkpoint(config.file).info.base_model
    config.out.mkdir(parents=True, exist_ok=True)
    opened = open_cases(config)
    cases, failed = opened.cases, dict(opened.failed)
    failed |= restore_all(config, cases)
    tried, lost = run_baselines(cases, config.out / "baselines", config.workers)
    failed |= lost
    cases = [case for case in cases if case.id not in failed]
    if config.nafnet is not None:
        run_nafnet(config.nafnet, config.out, cases)
    reason = run_bm3d(config.out, cases)
    missing = {"bm3d": reason} if reason else {}
    learned = Learned(config.weights)
    photos = score_all(config.out, cases, tried, learned)
    if not photos:
        raise ValueError(f"no photo was restored: {failed}")
    summary = report.summarize(photos)
    summary["harm"] = summarize_harm(photos)
    add_fid(config.out, cases, learned, summary)
    missing |= learned.missing
    for (package, reason), count in opened.missing.items():
        missing[package] = f"{reason}; {count} photos left out"
    if reason := plots.draw_tsne(config.file, config.sd15, cases, config.out / "tsne.png"):
        missing["tsne"] = reason
    about = describe(config, photos)
    draw_sheets(config.out, cases, photos, summary, config.sheet_photos)
    if summary["harm"]:
        draw_worst(config.out, cases, photos, summary["harm"])
    title = f"{TITLES[base_model]} (blind)"
    plots.draw_bars(summary, config.out / "bars.png", title)
    accuracy = summary["overall"]["accuracy"]
    plots.draw_confusion(summary["confusion"], accuracy, config.out / "confusion.png")
    write_report(config.out, summary, photos, about, missing, failed, mean_seconds(tried))
    return summary, failed


def describe(config: Config, photos: Sequence[PhotoScore]) -> dict[str, Any]:
    """Where the figures come from."""
    data = config.data
    return {
        "file": config.file.name,
        "weights_sha256": weights_digest(config.file),
        "workflow": config.workflow.name,
        "git_revision": git_revision(),
        "clean": data.clean.name if data.clean else None,
        "pairs": data.pairs.name if data.pairs else None,
        "harm": [folder.name for folder in data.harm],
        "suites": list(data.suites),
        "seed": data.seed,
        "limit": data.limit,
        "limit_untouched": data.limit_untouched,
        "definition": tables.SETTINGS,
        "packages": independent.versions(),
        "sizes": sorted({photo.size for photo in photos}),
        "server": config.server or "started by this program",
    }


def write_report(
    out: Path,
    summary: Summary,
    photos: Sequence[PhotoScore],
    about: dict[str, Any],
    missing: dict[str, str],
    failed: dict[str, str],
    seconds: dict[str, float],
) -> None:
    """Writes metrics.json, scores.json and table.md."""
    bars = report.quality_bars(summary)
    metrics = {
        "about": about,
        "bars": [vars(bar) for bar in bars],
        "goals": [vars(bar) for bar in report.goals(summary)],
        **summary,
        "not_available": missing,
        "failed": failed,
        "photos": [vars(photo) for photo in photos],
        "baseline_seconds": seconds,
    }
    write_atomically(out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    scores = report.compact_scores(summary, about)
    write_atomically(out / "scores.json", json.dumps(scores, indent=1) + "\n")
    text = tables.markdown(summary, bars, about, missing, failed)
    write_atomically(out / "table.md", text)
    log.info("\n%s", tables.bars_table(bars))


@in_words
def main(config: Config) -> int:
    """Entry point; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    exit_on_termination()
    summary, failed = evaluate(config)
    log.info("report: %s", config.out / "table.md")
    for name, reason in failed.items():
        log.error("failed: %s: %s", name, reason)
    if failed:
        return 1
    missed = [bar.name for bar in report.quality_bars(summary) if bar.passed is False]
    return 2 if config.check and missed else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))
