"""One safetensors file per model: reading it by parts, writing it whole, naming what is wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from .abstention import Abstention
from .files import written_whole
from .weights import (
    DTYPES,
    MOST_HEADER,
    CheckpointError,
    CheckpointKeysError,
    CheckpointValuesError,
    Header,
    TruncatedCheckpointError,
    UnsupportedCheckpointError,
    check_weights,
    parse_json,
    read_header,
    read_tensors,
    shortened,
)

__all__ = [
    "CheckpointError",
    "CheckpointKeysError",
    "CheckpointValuesError",
    "TruncatedCheckpointError",
    "UnsupportedCheckpointError",
]

EPSILON, V_PREDICTION = "epsilon", "v_prediction"
ONE_KIND, ANY_KINDS = "ce", "bce"
FORMAT = "diff-restorer"
FORMAT_VERSION = 2
"""Newest that this code reads: 2 has a decoder with a detail path, which code for 1 would leave out
without a word."""
DETAIL_PREFIX = "decoder.detail."
REQUIRED_PREFIXES = ("prompt_processor.", "control.")
BASE_PREFIXES = ("base.unet.", "base.vae.", "base.clip_vision.")
PREFIXES = (
    *REQUIRED_PREFIXES,
    *(DETAIL_PREFIX, "decoder.fusion.", "decoder.vae."),
    *BASE_PREFIXES,
)
"""Of all tensors that a file may hold."""
TINY_VAE_KEY = "taesd_decoder.1.weight"
"""By this key of a VAE the host knows a TAESD."""

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


class NewerCheckpointError(UnsupportedCheckpointError):
    """The file was written by a newer version of Diff-Restorer."""


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
                value = parse_json(metadata[name])
            except ValueError as error:
                raise ValueError(f"metadata '{name}' is not JSON ({shortened(error)})") from error
            if not isinstance(value, kind):
                raise ValueError(f"metadata '{name}' is not a JSON {kind.__name__}")
            return value

        prediction = metadata.get("prediction", EPSILON)  # files before it existed have none
        if prediction not in (EPSILON, V_PREDICTION):
            raise ValueError(
                f"metadata 'prediction' is {shortened(prediction)!r}, not {EPSILON!r} "
                f"or {V_PREDICTION!r}"
            )
        classification = metadata.get("classification", ONE_KIND)  # likewise
        if classification not in (ONE_KIND, ANY_KINDS):
            raise ValueError(
                f"metadata 'classification' is {shortened(classification)!r}, not {ONE_KIND!r} "
                f"or {ANY_KINDS!r}"
            )
        types = tuple(str(name) for name in parsed("types", list))
        if not types or len(set(types)) != len(types):
            raise ValueError(f"metadata 'types' is {shortened(types)}, not names that all differ")
        latent_scale = float(metadata["latent_scale"])
        if not 0 < latent_scale < math.inf:
            raise ValueError(f"metadata 'latent_scale' is {latent_scale}, not a number above 0")
        clip = parsed("clip", dict)
        _check_preprocessing(clip)
        abstention = metadata.get("abstention")  # likewise
        exclusive = classification == ONE_KIND
        return cls(
            types=types,
            base_model=metadata["base_model"],
            clip=clip,
            latent_scale=latent_scale,
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


def _check_preprocessing(clip: Mapping[str, Any]) -> None:
    """What the vision model's pictures are made by, as far as the file tells.

    Raises:
        ValueError: Pictures made so would be empty or not finite.
    """
    size = clip.get("image_size", 1)
    if type(size) is not int or not 1 <= size <= 4096:
        raise ValueError(f"metadata 'clip': image_size {shortened(size)}, not 1 to 4096 pixels")
    for name, least in (("mean", -math.inf), ("std", 0.0)):
        values: Any = clip.get(name, [1.0] * 3)
        numbers = cast("list[Any]", values) if isinstance(values, list) else []
        finite = (isinstance(n, int | float) and least < n < math.inf for n in numbers)
        if len(numbers) != 3 or not all(finite):
            above = " above 0" if least == 0 else ""
            raise ValueError(
                f"metadata 'clip': {name} {shortened(clip[name])}, not three finite numbers{above}"
            )


@dataclass(frozen=True)
class Checkpoint:
    """A file that was looked at; tensors are read when they are asked for, and copied."""

    path: Path
    info: CheckpointInfo
    header: Header

    @property
    def keys(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self.header.entries)

    @property
    def has_tiny_vae(self) -> bool | None:
        """Whether its latents are those of a TAESD, as Nano's are; None if it does not tell."""
        kinds = [
            f"{prefix}{TINY_VAE_KEY}" in self.header.entries
            for prefix in ("decoder.vae.", "base.vae.")
            if self.has(prefix)
        ]
        return kinds[0] if kinds else None

    def has(self, prefix: str) -> bool:
        """Whether the file holds tensors under `prefix`."""
        return any(key.startswith(prefix) for key in self.header.entries)

    def shapes(self, prefix: str) -> dict[str, Tensor]:
        """`state` without values, on the device meta: enough to choose and check a network."""
        return {
            key[len(prefix) :]: torch.empty(
                entry.shape, dtype=DTYPES[entry.dtype], device=torch.device("meta")
            )
            for key, entry in sorted(self.header.entries.items())
            if key.startswith(prefix)
        }

    def state(self, prefix: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The tensors under `prefix`, which is cut off their keys; empty where there are none.

        Args:
            prefix: Such as `control.`.
            dtype: Number format to convert them to, one by one; None keeps that of the file.

        Raises:
            CheckpointValuesError: Values are not finite.
            UnsupportedCheckpointError: The file has changed since it was opened.
        """
        keys = sorted(key for key in self.header.entries if key.startswith(prefix))
        read = read_tensors(self.path, self.header, keys, dtype)
        return {key[len(prefix) :]: tensor for key, tensor in read.items()}

    @property
    def self_contained(self) -> bool:
        """Whether UNet, VAE and vision encoder are in the file, too."""
        return all(map(self.has, BASE_PREFIXES))


def read_checkpoint(path: Path | str, required: Iterable[str] = REQUIRED_PREFIXES) -> Checkpoint:
    """Open a Diff-Restorer file and check what it says of itself; no tensor is read yet.

    Its header alone decides, in milliseconds, see `check_weights`; values are checked as they are
    read.

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
    header = read_header(path, MOST_HEADER)
    metadata, keys = header.metadata, header.entries.keys()
    if metadata.get("format") != FORMAT:
        raise UnsupportedCheckpointError(
            f"{path}: expected a Diff-Restorer file, found {_describe(keys)}. Diff-Restorer files "
            "carry the metadata format=diff-restorer and go to models/diff_restorer."
        )
    try:
        version = int(metadata.get("format_version", ""))
        if version < 1:
            raise ValueError(f"metadata 'format_version' is {version}, not a number from 1 on")
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
        raise UnsupportedCheckpointError(
            f"{path}: {str(error)[:300]}. Export the file again."
        ) from error
    check_weights(path, header.entries)
    if unknown := [key for key in keys if not key.startswith(PREFIXES)]:
        raise CheckpointKeysError.of(path, "file", (), unknown)
    absent = [prefix for prefix in required if not any(k.startswith(prefix) for k in keys)]
    if absent:
        raise CheckpointKeysError.of(path, "file", [f"{prefix}*" for prefix in absent], ())
    return Checkpoint(path, info, header)


def write_checkpoint(path: Path | str, tensors: Mapping[str, Tensor], info: CheckpointInfo) -> None:
    """Write a Diff-Restorer file; a reader sees the old file or the new one, never a part.

    Args:
        path: Target, replaced if it exists.
        tensors: By the keys of the file format, such as `control.zero_convs.0.0.weight`.
        info: Becomes the metadata.
    """
    contiguous = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
    needed = 2 if any(key.startswith(DETAIL_PREFIX) for key in tensors) else 1
    info = replace(info, format_version=max(needed, info.format_version))
    with written_whole(Path(path)) as part:
        save_file(contiguous, part, metadata=info.to_metadata())
        part.chmod(0o644)  # safetensors makes files private to their owner


def open_safetensors(path: Path) -> Any:
    """Open any safetensors file for programs, memory-mapped, as a context manager.

    Raises:
        FileNotFoundError: There is no such file.
        TruncatedCheckpointError: The file is incomplete.
        UnsupportedCheckpointError: The file is a pickle or something else.
    """
    if not path.is_file():
        read_header(path)  # says what it is instead
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        read_header(path)  # likewise, in better words
        raise UnsupportedCheckpointError(f"{path}: {error}. Download it again.") from error


def _describe(keys: Iterable[str]) -> str:
    for prefix, kind, folder in _FOREIGN_KINDS:
        if any(key.startswith(prefix) for key in keys):
            return f"{kind} (it belongs in {folder})"
    first = ", ".join(map(shortened, sorted(keys)[:3]))
    return f"a safetensors file of another kind (first keys: {first})"
