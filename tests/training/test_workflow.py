"""What training validates with is what `restore_sd15` makes in the host, at toy size."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks.stage import stock
from diff_restorer.checkpoint import write_checkpoint
from tests import toy_weights
from tests.photos import picture
from tests.training import toy_sd15
from tools import in_process
from tools.environment import ROOT
from tools.workflow import Workflow, find_node, load_workflow
from training import sample_decoder_data, train_control, train_decoder
from training.common import DataConfig, data_for, open_models, to_home
from training.data import PICTURES
from training.loop import LoopConfig
from training.models import CLIP_MEAN, CLIP_STD

NAME = "toy_sd15_restorer.safetensors"


def tensors() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A finished file for the toy SD 1.5, and that SD 1.5 as a self-contained file has it."""
    unet, vae, vision = toy_sd15.UNET, toy_sd15.VAE, toy_sd15.VISION
    options: dict[str, Any] = {"fusion_levels": (1, 2), "tuned_decoder": True}
    restorer = toy_weights.restorer_tensors(unet, vae, vision.width, **options, dtype=torch.half)
    restorer = {key: value for key, value in restorer.items() if ".pixels." not in key}
    base = (
        toy_weights.random_state(toy_weights.unet_shapes(unet), "base.unet.", 1)
        | toy_weights.random_state(toy_weights.vae_shapes(vae), "base.vae.", 2)
        | toy_weights.random_state(toy_weights.vision_shapes(vision), "base.clip_vision.", 3)
    )
    return restorer, base


def run(graph: Workflow, loaded: dict[str, tuple[Any, ...]], last: str) -> Any:
    """First output of the node of class `last`, in this process; nodes of classes that are `loaded`
    need not run."""
    nodes: Any = importlib.import_module("nodes")
    made = {find_node(graph, kind): outputs for kind, outputs in loaded.items()}

    def outputs(name: str) -> tuple[Any, ...]:
        if name not in made:
            kind = graph[name]["class_type"]
            inputs = {
                key: outputs(value[0])[value[1]] if isinstance(value, list) else value
                for key, value in graph[name]["inputs"].items()
            }
            v3 = hasattr(nodes.NODE_CLASS_MAPPINGS[kind], "GET_SCHEMA")
            made[name] = (in_process.execute if v3 else stock)(kind, **inputs)
        return made[name]

    return outputs(find_node(graph, last))[0]


def test_a_validation_picture_is_the_workflow_s(
    comfyui: Path, pack: ModuleType, photos: Path, tmp_path: Path
) -> None:
    """The same prompts, first latent, sampler, last sigma and decoder, from the same file."""
    from comfy.cli_args import args

    restorer, base = tensors()
    clip = {"name": "toy", "image_size": 64, "mean": list(CLIP_MEAN), "std": list(CLIP_STD)}
    whole = tmp_path / "base.safetensors"
    write_checkpoint(whole, restorer | base, toy_weights.info(clip=clip))
    file = comfyui / "models/diff_restorer" / NAME
    file.parent.mkdir(exist_ok=True)
    write_checkpoint(file, restorer, toy_weights.info("sd15", clip=clip))
    model = toy_sd15.model_config(tmp_path, init=(file,), fusion_growth=8, fusion_depth=2)
    shots = DataConfig(photos, part=80, crop=64, held_out=3, validation_samples=1)
    loop = LoopConfig(out=tmp_path / "run", precision="no")
    config = train_decoder.Config(loop, shots, model)
    models, _ = open_models(model)
    batch = to_home(data_for(models, shots, loop.seed, PICTURES)[1])
    loss = train_decoder.DecoderLoss(models, config)
    generator = torch.Generator().manual_seed(0)
    validated = loss.restored(batch, config.validation_steps, generator)

    graph = load_workflow(ROOT / "workflows/api/restore_sd15.json")
    shown = (batch["lq"][0].movedim(0, -1) * 255).round().byte()
    Image.fromarray(shown.numpy()).save(comfyui / "input/validated.png")
    for kind, inputs in {"LoadImage": {"image": "validated.png"},
                         "DiffRestorerLoader": {"file": NAME}}.items():  # fmt: skip
        graph[find_node(graph, kind)]["inputs"] |= inputs
    steps = graph[find_node(graph, "KSampler")]["inputs"]["steps"]
    stages = train_control.Config, train_decoder.Config
    assert {steps} == {s.validation_steps for s in stages} | {sample_decoder_data.Config.steps}

    with mock.patch.multiple(args, fp32_unet=True, fp32_vae=True), torch.inference_mode():
        unet, vision, vae, _ = pack.nodes.host_nano.load_nano(whole)
        loaded = {"CheckpointLoaderSimple": (unet, None, vae), "CLIPVisionLoader": (vision,)}
        restored = run(graph, loaded, "DiffRestorerAwareVAEDecode").movedim(-1, 1)
    # fp32 on both sides. Ending at the least timestep, not at sigma 0, is 1.7e-3 away, UniPC 6e-2.
    torch.testing.assert_close(restored, validated.clamp(0, 1), rtol=0, atol=5e-4)


def test_sd15_reads_p_s_from_what_it_denoises(tmp_path: Path) -> None:
    """As in the nodes, where both see the whole photo; Nano's sees the part that crops share."""
    models, _ = open_models(toy_sd15.model_config(tmp_path))
    picture("astronaut").save(tmp_path / "a.png")
    picture("coffee").save(tmp_path / "b.png")
    shots = DataConfig(tmp_path, part=320, crop=64, held_out=2, validation_samples=1)
    train, fixed = data_for(models, shots, 0, PICTURES)
    drawn = train.sized(2).finish(train.sized(2)[0], torch.device("cpu"))
    for batch in (drawn, fixed):
        assert torch.equal(batch["clip_view"], batch["lq"])  # the toy tower sees 64 px, too
    with pytest.raises(ValueError, match=r"--data\.crops-per-part: found 2, but with SD 1\.5"):
        data_for(models, replace(shots, crops_per_part=2), 0, PICTURES)
