"""SIGKILL at any moment, also while a checkpoint is written, costs no more than some steps."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tools.environment import ROOT

from .toys import same, train, untimed


def steps_done(out: Path) -> int:
    return max((int(p.name.removeprefix("step_")) for p in out.glob("step_*")), default=0)


def wait_for(condition: Any, child: BaseProcess) -> None:
    for _ in range(60_000):
        if condition():
            return
        assert child.is_alive(), "the run ended by itself"
        time.sleep(0.001)
    raise AssertionError("the run does not advance")


def test_a_signal_to_the_whole_process_group_still_saves_the_state(tmp_path: Path) -> None:
    """As `timeout`, a terminal and `accelerate launch` send it: to the data processes, too."""
    settings = {
        "out": str(tmp_path), "steps": 1_000_000, "decay": False, "workers": 1,
        "checkpoint_every": 1_000_000, "validate_every": 1_000_000,
    }  # fmt: skip
    command = [sys.executable, "-c", f"from tests.training.toys import train; train({settings})"]
    child = subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    rows = tmp_path / "metrics.csv"
    while not (rows.is_file() and rows.read_text().count("\n") > 2):
        assert child.poll() is None, child.communicate()
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGTERM)
    _, said = child.communicate(timeout=120)
    assert child.returncode == 128 + signal.SIGTERM, said
    assert steps_done(tmp_path) > 0


def test_killed_twenty_times_equals_a_straight_run_bit_for_bit(tmp_path: Path) -> None:
    # A server that has imported torch (dynamo, too, which optimizers ask for), and run nothing
    # with it, makes children in no time.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.toys", "torch._dynamo"])
    out = tmp_path / "killed"
    settings: dict[str, Any] = {
        "out": str(out), "steps": 1_000_000, "decay": False, "checkpoint_every": 1,
        "validate_every": 20,
    }  # fmt: skip
    chance = random.Random(0)
    in_writing = 0
    for kill in range(20):
        child = context.Process(target=train, args=(settings,))
        child.start()
        before = steps_done(out)
        wait_for(lambda before=before: steps_done(out) > before, child)
        time.sleep(chance.uniform(0, 0.05))
        if kill % 2:
            wait_for(lambda: any(out.glob("writing/*")), child)
        child.kill()
        child.join()
        assert child.exitcode == -9
        in_writing += (out / "writing").exists()
    assert in_writing  # the tenth and more were aimed at it

    steps = steps_done(out) + 2
    killed = train(settings | {"steps": steps})
    straight = train(
        settings | {"out": str(tmp_path / "straight"), "steps": steps, "checkpoint_every": steps}
    )
    assert same(load_file(killed), load_file(straight))
    for name in ("metrics.csv", "validation.csv"):
        assert untimed(out / name) == untimed(straight.parent / name)
    assert not (out / "writing").exists()
