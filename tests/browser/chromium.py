"""Chromium for the tests: the one of this machine, else the system's package."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PACKAGES = ("chromium", "fonts-wqy-zenhei")
"""Debian's; the font is for the Chinese screenshots."""
ARGUMENTS = (
    # No sandbox: tests run as root in containers. The other flags keep it off the network.
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip


class NoChromiumError(RuntimeError):
    """There is no Chromium and it could not be installed; the message says why."""


def find_or_install() -> Path:
    """The browser's program.

    Raises:
        NoChromiumError: It is missing and cannot be installed.
    """
    if (found := _found()) is not None:
        return found
    apt = shutil.which("apt-get")
    if apt is None or os.geteuid() != 0:
        raise NoChromiumError(
            f"no Chromium ({', '.join(NAMES)}) on the PATH, and only root can install it with "
            "apt-get: install Chromium to run the browser tests"
        )
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update", "-qq"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(
            [apt, *command], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise NoChromiumError(f"apt-get {command[0]} failed: {done.stderr.strip()[-300:]}")
    if (found := _found()) is None:
        raise NoChromiumError(f"apt-get installed {PACKAGES[0]}, but there is no program of it")
    return found


def _found() -> Path | None:
    return next((Path(path) for name in NAMES if (path := shutil.which(name))), None)
