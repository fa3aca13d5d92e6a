"""What every kind of input has in common: cases, outcomes, and how a found one is made small."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, Protocol

from tools.environment import ROOT
from tools.errors import PromptRejectedError

FOUND = Path(__file__).parent / "found"
Case = dict[str, Any]
"""JSON: `steps` say what is changed of good input, one after the other; the rest is the kind's."""
Step = list[Any]
SLOW = 30.0
"""Seconds of the processor that no case may take."""
LONGEST_MESSAGE = 2000
UNTRANSLATED = ("KeyError", "AttributeError", "IndexError", "size mismatch", "NoneType")
"""What a programmer would have to translate is no message for a user; a host's own words are."""


class FaultError(AssertionError):
    """Neither a good result nor a named error."""


class Kind(Protocol):
    """One kind of input."""

    def make(self, random: Random) -> Case:
        """A case by chance."""
        ...

    def run(self, case: Case) -> None:
        """Let the product have it; `FaultError` where the result is not good."""

    def named(self, error: Exception) -> bool:
        """Whether an error is one of the product's own."""
        ...

    def run_next(self) -> None:
        """Good input, which is to give what it gave before all cases, or `FaultError`."""


def outcome(kind: Kind, case: Case) -> str:
    """What comes of a case: `good`, or the name of the error; `FaultError` where it is neither."""
    begun = time.process_time()
    try:
        kind.run(copy.deepcopy(case))
        found = "good"
    except FaultError:
        raise
    except Exception as error:
        if not kind.named(error):
            raise FaultError(
                f"{type(error).__name__}: {str(error)[:300]}{_places(error)}"
            ) from error
        message, of_host = str(error), isinstance(error, PromptRejectedError)
        untranslated = not of_host and any(word in message for word in UNTRANSLATED)
        if len(message) > LONGEST_MESSAGE or untranslated:
            raise FaultError(f"said in {len(message)} characters: {message[:300]}") from error
        found = type(error).__name__
    if (spent := time.process_time() - begun) > SLOW:
        raise FaultError(f"{found} after {spent:.0f} s")
    return found


def _places(error: BaseException) -> str:
    """Where an error comes from, nearest first."""
    frames = traceback.extract_tb(error.__traceback__)[::-1]
    return "".join(f"\n  {Path(f.filename).name}:{f.lineno} {f.line}" for f in frames[:6])


def raised_by_the_pack(error: BaseException) -> bool:
    """Whether the nodes or the core found something wrong, not what they called."""
    last = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    return any(folder in last.parents for folder in (ROOT / "nodes", ROOT / "diff_restorer"))


def smaller(kind: Kind, case: Case, fault: FaultError) -> Case:
    """The case without the steps that its fault does not need."""
    for step in list(case["steps"]):
        without = case | {"steps": [each for each in case["steps"] if each is not step]}
        try:
            outcome(kind, without)
        except FaultError as found:
            if str(found)[:40] == str(fault)[:40]:
                case = without
    return case


def keep(name: str, case: Case, fault: FaultError, folder: Path = FOUND) -> Path:
    """Write a found case where the tests take it from."""
    text = json.dumps({"kind": name, **case}, sort_keys=True)
    path = folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"
    folder.mkdir(parents=True, exist_ok=True)
    note = str(fault).splitlines()[0][:200]
    path.write_text(json.dumps({"kind": name, "was": note, **case}, indent=1) + "\n")
    return path


def found_cases(name: str) -> Iterator[tuple[Path, Case]]:
    """What was found of a kind, ever."""
    for path in sorted(FOUND.glob("*.json")):
        case = json.loads(path.read_text())
        if case.pop("kind") == name:
            yield path, case


def some(random: Random, make: Callable[[], Step], most: int = 3) -> list[Step]:
    """One step or a few."""
    return [make() for _ in range(min(most, 1 + int(random.expovariate(1))))]


NUMBERS: list[Any] = [
    *(0, -1, 1, 2, 7, 8, 64, 2**15, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.0, -0.0, 0.5, 1e-30),
    *(1.5, 1e30, -1e30, 3.5e38, 1e308, math.nan, math.inf, -math.inf, True, False, None),
]
WORDS: list[Any] = [
    *("", " ", "nan", "inf", "-inf", "NaN", "1e999", "None", "null", "true", "../../etc/passwd"),
    *("/dev/zero", "\x00", "\n", "x" * 10_000, "[" * 1000, "{}", "[]", "[0]", '{"a": 1}', "東京"),
    *("\ud83d\ude00", "%s%n", "0", "-1", "64", "0x10", "1_0", "٣"),
]
