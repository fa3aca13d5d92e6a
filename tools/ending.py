"""What programs say, and how they end: with a sentence where their user can do something."""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec

from tools.environment import ROOT

PACKAGES = ("benchmarks", "diff_restorer", "nodes", "tools", "training")

Arguments = ParamSpec("Arguments")


def printable(text: str, stream: Any) -> str:
    """What a terminal can show: names and servers may send control characters, or no text."""
    safe = "".join(
        letter
        if letter.isprintable() or letter == "\n"
        else letter.encode("unicode_escape", "surrogatepass").decode()
        for letter in text
    )
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return safe.encode(encoding, "backslashreplace").decode(encoding)


def say(text: object) -> None:
    sys.stderr.write(printable(f"{text}\n", sys.stderr))


def sentence(error: Exception) -> str | None:
    """What to tell the user; None where an error is one of ours, and its traceback says more.

    Errors for users are those of kinds that we define, settings that our own code finds wrong
    (ValueError), and files that cannot be read or written, whichever library tells.
    """
    kind = type(error)
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve().parents
    is_ours = any(ROOT / package in raised_in for package in PACKAGES)
    for_users = (
        isinstance(error, OSError)
        or kind.__name__ == "SafetensorError"
        or kind.__module__.partition(".")[0] in (*PACKAGES, "__main__")
        or (isinstance(error, ValueError) and is_ours)
    )
    return (str(error) or kind.__name__) if for_users else None


def in_words(main: Callable[Arguments, int | None]) -> Callable[Arguments, int]:
    """A program's `main` that returns its exit status: 1 after a sentence, 130 after Ctrl-C."""

    @functools.wraps(main)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except KeyboardInterrupt:
            say("interrupted")
            return 130
        except Exception as error:
            words = sentence(error)
            if words is None:
                raise
            say(f"error: {words}")
            return 1

    return run
