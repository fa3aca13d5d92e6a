"""Runs ComfyUI workflows over photos; a run that was stopped goes on where it was."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from tools.client import Client
from tools.environment import ROOT
from tools.errors import ClientError, ServerUnreachableError, WorkflowError
from tools.restoration import INPUT_TITLE, OUTPUT_TITLE, restore
from tools.workflow import Workflow

from .pictures import digest, file_digest, pixel_digest, read_note, save_picture
from .testsets import Case, suite_of

log = logging.getLogger(__name__)
CODE = ("diff_restorer", "nodes")
"""Where the code lies that results depend on."""


def restored_path(out: Path, case: Case) -> Path:
    """Where the restored photo is kept."""
    return out / "restored" / f"{case.id}.png"


def vae_path(out: Path, case: Case) -> Path:
    """Where the round trip of the clean photo is kept; the own sets share it."""
    name = f"clean/{case.name}" if suite_of(case.set) == "own" else case.id
    return out / "vae" / f"{name}.png"


@dataclass(frozen=True)
class Task:
    """One photo to send through a workflow."""

    name: str
    photo: Path
    result: Path
    """PNG to write; its note has `key`, `probabilities` (type -> number) and `seconds`."""


@dataclass(frozen=True)
class Workload:
    """A workflow and what it has to do."""

    title: str
    """Of the progress bar and in messages."""
    workflow: Workflow
    """In API format, with the titles of `tools.restore`."""
    tasks: tuple[Task, ...]
    model: str
    """Digest of the model file: results of another one are made again."""
    multiple: int = 1
    """Sides of a photo are padded to multiples of this and cut off again, in pixels."""

    def pending(self) -> list[tuple[Task, str]]:
        """Tasks without a valid result, and the key that it will have; other code makes others."""
        code = file_digest(*(path for part in CODE for path in sorted((ROOT / part).glob("*.py"))))
        own = digest(json.dumps(self.workflow, sort_keys=True), self.model, code)
        wanted = ((task, digest(own, pixel_digest(task.photo))) for task in self.tasks)
        return [(task, key) for task, key in wanted if read_note(task.result).get("key") != key]


COMPLETE = "DiffRestorerNanoLoader"
"""Loader whose third output is a VAE."""


def vae_round_trip(workflow: Workflow) -> Workflow:
    """LoadImage -> VAE Encode -> VAE Decode with the VAE of a workflow, and no more; raises
    WorkflowError where no node of it has a VAE."""
    links = [node["inputs"]["vae"] for node in workflow.values() if "vae" in node["inputs"]]
    # Where none is connected, the nodes take that of the complete file.
    links += [[key, 2] for key, node in workflow.items() if node["class_type"] == COMPLETE]
    if not links:
        raise WorkflowError("the workflow has no VAE, so that its round trip cannot be measured")

    def node(class_type: str, title: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": class_type, "inputs": inputs, "_meta": {"title": title}}

    needed: Workflow = {
        "photo": node("LoadImage", INPUT_TITLE, image="photo.png"),
        "encode": node("VAEEncode", "VAE Encode", pixels=["photo", 0], vae=links[0]),
        "decode": node("VAEDecode", "VAE Decode", samples=["encode", 0], vae=links[0]),
        "save": node("SaveImage", OUTPUT_TITLE, images=["decode", 0], filename_prefix="vae"),
    }
    waiting = [links[0][0]]
    while waiting:  # the loader of the VAE, and whatever it is fed by
        name = waiting.pop()
        needed[name] = workflow[name]
        inputs = workflow[name]["inputs"].values()
        waiting += [value[0] for value in inputs if isinstance(value, list)]
    return needed


def run_workload(
    client: Client, workload: Workload, pending: Iterable[tuple[Task, str]]
) -> dict[str, str]:
    """Sends photos, `pending` of the workload, through its workflow; name of each that failed ->
    reason.

    Raises ServerUnreachableError where the server is gone; what is done is kept.
    """
    failed: dict[str, str] = {}
    todo = list(pending)
    done = len(workload.tasks) - len(todo)
    bar = tqdm(todo, desc=workload.title, unit="photo", initial=done, total=len(workload.tasks))
    for task, key in bar:
        bar.set_postfix_str(task.name)
        try:
            with Image.open(task.photo) as opened:
                photo = opened.convert("RGB")
            result = restore(
                client, workload.workflow, _pad(photo, workload.multiple), workload.title
            )
            picture = result.image
            if picture.size != photo.size:
                picture = picture.crop((0, 0, *photo.size))
        except ServerUnreachableError:
            raise
        except (ClientError, OSError) as error:
            log.warning("%s: %s failed: %s", task.name, workload.title, error)
            failed[task.name] = f"{workload.title}: {error}"
            continue
        note = {"key": key, "probabilities": result.probabilities, "seconds": result.seconds}
        save_picture(task.result, picture, note)
    return failed


def _pad(photo: Image.Image, multiple: int) -> Image.Image:
    """Repeats the right and bottom edges, as the nodes do."""
    edge = ((0, -photo.height % multiple), (0, -photo.width % multiple), (0, 0))
    return Image.fromarray(np.pad(np.asarray(photo), edge, "edge"))
