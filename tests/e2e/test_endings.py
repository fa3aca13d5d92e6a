"""How programs end: in words, where their user can do something."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import pytest

from diff_restorer.checkpoint import CheckpointError
from diff_restorer.weights import parse_json
from tools.ending import in_words
from tools.environment import ROOT
from tools.errors import ClientError


def fail_in_a_library() -> None:
    json.loads("{")


def refuse() -> None:
    parse_json("[" * 100_000)


def miss() -> None:
    (ROOT / "nowhere").read_text()


def raising(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


def stumble() -> None:
    {}["key"]


@pytest.mark.parametrize(
    ("main", "status", "words"),
    [
        (refuse, 1, "error: nested too deeply\n"),
        (raising(CheckpointError("a.safetensors: cut off")), 1, "error: a.safetensors: cut off\n"),
        (raising(ClientError("no ComfyUI answers")), 1, "error: no ComfyUI answers\n"),
        (miss, 1, "nowhere"),
        (raising(KeyboardInterrupt()), 130, "interrupted\n"),
        (lambda: None, 0, ""),
        (lambda: 2, 2, ""),
    ],
)
def test_what_users_can_mend_is_a_sentence(
    main: Callable[[], int | None], status: int, words: str, capsys: pytest.CaptureFixture[str]
):
    assert in_words(main)() == status
    printed = capsys.readouterr().err
    assert words in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("main", [fail_in_a_library, stumble])
def test_what_we_have_to_mend_keeps_its_traceback(main: Callable[[], None]):
    with pytest.raises((ValueError, KeyError)):
        in_words(main)()


@pytest.mark.parametrize(
    "program",
    ["training.evaluate --data.clean /nowhere --out {out}", "training.plots /nowhere"],
)
def test_programs(program: str, tmp_path):
    command = [argument.format(out=tmp_path) for argument in program.split()]
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr
