"""The summary as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .anchors import ANCHORS, PUBLISHED
from .metrics import FILES
from .report import Bar, Summary, decibel, goals, standing
from .suites import MILD_PAIRS
from .testsets import JPEG_QUALITY, NOISE_SIGMA, REAL, SEVERITIES, SUITES, suite_of

SETTINGS = (
    f"noise: Gaussian, sigma {NOISE_SIGMA} of 255; jpeg: quality {JPEG_QUALITY}; the other kinds: "
    f"severity drawn uniformly from {SEVERITIES[0]} to {SEVERITIES[1]}"
)
"""How the synthetic test sets are made."""
_SECTIONS = {
    "own": (
        "Own degradations",
        f"{SETTINGS}. LQ is the mean of the degraded photos; `clean` is scored against itself. "
        "The baselines are told the kind; the best is chosen by its mean over the set. Published "
        "scores are of networks for one kind, on noise that is not clipped; see "
        "`evaluation/anchors.py`.",
    ),
    "independent": (
        "Degradations that others wrote",
        "By `albumentations` and `imagecorruptions`, each photo by one variant drawn for it "
        "(`evaluation/independent.py`); never used in training.",
    ),
    "mixes": (
        "Mixes",
        "Two or three degradations in one photo, each at a severity of its own, "
        f"{SEVERITIES[0]} to {SEVERITIES[1]}.",
    ),
    "harm": (
        "Harm",
        "Photos that hardly need restoring (`evaluation/suites.py`). Clean, flat, dark and grey "
        "ones are to come back as they are, the others nearer to the clean photo. PSNR counts up "
        "to an error of one grey level, 48.13 dB: a photo loses over 1 dB if it ends that much "
        "below where it began, both ends so bounded. The shares of those that fall are of the "
        "photos that were above. `real` are mild real pairs, which guided decisions.",
    ),
    "pairs": ("Real and published pairs", "The baselines are told the kind."),
}
_MADE = ("own", "independent", "mixes")
"""Suites that are made from one folder of clean photos."""
_STANDING = {"decided_on": "that guided decisions", "untouched": "that guided no decision"}
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


def _scores_table(
    sets: Mapping[str, Summary], mean: tuple[str, Summary] | None, clean: str | None = None
) -> str:
    """One row per set, then one with the name and summary of a mean; columns that no set has are
    left out. For the folder `clean` of photos, published figures may stand beside ours."""
    learned = [name for name in FILES if any(name in row["lq"] for row in sets.values())]
    anchors = [name for name in ANCHORS if any(name in row for row in sets.values())]
    published = {name: PUBLISHED[clean or "", name] for name in sets if (clean, name) in PUBLISHED}
    compared = any("best_baseline" in row for row in sets.values())
    header = ["set", "photos", "LQ dB", "restored dB", "gain dB"]
    header += ["best baseline dB", "its name"] if compared else []
    header += [f"{ANCHORS[name]} dB" for name in anchors]
    header += ["published dB"] if published else []
    header += ["SSIM LQ", "SSIM restored"]
    header += [f"{name.upper()} {column}" for name in learned for column in ("LQ", "restored")]
    header += ["seen as", "s per photo"]

    def line(name: str, row: Summary) -> list[str]:
        lq, restored, best = row["lq"], row["restored"], row.get("best_baseline", {})
        spread = row.get("gain_standard_error")
        gain = _gain(row["gain"]) + ("" if spread is None else f" ± {spread:.2f}")
        cells = [name, str(row.get("photos", "")), decibel(lq["psnr"]), decibel(restored["psnr"])]
        cells.append("-" if lq["psnr"] >= 99 else gain)
        cells += [decibel(best.get("psnr")), best.get("name", "-")] if compared else []
        cells += [decibel(row.get(anchor, {}).get("psnr")) for anchor in anchors]
        cells += [published.get(name, "-")] if published else []
        cells += [f"{lq['ssim']:.3f}", f"{restored['ssim']:.3f}"]
        for metric in learned:
            cells += [
                f"{column[metric]:.3f}" if metric in column else "-" for column in (lq, restored)
            ]
        cells.append(_seen_as(row.get("seen_as", {})))
        cells.append(f"{row['seconds']:.1f}" if "seconds" in row else "")
        return cells

    rows = [line(name.partition("/")[2] or name, row) for name, row in sets.items()]
    if mean and "lq" in mean[1]:
        rows.append(line(f"**{mean[0]}**", mean[1]))
    return table(header, rows)


def _seen_as(counts: Mapping[str, int]) -> str:
    """The two most frequent verdicts of the classifier, in per cent of the photos."""
    total = sum(counts.values())
    return ", ".join(f"{kind} {count / total:.0%}" for kind, count in list(counts.items())[:2])


def _standing(rows: Mapping[str, Summary]) -> str:
    """Whether decisions were made on the photos of a suite."""
    parts = standing(list(rows.values()))
    if len(parts) == 2:
        return "; ".join(
            f"{_STANDING[name]}: {_gain(part['gain'])} dB ({part['photos']} photos)"
            for name, part in parts.items()
        )
    return "; ".join(_STANDING[name] for name in parts)


def _harm_tables(harm: Summary) -> str:
    """The harm table and the list of the worst."""

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.0%}"

    rows = {**harm["looks"], **({"**all looks**": harm["all"]} if harm["all"] else {})}
    lines = [
        [name, str(row["photos"]), f"{row['before']:.2f}", f"{row['after']:.2f}"]
        + [share(row[column]) for column in ("lose", "below_40", "below_30")]
        + [f"{row['percentile_5']:.1f}", f"{row['lowest']:.1f}", share(row["seen_clean"])]
        for name, row in rows.items()
    ]
    header = (
        "look", "photos", "given dB", "restored dB", "lose over 1 dB", "fall below 40 dB",
        "fall below 30 dB", "5th percentile dB", "lowest dB", "seen as clean",
    )  # fmt: skip
    worst = [
        [
            entry["photo"].removeprefix("harm/"),
            decibel(entry["before"]),
            decibel(entry["after"]),
            entry["seen_as"] or "-",
        ]
        for entry in harm["worst"]
    ]
    return (
        table(header, lines)
        + "\nThe worst (pictures: `sheets/harm_worst.jpg`):\n\n"
        + table(("photo", "given dB", "restored dB", "seen as"), worst)
    )


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
    """The whole report, from what `report.summarize`, `report.quality_bars` and `training.evaluate`
    give: metrics that are missing and photos that failed have their reasons."""
    sets = summary["sets"]
    sizes = ", ".join(f"{width} x {height}" for width, height in about["sizes"][:6])
    parts = [
        "# Evaluation",
        f"File `{about['file']}` (tensors sha256 {about['weights_sha256'][:16]}), workflow "
        f"`{about['workflow']}` with its default settings, code {about['git_revision']}.",
        f"PSNR and SSIM on 8-bit RGB at full resolution ({sizes}"
        f"{', ...' if len(about['sizes']) > 6 else ''} px), SSIM by kornia (Gaussian window, "
        "11 px). Each figure is the mean over photos; ± is the standard error of the mean gain.",
        "## Quality bars\n\n" + bars_table(bars),
    ]
    if wanted := goals(summary):
        reached = [[bar.name, bar.value, "yes" if bar.passed else "no"] for bar in wanted]
        text = "## Goals of the next version\n\nFor information.\n\n"
        parts.append(text + table(("goal", "measured", "reached"), reached))
    for suite in SUITES:
        rows = {name: row for name, row in sets.items() if suite_of(name) == suite}
        if not rows:
            continue
        title, text = _SECTIONS[suite]
        judged = {name: row for name, row in rows.items() if name != MILD_PAIRS} or rows
        made = f"Made from `{about['clean']}` with seed {about['seed']}. " if suite in _MADE else ""
        if suite == "harm":
            body = _harm_tables(summary["harm"])
        else:
            mean = summary["overall"] if suite == "own" else summary["suites"][suite]
            last = (
                None if suite == "pairs" else (f"mean of {len(rows.keys() - {'clean'})} sets", mean)
            )
            body = _scores_table(rows, last, about["clean"] if suite == "own" else None)
        parts.append(f"## {title}\n\n{made}{text} Photos {_standing(judged)}.\n\n{body}")
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
