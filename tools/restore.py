"""Restores photos through any running ComfyUI server that has Diff-Restorer.

python -m tools.restore photo.jpg [more.png ...] [--server URL] [--out DIR]
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from tools.client import (
    Client,
    ClientError,
    Progress,
    Result,
    Workflow,
    find_node,
    load_workflow,
)
from tools.environment import ROOT

NANO_WORKFLOW = ROOT / "workflows/api/restore_nano.json"
INPUT_TITLE = "Degraded photo"
OUTPUT_TITLE = "Restored"
CLASSIFIER = "DiffRestorerDegradationClassifier"


@dataclass(frozen=True)
class Restoration:
    """What the server made of one photo."""

    image: Image.Image
    probabilities: dict[str, float]
    """Degradation type -> probability; empty if the workflow has no classifier."""
    seconds: float

    @property
    def kind(self) -> str | None:
        """The most probable type."""
        return max(self.probabilities, key=self.probabilities.__getitem__, default=None)


def read_photo(path: Path, max_side: int = 0) -> Image.Image:
    """Opens a photo upright and, if it is larger, shrinks it.

    Args:
        path: The file.
        max_side: Longest side in pixels; 0 keeps the size.

    Raises:
        ClientError: The file is missing or no picture.
    """
    try:
        with Image.open(path) as opened:
            photo = ImageOps.exif_transpose(opened).convert("RGB")
    except FileNotFoundError as error:
        raise ClientError(f"there is no photo {path}") from error
    except (UnidentifiedImageError, OSError) as error:
        raise ClientError(f"{path} is not a picture that can be read: {error}") from error
    if max_side and max(photo.size) > max_side:
        photo.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return photo


def restore(client: Client, workflow: Workflow, photo: Image.Image, name: str) -> Restoration:
    """Restores one photo, with a progress bar.

    Args:
        client: The server to use.
        workflow: In API format, with a LoadImage node titled ``Degraded photo`` and a SaveImage
            node titled ``Restored``; it is not changed.
        photo: RGB picture.
        name: Label of the progress bar and of the file on the server.

    Raises:
        ClientError: Anything that keeps the server from restoring it.
    """
    source = find_node(workflow, "LoadImage", INPUT_TITLE)
    target = find_node(workflow, "SaveImage", OUTPUT_TITLE)
    stream = io.BytesIO()
    photo.save(stream, "PNG")
    filled = copy.deepcopy(workflow)
    stored = client.upload(stream.getvalue(), f"diff-restorer-{name}.png")
    filled[source]["inputs"]["image"] = stored
    # disable=None: no bar where the output is no terminal.
    with tqdm(desc=name, leave=False, unit="step", dynamic_ncols=True, disable=None) as bar:
        result = client.run(filled, lambda progress: _show(bar, filled, progress))
    images = client.images(result, target)
    if len(images) != 1:
        raise ClientError(
            f"node {target} ({OUTPUT_TITLE!r}) gave {len(images)} pictures instead of one"
        )
    return Restoration(images[0].convert("RGB"), _probabilities(result, filled), result.seconds)


def _show(bar: tqdm, workflow: Workflow, progress: Progress) -> None:
    node = workflow.get(progress.node, {})
    bar.set_postfix_str(node.get("_meta", {}).get("title") or node.get("class_type", ""))
    if progress.steps > 1:
        bar.total = progress.steps
        bar.n = progress.step
    bar.refresh()


def _probabilities(result: Result, workflow: Workflow) -> dict[str, float]:
    for node_id, shown in result.outputs.items():
        if workflow[node_id]["class_type"] == CLASSIFIER:
            return json.loads("".join(shown["text"]))
    return {}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m tools.restore``."""
    parser = argparse.ArgumentParser(prog="python -m tools.restore", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("photos", nargs="+", type=Path, metavar="photo")
    parser.add_argument("--server", default="http://127.0.0.1:8188", metavar="URL")
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR")
    parser.add_argument("--workflow", type=Path, default=NANO_WORKFLOW, metavar="FILE")
    parser.add_argument(
        "--max-side", type=int, default=0, metavar="PIXELS", help="shrink larger photos first"
    )
    options = parser.parse_args(arguments)
    client = Client(options.server)
    try:
        workflow = load_workflow(options.workflow)
        options.out.mkdir(parents=True, exist_ok=True)
        for path in options.photos:
            photo = read_photo(path, options.max_side)
            restored = restore(client, workflow, photo, path.stem)
            target = options.out / f"{path.stem}_restored.png"
            restored.image.save(target)
            seen = f", seen as {restored.kind}" if restored.kind else ""
            sys.stdout.write(f"{target} ({restored.seconds:.1f} s{seen})\n")
    except ClientError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
