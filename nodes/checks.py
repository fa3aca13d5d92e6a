"""What nodes take, checked in one place.

The host checks only what is typed into widgets, and takes not-a-number to be within all limits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .host_models import DiffRestorer
from .images import check_finite, check_image, kind_of
from .sockets import Degradation, DegradationSocket, DiffRestorerSocket

_OWN = {
    DegradationSocket.io_type: (Degradation, "the output of a Prompt Processor"),
    DiffRestorerSocket.io_type: (DiffRestorer, "the output of Load Diff-Restorer"),
}
MOST_TEXT = 1000
"""Characters of names, which messages quote."""
# By what it is asked for, as hosts and packs bring classes of their own.
_OF_THE_HOST = {"MODEL": "model_options", "VAE": "first_stage_model", "CLIP_VISION": "encode_image"}


def checked(execute: Callable[..., Any]) -> Callable[..., Any]:
    """A node's `execute` that checks each of its inputs, as its schema declares them, before.

    Raises ValueError, which begins with the name of the input, where one is not what it is declared
    as, out of its limits or not finite.
    """

    @functools.wraps(execute)
    def run(cls: Any, **inputs: Any) -> Any:
        for entry in cls.SCHEMA.inputs:
            value = inputs.get(entry.id)
            if value is not None or (entry.id in inputs and not entry.optional):
                _check(entry, value)
        return execute(cls, **inputs)

    return run


def _check(entry: Any, value: Any) -> None:
    name, kind = entry.id, str(entry.get_io_type())
    if kind in ("FLOAT", "INT"):
        _check_number(name, value, int if kind == "INT" else (int, float), entry.min, entry.max)
    elif kind == "IMAGE":
        check_image(value, name)
    elif kind == "LATENT":
        _check_latent(name, value)
    elif kind == "CONDITIONING":
        _check_conditioning(name, value)
    elif kind in _OWN and not isinstance(value, _OWN[kind][0]):
        raise ValueError(f"{name}: found {kind_of(value)}, expected {_OWN[kind][1]}.")
    elif kind in _OF_THE_HOST and not hasattr(value, _OF_THE_HOST[kind]):
        raise ValueError(f"{name}: found {kind_of(value)}, expected a {kind} of a loader.")
    elif kind in ("STRING", "COMBO"):
        _check_text(name, value)


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name}: found {kind_of(value)}, expected text.")
    if len(value) > MOST_TEXT:
        raise ValueError(
            f"{name}: found {len(value):,} characters, expected text of at most {MOST_TEXT:,}."
        )


def _check_number(name: str, value: Any, kinds: Any, least: float, most: float) -> None:
    if not isinstance(value, kinds) or not least <= value <= most:
        given = value if isinstance(value, int | float) else kind_of(value)
        raise ValueError(f"{name}: {given}, expected {least:.20g} to {most:.20g}.")


def _check_latent(name: str, value: Any) -> None:
    samples = value.get("samples") if isinstance(value, dict) else None
    if not isinstance(samples, Tensor):
        raise ValueError(
            f"{name}: found {kind_of(value)} without samples, expected a sampler's LATENT."
        )
    if samples.ndim != 4 or 0 in samples.shape or not samples.is_floating_point():
        raise ValueError(
            f"{name}: expected latents of pictures (batch, channels, height, width), found shape "
            f"{tuple(samples.shape)} of {samples.dtype}. Those of videos and sounds do not fit."
        )
    check_finite(
        name,
        samples,
        "They come from the sampler: lower its cfg, take another sampler or scheduler, or start "
        "the host with --fp32-unet.",
    )


def _check_conditioning(name: str, value: Any) -> None:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name}: found {kind_of(value)} without entries, expected a prompt.")
    for entry in value:
        whole = isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[1], dict)
        tokens = entry[0] if whole else None
        given, fits = kind_of(tokens), False
        if isinstance(tokens, Tensor):
            given = f"{tuple(tokens.shape)} of {tokens.dtype}"
            fits = tokens.ndim == 3 and 0 not in tokens.shape and tokens.is_floating_point()
        if not (isinstance(tokens, Tensor) and fits):
            raise ValueError(
                f"{name}: expected tokens (batch, tokens, width), found {given}. Connect the "
                "output of a text encoder or of the Prompt Processor."
            )
        check_finite(name, tokens, "They come from the text encoder: is its file damaged?")
