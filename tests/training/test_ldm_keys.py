"""The key map is one to one and gives the keys that SD 1.5 files have."""

from typing import Any

import pytest
import torch

from training.ldm_keys import from_ldm, tiny_vae_keys, to_ldm, unet_keys, vae_keys
from training.networks import Sizes, build_control, build_unet, build_vae


@pytest.fixture(scope="module")
def unet() -> Any:
    """SD 1.5's block structure at toy width."""
    return build_unet(
        Sizes(
            unet_channels=(32, 64, 128, 128),
            unet_layers=2,
            unet_attention=(True, True, True, False),
            context_width=16,
        )
    )


def test_unet_keys_are_those_of_sd15(unet: Any) -> None:
    keys = unet_keys(unet.state_dict())
    assert len(set(keys.values())) == len(keys) == 686  # as in every SD 1.5 checkpoint
    expected = {
        "down_blocks.0.resnets.0.time_emb_proj.weight": "input_blocks.1.0.emb_layers.1.weight",
        "down_blocks.0.downsamplers.0.conv.weight": "input_blocks.3.0.op.weight",
        "down_blocks.1.resnets.0.conv_shortcut.bias": "input_blocks.4.0.skip_connection.bias",
        "down_blocks.3.resnets.1.norm2.weight": "input_blocks.11.0.out_layers.0.weight",
        "mid_block.attentions.0.proj_in.weight": "middle_block.1.proj_in.weight",
        "mid_block.resnets.1.conv2.weight": "middle_block.2.out_layers.3.weight",
        "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.1.conv.weight",
        "up_blocks.1.upsamplers.0.conv.weight": "output_blocks.5.2.conv.weight",
        "up_blocks.3.attentions.2.proj_out.bias": "output_blocks.11.1.proj_out.bias",
        "conv_out.weight": "out.2.weight",
    }
    assert {name: keys[name] for name in expected} == expected


def test_control_keys_hold_the_hint_and_the_zero_convs(unet: Any) -> None:
    keys = unet_keys(build_control(unet).state_dict())
    assert keys["controlnet_cond_embedding.weight"] == "input_hint_block.0.weight"
    assert keys["controlnet_down_blocks.11.bias"] == "zero_convs.11.0.bias"
    assert keys["controlnet_mid_block.weight"] == "middle_block_out.0.weight"
    assert len(set(keys.values())) == len(keys)


@pytest.mark.parametrize("layers", [1, 2])
def test_vae_round_trip_keeps_every_tensor(layers: int) -> None:
    sizes = Sizes(vae_channels=(32, 32, 64, 64), vae_layers=layers)
    state = build_vae(sizes).state_dict()
    keys = vae_keys(state)
    ldm = to_ldm(state, keys)
    assert ldm["encoder.mid.attn_1.q.weight"].shape == (64, 64, 1, 1)
    assert "decoder.up.3.block.0.norm1.weight" in ldm
    assert "encoder.down.0.downsample.conv.weight" in ldm
    torch.testing.assert_close(from_ldm(ldm, keys), state, rtol=0, atol=0)


def test_tiny_vae_keys_count_the_clamp_of_the_decoder() -> None:
    state = build_vae(Sizes()).state_dict()
    keys = tiny_vae_keys(state)
    assert keys["encoder.layers.0.weight"] == "taesd_encoder.0.weight"
    assert keys["decoder.layers.0.weight"] == "taesd_decoder.1.weight"
    assert keys["decoder.layers.18.bias"] == "taesd_decoder.19.bias"
    assert len(set(keys.values())) == len(keys) == len(state)


def test_unknown_keys_are_errors() -> None:
    with pytest.raises(KeyError, match="class_embedding"):
        unet_keys(["down_blocks.0.resnets.0.conv1.weight", "class_embedding.weight"])
