"""Runs ComfyUI workflows over test cases; a run that was stopped goes on where it was."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from tools.client import Client, ClientError, ServerUnreachableError, Workflow
from tools.restore import INPUT_TITLE, OUTPUT_TITLE, restore

from .pictures import digest, read_note, save_picture

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One photo to send through a workflow."""

    name: str
    photo: Path
    result: Path
    """PNG to write; its note has `key`, `probabilities` (type -> number) and `seconds`."""


def vae_round_trip() -> Workflow:
    """LoadImage -> VAE Encode -> VAE Decode with Nano's stock VAE: what its latents can show."""

    def node(class_type: str, title: str = "", **inputs: object) -> dict[str, object]:
        return {"class_type": class_type, "inputs": inputs, "_meta": {"title": title or class_type}}

    return {
        "1": node("LoadImage", INPUT_TITLE, image="photo.png"),
        "2": node("DiffRestorerNanoLoader"),
        "3": node("VAEEncode", pixels=["1", 0], vae=["2", 2]),
        "4": node("VAEDecode", samples=["3", 0], vae=["2", 2]),
        "5": node("SaveImage", OUTPUT_TITLE, images=["4", 0], filename_prefix="vae"),
    }


def run_jobs(
    client: Client | None,
    workflow: Workflow,
    jobs: Iterable[Job],
    weights: str,
    title: str,
    multiple: int = 1,
) -> dict[str, str]:
    """Sends every photo that has no valid result yet through a workflow.

    Args:
        client: The server; None only says which results are missing.
        workflow: In API format, with the titles of `tools.restore`.
        jobs: What to do.
        weights: Digest of the model file, part of the key.
        title: Of the progress bar.
        multiple: Sides of the photo are padded to multiples of this, and cut off again.

    Returns:
        Name of each photo that failed -> reason.

    Raises:
        ServerUnreachableError: The server is gone; what is done is kept.
    """
    failed: dict[str, str] = {}
    key = digest(json.dumps(workflow, sort_keys=True), weights)
    wanted = [(job, digest(key, job.photo.read_bytes())) for job in jobs]
    todo = [(job, own) for job, own in wanted if read_note(job.result).get("key") != own]
    bar = tqdm(todo, desc=title, unit="photo", initial=len(wanted) - len(todo), total=len(wanted))
    for job, own in bar:
        bar.set_postfix_str(job.name)
        if client is None:
            failed[job.name] = f"{title}: not done yet"
            continue
        try:
            with Image.open(job.photo) as opened:
                photo = opened.convert("RGB")
            done = restore(client, workflow, _pad(photo, multiple), title)
            picture = done.image.crop((0, 0, *photo.size)) if multiple > 1 else done.image
            if picture.size != photo.size:
                raise ClientError(f"{photo.size} went in, {picture.size} came back")
        except ServerUnreachableError:
            raise
        except (ClientError, OSError) as error:
            log.warning("%s: %s", job.name, error)
            failed[job.name] = f"{title}: {error}"
            continue
        note = {"key": own, "probabilities": done.probabilities, "seconds": done.seconds}
        save_picture(job.result, picture, note)
    return failed


def _pad(photo: Image.Image, multiple: int) -> Image.Image:
    """Repeats the right and bottom edges, as the nodes do."""
    width, height = (-(-side // multiple) * multiple for side in photo.size)
    if (width, height) == photo.size:
        return photo
    padded = Image.new("RGB", (width, height))
    padded.paste(photo)
    right = photo.crop((photo.width - 1, 0, photo.width, photo.height))
    padded.paste(right.resize((width - photo.width, photo.height)), (photo.width, 0)) if (
        width > photo.width
    ) else None
    bottom = padded.crop((0, photo.height - 1, width, photo.height))
    if height > photo.height:
        padded.paste(bottom.resize((width, height - photo.height)), (0, photo.height))
    return padded


def picture_bytes(picture: Image.Image) -> bytes:
    """The picture as a PNG file."""
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()
