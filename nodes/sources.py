"""Where nodes get what is not connected to them: from a degradation, or from a complete file."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from .host_models import DiffRestorer
from .sockets import Degradation, DegradationSocket, DiffRestorerSocket

OVERRIDE = "Only where it is to be another one than that of degradation. "
"""Begins the tooltip of an input that `degradation` brings, too."""
COMPLETE = "Not needed with a complete file such as Nano's. "
"""Begins the tooltip of an input that a self-contained file brings, too."""


def restorer_input() -> Any:
    """`diff_restorer` behind the Prompt Processor."""
    tooltip = OVERRIDE + "From Load Diff-Restorer."
    return DiffRestorerSocket.Input("diff_restorer", optional=True, tooltip=tooltip)


def degradation_input() -> Any:
    """`degradation` of nodes that cannot do without."""
    tooltip = "From the Prompt Processor. Brings its file and its photos along."
    return DegradationSocket.Input("degradation", tooltip=tooltip)


def photos_input(what: str) -> Any:
    """`image` behind the Prompt Processor."""
    return io.Image.Input("image", optional=True, tooltip=OVERRIDE + what)


def clip_vision_input(*, of_what: str = "") -> Any:
    """`clip_vision`, which a complete file brings."""
    tooltip = f"{COMPLETE}Else the vision model that the file was trained with{of_what}."
    return io.ClipVision.Input("clip_vision", optional=True, tooltip=tooltip)


def vae_input(*, what_for: str = "") -> Any:
    """`vae`, which a complete file brings."""
    tooltip = f"{COMPLETE}Else the VAE of the diffusion model{what_for}."
    return io.Vae.Input("vae", optional=True, tooltip=tooltip)


def share_input(name: str, tooltip: str, *, default: float = 1.0, step: float = 0.01) -> Any:
    """A share of something, from 0 to 1."""
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=step, tooltip=tooltip)


def restorer_of(given: DiffRestorer | None, degradation: Degradation | None) -> DiffRestorer:
    """The connected file, else the one that read the degradation; raises ValueError where neither
    is."""
    if given is not None:
        return given
    return _required(degradation, "diff_restorer", "Load Diff-Restorer").restorer


def photos_of(given: Tensor | None, degradation: Degradation | None) -> Tensor:
    """The connected photos, else those that the degradation was read from; ValueError without
    either."""
    if given is not None:
        return given
    return _required(degradation, "image", "the degraded photos").image


def _required(degradation: Degradation | None, name: str, source: str) -> Degradation:
    if degradation is None:
        raise ValueError(
            f"{name}: nothing is connected. Connect {source}, or degradation of a Prompt "
            "Processor, which brings its file and its photos."
        )
    return degradation


def clip_vision_of(given: Any, restorer: DiffRestorer) -> Any:
    """The connected vision model, else the file's own; raises ValueError where it has none."""
    return _part(given, restorer.clip_vision, "clip_vision", restorer, "Load CLIP Vision")


def vae_of(given: Any, restorer: DiffRestorer) -> Any:
    """The connected VAE, else the file's own; raises ValueError where it has none."""
    return _part(given, restorer.vae, "vae", restorer, "Load Checkpoint")


def _part(given: Any, own: Any, name: str, restorer: DiffRestorer, loader: str) -> Any:
    if given is not None:
        return given
    if own is None:
        raise ValueError(
            f"{name}: nothing is connected, and {restorer.path.name} has none of its own. Connect "
            f"{name} of {loader}."
        )
    return own
