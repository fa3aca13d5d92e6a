"""SD 1.5 and CLIP open from every accepted layout; other files are named and refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diff_restorer.checkpoint import CheckpointError, read_checkpoint
from tests import toy_weights
from tests.toy_models import open_clip_tower
from tests.training import toy_sd15
from training.common import ModelConfig, open_models
from training.models import clip_tokens
from training.networks import SD15_SIZES, sizes_of
from training.pretrained import PretrainedError, Sd15Config, from_open_clip, open_base


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sd15")
    checkpoint = toy_sd15.write_checkpoint(folder / "sd15.safetensors")
    clip = toy_sd15.write_clip(folder / "clip.safetensors")
    return {
        "checkpoint": checkpoint,
        "clip": clip,
        "tower": toy_sd15.write_clip(folder / "tower.safetensors", with_text=False),
        "clip folder": toy_sd15.write_clip_folder(folder / "clip"),
        "folder": toy_sd15.write_folder(folder / "diffusers", checkpoint, clip),
    }


def opened(checkpoint: Path, clip: Path, vae: Path | None = None) -> Any:
    return open_base(Sd15Config(checkpoint, vae, str(clip)), SD15_SIZES)


def states(base: Any) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value
        for name in ("unet", "vae", "vision")
        for key, value in getattr(base, name).state_dict().items()
    }


def test_single_file_and_diffusers_folder_are_the_same_networks(files: dict[str, Path]) -> None:
    single = opened(files["checkpoint"], files["clip"])
    folder = opened(files["folder"], files["clip folder"])
    assert single.sizes == folder.sizes
    assert (single.sizes.unet_channels, single.sizes.unet_attention) == ((32, 64), (True, False))
    assert (single.sizes.context_width, single.sizes.vae_channels) == (64, (32, 32, 64, 64))
    assert (single.sizes.vision_width, single.sizes.vision_image) == (64, 64)
    assert single.sizes.prompt_hidden == 1024  # the file does not tell it
    mine = states(single)
    torch.testing.assert_close(mine, states(folder), rtol=0, atol=0)
    written = load_file(files["checkpoint"])
    assert torch.equal(
        mine["unet.down_blocks.0.resnets.0.conv1.weight"],
        written["model.diffusion_model.input_blocks.1.0.in_layers.2.weight"],
    )
    assert not any(value.requires_grad for value in single.unet.parameters())


def test_files_may_be_written_over_while_a_training_runs(
    files: dict[str, Path], tmp_path: Path
) -> None:
    """Mapped weights would end it, or change: those of fp32 files are used as they are."""
    path = tmp_path / "sd15.safetensors"
    state = {key: value.float() for key, value in load_file(files["checkpoint"]).items()}
    save_file(state, path)
    base = opened(path, files["clip"])
    before = copy.deepcopy(states(base))
    path.write_bytes(bytes(path.stat().st_size))
    path.write_bytes(b"")
    torch.testing.assert_close(states(base), before, rtol=0, atol=0)


def test_another_vae_takes_the_place_of_the_checkpoint_s(
    files: dict[str, Path], tmp_path: Path
) -> None:
    state = toy_weights.random_state(toy_weights.vae_shapes(toy_sd15.VAE), "", 9)
    save_file(state | {"loss.logvar": torch.zeros(())}, tmp_path / "vae.safetensors")
    base = opened(files["checkpoint"], files["clip"], tmp_path / "vae.safetensors")
    assert torch.equal(base.vae.encoder.conv_in.weight, state["encoder.conv_in.weight"])
    base.vae.save_pretrained(tmp_path / "vae")
    again = opened(files["checkpoint"], files["tower"], tmp_path / "vae")
    assert torch.equal(again.vae.decoder.conv_out.weight, state["decoder.conv_out.weight"])


def test_p_clip_of_an_open_clip_file_is_open_clip_s(files: dict[str, Path], tmp_path: Path) -> None:
    tower = open_clip_tower(toy_sd15.VISION)
    state = {f"visual.{key}": value for key, value in tower.state_dict().items()}
    save_file(state | {"logit_scale": torch.zeros(())}, tmp_path / "open_clip.safetensors")
    vision = opened(files["checkpoint"], tmp_path / "open_clip.safetensors").vision
    view = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    seen: list[torch.Tensor] = []
    tower.transformer.register_forward_hook(lambda *args: seen.append(args[2]))
    mean = torch.tensor((0.48145466, 0.4578275, 0.40821073))[:, None, None]
    std = torch.tensor((0.26862954, 0.26130258, 0.27577711))[:, None, None]
    with torch.no_grad():
        tower((view - mean) / std)
        found = clip_tokens(vision, view)
    assert found.shape == (2, 16, 64)
    # fp32 on both sides; the attention kernels sum in another order.
    torch.testing.assert_close(found, seen[0][:, 1:], rtol=1e-4, atol=1e-4)


def test_every_key_of_open_clip_has_a_place() -> None:
    renamed = from_open_clip(open_clip_tower(toy_sd15.VISION).state_dict())
    shapes = dict(toy_weights.vision_shapes(toy_sd15.VISION))
    assert {key: tuple(value.shape) for key, value in renamed.items()} == shapes


def wrong_context(width: int) -> Callable[[Path], Path]:
    sizes = replace(toy_sd15.UNET, context=width)
    return partial(toy_sd15.write_checkpoint, unet=sizes)


def changed(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Path]:
    """A checkpoint after `edit` of its tensors."""

    def write(path: Path) -> Path:
        state = load_file(toy_sd15.write_checkpoint(path))
        edit(state)
        save_file(state, path)
        return path

    return write


def truncated(path: Path) -> Path:
    whole = toy_sd15.write_checkpoint(path.with_name("whole.safetensors"))
    return toy_weights.write_truncated(path, whole)


def without(*prefixes: str) -> Callable[[dict[str, Any]], None]:
    def edit(state: dict[str, Any]) -> None:
        for key in [key for key in state if key.startswith(prefixes)]:
            del state[key]

    return edit


def linear_projections(state: dict[str, Any]) -> None:
    key = f"{toy_sd15.UNET_PREFIX}middle_block.1.proj_in.weight"
    state[key] = state[key][:, :, 0, 0].contiguous()


def nine_channels(state: dict[str, Any]) -> None:
    state[f"{toy_sd15.UNET_PREFIX}input_blocks.0.0.weight"] = torch.zeros(32, 9, 3, 3)


WRONG = {
    "SDXL": (wrong_context(2048), "found SDXL"),
    "SD 2": (wrong_context(1024), "found Stable Diffusion 2"),
    "linear": (changed(linear_projections), "linear projections"),
    "inpainting": (changed(nine_channels), "9 input channels"),
    "pickle": (toy_weights.write_pickle, "pickle"),
    "truncated": (truncated, "incomplete"),
    "a VAE": (toy_weights.write_wrong_kind, r"no tensor model\.diffusion_model\."),
    "no VAE": (changed(without("first_stage_model.")), r"no tensor first_stage_model\."),
    "a hole": (
        changed(without("model.diffusion_model.out.2.weight")),
        r"the UNet does not fit \(missing: conv_out\.weight\)",
    ),
    "no middle": (changed(without("model.diffusion_model.middle_block.")), "found no SD UNet"),
    "nothing": (lambda path: path, "no such file"),
}


@pytest.mark.parametrize(("write", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_checkpoint_is_named(
    write: Callable[[Path], Path], message: str, files: dict[str, Path], tmp_path: Path
) -> None:
    path = write(tmp_path / "wrong.safetensors")
    with pytest.raises((CheckpointError, PretrainedError, FileNotFoundError), match=message) as got:
        opened(path, files["clip"])
    assert "wrong.safetensors" in str(got.value)


def test_a_folder_without_its_parts_is_named(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(PretrainedError, match=r"unet: no config\.json"):
        opened(tmp_path, files["clip"])
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/config.json").write_text("{}")
    with pytest.raises(PretrainedError, match=r"pickles \(\.bin\) are refused"):
        opened(tmp_path, files["clip"])


@pytest.mark.parametrize(("width", "name"), [(1280, "ViT-H"), (768, "ViT-B")])
def test_another_tower_is_named(
    width: int, name: str, files: dict[str, Path], tmp_path: Path
) -> None:
    sizes = toy_weights.VisionSizes(width, 1, 16, 32, 64, 8)
    path = tmp_path / "tower.safetensors"
    save_file(toy_weights.random_state(toy_weights.vision_shapes(sizes)), path)
    with pytest.raises(PretrainedError, match=f"tower.safetensors: found {name}.*ViT-L/14"):
        opened(files["checkpoint"], path)


def test_laion_s_tower_is_told_by_its_activation(files: dict[str, Path], tmp_path: Path) -> None:
    folder = toy_sd15.write_clip_folder(tmp_path / "laion", hidden_act="gelu")
    with pytest.raises(PretrainedError, match="a vision tower with gelu"):
        opened(files["checkpoint"], folder)


def test_a_clip_that_is_nowhere_is_named(files: dict[str, Path]) -> None:
    for source in ("ViT-L-14-quickgelu/openai", "nothing.safetensors"):
        with pytest.raises(PretrainedError, match=f"--model.sd15.clip {source}: no such file"):
            opened(files["checkpoint"], Path(source))
    with pytest.raises(PretrainedError, match=r"needs both.*--model\.sd15\.clip"):
        open_models(ModelConfig(sd15=Sd15Config(files["checkpoint"])))


def test_files_of_the_other_base_are_refused(tmp_path: Path) -> None:
    nano = toy_weights.write_nano(tmp_path / "nano.safetensors")
    with pytest.raises(ValueError, match="belongs to a 'nano' base"):
        open_models(toy_sd15.model_config(tmp_path, init=(nano,)))


def test_sizes_are_read_from_a_self_contained_file(tmp_path: Path) -> None:
    sizes = sizes_of(read_checkpoint(toy_weights.write_nano(tmp_path / "nano.safetensors")))
    assert sizes.unet_channels == (32, 64)
    assert sizes.unet_attention == (False, True)
    assert (sizes.unet_layers, sizes.vae_layers, sizes.vision_layers) == (1, 1, 2)
    assert (sizes.vision_patch, sizes.vision_image, sizes.vision_head_width) == (16, 64, 64)
    assert (sizes.prompt_hidden, sizes.context_width) == (64, 32)
    assert (sizes.fusion_levels, sizes.fusion_growth, sizes.fusion_depth) == ((0, 1, 2), 8, 2)
    assert sizes.fusion_pixel_width == 8
