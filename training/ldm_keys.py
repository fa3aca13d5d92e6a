"""One key map between the diffusers layout (training) and the LDM layout (files, host)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "controlnet_cond_embedding": "input_hint_block.0",
    "controlnet_mid_block": "middle_block_out.0",
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def unet_keys(keys: Iterable[str]) -> dict[str, str]:
    """Map the state-dict keys of a diffusers UNet or ControlNet to LDM keys.

    Args:
        keys: All keys of the diffusers module; block counts are read from them.

    Raises:
        KeyError: A key belongs to no known block.
    """
    keys = tuple(keys)
    resnets = (re.match(r"down_blocks\.0\.resnets\.(\d+)", key) for key in keys)
    layers = 1 + max(int(match[1]) for match in resnets if match)
    attended = {m[1] for k in keys if (m := re.match(r"(up_blocks\.\d+)\.attentions", k))}
    return {key: _unet_key(key, layers, attended) for key in keys}


def _unet_key(key: str, layers: int, attended: set[str]) -> str:
    if match := re.fullmatch(r"controlnet_down_blocks\.(\d+)\.(.+)", key):
        return f"zero_convs.{match[1]}.0.{match[2]}"
    if match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", key):
        side, level, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        if kind == "downsamplers":
            return f"input_blocks.{(level + 1) * (layers + 1)}.0.{rest.replace('conv', 'op', 1)}"
        if kind == "upsamplers":
            place = 2 if f"up_blocks.{level}" in attended else 1
            return f"output_blocks.{level * (layers + 1) + layers}.{place}.{rest}"
        number = level * (layers + 1) + index + (1 if side == "down" else 0)
        block = f"{'input' if side == 'down' else 'output'}_blocks.{number}"
        return f"{block}.0.{_renamed(rest, _RESNET)}" if kind == "resnets" else f"{block}.1.{rest}"
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", key):
        if match[1] == "attentions":
            return f"middle_block.1.{match[3]}"
        return f"middle_block.{2 * int(match[2])}.{_renamed(match[3], _RESNET)}"
    return _renamed(key, _UNET_ENDS)


def vae_keys(keys: Iterable[str]) -> dict[str, str]:
    """Map the state-dict keys of a diffusers AutoencoderKL to LDM keys, see `unet_keys`."""
    keys = tuple(keys)
    last = max(int(m[1]) for k in keys if (m := re.search(r"up_blocks\.(\d+)\.", k)))
    return {key: _vae_key(key, last) for key in keys}


def tiny_vae_keys(keys: Iterable[str]) -> dict[str, str]:
    """Map the keys of a diffusers AutoencoderTiny to those of the host's TAESD.

    The decoder of TAESD counts its clamp as a layer, which diffusers does not.
    """
    return {
        key: re.sub(
            r"^(en|de)coder\.layers\.(\d+)",
            lambda m: f"taesd_{m[1]}coder.{int(m[2]) + (m[1] == 'de')}",
            key,
        )
        for key in keys
    }


def _vae_key(key: str, last: int) -> str:
    key = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{last - int(m[1])}", key)
    for pattern, ldm in (
        (r"down_blocks\.", "down."),
        (r"\.resnets\.(\d+)", r".block.\1"),
        (r"(down|up)samplers\.0", r"\1sample"),
        (r"mid_block\.block\.0", "mid.block_1"),
        (r"mid_block\.block\.1", "mid.block_2"),
        (r"conv_shortcut", "nin_shortcut"),
        (r"conv_norm_out", "norm_out"),
    ):
        key = re.sub(pattern, ldm, key)
    if match := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)", key):
        return f"{match[1]}.mid.attn_1.{_renamed(match[2], _VAE_ATTENTION)}"
    return key


def _renamed(key: str, names: Mapping[str, str]) -> str:
    for diffusers, ldm in names.items():
        if key.startswith(f"{diffusers}."):
            return ldm + key[len(diffusers) :]
    raise KeyError(key)


def to_ldm(state: Mapping[str, Tensor], keys: Mapping[str, str]) -> dict[str, Tensor]:
    """Rename a diffusers state dict to LDM keys by a map from `unet_keys` or `vae_keys`.

    The VAE's attention projections are linear layers in diffusers, (C, C), and 1x1 convs in LDM,
    (C, C, 1, 1).
    """
    return {
        keys[name]: tensor[:, :, None, None] if _is_projection(keys[name], tensor) else tensor
        for name, tensor in state.items()
    }


def from_ldm(state: Mapping[str, Tensor], keys: Mapping[str, str]) -> dict[str, Tensor]:
    """Inverse of `to_ldm`, for the diffusers keys that `keys` names."""
    return {
        name: state[ldm][:, :, 0, 0] if re.search(_PROJECTION, ldm) else state[ldm]
        for name, ldm in keys.items()
    }


_PROJECTION = r"mid\.attn_1\.(q|k|v|proj_out)\.weight$"


def _is_projection(ldm_key: str, tensor: Tensor) -> bool:
    return tensor.ndim == 2 and re.search(_PROJECTION, ldm_key) is not None
