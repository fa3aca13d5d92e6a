"""One safetensors file per model: reading it lazily, writing it whole, naming what is wrong."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from .abstention import Abstention

EPSILON, V_PREDICTION = "epsilon", "v_prediction"
ONE_KIND, ANY_KINDS = "ce", "bce"
FORMAT = "diff-restorer"
FORMAT_VERSION = 2
"""Newest that this code reads: 2 has a decoder with a detail path, which code for 1 would leave out
without a word."""
DETAIL_PREFIX = "decoder.detail."
REQUIRED_PREFIXES = ("prompt_processor.", "control.")
BASE_PREFIXES = ("base.unet.", "base.vae.", "base.clip_vision.")

# First key prefix found in a foreign file -> what it is and where it belongs.
_FOREIGN_KINDS = (
    ("model.diffusion_model.", "a Stable Diffusion checkpoint", "models/checkpoints"),
    ("vision_model.", "a CLIP vision model", "models/clip_vision"),
    ("visual.", "an open_clip vision model", "models/clip_vision"),
    ("control_model.", "a ControlNet", "models/controlnet"),
    ("input_hint_block.", "a ControlNet", "models/controlnet"),
    ("controlnet_cond_embedding.", "a ControlNet", "models/controlnet"),
    ("lora_", "a LoRA", "models/loras"),
    ("decoder.", "a VAE", "models/vae"),
    ("text_model.", "a text encoder", "models/text_encoders"),
    ("input_blocks.", "a diffusion model", "models/diffusion_models"),
)


class CheckpointError(ValueError):
    """A file that cannot be used as a Diff-Restorer model; the message names the file."""


class TruncatedCheckpointError(CheckpointError):
    """The file ends before its header says it should."""


class UnsupportedCheckpointError(CheckpointError):
    """The file is of another kind: a pickle, another model, damaged metadata."""


class NewerCheckpointError(UnsupportedCheckpointError):
    """The file was written by a newer version of Diff-Restorer."""


class CheckpointKeysError(CheckpointError):
    """Tensors of the file do not fit the module that they are meant for."""

    @classmethod
    def of(
        cls, path: Path | str, part: str, missing: Iterable[str], unexpected: Iterable[str]
    ) -> CheckpointKeysError:
        """The error for one part of one file, with the first keys of each sort."""
        found = [
            f"{label}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
            for label, names in (("missing", sorted(missing)), ("unexpected", sorted(unexpected)))
            if names
        ]
        return cls(f"{path}: the {part} does not fit ({'; '.join(found)}). Export the file again.")


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What a file says of itself in its metadata; all sizes are in the tensors instead."""

    types: tuple[str, ...]
    """Names of the degradation types, in the order of the classifier's logits."""
    base_model: str
    """`sd15`, or `nano` for a self-contained file."""
    clip: Mapping[str, Any]
    """CLIP variant and preprocessing: `name`, `image_size` (pixels), `mean`, `std`."""
    latent_scale: float = 0.18215
    """Factor between the VAE's own latent and the one the UNet sees."""
    prediction: str = EPSILON
    """What the UNet predicts: `epsilon` (SD 1.5) or `v_prediction` (Nano)."""
    classification: str = ONE_KIND
    """How the classifier was trained: `ce`, one kind per photo (softmax), or `bce`, any number of
    them (sigmoids)."""
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Settings of the training programs, by program, such as `train_control`."""
    git_revision: str = ""
    """Revision of the training code."""
    scores: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Evaluation results."""
    abstention: Abstention | None = None
    """How sure the classifier must be before it is acted on; None acts on whatever it says."""
    format_version: int = 1
    """The oldest that its tensors can do with; `write_checkpoint` raises it."""

    def to_metadata(self) -> dict[str, str]:
        """Metadata as safetensors stores it: strings only."""
        optional = {} if self.abstention is None else {"abstention": self.abstention.to_json()}
        return {
            "format": FORMAT,
            "format_version": str(self.format_version),
            "types": json.dumps(list(self.types)),
            "base_model": self.base_model,
            "clip": json.dumps(dict(self.clip)),
            "latent_scale": repr(self.latent_scale),
            "prediction": self.prediction,
            "classification": self.classification,
            "config": json.dumps(dict(self.config)),
            "git_revision": self.git_revision,
            "scores": json.dumps(dict(self.scores)),
            **optional,
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> CheckpointInfo:
        """Inverse of `to_metadata`.

        Raises:
            KeyError: An entry is missing.
            ValueError: An entry cannot be read; the message names it.
        """

        def parsed(name: str, kind: type[Any]) -> Any:
            try:
                value = json.loads(metadata[name])
            except json.JSONDecodeError as error:
                raise ValueError(f"metadata '{name}' is not JSON ({error})") from error
            if not isinstance(value, kind):
                raise ValueError(f"metadata '{name}' is not a JSON {kind.__name__}")
            return value

        prediction = metadata.get("prediction", EPSILON)  # files before it existed have none
        if prediction not in (EPSILON, V_PREDICTION):
            raise ValueError(
                f"metadata 'prediction' is {prediction!r}, not {EPSILON!r} or {V_PREDICTION!r}"
            )
        classification = metadata.get("classification", ONE_KIND)  # likewise
        if classification not in (ONE_KIND, ANY_KINDS):
            raise ValueError(
                f"metadata 'classification' is {classification!r}, not {ONE_KIND!r} or "
                f"{ANY_KINDS!r}"
            )
        types = tuple(str(name) for name in parsed("types", list))
        abstention = metadata.get("abstention")  # likewise
        exclusive = classification == ONE_KIND
        return cls(
            types=types,
            base_model=metadata["base_model"],
            clip=parsed("clip", dict),
            latent_scale=float(metadata["latent_scale"]),
            prediction=prediction,
            classification=classification,
            config=parsed("config", dict),
            git_revision=metadata["git_revision"],
            scores=parsed("scores", dict),
            abstention=(
                None if abstention is None else Abstention.from_json(abstention, types, exclusive)
            ),
            format_version=int(metadata["format_version"]),
        )


@dataclass(frozen=True)
class Checkpoint:
    """An opened file. Tensors are views of the memory-mapped file until they are changed."""

    path: Path
    info: CheckpointInfo
    keys: frozenset[str]

    @cached_property
    def _file(self) -> Any:
        return _open(self.path)

    def has(self, prefix: str) -> bool:
        """Whether the file holds tensors under `prefix`."""
        return any(key.startswith(prefix) for key in self.keys)

    def state(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under `prefix`, which is cut off their keys; empty where there are none."""
        return {
            key[len(prefix) :]: cast(Tensor, self._file.get_tensor(key))
            for key in sorted(self.keys)
            if key.startswith(prefix)
        }

    @property
    def self_contained(self) -> bool:
        """Whether UNet, VAE and vision encoder are in the file, too."""
        return all(map(self.has, BASE_PREFIXES))


def read_checkpoint(path: Path | str, required: Iterable[str] = REQUIRED_PREFIXES) -> Checkpoint:
    """Open a Diff-Restorer file and check what it says of itself; no tensor is read yet.

    Args:
        path: The file.
        required: Key prefixes that must be there; files between training stages lack some.

    Raises:
        FileNotFoundError: There is no such file.
        TruncatedCheckpointError: The file is incomplete.
        NewerCheckpointError: The file's format is newer than this code.
        UnsupportedCheckpointError: The file is something else.
    """
    path = Path(path)
    with open_safetensors(path) as file:
        metadata: dict[str, str] = dict(file.metadata() or {})
        keys: frozenset[str] = frozenset(file.keys())
    if metadata.get("format") != FORMAT:
        raise UnsupportedCheckpointError(
            f"{path}: expected a Diff-Restorer file, found {_describe(keys)}. Diff-Restorer files "
            "carry the metadata format=diff-restorer and go to models/diff_restorer."
        )
    try:
        version = int(metadata.get("format_version", ""))
        if version > FORMAT_VERSION:
            raise NewerCheckpointError(
                f"{path}: format version {version}, but this Diff-Restorer reads up to version "
                f"{FORMAT_VERSION}. Update Diff-Restorer."
            )
        info = CheckpointInfo.from_metadata(metadata)
    except KeyError as error:
        raise UnsupportedCheckpointError(
            f"{path}: metadata {error} is missing. Export the file again."
        ) from error
    except CheckpointError:
        raise
    except ValueError as error:
        raise UnsupportedCheckpointError(f"{path}: {error}. Export the file again.") from error
    absent = [prefix for prefix in required if not any(k.startswith(prefix) for k in keys)]
    if absent:
        raise CheckpointKeysError.of(path, "file", [f"{prefix}*" for prefix in absent], ())
    return Checkpoint(path, info, keys)


def write_checkpoint(path: Path | str, tensors: Mapping[str, Tensor], info: CheckpointInfo) -> None:
    """Write a Diff-Restorer file; a reader sees the old file or the new one, never a part.

    Args:
        path: Target, replaced if it exists.
        tensors: By the keys of the file format, such as `control.zero_convs.0.0.weight`.
        info: Becomes the metadata.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        contiguous = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
        needed = 2 if any(key.startswith(DETAIL_PREFIX) for key in tensors) else 1
        info = replace(info, format_version=max(needed, info.format_version))
        save_file(contiguous, temporary, metadata=info.to_metadata())
        # mkstemp makes the file private to its owner; a model is as readable as its folder.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def open_safetensors(path: Path) -> Any:
    """Open any safetensors file, as a context manager.

    Raises:
        FileNotFoundError: There is no such file.
        TruncatedCheckpointError: The file is incomplete.
        UnsupportedCheckpointError: The file is a pickle or something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        return _open(path)
    except SafetensorError as error:
        raise _unreadable(path, error) from error


def _open(path: Path) -> Any:
    return safe_open(path, framework="pt", device="cpu")


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    """Name the damage: safetensors' own messages speak of headers and buffers."""
    with path.open("rb") as file:
        head, body = file.read(8), file.read(2)
    if head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return UnsupportedCheckpointError(
            f"{path}: a PyTorch pickle, whatever its name says. Only safetensors is accepted, "
            "because pickles can run code when they are opened."
        )
    # Eight bytes of length, then a JSON object: the file began as safetensors, so its end is gone.
    if len(head) < 8 or body == b'{"':
        return TruncatedCheckpointError(
            f"{path}: incomplete, only {path.stat().st_size:,} bytes are there. Download or copy "
            "it again."
        )
    return UnsupportedCheckpointError(
        f"{path}: not a safetensors file ({error}). Diff-Restorer files end in .safetensors and "
        "go to models/diff_restorer."
    )


def _describe(keys: frozenset[str]) -> str:
    for prefix, kind, folder in _FOREIGN_KINDS:
        if any(key.startswith(prefix) for key in keys):
            return f"{kind} (it belongs in {folder})"
    return f"a safetensors file of another kind (first keys: {', '.join(sorted(keys)[:3])})"
