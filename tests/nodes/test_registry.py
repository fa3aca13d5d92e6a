"""What the registry of ComfyUI asks of packs, held against what ships."""

from __future__ import annotations

import ast
import fnmatch
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tools.environment import ROOT

FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_MODULES = {
    "subprocess", "socket", "urllib", "http", "requests", "aiohttp", "httpx", "pip", "pickle",
    "marshal", "ctypes", "huggingface_hub",
}  # fmt: skip
"""No packages installed while it runs, no network, no code from data."""


def shipped() -> list[Path]:
    """Tracked files that `.comfyignore` does not leave out."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    ignored = (ROOT / ".comfyignore").read_text().split()

    def left_out(name: str) -> bool:
        return any(
            name.startswith(entry) if entry.endswith("/") else fnmatch.fnmatch(name, entry)
            for entry in ignored
        )

    return [ROOT / name for name in listed.stdout.splitlines() if not left_out(name)]


def imported(tree: ast.AST) -> Iterator[str]:
    """Top-level names of all packages that a module imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def test_what_ships_is_the_pack_and_nothing_of_its_workshop() -> None:
    top = {path.relative_to(ROOT).parts[0] for path in shipped()}
    assert {"__init__.py", "nodes", "diff_restorer", "models", "web", "workflows", "locales"} <= top
    assert not top & {"tests", "training", "tools", "benchmarks", "docs", "Makefile"}


def test_no_code_from_data_no_installs_and_no_network() -> None:
    for path in (path for path in shipped() if path.suffix == ".py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        called = {
            node.func.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not called & FORBIDDEN_CALLS, path
        assert not set(imported(tree)) & FORBIDDEN_MODULES, path


def test_readable_code_and_plain_weights_only() -> None:
    for path in shipped():
        assert path.suffix not in {".pt", ".pth", ".ckpt", ".bin", ".so", ".exe", ".whl", ".pyc"}
        if path.suffix == ".py":
            assert max(map(len, path.read_text(encoding="utf-8").splitlines())) <= 120


def test_the_package_says_what_the_registry_asks_for() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^name = "[a-z0-9-]+"$', text, re.M)
    assert re.search(r'^version = "\d+\.\d+\.\d+"$', text, re.M)
    for key in ("PublisherId", "DisplayName", "Repository", "requires-comfyui"):
        assert re.search(rf'^{key} = ".+"$', text, re.M), key
    assert (ROOT / "LICENSE").is_file()
    assert (ROOT / "requirements.txt").is_file()
