"""Tries random input until the time is over: python -m tests.fuzz [--minutes 10] [--seed 0].

Files, photos and values of nodes are tried in this process, prompts and servers with a real
ComfyUI. Prints what came of how many cases; a fault is made small and kept under tests/fuzz/found/,
where `make test` tries it from then on, and ends the program with status 1.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any

import torch

from tests.e2e.graph import Runner, with_own_nodes
from tests.e2e.holding import Holding
from tests.fuzz.cases import FaultError, Kind, keep, outcome, smaller
from tests.fuzz.files import Files
from tests.fuzz.photos import Photos
from tests.fuzz.servers import Prompts, Servers
from tests.fuzz.toys import Toys
from tests.fuzz.values import Values
from tools import environment, in_process
from tools.ending import in_words
from tools.host import Host, exit_on_termination

KINDS = ("files", "photos", "values", "prompts", "servers")
AT_ONCE = 25
"""Cases of one kind, after which good input is tried."""
CURRENT = Path(tempfile.gettempdir()) / "diff-restorer-fuzz-current.json"
"""The case that is being tried, for one that ends the process or the server."""


def say(line: str) -> None:
    """To whoever waits."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def run(options: argparse.Namespace, stack: ExitStack) -> int:
    """Try the kinds in turn; returns the number of faults."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="diff-restorer-fuzz-")))
    kinds = _open(options.kinds, folder, stack)
    counts: dict[str, Counter[str]] = {name: Counter() for name in kinds}
    deadline = time.monotonic() + 60 * options.minutes
    turn, faults = 0, 0
    while time.monotonic() < deadline:
        for name, kind in kinds.items():
            # By seed, kind and turn alone, so that one turn can be tried again.
            random = Random(f"{options.seed} {name} {turn}")
            share = (deadline - time.monotonic()) / len(kinds)
            faults += _try(name, kind, random, counts[name], time.monotonic() + share)
        turn += 1
    for name, found in counts.items():
        total = f"{sum(found.values()):6} {name}"
        say(f"{total:16}" + ", ".join(f"{n} {what}" for what, n in found.most_common()))
    say(f"{sum(map(Counter.total, counts.values()))} cases, {faults} other outcomes")
    return faults


def _try(name: str, kind: Kind, random: Random, counts: Counter[str], until: float) -> int:
    """One turn of a kind."""
    faults = 0
    for _ in range(AT_ONCE):
        if time.monotonic() > until:
            break
        case = kind.make(random)
        CURRENT.write_text(json.dumps({"kind": name, **case}))
        try:
            counts[outcome(kind, case)] += 1
        except FaultError as fault:
            counts["FAULT"] += 1
            faults += 1
            small = smaller(kind, case, fault)
            path = keep(name, small, fault)
            say(f"{path}: {json.dumps(small)[:300]}\n  {fault}")
    try:
        kind.run_next()
    except FaultError as fault:
        say(f"after {name}: {fault}")
        faults += 1
    return faults


def _silence_libtiff() -> None:
    """It writes what it finds wrong to the C library's stderr; Python's own stays."""
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    faulthandler.enable(sys.stderr)  # what ends the process is told all the same


def _open(names: Sequence[str], folder: Path, stack: ExitStack) -> dict[str, Kind]:
    """The kinds by name; a server and the host in this process only where they are needed."""
    made: dict[str, Callable[[], Kind]] = {}
    if set(names) & {"files", "photos", "values"}:
        in_process.import_host(environment.comfyui_root(), folder, cpu=True)
        host_utils: Any = importlib.import_module("comfy.utils")
        host_utils.set_progress_bar_enabled(False)
        pack = in_process.load_pack()
        toys = Toys(pack, folder)
        made["files"] = lambda: Files(toys, folder)
        made["photos"] = lambda: Photos(pack, folder)
        made["values"] = lambda: Values(toys)
    if set(names) & {"prompts", "servers"}:
        runner = Runner(stack.enter_context(Host(with_own_nodes(folder / "server"))))
        made["prompts"] = lambda: Prompts(runner)
        made["servers"] = lambda: Servers(runner, Holding(folder))
    return {name: made[name]() for name in names}


@in_words
def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m tests.fuzz``."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--minutes", type=float, default=10.0, metavar="M", help="default: 10")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="default: all")
    options = parser.parse_args(arguments)
    exit_on_termination()
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")  # Pillow's, of what is damaged
    _silence_libtiff()
    torch.set_num_threads(1)  # of toys, which are faster so
    with ExitStack() as stack:
        return 1 if run(options, stack) else 0


if __name__ == "__main__":
    sys.exit(main())
