"""Restores one photo through a ComfyUI workflow, at 8 or 16 bits per channel.

The host's LoadImage and SaveImage know 8 bits only (16-bit grey even comes out white). For 16 bits
the client adds stock nodes to the workflow; see `deepen_input` and `deepen_output`.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from tools.client import AsyncClient, Client, OnProgress, Progress, Result
from tools.environment import ROOT
from tools.errors import ClientError, WorkflowError
from tools.photo import Pixels, to_bits
from tools.workflow import Workflow, find_node, title_of

NANO_WORKFLOW = ROOT / "workflows/api/restore_nano.json"
INPUT_TITLE = "Degraded photo"
OUTPUT_TITLE = "Restored"
READERS = ("DiffRestorerDegradationClassifier", "DiffRestorerPromptProcessor")
"""Nodes that tell the probabilities, the one to go by first."""
UPLOADS = "diff-restorer"
"""Subfolder of the server's input folder."""
DOUBLINGS = 8
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "sgm_uniform"},
    "best": {"steps": 3, "cfg": 1.0, "sampler_name": "euler", "scheduler": "sgm_uniform"},
}
"""Settings of the sampler for Nano. In docs/decoder.md 2 steps cost 0.1 dB on our own kinds, and no
other setting came to more than `best`, which the workflows have."""


@dataclass(frozen=True)
class Restoration:
    """What the server made of one photo."""

    pixels: Pixels
    """(H, W, 3) or (H, W, 4); uint16 for a photo of 16 bits and a result without alpha."""
    probabilities: dict[str, float]
    """Degradation type -> probability; empty if no node of the workflow tells."""
    seconds: float

    @property
    def image(self) -> Image.Image:
        """The colours at 8 bits."""
        return Image.fromarray(np.ascontiguousarray(to_bits(self.pixels[..., :3], 8)))

    @property
    def kind(self) -> str | None:
        """The most probable type."""
        return max(self.probabilities, key=self.probabilities.__getitem__, default=None)


def with_preset(workflow: Workflow, name: str) -> Workflow:
    """A copy of a workflow with the settings of one of `PRESETS` in its KSampler nodes."""
    changed = copy.deepcopy(workflow)
    samplers = [node for node in changed.values() if node["class_type"] == "KSampler"]
    if not samplers:
        raise WorkflowError(f"--preset {name}: the workflow has no KSampler node to set")
    for sampler in samplers:
        sampler["inputs"] |= PRESETS[name]
    return changed


def restore(client: Client, workflow: Workflow, photo: Image.Image, name: str) -> Restoration:
    """Restores one photo at 8 bits, with a progress bar of that name; see `restore_pixels`."""
    # disable=None: no bar where the output is no terminal.
    with tqdm(desc=name, leave=False, unit="step", dynamic_ncols=True, disable=None) as bar:

        async def show(progress: Progress) -> None:
            node = workflow.get(progress.node, {})
            bar.set_postfix_str(title_of(node) or node.get("class_type", ""))
            if progress.steps > 1:
                bar.total, bar.n = progress.steps, progress.step
            bar.refresh()

        pixels = np.asarray(photo.convert("RGB"))
        return asyncio.run(restore_pixels(client.asynchronous, workflow, pixels, show))


async def restore_pixels(
    client: AsyncClient,
    workflow: Workflow,
    pixels: Pixels,
    on_progress: OnProgress,
    prefix: str | None = None,
) -> Restoration:
    """Sends pixels through a workflow.

    Args:
        workflow: In API format, with a LoadImage node titled ``Degraded photo`` and a SaveImage
            node titled ``Restored``; it is not changed. It may use the transparency or not.
        pixels: (H, W, 3) or (H, W, 4), uint8 or uint16.
        prefix: Of the result's file on the server, in place of the workflow's. Where results are
            removed it must be new: the server answers the same photo with the same file.
    """
    filled = copy.deepcopy(workflow)
    source = find_node(filled, "LoadImage", INPUT_TITLE)
    target = find_node(filled, "SaveImage", OUTPUT_TITLE)
    if prefix is not None:
        filled[target]["inputs"]["filename_prefix"] = prefix
    deep = pixels.dtype == np.uint16
    if deep:
        upper, lower = (pixels >> 8).astype(np.uint8), (pixels & 255).astype(np.uint8)
        filled[source]["inputs"]["image"] = await _upload(client, upper)
        deepen_input(filled, source, await _upload(client, lower[..., :3]))
    else:
        filled[source]["inputs"]["image"] = await _upload(client, pixels)
    result = await client.run(filled, on_progress)
    restored = await _fetch(client, result, target)
    seconds = result.seconds
    if deep and restored.shape[2] == 3:  # ImageBlend knows no transparency
        height, width = restored.shape[:2]
        deepen_output(filled, target, await _upload(client, restored), width, height)
        # The server has the rest of the graph in its cache.
        rest = await client.run(filled)
        fine = await _fetch(client, rest, target)
        with client.expecting("/view"):  # of the same size
            restored = await asyncio.to_thread(_join, restored, fine)
        seconds += rest.seconds
    with client.expecting("/history"):
        return Restoration(restored, _probabilities(result, filled), seconds)


def deepen_input(workflow: Workflow, source: str, lower: str) -> None:
    """Adds the lower bytes of a 16-bit photo to what a LoadImage node gives.

    v / 65535 = (1 - 1/257) * upper / 255 + 1/257 * lower / 255, which ImageBlend computes in float.

    Args:
        source: Id of the node that loads the upper bytes.
        lower: The uploaded picture of the lower bytes.
    """
    loaded, blended = f"{source}-lower", f"{source}-16-bit"
    for node in workflow.values():
        for name, value in node["inputs"].items():
            if value == [source, 0]:
                node["inputs"][name] = [blended, 0]
    workflow[loaded] = {"class_type": "LoadImage", "inputs": {"image": lower}}
    workflow[blended] = _blend([source, 0], [loaded, 0], "normal", 1 / 257)


def deepen_output(workflow: Workflow, target: str, upper: str, width: int, height: int) -> None:
    """Lets a SaveImage node save what it cut off the last time, enlarged by 256.

    ImageBlend subtracts (``difference``) and doubles (``overlay`` with white), in float. The
    uploaded picture that it saved is ``upper``, ``width`` by ``height`` pixels.
    """
    loaded, white = f"{target}-upper", f"{target}-white"
    workflow[loaded] = {"class_type": "LoadImage", "inputs": {"image": upper}}
    size = {"width": width, "height": height, "batch_size": 1, "color": 0xFFFFFF}
    workflow[white] = {"class_type": "EmptyImage", "inputs": size}
    link = workflow[target]["inputs"]["images"]
    steps = [([loaded, 0], "difference"), *[([white, 0], "overlay")] * DOUBLINGS]
    for index, (other, mode) in enumerate(steps):
        name = f"{target}-rest{index}"
        workflow[name] = _blend(link, other, mode, 1.0)
        link = [name, 0]
    workflow[target]["inputs"]["images"] = link


def _blend(first: list[Any], second: list[Any], mode: str, factor: float) -> dict[str, Any]:
    inputs = {"image1": first, "image2": second, "blend_mode": mode, "blend_factor": factor}
    return {"class_type": "ImageBlend", "inputs": inputs}


def encode(pixels: Pixels) -> tuple[bytes, str]:
    """Pixels as a PNG file, and its name on servers."""
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(stream, "PNG", compress_level=1)
    data = stream.getvalue()
    # Named by content: the same name never means another photo to a server that is shared.
    return data, f"{hashlib.sha256(data).hexdigest()[:24]}.png"


async def _upload(client: AsyncClient, pixels: Pixels) -> str:
    data, name = await asyncio.to_thread(encode, pixels)
    return await client.upload(data, name, UPLOADS)


async def _fetch(client: AsyncClient, result: Result, target: str) -> Pixels:
    images = await client.images(result, target)
    if len(images) != 1:
        raise ClientError(
            f"node {target} ({OUTPUT_TITLE!r}) gave {len(images)} pictures instead of one"
        )
    return np.asarray(images[0].convert("RGBA" if images[0].mode == "RGBA" else "RGB"))


def _join(upper: Pixels, fine: Pixels) -> Pixels:
    """16 bits of what SaveImage saved, and of what it cut off."""
    # It cuts off, so half a step is missing on average; 255 * 256 steps make white.
    joined = upper.astype(np.float64) * 256 + fine + 0.5
    return (joined * (65535 / 65280)).round().clip(0, 65535).astype(np.uint16)


def _probabilities(result: Result, workflow: Workflow) -> dict[str, float]:
    for reader in READERS:
        for node_id, shown in result.outputs.items():
            # Older versions of the pack show no text there.
            if workflow.get(node_id, {}).get("class_type") == reader and "text" in shown:
                kinds = json.loads("".join(shown["text"]))
                return {str(kind): float(probability) for kind, probability in kinds.items()}
    return {}
