"""Measures every photo that was restored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from .anchors import ANCHORS, anchor_path
from .competing import Tried
from .metrics import Learned, fidelity
from .pictures import read_image, read_note
from .report import PhotoScore, Summary
from .restoring import restored_path, vae_path
from .testsets import Case


def score_all(
    out: Path, cases: Sequence[Case], tried: Mapping[str, Tried], learned: Learned
) -> list[PhotoScore]:
    """Scores of the cases that were restored, with those of the classical baselines by case id
    (`tried`)."""
    photos: list[PhotoScore] = []
    for case in tqdm(cases, desc="scores", unit="photo"):
        restored = restored_path(out, case)
        if not restored.is_file():
            continue
        others = {"vae": vae_path(out, case)}
        others |= {anchor: anchor_path(out, anchor, case) for anchor in ANCHORS}
        gt = read_image(case.gt)
        scores: dict[str, dict[str, float]] = {}
        for name, path in {"lq": case.lq, "restored": restored}.items():
            image = read_image(path)
            scores[name] = fidelity(image, gt) | learned.score(image, gt)
        for name, path in others.items():
            if path.is_file():
                scores[name] = fidelity(read_image(path), gt)
        note = read_note(restored)
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
                decided_on=case.decided_on,
            )
        )
    return photos


def add_fid(out: Path, cases: Sequence[Case], learned: Learned, summary: Summary) -> None:
    """Adds FID per set, where its network is at hand and a set has two photos."""
    if "fid" in learned.missing:
        return
    for name, row in summary["sets"].items():
        chosen = [case for case in cases if case.set == name and restored_path(out, case).is_file()]
        if len(chosen) < 2:
            continue
        for column in ("lq", "restored"):
            files = [case.lq if column == "lq" else restored_path(out, case) for case in chosen]
            pairs = zip(
                map(read_image, files), (read_image(case.gt) for case in chosen), strict=True
            )
            row[column]["fid"] = learned.fid(pairs)
