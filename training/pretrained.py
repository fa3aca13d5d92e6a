"""Stable Diffusion 1.5 and CLIP ViT-L/14 from local files; nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn

from diff_restorer.checkpoint import open_safetensors
from diff_restorer.weights import check_fit

from .ldm_keys import from_ldm, to_ldm, unet_keys, vae_keys
from .networks import (
    SD15_SIZES,
    Sizes,
    build_unet,
    build_vae,
    build_vision,
    unet_sizes,
    vae_sizes,
    vision_sizes,
)

State = dict[str, Tensor]

_OTHER_UNETS = {1024: "Stable Diffusion 2", 2048: "SDXL"}
_OTHER_TOWERS = {768: "ViT-B", 1280: "ViT-H", 1408: "ViT-g", 1664: "ViT-bigG"}
_ACCEPTED = "a Stable Diffusion 1.5 checkpoint (.safetensors) or a diffusers folder (unet/, vae/)"
_ACCEPTED_VAE = "an SD 1.5 AutoencoderKL"
_ACCEPTED_CLIP = (
    "OpenAI's ViT-L/14: a Hugging Face folder, its model.safetensors, or an open_clip .safetensors"
)


class PretrainedError(ValueError):
    """A file is not the pretrained model that is asked for; the message names the file."""


@dataclass(frozen=True)
class Sd15Config:
    """The frozen networks of Stable Diffusion 1.5, all from local files; without them, Nano's."""

    checkpoint: Path | None = None
    """SD 1.5: one .safetensors file (UNet and VAE), or a diffusers folder (unet/, vae/)."""
    vae: Path | None = None
    """Another VAE: a .safetensors file or a diffusers folder; else the checkpoint's own."""
    clip: str | None = None
    """OpenAI's ViT-L/14: a Hugging Face folder, its model.safetensors, an open_clip .safetensors,
    or a name in open_clip's local cache such as ViT-L-14-quickgelu/openai."""
    prompt_hidden: int = SD15_SIZES.prompt_hidden
    """Width of the Prompt Processor's hidden layers."""
    fusion_levels: tuple[int, ...] = SD15_SIZES.fusion_levels
    """VAE levels (0 is full size, 1 is 1/2, ...) whose encoder features the decoder sees."""
    fusion_growth: int = SD15_SIZES.fusion_growth
    """Channels that each conv of a residual dense block adds."""
    fusion_depth: int = SD15_SIZES.fusion_depth
    """Convs of a residual dense block."""
    fusion_pixel_width: int = SD15_SIZES.fusion_pixel_width
    """Width of the block that fuses the photo's own pixels; 0 is none. Ours."""

    def sizes(self) -> Sizes:
        """SD 1.5's sizes with these choices."""
        return replace(
            SD15_SIZES,
            prompt_hidden=self.prompt_hidden,
            fusion_levels=self.fusion_levels,
            fusion_growth=self.fusion_growth,
            fusion_depth=self.fusion_depth,
            fusion_pixel_width=self.fusion_pixel_width,
        )


@dataclass(frozen=True)
class Base:
    """The frozen networks that a Diff-Restorer stands on; fp32, on the CPU."""

    sizes: Sizes
    unet: Any
    vae: Any
    vision: Any


def open_base(config: Sd15Config, sizes: Sizes) -> Base:
    """Load UNet, VAE and vision tower; their sizes are read from the files, but for what those do
    not tell: prompt processor, fusion, heads.

    Raises:
        FileNotFoundError: A file does not exist.
        CheckpointError: A file is a pickle or incomplete.
        PretrainedError: A file holds another model, or is not named.
    """
    if config.checkpoint is None or config.clip is None:
        raise PretrainedError(
            "--model.sd15 needs both --model.sd15.checkpoint and --model.sd15.clip "
            f"({_ACCEPTED_CLIP})"
        )
    unet, vae = _open_checkpoint(config.checkpoint, with_vae=config.vae is None)
    if config.vae is not None:
        vae = _open_vae(config.vae)
    vision = _open_vision(config.clip)
    vae_file, clip_file = config.vae or config.checkpoint, Path(config.clip)
    sizes = replace(
        sizes,
        **_read_sizes(unet_sizes, unet, config.checkpoint, _ACCEPTED),
        **_read_sizes(vae_sizes, vae, vae_file, _ACCEPTED_VAE),
        **_read_sizes(vision_sizes, vision, clip_file, _ACCEPTED_CLIP),
    )
    with init_empty_weights():
        networks = build_unet(sizes), build_vae(sizes), build_vision(sizes)
    if "visual_projection.weight" not in vision:  # a bare tower; P_CLIP is taken before it
        vision["visual_projection.weight"] = torch.eye(sizes.vision_width)
    else:
        width = vision["visual_projection.weight"].shape[0]
        networks[2].visual_projection = nn.Linear(sizes.vision_width, width, bias=False)
    _fill(networks[0], unet, config.checkpoint, "UNet", _ACCEPTED, unet_keys)
    _fill(networks[1], vae, vae_file, "VAE", _ACCEPTED_VAE, vae_keys)
    _fill(networks[2], vision, clip_file, "vision tower", _ACCEPTED_CLIP)
    return Base(sizes, *(network.eval().requires_grad_(False) for network in networks))


def _open_checkpoint(path: Path, with_vae: bool) -> tuple[State, State]:
    """UNet and VAE (empty unless `with_vae`) in LDM layout."""
    if path.is_dir():
        unet = _from_folder(UNet2DConditionModel, path / "unet", unet_keys)
        vae = _from_folder(AutoencoderKL, path / "vae", vae_keys) if with_vae else {}
    else:
        prefixes = ("model.diffusion_model.", "first_stage_model.")[: 1 + with_vae]
        parts = dict(zip(prefixes, _read(path, *prefixes, expected=_ACCEPTED), strict=True))
        unet, vae = parts["model.diffusion_model."], parts.get("first_stage_model.", {})
    _check_unet(unet, path)
    return unet, vae


def _check_unet(state: Mapping[str, Tensor], path: Path) -> None:
    """Structure tells the families apart, so that a small SD 1.5 of any width is accepted."""
    context = state.get("middle_block.1.transformer_blocks.0.attn2.to_k.weight")
    other = _OTHER_UNETS.get(context.shape[1]) if context is not None else "no SD UNet"
    entry = state.get("input_blocks.0.0.weight")
    if other is None and entry is not None and entry.shape[1] != 4:
        other = f"a UNet with {entry.shape[1]} input channels (inpainting or editing)"
    projection = state.get("middle_block.1.proj_in.weight")
    if other is None and projection is not None and projection.ndim == 2:
        other = "a UNet with linear projections (SD 2 or SDXL family)"
    if other is not None:
        raise PretrainedError(f"{path}: found {other}; accepted is {_ACCEPTED}")


def _open_vae(path: Path) -> State:
    if path.is_dir():
        return _from_folder(AutoencoderKL, path, vae_keys)
    with open_safetensors(path) as file:
        keys = list(file.keys())
    if any(".down_blocks." in key for key in keys):
        raise PretrainedError(
            f"{path}: a VAE in diffusers layout; give its folder (with config.json) instead"
        )
    inside = any(key.startswith("first_stage_model.") for key in keys)
    prefix = "first_stage_model." if inside else ""
    state = _read(path, prefix, expected="a VAE of SD 1.5 (.safetensors) or its folder")[0]
    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    return {key: value for key, value in state.items() if key.startswith(parts)}


def _from_folder(kind: Any, folder: Path, names: Any) -> State:
    """A network of a diffusers folder, by diffusers' own loader, in LDM layout."""
    if not (folder / "config.json").is_file():
        raise PretrainedError(f"{folder}: no config.json there; accepted is {_ACCEPTED}")
    weights = sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
    if not weights:
        raise PretrainedError(
            f"{folder}: no diffusion_pytorch_model.safetensors there; pickles (.bin) are refused"
        )
    with open_safetensors(weights[0]):  # names a truncated file before diffusers meets it
        variant = weights[0].name.removesuffix(".safetensors").partition(".")[2] or None
    model = kind.from_pretrained(
        folder, variant=variant, use_safetensors=True, local_files_only=True
    )
    state = model.state_dict()
    try:
        return to_ldm(state, names(state))
    except (KeyError, ValueError) as error:
        raise PretrainedError(
            f"{folder}: its blocks are not those of SD 1.5 ({error}); accepted is {_ACCEPTED}"
        ) from error


def _open_vision(source: str) -> State:
    """A vision tower in Hugging Face's layout."""
    path = Path(source)
    if not path.exists():
        path = _cached_open_clip(source)
    if path.is_dir():
        _check_activation(path / "config.json")
        path = path / "model.safetensors"
        if not path.is_file():
            raise PretrainedError(
                f"{path.parent}: no model.safetensors there; accepted is {_ACCEPTED_CLIP}"
            )
    with open_safetensors(path) as file:
        keys = list(file.keys())
    if any(key.startswith("visual.") for key in keys):
        state = from_open_clip(_read(path, "visual.", expected=_ACCEPTED_CLIP)[0])
    else:
        state = _read(path, "", expected=_ACCEPTED_CLIP)[0]
        parts = ("vision_model.", "visual_projection.")
        state = {key: value for key, value in state.items() if key.startswith(parts)}
    width = state.get("vision_model.embeddings.class_embedding", torch.empty(0)).shape[0]
    if not width or width in _OTHER_TOWERS:
        other = f"{_OTHER_TOWERS[width]} (width {width})" if width else "no CLIP vision tower"
        raise PretrainedError(f"{path}: found {other}; accepted is {_ACCEPTED_CLIP}")
    return {key: value for key, value in state.items() if not key.endswith("position_ids")}


def _check_activation(config: Path) -> None:
    """LAION's ViT-L/14 has the very shapes of OpenAI's, but computes gelu."""
    if not config.is_file():
        return
    settings = json.loads(config.read_text(encoding="utf-8"))
    activation = settings.get("vision_config", settings).get("hidden_act", "quick_gelu")
    if activation != "quick_gelu":
        raise PretrainedError(
            f"{config}: a vision tower with {activation}; accepted is {_ACCEPTED_CLIP}, with "
            "quick_gelu"
        )


def _cached_open_clip(name: str) -> Path:
    """The file that open_clip or the hub client has in its local cache for MODEL/TAG."""
    import open_clip  # only here: it takes seconds to import

    model, _, tag = name.partition("/")
    entry = open_clip.get_pretrained_cfg(model, tag) if tag else {}
    repository = str(entry.get("hf_hub", "")).rpartition("/")[0]
    if repository:
        cached = try_to_load_from_cache(repository, "open_clip_model.safetensors")
        if isinstance(cached, str):
            return Path(cached)
    known = f", and {repository} is not in the local cache" if repository else ""
    raise PretrainedError(
        f"--model.sd15.clip {name}: no such file or folder{known}; accepted is {_ACCEPTED_CLIP}"
    )


def from_open_clip(state: Mapping[str, Tensor]) -> State:
    """An open_clip vision tower (keys without `visual.`) in Hugging Face's layout."""
    ends = {
        "class_embedding": "embeddings.class_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        "conv1.weight": "embeddings.patch_embedding.weight",
        "ln_pre.weight": "pre_layrnorm.weight",
        "ln_pre.bias": "pre_layrnorm.bias",
        "ln_post.weight": "post_layernorm.weight",
        "ln_post.bias": "post_layernorm.bias",
    }
    inner = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    renamed: State = {}
    for key, tensor in state.items():
        if key in ends:
            renamed[f"vision_model.{ends[key]}"] = tensor
        elif key == "proj":
            renamed["visual_projection.weight"] = tensor.T.contiguous()
        elif key.startswith("transformer.resblocks."):
            number, _, rest = key.removeprefix("transformer.resblocks.").partition(".")
            layer = f"vision_model.encoder.layers.{number}"
            name, _, kind = rest.rpartition(".")
            if rest.startswith("attn.in_proj_"):
                kind = rest.removeprefix("attn.in_proj_")
                for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                    renamed[f"{layer}.self_attn.{part}_proj.{kind}"] = piece
            elif name in inner:
                renamed[f"{layer}.{inner[name]}.{kind}"] = tensor
    return renamed


def _read(path: Path, *prefixes: str, expected: str) -> list[State]:
    """The tensors under each prefix, which is cut off."""
    with open_safetensors(path) as file:
        keys = list(file.keys())
        for prefix in prefixes:
            if not any(key.startswith(prefix) for key in keys):
                raise PretrainedError(
                    f"{path}: no tensor {prefix}* among its {len(keys)} (first: "
                    f"{', '.join(sorted(keys)[:3])}); accepted is {expected}"
                )
        return [
            {key[len(prefix) :]: file.get_tensor(key) for key in keys if key.startswith(prefix)}
            for prefix in prefixes
        ]


def _read_sizes(read: Any, state: State, path: Path, expected: str) -> dict[str, Any]:
    try:
        return read(state)
    except KeyError as error:
        raise PretrainedError(f"{path}: lacks {error}; accepted is {expected}") from error


def _fill(
    module: nn.Module, state: State, path: Path, part: str, accepted: str, names: Any = None
) -> None:
    """Assign fp32 weights to a module that has none yet; what else the file holds is left out.

    They are in LDM layout where `names` tells the keys of that.
    """
    own = module.state_dict()
    if names is not None:  # what is not there is left to `check_fit` to name
        keys = names(own)
        state = from_ldm(state, {name: ldm for name, ldm in keys.items() if ldm in state})
    state = {key: value for key, value in state.items() if key in own}
    check_fit(module, state, path, part, f"Accepted is {accepted}.")
    # Copies: a mapped file that is written over would end the run, or change its networks.
    copies = {key: value.to(torch.float32, copy=True) for key, value in state.items()}
    module.load_state_dict(copies, assign=True)
