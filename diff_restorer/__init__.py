"""Diff-Restorer core: what the paper adds to Stable Diffusion, in plain PyTorch."""

from .control import make_hint_conv, zero_init
from .decoder import aware_decode, encode_with_features, encoder_features
from .detail import DetailConfig, DetailPath
from .fusion import FusionBlocks, FusionConfig
from .local import LocalPooled
from .photo_statistics import local_statistics, photo_statistics
from .prompt_processor import DEFAULT_TYPES, PromptOutput, PromptProcessor, PromptProcessorConfig
from .vae_trunk import UnsupportedVaeError, VaeTrunk

__all__ = [
    "DEFAULT_TYPES",
    "DetailConfig",
    "DetailPath",
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
    "local_statistics",
    "make_hint_conv",
    "photo_statistics",
    "zero_init",
]
