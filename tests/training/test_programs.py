"""The real programs, all stages in order at toy width, end in a file that reads back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from skimage import data

from diff_restorer.checkpoint import read_checkpoint
from training import export, sample_decoder_data, train_control, train_decoder
from training.common import DataConfig, ModelConfig
from training.loop import LoopConfig
from training.models import Models, Sizes
from training.nano import autoencoder, vision

TOY = Sizes(
    unet_channels=(32, 64),
    unet_attention=(False, True),
    context_width=16,
    vision_width=32,
    vision_layers=2,
    vision_image=32,
    vision_patch=8,
    vision_head_width=16,
    prompt_hidden=24,
    fusion_levels=(0, 2),
    fusion_growth=4,
    fusion_depth=1,
    fusion_pixel_width=8,
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name in ("astronaut", "chelsea", "coffee"):
        Image.fromarray(getattr(data, name)()).resize((96, 80)).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def files(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What each stage wrote."""
    out = tmp_path_factory.mktemp("runs")

    def loop(name: str) -> LoopConfig:
        return LoopConfig(
            out=out / name, steps=2, batch_size=2, warmup=1, workers=0, ema=0.5,
            checkpoint_every=2, validate_every=2,
        )  # fmt: skip

    shots = DataConfig(photos, crop=32, held_out=3, validation_samples=9)
    made = {
        "base": autoencoder.main(
            autoencoder.Config(loop("base"), shots, ModelConfig(sizes=TOY)),
        ),
        "eyes": vision.main(vision.Config(loop("eyes"), shots, ModelConfig(sizes=TOY))),
    }
    made["control"] = train_control.main(
        train_control.Config(
            loop("control"),
            shots,
            ModelConfig(init=(made["eyes"], made["base"]), sizes=TOY),
            train_unet=True,
            validation_steps=2,
        )
    )
    stage1 = ModelConfig(init=(made["control"],), sizes=TOY)
    made["latents"] = sample_decoder_data.main(
        sample_decoder_data.Config(shots, out / "latents.safetensors", stage1, samples=3, steps=2)
    )
    made["decoder"] = train_decoder.main(
        train_decoder.Config(
            loop("decoder"), shots, stage1, latents=made["latents"], validation_steps=2
        )
    )
    made["release"] = export.main(
        export.Config(
            shots,
            out / "release.safetensors",
            ModelConfig(init=(made["decoder"],), sizes=TOY),
            samples=128,
        )
    )
    return made


def changed(before: Path, after: Path, prefix: str) -> set[bool]:
    """Whether each tensor under `prefix` differs between two files."""
    old = read_checkpoint(before, required=()).state(prefix)
    new = read_checkpoint(after, required=()).state(prefix)
    assert old.keys() == new.keys()
    return {not torch.equal(old[key], new[key]) for key in old}


def test_stage_1_leaves_the_vae_and_the_vision_encoder_alone(files: dict[str, Path]) -> None:
    assert changed(files["base"], files["control"], "base.vae.") == {False}
    assert changed(files["eyes"], files["control"], "base.clip_vision.") == {False}
    assert True in changed(files["eyes"], files["control"], "prompt_processor.semantic.")


def test_stage_2_trains_the_decoder_only(files: dict[str, Path]) -> None:
    for prefix in ("base.", "control.", "prompt_processor."):
        assert changed(files["control"], files["decoder"], prefix) == {False}
    stock = read_checkpoint(files["base"], required=()).state("base.vae.")
    tuned = read_checkpoint(files["decoder"]).state("decoder.vae.")
    assert any(not torch.equal(stock[key], tuned[key]) for key in tuned)
    fusion = read_checkpoint(files["decoder"]).state("decoder.fusion.")
    assert fusion["0.out.weight"].any()
    assert fusion["2.out.weight"].any()


def test_the_release_is_complete_and_in_half_precision(files: dict[str, Path]) -> None:
    checkpoint = read_checkpoint(files["release"])
    assert checkpoint.self_contained
    assert checkpoint.fusion_levels == (0, 2)
    assert checkpoint.info.types[-1] == "clean"
    assert checkpoint.info.config["loop"]["steps"] == 2
    state = checkpoint.state("")
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert state["prompt_processor.prototypes"].any(dim=1).all()


def test_the_release_loads_into_other_models(files: dict[str, Path]) -> None:
    models = Models(TOY, read_checkpoint(files["release"]).info.types)
    assert models.load(files["release"]) >= {"base.unet.", "control.", "decoder.fusion."}
    with pytest.raises(ValueError, match="does not fit the configured sizes"):
        Models(Sizes(), models.types).load(files["release"])


def test_a_missing_part_is_named(files: dict[str, Path], photos: Path) -> None:
    with pytest.raises(ValueError, match=r"base\.clip_vision\."):
        train_control.main(
            train_control.Config(
                LoopConfig(out=files["base"].parent / "never"),
                DataConfig(photos, crop=32),
                ModelConfig(init=(files["base"],), sizes=TOY),
            )
        )


def test_toy_photos_are_shared_out_to_training_and_validation(photos: Path) -> None:
    with pytest.raises(ValueError, match="photo"):
        autoencoder.main(autoencoder.Config(LoopConfig(out=photos), DataConfig(photos / "nothing")))
