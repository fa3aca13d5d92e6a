"""The summary as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .metrics import FILES
from .report import Bar, Summary, decibel
from .testsets import JPEG_QUALITY, NOISE_SIGMA, REAL, SEVERITIES

SETTINGS = (
    f"noise: Gaussian, sigma {NOISE_SIGMA} of 255; jpeg: quality {JPEG_QUALITY}; the other kinds: "
    f"severity drawn uniformly from {SEVERITIES[0]} to {SEVERITIES[1]}"
)
"""How the synthetic test sets are made."""
_VERDICTS = {True: "pass", False: "**fail**", None: "not measured"}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right; empty where there are no rows."""
    if not rows:
        return ""
    line = " | ".join(["---"] + ["---:"] * (len(header) - 1))
    body = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"| {' | '.join(header)} |\n| {line} |\n{body}\n"


def bars_table(bars: Sequence[Bar]) -> str:
    """The quality bars with what was measured."""
    rows = [[bar.name, bar.value, _VERDICTS[bar.passed]] for bar in bars]
    return table(("bar", "measured", "verdict"), rows)


def _gain(value: float) -> str:
    return f"{value:+.2f}"


def _scores_table(sets: Mapping[str, Summary], overall: Summary | None) -> str:
    learned = [name for name in ("lpips", "dists", "fid") if _has(sets, name)]
    nafnet = any("nafnet" in row for row in sets.values())
    header = ["set", "photos", "LQ dB", "restored dB", "gain dB", "best baseline dB", "its name"]
    header += ["NAFNet dB"] if nafnet else []
    header += ["SSIM LQ", "SSIM restored"]
    header += [f"{name.upper()} {column}" for name in learned for column in ("LQ", "restored")]
    header += ["recall", "s per photo"]

    def line(name: str, row: Summary) -> list[str]:
        lq, restored, best = row["lq"], row["restored"], row.get("best_baseline")
        clean = lq["psnr"] >= 99
        spread = row.get("gain_standard_error")
        gain = _gain(row["gain"]) + ("" if spread is None else f" ± {spread:.2f}")
        cells = [name, str(row.get("photos", "")), decibel(lq["psnr"]), decibel(restored["psnr"])]
        cells += ["-" if clean else gain, decibel(best["psnr"]) if best else "-"]
        cells += [best.get("name", "") if best else "-"]
        cells += [decibel(row["nafnet"]["psnr"]) if "nafnet" in row else "-"] if nafnet else []
        cells += [f"{lq['ssim']:.3f}", f"{restored['ssim']:.3f}"]
        for metric in learned:
            cells += [
                f"{column[metric]:.3f}" if metric in column else "-" for column in (lq, restored)
            ]
        recall = row.get("recall")
        cells.append("-" if recall is None else f"{recall:.0%}")
        cells.append(f"{row['seconds']:.1f}" if "seconds" in row else "")
        return cells

    rows = [line(name.removeprefix(REAL), row) for name, row in sets.items()]
    if overall and "lq" in overall:
        rows.append(line(f"**mean of {overall['kinds']} kinds**", overall))
    return table(header, rows)


def _has(sets: Mapping[str, Summary], metric: str) -> bool:
    return any(metric in row["lq"] for row in sets.values())


def _baselines_table(sets: Mapping[str, Summary]) -> str:
    rows = []
    for name, row in sets.items():
        ranked = sorted(row["baselines"].items(), key=lambda item: -item[1])
        lq = row["lq"]["psnr"]
        text = ", ".join(f"{label} {_gain(psnr - lq)}" for label, psnr in ranked)
        if text:
            rows.append([name, text])
    return table(("set", "gain over LQ, dB"), rows).replace("| --- | ---: |", "| --- | --- |")


def _anchors_table(sets: Mapping[str, Summary]) -> str:
    rows = [
        [
            "clean photos of the synthetic sets" if name == "clean" else name.removeprefix(REAL),
            "-" if name == "clean" else decibel(row["lq"]["psnr"]),
            decibel(row["vae"]["psnr"]),
            f"{row['vae']['ssim']:.3f}",
        ]
        for name, row in sets.items()
        if "vae" in row and (name == "clean" or name.startswith(REAL))
    ]
    return table(("set", "LQ itself dB", "stock-VAE round trip of GT dB", "its SSIM"), rows)


def _confusion_table(confusion: Summary) -> str:
    kinds = confusion["kinds"]
    rows = [
        [kind, *(str(count) if count else "·" for count in counts)]
        for kind, counts in zip(kinds, confusion["counts"], strict=True)
        if any(counts)
    ]
    return table(("true \\ seen as", *kinds), rows)


def markdown(
    summary: Summary,
    bars: Sequence[Bar],
    about: Mapping[str, Any],
    missing: Mapping[str, str],
    failed: Mapping[str, str],
) -> str:
    """The whole report.

    Args:
        summary: From `report.summarize`.
        bars: From `report.quality_bars`.
        about: Where the figures come from, see `training.evaluate`.
        missing: Metric -> why it was not measured.
        failed: Photo -> reason, of those that are not in the figures.
    """
    sets = summary["sets"]
    synthetic = {name: row for name, row in sets.items() if not name.startswith(REAL)}
    real = {name: row for name, row in sets.items() if name.startswith(REAL)}
    sizes = ", ".join(f"{width} x {height}" for width, height in about["sizes"][:6])
    parts = [
        "# Evaluation",
        f"File `{about['file']}` (tensors sha256 {about['weights_sha256'][:16]}), workflow "
        f"`{about['workflow']}` with its default settings, code {about['git_revision']}.",
        f"PSNR and SSIM on 8-bit RGB at full resolution ({sizes}"
        f"{', ...' if len(about['sizes']) > 6 else ''} px), SSIM by scikit-image (Gaussian window, "
        "11 px). Each figure is the mean over photos; ± is the standard error of the mean gain.",
        "## Quality bars\n\n" + bars_table(bars),
    ]
    if synthetic:
        limit = f", the first {about['limit']} photos only" if about["limit"] else ""
        parts += [
            f"## Synthetic sets\n\nMade from `{about['clean']}` with seed {about['seed']}{limit}: "
            f"{SETTINGS}. LQ is the mean of the degraded photos; `clean` is scored against itself. "
            "The baselines are told the kind; the best one is chosen by its mean over the set.\n\n"
            + _scores_table(synthetic, summary["overall"])
        ]
    if real:
        parts.append("## Real and published pairs\n\n" + _scores_table(real, None))
    if anchors := _anchors_table(sets):
        parts.append("## Anchors\n\n" + anchors)
    if listed := _baselines_table(sets):
        parts.append("## All baselines\n\n" + listed)
    if confusion := _confusion_table(summary["confusion"]):
        accuracy = summary["overall"]["accuracy"]
        parts.append(f"## Classifier\n\nAccuracy {accuracy:.1%}.\n\n" + confusion)
    absent = [f"- {name.upper()}: {reason}" for name, reason in missing.items()]
    if "fid" not in missing:
        absent.append(f"- FID needs far more photos than these; see {FILES['fid']}.")
    parts.append("## Notes\n\n" + "\n".join(absent))
    if failed:
        lines = "\n".join(f"- {name}: {reason}" for name, reason in failed.items())
        parts.append(f"## Failed photos\n\nNot in the figures above.\n\n{lines}")
    return "\n\n".join(part.rstrip() for part in parts) + "\n"
