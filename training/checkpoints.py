"""Full states in a run folder: written whole or not at all, read back, and refused by name."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor, nn

from diff_restorer.checkpoint import CheckpointKeysError, read_checkpoint

from .errors import DiskError, ResumeError

log = logging.getLogger(__name__)

KEPT = 2
_MANIFEST, _WRITING = "state.json", "writing"
# Settings that a run may change when it goes on; any other that differs is named in a warning.
_FREE = frozenset(
    [
        *("out", "steps", "epochs", "minutes", "workers", "threads", "compile", "tensorboard"),
        *("log_every", "checkpoint_every", "checkpoint_minutes", "memory_mb"),
        *("validate_every", "validate_minutes", "validation_steps", "validation_samples"),
        "gradient_checkpointing",
    ]
)


def state_bytes(trainable: nn.Module) -> int:
    """Bytes of one full state: weights, EMA and AdamW's two moments, and a little for the rest."""
    tensors = [*trainable.parameters(), *trainable.buffers()]
    learned = [p for p in trainable.parameters() if p.requires_grad]
    return sum(t.nbytes for t in tensors) + 3 * sum(p.nbytes for p in learned) + 2**20


def require_space(folder: Path, needed: int, what: str, option: str = "--out") -> None:
    """Raises DiskError, which names both figures, where `what` (a plural) needs more than `folder`
    has room for; `option` names the folder on the command line."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskError(
            f"{folder}: {what} need {_size(needed)}, but {_size(free)} are free. Make room and "
            f"start the same command again, which goes on from what is there; or give another "
            f"{option}."
        )


class Checkpoints:
    """The folders `step_0000500/` and so on of a run, of which the last two are kept.

    A checkpoint is written into `writing/`, brought to the disk and then renamed, so that a process
    killed at any moment leaves only whole ones. With several machines, the folder must be shared.
    """

    def __init__(
        self, accelerator: Accelerator, out: Path, size: int, settings: Mapping[str, Any]
    ) -> None:
        """Saves what is registered with `accelerator`, `size` bytes each as far as is known;
        compares `settings` when a run goes on."""
        self.accelerator, self.out, self.size = accelerator, out, size
        self.settings = {**_flat(settings), "processes": accelerator.num_processes}
        accelerator.register_save_state_pre_hook(self._name_without_wrapper)
        accelerator.register_load_state_pre_hook(self._load_without_wrapper)

    def prepare(self) -> None:
        """Make the run folder, and raise DiskError now rather than in an hour where the checkpoints
        to come do not fit: those that are kept, and one in writing."""
        self.out.mkdir(parents=True, exist_ok=True)
        self._require_space(self.size * max(1, KEPT + 1 - len(self.folders())))

    def _require_space(self, needed: int) -> None:
        require_space(self.out, needed, "checkpoints", "--loop.out")

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """A folder in the run folder for what is not whole yet; afterwards it is gone. What a
        killed process leaves in it goes when the next one writes."""
        temporary = self.out / _WRITING
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def folders(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return sorted(p for p in self.out.glob("step_*") if re.fullmatch(r"step_\d{7,}", p.name))

    def save(self, step: int, extra: Mapping[str, Any]) -> None:
        """Write the state after `step` steps, and `extra` (JSON); raises DiskError where that
        fails."""
        temporary, final = self.out / _WRITING, self.out / f"step_{step:07d}"
        main = self.accelerator.is_main_process
        if main:
            shutil.rmtree(temporary, ignore_errors=True)
            self._require_space(self.size)
        self.accelerator.wait_for_everyone()
        try:
            self.accelerator.save_state(str(temporary))
            self.accelerator.wait_for_everyone()
            if main:
                _seal(temporary, {"step": step, "settings": self.settings, "extra": extra})
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise write_failure(self.out, f"the checkpoint of step {step}", error) from error
        if main:
            if final.exists():  # of an earlier course of the run
                shutil.rmtree(final)
            temporary.rename(final)
            _to_disk(self.out)
            for old in self.folders()[:-KEPT]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def resume(self) -> tuple[int, dict[str, Any]]:
        """Load the newest checkpoint that can be read: its step and `extra`, 0 and nothing where
        there is none. Raises ResumeError where there are some, but none can be read."""
        damaged: list[Path] = []
        reason: Exception | None = None
        for folder in reversed(self.folders()):
            try:
                manifest = _unseal(folder)
                self.accelerator.load_state(str(folder))
            except Exception as error:  # zip, pickle, JSON, safetensors and OS errors alike
                log.warning("%s cannot be read, trying the one before: %s", folder, error)
                damaged.append(folder)
                reason = error
                continue
            if changed := self._changes(manifest["settings"]):
                log.warning("%s was trained with other settings: %s", folder, "; ".join(changed))
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                for folder_ in damaged:
                    aside = folder_.with_suffix(".unreadable")
                    shutil.rmtree(aside, ignore_errors=True)
                    folder_.rename(aside)
            log.info("resumed %s at step %d", self.out, manifest["step"])
            return int(manifest["step"]), manifest["extra"]
        if damaged:
            raise ResumeError(
                f"{self.out}: none of {', '.join(p.name for p in reversed(damaged))} can be read "
                f"with these settings (last: {reason}). Go back to the settings in "
                f"{self.out / 'config.toml'}, or move the folder away to start anew."
            ) from reason
        return 0, {}

    def _name_without_wrapper(
        self, models: list[nn.Module], weights: list[Mapping[str, Tensor]], folder: str
    ) -> None:
        """DDP calls every weight `module.` something: a run may go on without it."""
        for place in range(len(weights)):
            weights[place] = self.accelerator.unwrap_model(models[place]).state_dict()

    def _load_without_wrapper(self, models: list[nn.Module], folder: str) -> None:
        models[:] = [self.accelerator.unwrap_model(model) for model in models]

    def _changes(self, before: Mapping[str, Any]) -> list[str]:
        """Settings that differ and may change what is learnt."""
        now: dict[str, Any] = json.loads(json.dumps(self.settings))  # tuples as the file has them
        return [
            f"{name} {before.get(name)} -> {now.get(name)}"
            for name in sorted(before.keys() | now.keys())
            if name.split(".")[-1] not in _FREE and before.get(name) != now.get(name)
        ]


def write_failure(folder: Path, what: str, error: Exception) -> DiskError:
    """The error for `what` that could not be written into `folder`."""
    free = shutil.disk_usage(folder).free
    return DiskError(
        f"{folder}: could not write {what} ({_size(free)} are free): {error}. What was written "
        "before is intact; with room, the same command goes on from the last checkpoint."
    )


def compare_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Check that a Diff-Restorer file reads back as the tensors that were written, bit for bit.

    Raises CheckpointKeysError for tensors that are missing or too many, and ValueError, which names
    the first, for others.
    """
    read = read_checkpoint(path, required=()).state("")
    if read.keys() != tensors.keys():
        missing, extra = tensors.keys() - read.keys(), read.keys() - tensors.keys()
        raise CheckpointKeysError.of(path, "file", missing, extra)
    if wrong := [key for key, value in tensors.items() if not _same(read[key], value)]:
        raise ValueError(
            f"{path}: reads back other than it was written ({', '.join(wrong[:3])}); is the disk "
            "all right? The checkpoints beside it hold the training state."
        )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b.detach().cpu())


def _seal(folder: Path, manifest: dict[str, Any]) -> None:
    """Add the manifest, which names all files and their sizes, and bring all to the disk."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    sizes = {str(p.relative_to(folder)): p.stat().st_size for p in files}
    path = folder / _MANIFEST
    path.write_text(json.dumps({**manifest, "files": sizes}, indent=1))
    for file in (*files, path, *(p for p in folder.rglob("*") if p.is_dir()), folder):
        _to_disk(file)


def _unseal(folder: Path) -> dict[str, Any]:
    manifest = json.loads((folder / _MANIFEST).read_text())
    for name, size in manifest["files"].items():
        length = (folder / name).stat().st_size
        if length != size:
            raise ValueError(f"{name} has {length} bytes instead of {size}")
    return manifest


def _to_disk(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
