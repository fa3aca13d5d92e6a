"""The main job: starts ComfyUI with the pack and restores photos through its API.

python -m tools.demo [--out demo_out]                  eight photos, one per degradation
python -m tools.demo --image photo.jpg [--out ...]     your own photo
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import skimage
import sklearn
import torch
from PIL import Image, ImageOps

from diff_restorer import similarity
from diff_restorer.degradations import degrade
from tools import sheet
from tools.client import Client
from tools.ending import in_words
from tools.environment import ROOT
from tools.errors import ClientError
from tools.host import Host, exit_on_termination
from tools.photo import read
from tools.restoration import NANO_WORKFLOW, Restoration, restore
from tools.workflow import Workflow, load_workflow

LONG_SIDE = 512
LARGE_WORKFLOW = ROOT / "workflows/api/restore_large.json"
LARGE = 1.5e6
"""Pixels from which a photo is sampled in tiles, and shown smaller with a piece at full size."""
SHOWN, PIECE = 960, 720
"""Sides of what is shown of large photos."""
SKIMAGE = Path(skimage.__file__).parent / "data"
SKLEARN = Path(sklearn.__file__).parent / "datasets/images"


@dataclass(frozen=True)
class Sample:
    """One photo of the demo and what is done to it."""

    kind: str
    photo: Path
    severity: float
    seed: int


# All of them lie inside the wheels; none was seen in training.
SAMPLES = (
    Sample("noise", SKIMAGE / "astronaut.png", 0.6, 3),
    Sample("blur", SKIMAGE / "camera.png", 0.5, 2),
    Sample("jpeg", SKIMAGE / "coffee.png", 0.7, 3),
    Sample("low_light", SKIMAGE / "motorcycle_left.png", 0.6, 4),
    Sample("haze", SKLEARN / "china.jpg", 0.6, 5),
    Sample("rain", SKIMAGE / "chelsea.png", 0.6, 6),
    Sample("snow", SKIMAGE / "rocket.jpg", 0.6, 7),
    Sample("raindrop", SKLEARN / "flower.jpg", 0.6, 8),
)


def sample_of(kind: str) -> Sample:
    (found,) = (sample for sample in SAMPLES if sample.kind == kind)
    return found


def degrade_photo(photo: Image.Image, sample: Sample) -> Image.Image:
    """Applies a sample's degradation; the same seed gives the same picture."""
    pixels = torch.from_numpy(np.array(photo, dtype=np.float32) / 255)
    generator = torch.Generator().manual_seed(sample.seed)
    image = pixels.permute(2, 0, 1)[None].contiguous()  # HWC -> BCHW
    degraded = degrade(sample.kind, image, sample.severity, generator)
    levels = (degraded[0].permute(1, 2, 0) * 255).round().clamp(0, 255).byte()
    return Image.fromarray(levels.numpy())


def psnr(image: Image.Image, reference: Image.Image) -> float:
    """Peak signal-to-noise ratio of two 8-bit RGB pictures of one size, in dB."""
    levels = (torch.from_numpy(np.asarray(p) / 255)[None] for p in (image, reference))
    return float(similarity.psnr(*levels))


def restore_sample(
    client: Client, workflow: Workflow, sample: Sample, out: Path
) -> tuple[dict[str, Any], Image.Image]:
    """Degrades and restores one photo, writes its files and returns its scores and sheet.

    The scores are an entry of ``metrics.json``: PSNR against the clean photo, in dB, and the
    probability of the predicted kind.
    """
    clean = read(sample.photo, LONG_SIDE).picture
    degraded = degrade_photo(clean, sample)
    restoration = restore(client, workflow, degraded, sample.kind)
    restored = restoration.image
    if restored.size != clean.size:
        raise ClientError(f"{sample.kind}: {clean.size} went in, {restored.size} came back")
    before, after, seconds = psnr(degraded, clean), psnr(restored, clean), restoration.seconds
    scores = {
        "photo": sample.photo.name,
        "kind": sample.kind,
        "predicted_kind": restoration.kind,
        "probability": max(restoration.probabilities.values(), default=0.0),
        "psnr_lq": before,
        "psnr_restored": after,
        "seconds": seconds,
    }
    cells = [
        ("clean", clean),
        (f"degraded, {before:.1f} dB", degraded),
        (f"restored, {after:.1f} dB ({seconds:.1f} s)", restored),
    ]
    drawn = sheet.row(f"{sample.kind}: {_prediction(restoration)}", cells)
    degraded.save(out / f"{sample.kind}_degraded.png")
    restored.save(out / f"{sample.kind}_restored.png")
    drawn.save(out / f"{sample.kind}_sheet.png")
    figures = f"{before:5.2f} -> {after:5.2f} dB, {_prediction(restoration)}, {seconds:.1f} s"
    print(f"{sample.kind:<10} {figures}", flush=True)
    return scores, drawn


def restore_samples(client: Client, workflow: Workflow, out: Path) -> None:
    """Runs all samples and writes the overall sheet and ``metrics.json``."""
    scores, rows = zip(
        *(restore_sample(client, workflow, sample, out) for sample in SAMPLES), strict=True
    )
    sheet.stack(rows).save(out / "sheet.jpg", quality=92)
    means = {
        name: float(np.mean([each[name] for each in scores]))
        for name in ("psnr_lq", "psnr_restored", "seconds")
    }
    means["accuracy"] = float(np.mean([each["predicted_kind"] == each["kind"] for each in scores]))
    report = {"photos": scores, "mean": means}
    (out / "metrics.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"{'mean':<10} {means['psnr_lq']:5.2f} -> {means['psnr_restored']:5.2f} dB")


def restore_own(client: Client, host: Host | None, path: Path, out: Path) -> None:
    """Restores the user's photo and writes it with a before/after sheet."""
    photo = read(path).picture
    large = photo.width * photo.height > LARGE
    workflow = load_workflow(LARGE_WORKFLOW if large else NANO_WORKFLOW)
    before = host.memory() if host else None
    restoration = restore(client, workflow, photo, path.stem)
    restored, title = restoration.image, f"{path.name}: {_prediction(restoration)}"
    restored.save(out / f"{path.stem}_restored.png")
    cells = [("your photo", photo), (f"restored ({restoration.seconds:.1f} s)", restored)]
    if large:
        shown = [(name, ImageOps.contain(picture, (SHOWN, SHOWN))) for name, picture in cells]
        left, top = max(0, photo.width - PIECE) // 2, max(0, photo.height - PIECE) // 2
        box = (left, top, min(photo.width, left + PIECE), min(photo.height, top + PIECE))
        pieces = [(f"{name}, a piece", picture.crop(box)) for name, picture in cells]
        drawn = sheet.stack([sheet.row(title, shown), sheet.row("at full size", pieces)])
    else:
        drawn = sheet.row(title, cells)
    drawn.save(out / f"{path.stem}_sheet.png")
    print(f"{title}, {restoration.seconds:.1f} s")
    if host and before is not None:
        print(f"ComfyUI held {before:.2f} GB before, at most {host.memory(peak=True):.2f} GB then")


def _prediction(restoration: Restoration) -> str:
    if restoration.kind is None:
        return "no classifier in the workflow"
    return f"seen as {restoration.kind} ({restoration.probabilities[restoration.kind]:.0%})"


@in_words
def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m tools.demo``."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--image", type=Path, metavar="PHOTO", help="restore this photo instead")
    add("--out", type=Path, default=Path("demo_out"), metavar="DIR")
    add("--server", metavar="URL", help="use this server instead of starting one")
    add("--port", type=int, help="port of the server (default: a free one)")
    add("--gpu", action="store_true", help="let ComfyUI use a GPU")
    options = parser.parse_args(arguments)
    exit_on_termination()
    options.out.mkdir(parents=True, exist_ok=True)
    own: AbstractContextManager[Host | None] = nullcontext()
    if not options.server:
        print("Starting ComfyUI ...", file=sys.stderr)
        own = Host(port=options.port, cpu=not options.gpu, log=options.out / "host.log")
    with own as host:
        client = Client(host.url if host else options.server)
        if options.image:
            restore_own(client, host, options.image, options.out)
        else:
            restore_samples(client, load_workflow(NANO_WORKFLOW), options.out)
    print(f"\nPictures: {options.out.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
