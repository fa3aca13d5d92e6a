"""Training reads P_CLIP from open_clip, the nodes from the host: the same numbers from both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import toy_weights
from tests.toy_models import open_clip_tower


def tokens_of_open_clip(tower: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Output of the last block without the class token, before ln_post, as training takes it."""
    seen = []
    handle = tower.transformer.register_forward_hook(lambda *args: seen.append(args[2]))
    tower(pixels)
    handle.remove()
    return seen[0][:, 1:]


@pytest.mark.parametrize(
    "sizes",
    [toy_weights.VisionSizes(mlp=256), toy_weights.VisionSizes(128, 3, 16, 96, 512, 64)],
)
def test_same_tokens(comfyui: Path, tmp_path: Path, sizes: toy_weights.VisionSizes) -> None:
    import comfy.clip_vision

    tower = open_clip_tower(sizes)
    config = {
        "model_type": "clip_vision_model",
        "hidden_act": "quick_gelu",
        "hidden_size": sizes.width,
        "image_size": sizes.image,
        "intermediate_size": sizes.mlp,
        "num_attention_heads": sizes.width // 64,
        "num_channels": 3,
        "num_hidden_layers": sizes.layers,
        "patch_size": sizes.patch,
        "projection_dim": sizes.projection,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    host = comfy.clip_vision.ClipVisionModel(str(tmp_path / "config.json"))
    host.model.float()
    state = {f"visual.{key}": value for key, value in tower.state_dict().items()}
    missing, unexpected = host.load_sd(comfy.clip_vision.convert_to_transformers(state, "visual."))
    assert not missing
    assert not unexpected

    image = torch.rand(2, 90, 70, 3, generator=torch.Generator().manual_seed(1))
    found = host.encode_image(image, crop=False)["last_hidden_state"][:, 1:]
    pixels = comfy.clip_vision.clip_preprocess(image, size=sizes.image, crop=False)
    expected = tokens_of_open_clip(tower, pixels)
    # fp32 on both sides; the attention kernels sum in another order.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    tower.transformer.resblocks[0].mlp.gelu = torch.nn.GELU()
    wrong = tokens_of_open_clip(tower, pixels)
    assert (wrong - expected).abs().max() > 1e-2, "quick_gelu would not be noticed"


@pytest.mark.slow
def test_same_tokens_at_full_size(comfyui: Path) -> None:
    """ViT-L/14 as the host's own loader detects it, activation included."""
    import comfy.clip_vision

    tower = open_clip_tower(toy_weights.VIT_L)
    tower.half().float()  # The host stores fp16 and computes in fp32.
    state = {f"visual.{key}": value for key, value in tower.state_dict().items()}
    host: Any = comfy.clip_vision.load_clipvision_from_sd(
        state, prefix="visual.", convert_keys=True
    )
    host.model.float()
    image = torch.rand(1, 300, 200, 3, generator=torch.Generator().manual_seed(1))
    found = host.encode_image(image, crop=False)["last_hidden_state"][:, 1:]
    assert found.shape == (1, 256, 1024)
    pixels = comfy.clip_vision.clip_preprocess(image, size=224, crop=False)
    torch.testing.assert_close(found, tokens_of_open_clip(tower, pixels), rtol=1e-3, atol=1e-3)
