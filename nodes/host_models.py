"""A loaded Diff-Restorer file, and what it reads from photos."""

from __future__ import annotations

import logging
import weakref
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.model_management
import torch
from torch import Tensor

from ..diff_restorer import PromptProcessor, PromptProcessorConfig
from ..diff_restorer.checkpoint import Checkpoint, read_checkpoint
from ..diff_restorer.views import NATIVE, WHOLE, native_views
from .host_build import build_control, build_fusion, build_prompt_processor, build_tuned_decoder
from .images import digest
from .sockets import Degradation


class DiffRestorer:
    """A loaded Diff-Restorer file: what the socket DIFF_RESTORER carries.

    Weights stay views of the memory-mapped file where their number format is the one that the
    host computes in.
    """

    def __init__(self, checkpoint: Checkpoint, control_dtype: torch.dtype | None = None) -> None:
        """Build all parts of the file.

        Args:
            checkpoint: The opened file.
            control_dtype: Number format of the control module; None leaves it to the host.

        Raises:
            CheckpointKeysError: Tensors are missing, left over or of the wrong size.
        """
        self.path = checkpoint.path
        self.info = checkpoint.info
        self.latent_format = comfy.latent_formats.SD15(scale_factor=self.info.latent_scale)
        self.prompt_processor = build_prompt_processor(checkpoint)
        self.control = build_control(checkpoint, self.latent_format, control_dtype)
        self.fusion: Any = build_fusion(checkpoint) if checkpoint.has("decoder.fusion.") else None
        self.tuned_decoder: Any = (
            build_tuned_decoder(checkpoint) if checkpoint.has("decoder.vae.") else None
        )
        self.carried: weakref.WeakSet[Any] = weakref.WeakSet()
        """The `PhotoFeatures` that LATENTs carry at the moment."""
        self._last_tokens: tuple[weakref.ref[Any], bytes, tuple[Tensor, Tensor]] | None = None

    @property
    def sizes(self) -> PromptProcessorConfig:
        """Widths and number of types, as read from the file."""
        return self.prompt_processor.model.config

    def read(
        self, clip_vision: Any, rgb: Tensor, remember: bool = True
    ) -> tuple[Tensor, Degradation]:
        """P_S (B, T, C) and the degradation of photos (B, H, W, 3) in [0, 1].

        What CLIP sees is remembered for the graph's next node, unless told otherwise.

        Raises:
            ValueError: `clip_vision` is not the model that the file was trained with.
        """
        whole, close = self._clip_tokens(clip_vision, rgb, remember)
        comfy.model_management.load_models_gpu([self.prompt_processor])
        model: PromptProcessor = self.prompt_processor.model
        device = self.prompt_processor.load_device
        out = model(close.to(device).float())
        if close is not whole:
            semantic = model.semantic(whole.to(device).float())
            out = out.over_views(len(rgb))._replace(semantic=semantic)
        home = comfy.model_management.intermediate_device()
        degradation = Degradation(
            tokens=out.degradation.to(home),
            pooled=out.pooled.to(home),
            probabilities=out.logits.softmax(dim=-1).to(home),
            types=self.info.types,
            prototypes=model.prototypes.to(home, torch.float32),
        )
        return out.semantic.to(home), degradation

    def _clip_tokens(self, clip_vision: Any, rgb: Tensor, remember: bool) -> tuple[Tensor, Tensor]:
        """P_CLIP for P_S, (B, T, clip_width), and for P_D; kept for the graph's next node.

        They are the same unless the file asks for native views: then P_D comes from a second look
        at windows of the photos that are not resized, (B * V, T, clip_width).

        The photo is recognised by its bytes, which costs a thousandth of the vision model.
        """
        photo = digest(rgb)
        if self._last_tokens is not None:
            encoder, known, tokens = self._last_tokens
            if encoder() is clip_vision and known == photo:
                return tokens
        whole = close = self._encode(clip_vision, rgb)
        if self.info.clip.get("degradation_view", WHOLE) == NATIVE:
            views = native_views(rgb, clip_vision.image_size).flatten(0, 1)
            close = whole if views.shape == rgb.shape else self._encode(clip_vision, views)
        tokens = whole, close
        if remember:
            self._last_tokens = (weakref.ref(clip_vision), photo, tokens)
        return tokens

    def _encode(self, clip_vision: Any, view: Tensor) -> Tensor:
        hidden = clip_vision.encode_image(view, crop=False)["last_hidden_state"]
        self._check_clip(clip_vision, hidden.shape[-1])
        return hidden[:, 1:]

    def _check_clip(self, clip_vision: Any, width: int) -> None:
        needed, trained = self.sizes.clip_width, self.info.clip
        if width != needed:
            raise ValueError(
                f"clip_vision: its tokens are {width} wide, but {self.path.name} needs {needed}. "
                + _clip_hint(needed, str(trained.get("name", "")))
            )
        size = getattr(clip_vision, "image_size", trained.get("image_size"))
        if size != trained.get("image_size", size):
            logging.warning(
                "Diff-Restorer: clip_vision sees %s px, %s was trained with %s px.",
                size, self.path.name, trained["image_size"],
            )  # fmt: skip


def load_restorer(path: Path) -> DiffRestorer:
    """Read a Diff-Restorer file for use with models of the user's own.

    Raises:
        CheckpointError: The file cannot be used; the message says why.
    """
    return DiffRestorer(read_checkpoint(path))


def _clip_hint(width: int, name: str) -> str:
    if width == 1024:
        return (
            "Load OpenAI's ViT-L/14 (openai/clip-vit-large-patch14, put model.safetensors into "
            "models/clip_vision); the ViT-H and bigG files of IP-Adapter do not fit."
        )
    if width == 1280:
        return "Load a ViT-H/14 vision model from models/clip_vision."
    return f"Load the vision model that it was trained with{f' ({name})' if name else ''}."
