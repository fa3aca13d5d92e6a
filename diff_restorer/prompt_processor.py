"""Prompt Processor: CLIP tokens -> semantic prompt P_S and degradation prompt P_D."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .checkpoint import ONE_KIND

DEFAULT_TYPES = ("noise", "blur", "jpeg", "low_light", "haze", "rain", "snow", "raindrop")
"""The eight degradation types of the published evaluation, as far as they can be inferred."""


@dataclass(frozen=True)
class PromptProcessorConfig:
    """Sizes of a Prompt Processor, all of which can be read back from its weights."""

    clip_width: int
    """Width of the CLIP tokens (ViT-L/14: 1024)."""
    hidden_width: int
    """Width of the hidden layers (paper scale: 1024)."""
    context_width: int
    """Width of the UNet's cross-attention context (SD 1.5: 768)."""
    num_types: int
    """Number of degradation types N."""

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> PromptProcessorConfig:
        """Read the sizes from tensor shapes.

        Args:
            state: Weights without the `prompt_processor.` prefix.

        Raises:
            KeyError: A tensor that carries a size is missing; the message is its key.
        """
        hidden_width, clip_width = state["semantic.0.weight"].shape
        num_types, context_width = state["classifier.weight"].shape
        return cls(clip_width, hidden_width, context_width, num_types)


class PromptOutput(NamedTuple):
    """What the Prompt Processor reads from one batch of CLIP tokens."""

    semantic: Tensor
    """P_S, (B, T, context_width): replaces or joins the text embedding."""
    degradation: Tensor
    """P_D, (B, T, context_width): cross-attention context of the control module."""
    pooled: Tensor
    """Mean of P_D over tokens, (B, context_width): for the classifier and the decoder."""
    logits: Tensor
    """(B, N), one per degradation type."""

    def probabilities(self, classification: str = ONE_KIND) -> Tensor:
        """(B, N) in [0, 1]: that a photo has this kind of damage.

        Args:
            classification: How the classifier was trained, see `CheckpointInfo`: of kinds that
                exclude each other the sum is 1.
        """
        one = classification == ONE_KIND
        return self.logits.softmax(dim=-1) if one else self.logits.sigmoid()

    def over_views(self, photos: int) -> PromptOutput:
        """What several views of each photo, photo by photo in a row, tell of its degradation.

        That is their mean, so that a photo has as many tokens as one view. Ours: with SD 1.5
        one view holds the whole photo, as in SSP-IR by the same authors.

        Args:
            photos: Number of photos B; there are B * V views.

        Returns:
            `degradation`, `pooled` and `logits` of B photos; `semantic` stays as it is.
        """

        def mean(views: Tensor) -> Tensor:
            return views.reshape(photos, -1, *views.shape[1:]).mean(dim=1)

        return self._replace(
            degradation=mean(self.degradation), pooled=mean(self.pooled), logits=mean(self.logits)
        )


class PromptProcessor(nn.Module):
    """Semantic branch B_s, degradation branch B_d and classifier C on P_CLIP.

    Source: Diff-Restorer (arXiv 2407.03636), section on the Prompt Processor. B_s has three linear
    layers and B_d two, each but the last followed by LayerNorm and LeakyReLU. Our choices where the
    paper is silent: P_CLIP keeps all patch tokens, and P_D is pooled by its mean.
    """

    prototypes: Tensor
    """(num_types, context width): pooled P_D of each type, averaged over photos; zero until a file
    is finished."""

    def __init__(
        self,
        config: PromptProcessorConfig,
        ops: Any = nn,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        clip, hidden, context = config.clip_width, config.hidden_width, config.context_width

        def linear(width_in: int, width_out: int) -> nn.Module:
            return ops.Linear(width_in, width_out, device=device, dtype=dtype)

        def norm() -> nn.Module:
            return ops.LayerNorm(hidden, device=device, dtype=dtype)

        self.semantic = nn.Sequential(
            linear(clip, hidden), norm(), nn.LeakyReLU(),
            linear(hidden, hidden), norm(), nn.LeakyReLU(),
            linear(hidden, context),
        )  # fmt: skip
        self.degradation = nn.Sequential(
            linear(clip, hidden), norm(), nn.LeakyReLU(),
            linear(hidden, context),
        )  # fmt: skip
        self.classifier = linear(context, config.num_types)
        self.register_buffer(
            "prototypes", torch.zeros(config.num_types, context, device=device, dtype=dtype)
        )

    def forward(self, tokens: Tensor) -> PromptOutput:
        """Split CLIP tokens into semantics and degradation.

        Args:
            tokens: P_CLIP, (B, T, clip_width): last hidden state without the class token.
        """
        degradation = self.degradation(tokens)
        pooled = degradation.mean(dim=1)
        return PromptOutput(
            semantic=self.semantic(tokens),
            degradation=degradation,
            pooled=pooled,
            logits=self.classifier(pooled),
        )
