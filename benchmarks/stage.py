"""The host in this process, with models to measure."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from diff_restorer.checkpoint import write_checkpoint
from tests import toy_weights
from tools import in_process
from tools.environment import comfyui_root

from .measuring import computes_bf16, on_gpu

Conditioning = list[list[Any]]
Prompts = tuple[Conditioning, Conditioning]
"""Positive and negative."""
SAMPLER, SCHEDULER = "euler", "sgm_uniform"
LARGE_FILE = "models/diff_restorer/large_random.safetensors"
RANDOM_RESTORER = "models/diff_restorer/restorer_random.safetensors"  # of toy_weights.write_sd15


def open_host(folder: Path, precision: Literal["half", "fp32", "own"] = "half") -> ModuleType:
    """ComfyUI and the pack, whose root module it returns.

    Args:
        folder: Base directory of ComfyUI; weights that `write_models` makes lie in it.
        precision: `half` lets the host keep weights in bf16 on a CPU that computes in it, too, as
            it does on GPUs; `fp32` is for pictures that shall be compared; `own` leaves it to Nano
            and the host.
    """
    in_process.import_host(comfyui_root(), folder, cpu=not on_gpu())
    from comfy.cli_args import args

    args.bf16_unet = args.bf16_vae = precision == "half" and not on_gpu() and computes_bf16()
    args.fp32_unet = args.fp32_vae = precision == "fp32"
    return in_process.load_pack()


def write_models(folder: Path) -> None:
    """Random checkpoint, CLIP ViT-L, Diff-Restorer and ControlNet at the size of SD 1.5, below a
    base directory of ComfyUI."""
    toy_weights.write_sd15(folder)
    control = folder / "models/controlnet/control_random.safetensors"
    control.parent.mkdir(parents=True, exist_ok=True)
    state = toy_weights.random_state(_controlnet(), "control_model.", 14, torch.bfloat16)
    save_file(state, control)


def write_large(folder: Path, vae_width: int) -> None:
    """A random self-contained file for large pictures below a base directory of ComfyUI; its VAE is
    of SD 1.5's kind, which has 128 channels."""
    path = folder / LARGE_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = toy_weights.VaeSizes(vae_width, (1, 2, 4, 4), 2)
    tensors = toy_weights.restorer_tensors(vae=sizes, fusion_levels=(1, 2), dtype=torch.float16)
    tensors |= toy_weights.base_tensors(vae=sizes, dtype=torch.float16)
    for part in ("weight", "bias"):  # a residual that is small beside the picture
        tensors[f"decoder.fusion.pixels.out.{part}"] *= 0.02
    write_checkpoint(path, tensors, toy_weights.info())


def _controlnet() -> Iterator[tuple[str, tuple[int, ...]]]:
    """A stock ControlNet, whose hint is a picture."""
    for key, shape in toy_weights.control_shapes(toy_weights.SD15_UNET):
        if not key.startswith("input_hint_block."):
            yield key, shape
    widths = (3, 16, 16, 32, 32, 96, 96, 256, 320)
    for index, (cin, cout) in enumerate(pairwise(widths)):
        yield f"input_hint_block.{2 * index}.weight", (cout, cin, 3, 3)
        yield f"input_hint_block.{2 * index}.bias", (cout,)


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    """A smooth random picture with some texture, (1, height, width, 3) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 12, 12, generator=generator)
    smooth = F.interpolate(coarse, (height, width), mode="bicubic")
    grain = 0.03 * torch.randn(smooth.shape, generator=generator)
    return (smooth + grain).clamp(0, 1).movedim(1, -1).contiguous()


def stock(node_id: str, **inputs: Any) -> tuple[Any, ...]:
    """Run a node of the host's own (V1)."""
    host_nodes: Any = importlib.import_module("nodes")
    node = host_nodes.NODE_CLASS_MAPPINGS[node_id]
    return getattr(node(), node.FUNCTION)(**inputs)


def sample(
    model: Any,
    positive: Conditioning,
    negative: Conditioning,
    latent: dict[str, Any],
    steps: int,
    cfg: float = 1.0,
    sampler: str = SAMPLER,
    scheduler: str = SCHEDULER,
    seed: int = 1,
) -> dict[str, Any]:
    """KSampler at full denoise."""
    host_nodes: Any = importlib.import_module("nodes")
    return host_nodes.common_ksampler(
        model, seed, steps, cfg, sampler, scheduler, positive, negative, latent
    )[0]


@dataclass(frozen=True)
class Controlled:
    """What Degradation Control and the Prompt Processor make of one photo."""

    image: Tensor
    prompts: Prompts
    degradation: Any
    positive: Conditioning
    negative: Conditioning
    latent: dict[str, Any]


@dataclass(frozen=True)
class Graph:
    """MODEL, CLIP_VISION, VAE and DIFF_RESTORER, and the restoration graph on them."""

    model: Any
    clip_vision: Any
    vae: Any
    restorer: Any

    def look(self, node_id: str, image: Tensor, **inputs: Any) -> tuple[Any, ...]:
        """A node that reads a photo."""
        models = {"diff_restorer": self.restorer, "clip_vision": self.clip_vision}
        return in_process.execute(node_id, image=image, **models, **inputs)

    def control(self, image: Tensor, **settings: Any) -> Controlled:
        """The graph up to the sampler."""
        positive, negative, degradation = self.look("DiffRestorerPromptProcessor", image)
        settings = {"strength": 1.0} | settings
        controlled = in_process.execute(
            "DiffRestorerDegradationControl",
            positive=positive,
            negative=negative,
            diff_restorer=self.restorer,
            degradation=degradation,
            image=image,
            vae=self.vae,
            **settings,
        )
        return Controlled(image, (positive, negative), degradation, *controlled)

    def decode(self, found: Controlled, latent: dict[str, Any], **settings: Any) -> Tensor:
        """Aware VAE Decode, (B, H, W, 3) in [0, 1]."""
        return in_process.execute(
            "DiffRestorerAwareVAEDecode",
            samples=latent,
            vae=self.vae,
            diff_restorer=self.restorer,
            degradation=found.degradation,
            image=found.image,
            **settings,
        )[0]

    def tiled(self, image: Tensor, **settings: Any) -> tuple[Any, Any]:
        """MODEL that works in tiles, and the degradation with what each part suffers from."""
        settings = {"model": self.model} | settings
        model, _, degradation = self.look("DiffRestorerTiledDiffusion", image, **settings)
        return model, degradation


class Sd15:
    """The random models of `write_models`, each opened when it is first asked for."""

    @cached_property
    def _checkpoint(self) -> tuple[Any, ...]:
        return stock("CheckpointLoaderSimple", ckpt_name="sd15_random.safetensors")

    @cached_property
    def graph(self) -> Graph:
        model, _, vae = self._checkpoint
        return Graph(model, self.clip_vision, vae, load_restorer(Path(RANDOM_RESTORER).name))

    @cached_property
    def clip_vision(self) -> Any:
        return stock("CLIPVisionLoader", clip_name="vit_l_random.safetensors")[0]

    @cached_property
    def controlnet(self) -> Any:
        return stock("ControlNetLoader", control_net_name="control_random.safetensors")[0]

    def stock_control(self, image: Tensor) -> Prompts:
        """What CLIPTextEncode and ControlNetApplyAdvanced hand on: 77 tokens and a hint."""
        generator = torch.Generator().manual_seed(3)
        texts = (torch.randn(1, 77, 768, generator=generator) for _ in range(2))
        positive, negative = ([[text, {"pooled_output": text[:, 0]}]] for text in texts)
        controlled = stock(
            "ControlNetApplyAdvanced", positive=positive, negative=negative,
            control_net=self.controlnet, image=image, strength=1.0, start_percent=0.0,
            end_percent=1.0,
        )  # fmt: skip
        return controlled[0], controlled[1]


def load_restorer(name: str) -> Any:
    """DIFF_RESTORER of a file in the host's folder of them."""
    return in_process.execute("DiffRestorerLoader", file=name)[0]


def nano() -> Graph:
    """The shipped Nano."""
    return Graph(*in_process.execute("DiffRestorerNanoLoader"))
