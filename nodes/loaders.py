"""Nodes that open Diff-Restorer files."""

from __future__ import annotations

import os

from comfy_api.latest import io

from . import host
from .checks import checked
from .host_models import load_restorer
from .host_nano import load_nano
from .sockets import CATEGORY, RESTORATION, DiffRestorerSocket, found_by

NO_FILE = "(put a .safetensors file into models/diff_restorer)"


def _abstain_input() -> io.Boolean.Input:
    """The switch of both loaders; graphs from before it go without."""
    return io.Boolean.Input(
        "abstain",
        default=True,
        optional=True,
        tooltip=(
            "Leave photos alone where damage is not evident, and change their tone only where the "
            "whole photo asks for it. Off: act on whatever the Classifier says. Files that do not "
            "tell how sure is sure are not changed by it."
        ),
    )


class DiffRestorerLoader(io.ComfyNode):
    """Load Diff-Restorer: the parts that the paper adds to Stable Diffusion 1.5."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffRestorerLoader",
            display_name="Load Diff-Restorer",
            category=CATEGORY,
            **found_by(*RESTORATION),
            description=(
                "Opens a Diff-Restorer file from models/diff_restorer, to restore photos with any "
                "mix of damage: prompt processor, degradation control and decoder. The diffusion "
                "model, the VAE and the CLIP vision model that it was trained with are loaded by "
                "the usual nodes."
            ),
            inputs=[
                io.Combo.Input(
                    "file",
                    options=host.model_files() or [NO_FILE],
                    tooltip=(
                        "A .safetensors file in models/diff_restorer (or in a diff_restorer "
                        "folder of extra_model_paths.yaml). Press R to refresh the list."
                    ),
                ),
                _abstain_input(),
            ],
            outputs=[
                DiffRestorerSocket.Output(
                    display_name="diff_restorer",
                    tooltip="The opened file, for the other Diff-Restorer nodes.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, abstain: bool = True) -> str:
        if file is None:  # linked, so that the host does not know it yet: it may be any of them
            return " ".join(host.file_stamp(host.model_path(name)) for name in host.model_files())
        return file if file == NO_FILE else host.file_stamp(host.model_path(file))

    @classmethod
    @checked
    def execute(cls, file: str, abstain: bool = True) -> io.NodeOutput:
        return io.NodeOutput(load_restorer(host.model_path(file), abstain))


class DiffRestorerNanoLoader(io.ComfyNode):
    """Load Diff-Restorer Nano: the small model that comes with the pack, complete in one file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffRestorerNanoLoader",
            display_name="Load Diff-Restorer Nano",
            category=CATEGORY,
            **found_by(*RESTORATION),
            description=(
                "Loads Nano, the small self-contained Diff-Restorer that comes with this pack and "
                "runs on a CPU, to denoise, dehaze or derain photos, to take away JPEG artifacts "
                "and snow, and to brighten low light; it does little to deblur them. Nothing else "
                "has to be downloaded. Its parts only work with each other, not with Stable "
                "Diffusion files."
            ),
            inputs=[_abstain_input()],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="Nano's diffusion model, for any sampler."
                ),
                io.ClipVision.Output(
                    display_name="clip_vision",
                    tooltip="Nano's vision model, which reads the photo.",
                ),
                io.Vae.Output(
                    display_name="vae",
                    tooltip="Nano's VAE. Its latents are not Stable Diffusion's.",
                ),
                DiffRestorerSocket.Output(
                    display_name="diff_restorer",
                    tooltip="Nano's prompt processor, degradation control and decoder.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, abstain: bool = True) -> str:
        return host.file_stamp(host.NANO_FILE) if host.NANO_FILE.is_file() else "missing"

    @classmethod
    @checked
    def execute(cls, abstain: bool = True) -> io.NodeOutput:
        if not host.NANO_FILE.is_file():
            remedy = "They come with the pack: install it again."
            if os.environ.get(host.NANO_VARIABLE):
                remedy = f"The environment names it in {host.NANO_VARIABLE}: correct or unset that."
            raise FileNotFoundError(
                f"Nano's weights are missing: there is no {host.NANO_FILE.absolute()}. {remedy}"
            )
        return io.NodeOutput(*load_nano(host.NANO_FILE, abstain))
