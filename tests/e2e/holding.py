"""A workflow that tests can hold while a server runs it, and photos to send through it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.e2e.graph import Runner, make_photo
from tools import restore
from tools.restoration import INPUT_TITLE, OUTPUT_TITLE
from tools.workflow import Workflow


class Holding:
    """A workflow that gives the photo back unchanged, and can be held while it runs."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "hold"
        self.workflow = folder / "workflow.json"
        self.workflow.write_text(json.dumps(self.nodes))

    @property
    def nodes(self) -> Workflow:
        hold = {"image": ["photo", 0], "path": str(self.path)}
        save = {"images": ["hold", 0], "filename_prefix": "restored"}
        return {
            "photo": {
                "class_type": "LoadImage",
                "inputs": {"image": ""},
                "_meta": {"title": INPUT_TITLE},
            },
            "hold": {"class_type": "E2EHold", "inputs": hold},
            "save": {
                "class_type": "SaveImage",
                "inputs": save,
                "_meta": {"title": OUTPUT_TITLE},
            },
        }

    @property
    def runs(self) -> int:
        """How often servers began to run it."""
        log = Path(f"{self.path}.log")
        return len(log.read_text().splitlines()) if log.exists() else 0

    def hold(self, only: str = "") -> None:
        """Holds all runs from now on, or only the one of that number."""
        self.path.write_text(only)

    def release(self) -> None:
        self.path.unlink(missing_ok=True)


def wait_until(condition: Callable[[], object], seconds: float) -> bool:
    """Whether it came true in time."""
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(met)


def put_photos(folder: Path, count: int) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"photo {index}.png" for index in range(count)]
    for index, path in enumerate(paths):
        make_photo(32, 24, seed=index).save(path)
    return paths


def read_report(out: Path) -> dict[str, Any]:
    return json.loads((out / restore.REPORT_NAME).read_text())


def run(holding: Holding, runner: Runner, *arguments: str | Path) -> int:
    return restore.main(
        [*map(str, arguments), "--server", runner.host.url, "--workflow", str(holding.workflow)]
    )


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as opened:
        return np.asarray(opened)
