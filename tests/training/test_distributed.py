"""Two real processes (gloo) equal one that accumulates, with DDP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tools.environment import ROOT
from tools.host import free_port

from .toys import train, untimed


def launch(settings: dict[str, Any], nodes: int = 1) -> subprocess.CompletedProcess[str]:
    """The first node's end of `accelerate launch` on two processes with the shipped file, as the
    training guide has it, or on one process on each of two nodes, both on this machine."""
    port = str(free_port())
    started = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"),
                *("--config_file", "training/configs/accelerate/ddp.yaml"),
                *("--num_machines", str(nodes), "--machine_rank", str(rank)),
                *("--main_process_ip", "127.0.0.1", "--main_process_port", port),
                *("--num_processes", "2", "-m", "tests.training.toys", json.dumps(settings)),
            ],
            cwd=ROOT,
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(nodes)
    ]
    try:
        ends = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    done = [
        subprocess.CompletedProcess(process.args, process.returncode, *end)
        for process, end in zip(started, ends, strict=True)
    ]
    for end in reversed(done):
        assert end.returncode == 0, end.stderr[-3000:]
    return done[0]


def table(path: Path) -> list[dict[str, float]]:
    """What a clock and the machine have no say in."""
    return [{k: float(v) for k, v in row.items() if v} for row in untimed(path)]


def test_two_processes_equal_accumulation(tmp_path: Path) -> None:
    """Weights, EMA and logs; the second half of the two-process run is a resumed one."""
    shared = {"decay": False, "batch_size": 2, "steps": 7, "validate_every": 7}
    one = train({"out": str(tmp_path / "one"), "accumulate": 2, **shared})
    two: dict[str, Any] = {"out": str(tmp_path / "two"), "accumulate": 1, **shared}
    for steps in (4, 7):
        done = launch(two | {"steps": steps})
    assert "resumed" in done.stderr
    found, expected = load_file(tmp_path / "two" / "export.safetensors"), load_file(one)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for name in ("metrics.csv", "validation.csv"):
        shared_out, alone = table(tmp_path / "two" / name), table(tmp_path / "one" / name)
        if name == "validation.csv":
            assert shared_out.pop(0)["step"] == 4  # and one row each: one process writes
        assert len(shared_out) == len(alone)
        for found, expected in zip(shared_out, alone, strict=True):
            assert found == pytest.approx(expected, abs=0, rel=0)


def test_two_nodes_equal_accumulation(tmp_path: Path) -> None:
    """One process each, as on a cluster whose nodes share a disk."""
    shared = {"decay": False, "batch_size": 2, "steps": 4, "validate_every": 4}
    one = train({"out": str(tmp_path / "one"), "accumulate": 2, **shared})
    launch({"out": str(tmp_path / "two"), "accumulate": 1, **shared}, nodes=2)
    found, expected = load_file(tmp_path / "two" / "export.safetensors"), load_file(one)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert table(tmp_path / "two/metrics.csv") == table(tmp_path / "one/metrics.csv")


def test_a_run_of_two_processes_goes_on_in_one_and_back(tmp_path: Path) -> None:
    """The same batches, as the one accumulates; the weights' names must not tell of processes."""
    shared = {"decay": False, "batch_size": 2, "validate_every": 7}
    straight = train({"out": str(tmp_path / "one"), "accumulate": 2, "steps": 7, **shared})
    out = str(tmp_path / "two")
    for steps, processes in ((2, 2), (4, 1), (7, 2)):
        settings = {"out": out, "accumulate": 2 // processes, "steps": steps, **shared}
        if processes == 1:
            train(settings)
        else:
            done = launch(settings)
    assert "processes 1 -> 2" in done.stderr
    found, expected = load_file(tmp_path / "two" / "export.safetensors"), load_file(straight)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_two_processes_agree_on_the_end_of_a_time_box(tmp_path: Path) -> None:
    """Their clocks start apart, and each could take another step for the last."""
    out = tmp_path / "box"
    launch({"out": str(out), "steps": 0, "minutes": 0.25, "log_every": 1})
    rows = table(out / "metrics.csv")
    assert len(rows) > 3
    last = f"step_{round(rows[-1]['step']):07d}"
    assert json.loads((out / last / "state.json").read_text())["extra"]["course"]["ended"] == 15
    assert (out / "export.safetensors").exists()
