"""The table of ratios against their bars, plots, and the page that holds both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .cases import LARGE

Results = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One measured ratio."""

    what: str
    found: float
    bar: float
    """At most this."""
    note: str = ""

    @property
    def verdict(self) -> str:
        return "pass" if self.found <= self.bar else "**miss**"


def rows(results: Results) -> Iterator[Row]:
    """All ratios that the results have figures for."""

    def of(key: str) -> dict[str, Any] | None:
        entry = results.get(key)
        return None if entry is None or "error" in entry else entry

    if entry := of("step"):
        yield Row("a sampling step / one with ControlNetApplyAdvanced", entry["ratio"], 1.02)
    if entry := of("decode"):
        yield Row("Aware VAE Decode, features reused / VAEDecode", entry["reused"], 1.25)
        yield Row("Aware VAE Decode with encode / VAEEncode + VAEDecode", entry["made"], 1.25)
    if entry := of("vision"):
        yield Row("Prompt Processor + Classifier / CLIPVisionEncode", entry["ratio"], 1.05)
    for name, each in (of("load") or {}).items():
        if isinstance(each, dict) and "ratio" in each:
            what = f"loading {name}'s file / were its tensors read by the host, without a map"
            note = f"{each['file_gb']:.2f} GB; reading and checking alone {each['reading']:.2f}"
            yield Row(what, each["ratio"], 1.05, note)
            most = each["file_gb"] + each["largest_gb"]
            what = f"memory to read {name}'s file / the file and its largest tensor"
            yield Row(what, each["peak_gb"] / most, 1.05)
    exact = sorted(int(key.split()[1]) for key in results if key.startswith("exact "))
    whole = next((of(key) for key in results if key.startswith("untiled ")), None)
    for side in exact:
        entry, stock = of(f"exact {side}"), of(f"stock_tiled {side}")
        if entry and whole:
            ratio = entry["peak_gb"] / whole["peak_gb"]
            note = f"{entry['peak_gb']:.2f} of {whole['peak_gb']:.2f} GB"
            what = f"memory, exact tiles at {side} px / whole at {min(exact)} px"
            yield Row(what, ratio, 0.25, note)
        if entry and stock:
            ratio = entry["seconds"] / stock["seconds"]
            note = f"{entry['seconds']:.0f} of {stock['seconds']:.0f} s"
            yield Row(f"time, exact tiles / VAEDecodeTiled at {side} px", ratio, 1.6, note)
    for key, entry in results.get("differences", {}).items():
        if key.startswith("exact "):
            yield Row(f"{key} px: mean difference to the whole, levels", entry["mean"], 0.5)
            yield Row(f"{key} px: largest difference to the whole, levels", entry["max"], 4.0)


def summary(results: Results) -> str:
    """The table, in Markdown."""
    lines = ["| what | found | at most | |", "| --- | ---: | ---: | --- |"]
    for row in rows(results):
        note = f" ({row.note})" if row.note else ""
        lines.append(f"| {row.what}{note} | {row.found:.3g} | {row.bar:g} | {row.verdict} |")
    failed = [f"- {key}: {value['error']}" for key, value in results.items() if "error" in value]
    return "\n".join(lines + (["", "Failed:", *failed] if failed else []))


def write_report(results: Results, out: Path) -> None:
    """Write benchmarks.md and its plots into a folder."""
    machine = results["machine"]
    code = sorted({entry["code"] for entry in results.values() if "code" in entry})
    text = [
        "# Benchmarks",
        "",
        f"`make bench` on {machine['device']}, {machine['threads']} threads, torch "
        f"{machine['torch']}, code {', '.join(code)}. Ratios of medians within one run. "
        f"Weights are random at the size of SD 1.5, in {machine['format']}, but for Nano (a CPU "
        "computes UNet and ControlNets in fp32 all the same). Large pictures are decoded in fp32 "
        f"by a VAE of {machine['vae_width']} channels (SD 1.5 has 128). Memory is that of the "
        "device; on a CPU the process's own pages, without those of files.",
        "",
        summary(results),
    ]
    text += _differences(results) + _areas(results, out) + _peak(results) + _levers(results, out)
    (out / "benchmarks.md").write_text("\n".join(text) + "\n", encoding="utf-8")


def _differences(results: Results) -> list[str]:
    found = results.get("differences", {})
    large = {key: each for key, each in results.items() if key.split()[0] in LARGE}
    if not large:
        return []
    lines = ["", "## Tiled decodes against whole ones", ""]
    lines += [
        "| decode | mean, levels | largest, levels | seconds | GB |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for key, entry in large.items():
        if "error" in entry:
            continue
        difference = found.get(key)
        cells = f"{difference['mean']:.3f} | {difference['max']:.2f}" if difference else " | "
        label = key.replace("_", " ") + " px"
        lines.append(f"| {label} | {cells} | {entry['seconds']:.1f} | {entry['peak_gb']:.2f} |")
    # Pictures of one run alone are compared: there are none after a run of the tiled cases.
    return [*lines, "", "![Where they differ](benchmarks_seams.png)"] if found else lines


def _areas(results: Results, out: Path) -> list[str]:
    entries = [v for k, v in results.items() if k.startswith("area ") and "error" not in v]
    if not entries:
        return []
    area, seconds, memory = (
        np.array([entry[name] for entry in entries])
        for name in ("megapixels", "seconds", "peak_gb")
    )
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, values, label in ((left, seconds, "seconds"), (right, memory, "peak GB")):
        axes.plot(area, values, "o-", label="measured")
        slope = float((area * values).sum() / (area * area).sum())
        axes.plot(area, slope * area, "--", label=f"linear, {slope:.2g} per megapixel")
        axes.set_xlabel("megapixels")
        axes.set_ylabel(label)
        axes.legend()
    if "peak" in results and "error" not in results["peak"]:
        parts = results["peak"]["parts"]
        work = 5 * parts["UNet and control, a step"]["gflop"] + parts["decoder"]["gflop"]
        limit = work / (512**2 / 1e6) / results["peak"]["peak_gflops"]
        left.plot(area, limit * area, ":", label=f"at the peak in {results['peak']['format']}")
        left.legend()
    figure.savefig(out / "benchmarks_area.png", dpi=100)
    lines = [
        "",
        "## Nano's graph for large photos, three steps",
        "",
        "![Time and memory](benchmarks_area.png)",
        "",
    ]
    lines += ["| megapixels | seconds | per megapixel | peak GB |", "| ---: | ---: | ---: | ---: |"]
    for mp, s, gb in zip(area, seconds, memory, strict=True):
        lines.append(f"| {mp:.2f} | {s:.1f} | {s / mp:.2f} | {gb:.2f} |")
    return lines


def _peak(results: Results) -> list[str]:
    entry = results.get("peak")
    if not entry or "error" in entry:
        return []
    rate = f"{entry['peak_gflops']:.0f} GFLOP/s"
    peak = f"A matrix product in {entry['format']} reaches {rate} here."
    lines = ["", f"{peak} On a tile of 512 px:", ""]
    lines += ["| part | GFLOP | seconds | share of that |", "| --- | ---: | ---: | ---: |"]
    for name, part in entry["parts"].items():
        share = f"{100 * part['share']:.0f} %"
        lines.append(f"| {name} | {part['gflop']:.1f} | {part['seconds']:.3f} | {share} |")
    return lines


def _levers(results: Results, out: Path) -> list[str]:
    entry = results.get("levers")
    if not entry or "error" in entry:
        return []
    found = dict(entry["rows"])
    before = found.pop("degraded photo")["mean_psnr"]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    series: dict[str, list[tuple[float, float]]] = {}
    for name, row in found.items():
        group = name.split(",")[0] if name.endswith("steps") else name
        series.setdefault(group, []).append((row["seconds"], row["mean_psnr"]))
    for name, points in series.items():
        axes.plot(*zip(*points, strict=True), "o-" if len(points) > 1 else "x", label=name)
    axes.set_xscale("log")
    axes.set_xlabel("seconds of sampling per photo")
    axes.set_ylabel("PSNR, dB")
    axes.legend(fontsize=7)
    figure.savefig(out / "benchmarks_levers.png", dpi=100)
    lines = ["", "## What each lever does: Nano on the demo's eight photos, 256 px", ""]
    lines += [f"Degraded photos: {before:.2f} dB.", "", "![Levers](benchmarks_levers.png)", ""]
    lines += ["| sampling | seconds per photo | PSNR, dB |", "| --- | ---: | ---: |"]
    lines += [f"| {n} | {r['seconds']:.2f} | {r['mean_psnr']:.2f} |" for n, r in found.items()]
    return lines
