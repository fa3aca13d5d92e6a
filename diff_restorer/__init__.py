"""Diff-Restorer core: what the paper adds to Stable Diffusion, in plain PyTorch."""

from .control import make_hint_conv, zero_init
from .decoder import (
    FusionBlocks,
    FusionConfig,
    LocalPooled,
    aware_decode,
    encode_with_features,
    encoder_features,
)
from .prompt_processor import DEFAULT_TYPES, PromptOutput, PromptProcessor, PromptProcessorConfig
from .vae_trunk import UnsupportedVaeError, VaeTrunk

__all__ = [
    "DEFAULT_TYPES",
    "FusionBlocks",
    "FusionConfig",
    "LocalPooled",
    "PromptOutput",
    "PromptProcessor",
    "PromptProcessorConfig",
    "UnsupportedVaeError",
    "VaeTrunk",
    "aware_decode",
    "encode_with_features",
    "encoder_features",
    "make_hint_conv",
    "zero_init",
]
