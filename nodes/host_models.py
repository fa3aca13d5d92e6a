"""A loaded Diff-Restorer file, and what it reads from photos."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.model_management
import torch
from torch import Tensor

from ..diff_restorer import PromptOutput, PromptProcessorConfig
from ..diff_restorer.abstention import CLEAN, draw
from ..diff_restorer.checkpoint import Checkpoint, CheckpointKeysError, read_checkpoint
from ..diff_restorer.views import NATIVE, WHOLE, native_views
from .host import check_interrupt
from .host_build import build_control, build_extension, build_prompt_processor, build_tuned_decoder
from .images import check_finite, digest, split_alpha
from .sockets import Degradation

_AT_ONCE = 16
"""Photos, or windows of them, that the vision model sees at once."""


class DiffRestorer:
    """A loaded Diff-Restorer file: what the socket DIFF_RESTORER carries."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        control_dtype: torch.dtype | None = None,
        abstain: bool = True,
    ) -> None:
        """Build all parts of an opened file.

        Args:
            control_dtype: Number format of the control module; None leaves it to the host.
            abstain: Leave photos alone that are not surely damaged, where the file tells how sure
                is sure.

        Raises:
            CheckpointKeysError: Tensors are missing, left over or of the wrong size.
            CheckpointValuesError: Values are not finite.
        """
        self.path = checkpoint.path
        self.info = checkpoint.info
        self.abstention = checkpoint.info.abstention if abstain else None
        self.latent_format = comfy.latent_formats.SD15(scale_factor=self.info.latent_scale)
        self.prompt_processor = build_prompt_processor(checkpoint)
        self.control = build_control(checkpoint, self.latent_format, control_dtype)
        self.fusion: Any = build_extension(checkpoint)
        self.tuned_decoder: Any = (
            build_tuned_decoder(checkpoint) if checkpoint.has("decoder.vae.") else None
        )
        self.has_tiny_vae = checkpoint.has_tiny_vae
        self._check_widths()
        self.clip_vision: Any = None
        self.vae: Any = None
        """As `clip_vision`: the host's own class, where the file is complete."""
        self.carried: weakref.WeakSet[Any] = weakref.WeakSet()
        """The `PhotoFeatures` that LATENTs carry at the moment."""
        self._last: tuple[weakref.ref[Any], bytes, PromptOutput] | None = None

    def _check_widths(self) -> None:
        """Each part has been found to be whole; raises CheckpointKeysError where they are not parts
        of one model: they take P_D of another width than is read."""
        widths = {"control module": self.control.network.context_width}
        if self.fusion is not None:
            widths["decoder"] = self.fusion.model.config.context_width
        for part, width in widths.items():
            if width != self.sizes.context_width:
                raise CheckpointKeysError(
                    f"{self.path}: the {part} does not fit: it takes P_D that is {width} wide, the "
                    f"prompt processor's is {self.sizes.context_width}. Export the file again."
                )

    def get_ram_usage(self) -> int:
        """Bytes of the weights; newer hosts clear their cache by it."""
        modules = [self.prompt_processor.model, self.control.network]
        modules += [part.model for part in (self.fusion, self.tuned_decoder) if part is not None]
        return sum(weight.nbytes for module in modules for weight in module.state_dict().values())

    @property
    def sizes(self) -> PromptProcessorConfig:
        """Widths and number of types, as read from the file."""
        return self.prompt_processor.model.config

    def read(self, clip_vision: Any, image: Tensor) -> tuple[Tensor, Degradation]:
        """P_S (B, T, C) and the degradation of photos (B, H, W, 1 to 4) in [0, 1]; raises
        ValueError where `clip_vision` is not the model that the file was trained with.

        What is read is remembered for the graph's next node. The photos are recognised by their
        bytes, which costs a thousandth of the vision model.
        """
        out = self._recall(clip_vision, split_alpha(image)[0], remember=True)
        return out.semantic, self._degradation(out, image)

    def read_tiles(
        self, clip_vision: Any, tiles: Tensor, whole: Degradation
    ) -> tuple[Tensor, Degradation]:
        """`read` for tiles (tiles * B, h, w, 3) of B photos, of which `whole` was read.

        What changes tone must agree over a photo, see `Abstention.agreement`.
        """
        out = self._recall(clip_vision, tiles, remember=False)  # a lone tile is the photo
        if self.abstention is None:
            return out.semantic, self._degradation(out, tiles)
        photos = whole.probabilities
        by_tile = out.probabilities(self.info.classification).unflatten(0, (-1, len(photos)))
        limit = self.abstention.agreement(by_tile, photos).expand_as(by_tile).flatten(0, 1)
        return out.semantic, self._degradation(out, tiles, limit)

    def _degradation(
        self, out: PromptOutput, image: Tensor, limit: Tensor | None = None
    ) -> Degradation:
        """What the nodes go by; the only place where abstention acts."""
        prototypes = self.prompt_processor.model.prototypes.to(out.pooled.device, torch.float32)
        probabilities = out.probabilities(self.info.classification)
        tokens, pooled = out.degradation, out.pooled
        if self.abstention is not None:
            trust = self.abstention.trust(probabilities, limit)
            clean = prototypes[self.info.types.index(CLEAN)]
            tokens, pooled = draw(tokens, pooled, clean, trust)
        return Degradation(
            tokens=tokens,
            pooled=pooled,
            probabilities=probabilities,
            types=self.info.types,
            prototypes=prototypes,
            restorer=self,
            image=image,
            classification=self.info.classification,
            abstention=self.abstention,
        )

    def _recall(self, clip_vision: Any, rgb: Tensor, remember: bool) -> PromptOutput:
        """What was read from these photos last, else a new look."""
        photo = digest(rgb)
        if self._last is not None and self._last[0]() is clip_vision and self._last[1] == photo:
            return self._last[2]
        out = self._look(clip_vision, rgb)
        if remember:
            self._last = weakref.ref(clip_vision), photo, out
        return out

    def _look(self, clip_vision: Any, rgb: Tensor) -> PromptOutput:
        """What the Prompt Processor reads from photos, some at a time, as memory is finite.

        P_D comes from the whole photos, as P_S does, unless the file asks for native views: then it
        comes from a second look, at windows of the photos that are not resized.
        """
        native = self.info.clip.get("degradation_view", WHOLE) == NATIVE
        size = clip_vision.image_size
        count = native_views(rgb[:1], size).shape[1] if native else 1
        parts = []
        for some in rgb.split(max(1, _AT_ONCE // count)):
            check_interrupt()
            out = self._process(clip_vision, some)
            if native and max(some.shape[1:3]) > size:
                close = self._process(clip_vision, native_views(some, size).flatten(0, 1))
                out = close.over_views(len(some))._replace(semantic=out.semantic)
            parts.append(out)
        return PromptOutput(*map(torch.cat, zip(*parts, strict=True)))

    def _process(self, clip_vision: Any, views: Tensor) -> PromptOutput:
        tokens = self._encode(clip_vision, views)
        comfy.model_management.load_models_gpu([self.prompt_processor])
        out = self.prompt_processor.model(tokens.to(self.prompt_processor.load_device).float())
        home = comfy.model_management.intermediate_device()
        return PromptOutput(*(value.to(home) for value in out))

    def _encode(self, clip_vision: Any, view: Tensor) -> Tensor:
        hidden = clip_vision.encode_image(view, crop=False)["last_hidden_state"]
        self._check_clip(clip_vision, hidden.shape[-1])
        check_finite(
            "clip_vision",
            hidden,
            "Its file is damaged, or it overflows in fp16: start the host with --fp32-text-enc.",
        )
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
            raise ValueError(
                f"clip_vision: it sees {size} px, but {self.path.name} was trained with one that "
                f"sees {trained['image_size']} px. "
                + _clip_hint(needed, str(trained.get("name", "")))
            )


def load_restorer(path: Path, abstain: bool = True) -> DiffRestorer:
    """A `DiffRestorer` file for use with models of the user's own; raises CheckpointError, which
    says why, where it cannot be used."""
    return DiffRestorer(read_checkpoint(path), abstain=abstain)


def _clip_hint(width: int, name: str) -> str:
    if width == 1024:
        return (
            "Load OpenAI's ViT-L/14 (openai/clip-vit-large-patch14, put model.safetensors into "
            "models/clip_vision); the ViT-H and bigG files of IP-Adapter do not fit."
        )
    if width == 1280:
        return "Load a ViT-H/14 vision model from models/clip_vision."
    return f"Load the vision model that it was trained with{f' ({name})' if name else ''}."
