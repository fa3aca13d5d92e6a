"""What a run says of itself: CSV tables, a progress bar or plain lines, TensorBoard."""

from __future__ import annotations

import csv
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from diff_restorer.files import written_whole

from .clock import Clock
from .course import Course

try:
    import resource
except ImportError:  # Windows
    resource = None

log = logging.getLogger(__name__)

LINE_EVERY_SECONDS = 30


class Table:
    """A CSV file that grows by rows and whose first column is `step`."""

    def __init__(self, path: Path, *, last_step: int) -> None:
        """Opens or starts the table; rows after `last_step` are dropped, they will come again."""
        self.path = path
        self._columns: list[str] = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                # A row that was cut by a crash lacks its last values.
                rows = [row for row in reader if None not in row.values()]
                self._columns = list(reader.fieldnames or ())
            self._write([row for row in rows if int(row["step"]) <= last_step])

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row; new columns are added to the whole table."""
        if new := [name for name in row if name not in self._columns]:
            rows = read_table(self.path) if self.path.exists() else []
            self._columns += new
            self._write(rows)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns, restval="").writerow(row)

    def _write(self, rows: list[dict[str, str]]) -> None:
        with (
            written_whole(self.path) as part,
            part.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, self._columns, restval="")
            writer.writeheader()
            writer.writerows(rows)


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV table, by column name."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class Means:
    """Means of named scalars since the last `take`; values that are NaN do not count."""

    def __init__(self) -> None:
        self.state: dict[str, list[float]] = {}
        """Sum and count of each."""

    def add(self, name: str, total: float, count: float) -> None:
        """Take in `count` values whose sum is `total`."""
        held = self.state.setdefault(name, [0.0, 0.0])
        held[0], held[1] = held[0] + total, held[1] + count

    def take(self) -> dict[str, float]:
        """Means by name, NaN where nothing came; starts anew."""
        means = {name: t / n if n else float("nan") for name, (t, n) in self.state.items()}
        self.state = {}
        return means


class RunLog:
    """The logs of one run; does nothing on processes that are not the main one."""

    def __init__(
        self,
        out: Path,
        *,
        main: bool,
        course: Course,
        samples_per_step: int,
        device: torch.device,
        means: Means,
        clock: Clock,
        tensorboard: bool = False,
    ) -> None:
        """Opens the tables where `course` stands; raises ValueError where `tensorboard` is asked
        for and not installed."""
        self.means, self.course, self.device, self.main = means, course, device, main
        self._samples, start = samples_per_step, course.step
        self._since = time.perf_counter()
        self._clock, self._waited, self._window = clock, 0.0, 0
        self._said = 0.0
        self._board: Any = None
        self._bar = tqdm(
            total=course.length, initial=course.place, unit=course.unit, mininterval=5,
            disable=not (main and sys.stderr.isatty()), smoothing=0.05,
            bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} {unit} [{elapsed}<{remaining}{postfix}]",
        )  # fmt: skip
        if main:
            self._metrics = Table(out / "metrics.csv", last_step=start)
            self._validation = Table(out / "validation.csv", last_step=start)
            if tensorboard:
                self._board = _board(out / "tensorboard", start)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time of the block out of the throughput."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def advance(self) -> None:
        """One step is done."""
        self._window += 1
        self._bar.update(self.course.place - self._bar.n)

    def log(self, lr: float) -> None:
        """Write the row of the step that is done."""
        waited = self._clock.seconds().get("data", 0.0)
        step, now = self.course.step, time.perf_counter()
        elapsed = max(now - self._since, 1e-9)
        row = self.means.take() | {
            "lr": lr,
            "samples_per_s": self._window * self._samples / elapsed,
            "wait_share": (waited - self._waited) / elapsed,
            "peak_gb": peak_memory(self.device) / 1e9,
            "eta_s": self.course.seconds_left(),
        }
        self._since, self._waited, self._window = now, waited, 0
        if not self.main:
            return
        self._metrics.append({"step": step} | _rounded(row))
        self._to_board(step, row)
        facts = (
            f"loss {row['loss']:.4g}, {row['samples_per_s']:.3g} samples/s, "
            f"{row['wait_share']:.0%} waiting for data, peak {row['peak_gb']:.1f} GB"
        )
        self._bar.set_postfix_str(facts, refresh=False)
        due = now - self._said > LINE_EVERY_SECONDS or self.course.finished
        if self._bar.disable and due:
            left = timedelta(seconds=round(row["eta_s"]))
            log.info("%s: %s, %s to go", self.course, facts, left)
            self._said = now

    def validated(self, step: int, scores: Mapping[str, float]) -> None:
        """Write the scores of `step`."""
        self._validation.append({"step": step} | _rounded(scores))
        self._to_board(step, {f"validation/{name}": value for name, value in scores.items()})
        line = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
        if self._bar.disable:
            log.info("step %d: %s", step, line)
        else:
            self._bar.write(f"step {step}: {line}")

    def close(self) -> None:
        """End the bar and the event file."""
        self._bar.close()
        if self._board is not None:
            self._board.close()

    def _to_board(self, step: int, values: Mapping[str, float]) -> None:
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)


def peak_memory(device: torch.device) -> float:
    """Largest use of memory so far, bytes: the GPU's tensors, or the whole process on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    if resource is None:
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def _rounded(values: Mapping[str, float]) -> dict[str, float | str]:
    """Six digits are enough for a table; what is missing is left empty."""
    return {k: "" if v != v else float(f"{v:.6g}") for k, v in values.items()}


def _board(folder: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "--loop.tensorboard needs a package that is missing: pip install tensorboard. "
            "Without it, metrics.csv, validation.csv and curves.png hold the same."
        ) from error
    return SummaryWriter(folder, purge_step=start + 1)
