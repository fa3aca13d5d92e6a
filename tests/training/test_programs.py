"""The real programs, all stages in order at toy width, end in a file that reads back."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from diff_restorer import VaeTrunk, aware_decode, encoder_features, photo_statistics
from diff_restorer.abstention import Abstention
from diff_restorer.checkpoint import read_checkpoint, write_checkpoint
from diff_restorer.degradations import degrade
from diff_restorer.prompt_processor import DEFAULT_TYPES
from tests.photos import photo
from tests.training import toy_sd15
from training import (
    ablate,
    distill,
    export,
    sample_decoder_data,
    train_control,
    train_decoder,
)
from training.common import DataConfig, ModelConfig, home, open_models
from training.data import clip_view
from training.diffusion import sample
from training.loop import LoopConfig
from training.models import Models, psnr_gain, to_pixels
from training.nano import autoencoder, vision
from training.networks import Sizes

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
    detail_widths=(8, 12, 16),
    detail_depths=(1, 1, 2, 1, 1),
)


def loop(out: Path, **changes: Any) -> LoopConfig:
    """A step or two."""
    return replace(LoopConfig(out, steps=1, batch_size=1, warmup=1, workers=0), **changes)


def shots(photos: Path, **changes: Any) -> DataConfig:
    """Small parts of `photos`."""
    config = DataConfig(photos, part=48, crop=32, held_out=3, validation_samples=9)
    return replace(config, **changes)


def nano(*files: Path, **changes: Any) -> ModelConfig:
    """The toy networks, from files."""
    return replace(ModelConfig(init=files, sizes=TOY), **changes)


def stage_1(out: Path, photos: Path, *files: Path, **changes: Any) -> train_control.Config:
    """Of the toy networks, with a UNet of their own."""
    run, data, model = loop(out), shots(photos), nano(*files)
    return replace(train_control.Config(run, data, model, train_unet=True), **changes)


def stage_2(out: Path, photos: Path, file: Path, **changes: Any) -> train_decoder.Config:
    run, data, model = loop(out, batch_size=2), shots(photos), nano(file)
    return replace(train_decoder.Config(run, data, model), **changes)


@pytest.fixture(scope="module")
def files(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What each stage wrote."""
    out, data = tmp_path_factory.mktemp("runs"), shots(photos)
    two = {"steps": 2, "batch_size": 2, "ema": 0.5, "checkpoint_every": 2, "validate_every": 2}
    base = autoencoder.main(autoencoder.Config(loop(out / "base", **two), data, nano()))
    eyes = vision.main(vision.Config(loop(out / "eyes", **two), data, nano()))
    settings = stage_1(out / "control", photos, eyes, base, validation_steps=2)
    control = train_control.main(replace(settings, loop=loop(out / "control", **two)))
    latents = sample_decoder_data.main(
        sample_decoder_data.Config(
            *(data, out / "latents.safetensors", nano(control)), samples=3, batch_size=2, steps=2
        )
    )
    settings = stage_2(out / "decoder", photos, control, latents=latents, validation_steps=2)
    decoder = train_decoder.main(replace(settings, loop=loop(out / "decoder", **two)))
    release = export.main(
        export.Config(data, out / "release.safetensors", nano(decoder), samples=128)
    )
    return {
        "base": base, "eyes": eyes, "control": control, "latents": latents, "decoder": decoder,
        "release": release,
    }  # fmt: skip


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
    decoder = read_checkpoint(files["decoder"])
    assert decoder.state("decoder.detail.")["out.weight"].any()
    assert not decoder.has("decoder.vae.")
    assert not decoder.has("decoder.fusion.")


def test_stage_2_samples_latents_where_no_file_has_them(
    files: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    settings = stage_2(tmp_path, photos, files["control"], sample_steps=2, sampled_share=1.0)
    settings = replace(settings, loop=loop(tmp_path, steps=2, batch_size=2), validation_steps=2)
    made = read_checkpoint(train_decoder.main(settings)).state("decoder.detail.")
    assert made["out.weight"].any()
    with pytest.raises(ValueError, match="--sample-steps: latents come from --latents already"):
        train_decoder.main(replace(settings, latents=files["latents"]))
    with pytest.raises(ValueError, match=r"--sample-steps: no file of --model.init has \['base"):
        train_decoder.main(replace(settings, model=nano(files["base"], files["eyes"])))


def test_the_release_is_complete_and_in_half_precision(files: dict[str, Path]) -> None:
    checkpoint = read_checkpoint(files["release"])
    assert checkpoint.self_contained
    assert checkpoint.has("decoder.detail.")
    assert checkpoint.info.types[-1] == "clean"
    told = checkpoint.info.config
    assert list(told) == ["nano.vision", "nano.autoencoder", "train_control", "train_decoder"]
    assert told["train_control"]["train_unet"]
    assert told["train_decoder"]["loop"]["steps"] == 2
    assert told["train_decoder"]["loop"]["out"] == "decoder"  # and not the folder it is in
    state = checkpoint.state("")
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert state["prompt_processor.prototypes"].any(dim=1).all()


@pytest.mark.gpu
def test_every_program_runs_on_the_gpu(files: dict[str, Path], sd15_files: dict[str, Path]) -> None:
    assert home().type == "cuda"
    assert all(path.exists() for path in (*files.values(), *sd15_files.values()))


def test_a_weight_that_fp16_cannot_hold_is_named(
    files: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    source = read_checkpoint(files["decoder"])
    state = source.state("")
    state["decoder.detail.out.weight"] = state["decoder.detail.out.weight"] + 1e5
    write_checkpoint(tmp_path / "large.safetensors", state, source.info)
    large, never = nano(tmp_path / "large.safetensors"), tmp_path / "never.safetensors"
    with pytest.raises(ValueError, match=r"decoder\.detail\.out\.weight is not finite in fp16"):
        export.main(export.Config(shots(photos), never, large, samples=128))
    assert not never.exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--data.crop", "100"), "error: --data.crop: 100 pixels do not fit this UNet; give a"),
        (("--data.held-out", "1"), "error: --data.held-out: found 1; give at least 2"),
        (("--data.validation-samples", "0"), "error: --data.validation-samples: found 0"),
        (("--model.init", "missing.safetensors"), "missing.safetensors"),
    ],
)
def test_what_is_wrong_with_the_settings_is_one_line(
    photos: Path, tmp_path: Path, options: tuple[str, ...], expected: str
) -> None:
    command = [*(sys.executable, "-m", "training.nano.autoencoder"), "--loop.steps", "1"]
    command += ["--loop.out", str(tmp_path), "--data.photos", str(photos), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert expected in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_scores_that_are_no_json_are_named_at_the_start(photos: Path, tmp_path: Path) -> None:
    for text, message in (("{", "is not JSON"), ("[1]", "holds a list")):
        (tmp_path / "scores.json").write_text(text)
        unopened = nano(tmp_path / "not even opened")
        settings = export.Config(DataConfig(photos), tmp_path / "never", unopened)
        with pytest.raises(ValueError, match=f"--scores: .*{message}"):
            export.main(replace(settings, scores=tmp_path / "scores.json"))


def test_a_classifier_of_several_kinds_is_told_apart(
    files: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    settings = stage_1(tmp_path, photos, files["eyes"], files["base"], validation_steps=1)
    settings = replace(settings, classification="bce")
    made = train_control.main(settings)
    assert read_checkpoint(made).info.classification == "bce"
    assert open_models(nano(made))[0].classification == "bce"
    # A run that leaves the classifier alone, with the default of `classification`.
    later = replace(settings, loop=loop(tmp_path / "later"), model=nano(made))
    later = replace(later, train_degradation=False, classification="ce")
    assert read_checkpoint(train_control.main(later)).info.classification == "bce"
    assert read_checkpoint(files["release"]).info.classification == "ce"


def test_a_weight_of_a_loss_that_trains_nothing_is_refused(
    files: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    settings = stage_1(tmp_path, photos, files["control"], ce_weight=0.0, train_degradation=False)
    with pytest.raises(ValueError, match=r"--ce-weight 0\.0: without --train-degradation"):
        train_control.main(settings)


def test_a_decoder_without_diffusion_is_an_ablation(
    files: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    settings = stage_2(tmp_path, photos, files["control"], without_diffusion=True)
    models, _ = open_models(nano(train_decoder.main(settings)))
    assert models.ablations == {"without_diffusion"}
    with pytest.raises(ValueError, match="--without-diffusion: it decodes no sampled latents"):
        train_decoder.main(replace(settings, latents=files["latents"]))


def test_the_release_loads_into_other_models(files: dict[str, Path]) -> None:
    release = read_checkpoint(files["release"])
    models = Models(TOY, release.info.types)
    assert models.load(release) >= {"base.unet.", "control.", "decoder.detail."}
    with pytest.raises(ValueError, match=r"does not fit .* Give --model the sizes"):
        Models(Sizes(), models.types).load(release)


def test_a_finished_nano_can_be_given_another_decoder(files: dict[str, Path]) -> None:
    fusion = replace(TOY, detail_widths=(), fusion_levels=(1,), fusion_growth=4, fusion_depth=1)
    models, loaded = open_models(nano(files["release"], sizes=fusion))
    assert "decoder.detail." in loaded
    assert models.sizes.detail_widths == TOY.detail_widths
    models, loaded = open_models(nano(files["release"], sizes=fusion, fresh_decoder=True))
    assert not {prefix for prefix in loaded if prefix.startswith("decoder.")}
    assert models.decoder_parts == ("decoder.fusion.", "decoder.vae.")
    assert models.sizes.fusion_levels == (1,)


def test_thresholds_stay_with_the_classifier_they_were_fitted_to(
    files: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    source = read_checkpoint(files["control"])
    damages = [name for name in source.info.types if name != "clean"]
    abstention = Abstention(
        types=source.info.types, exclusive=True, thresholds=dict.fromkeys(damages, (0.5, 0.9))
    )
    fitted = tmp_path / "fitted.safetensors"
    write_checkpoint(fitted, source.state(""), replace(source.info, abstention=abstention))
    decoder = train_decoder.main(stage_2(tmp_path / "decoder", photos, fitted))
    assert read_checkpoint(decoder).info.abstention == abstention
    run = loop(tmp_path / "eyes", batch_size=2)
    eyes = vision.main(vision.Config(run, shots(photos), nano(fitted)))
    assert read_checkpoint(eyes, required=()).info.abstention is None


def test_a_missing_part_is_named(files: dict[str, Path], photos: Path) -> None:
    settings = stage_1(files["base"].parent / "never", photos, files["base"], train_unet=False)
    with pytest.raises(ValueError, match=r"base\.clip_vision\."):
        train_control.main(settings)


def test_toy_photos_are_shared_out_to_training_and_validation(photos: Path) -> None:
    with pytest.raises(ValueError, match="photo"):
        autoencoder.main(autoencoder.Config(LoopConfig(out=photos), DataConfig(photos / "nothing")))


def test_nano_s_sizes_need_not_be_repeated(files: dict[str, Path]) -> None:
    given = Sizes(vision_head_width=16)  # the one thing that tensors do not tell
    models, loaded = open_models(nano(files["release"], sizes=given))
    assert models.sizes == TOY
    assert {"base.unet.", "base.vae.", "base.clip_vision.", "control."} <= loaded
    assert models.types[-1] == "clean"


@pytest.fixture(scope="module")
def sd15_files(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same stages on a toy SD 1.5: stage 1 from a single file, stage 2 from a folder."""
    out = tmp_path_factory.mktemp("sd15")
    single = toy_sd15.model_config(out)
    folder = toy_sd15.model_config(
        out,
        checkpoint=toy_sd15.write_folder(
            out / "diffusers", out / "sd15.safetensors", out / "clip.safetensors"
        ),
    )

    two = {"steps": 2, "ema": 0.5, "checkpoint_every": 2, "validate_every": 2}
    data = shots(photos, validation_samples=8)
    control = train_control.main(
        train_control.Config(loop(out / "control", **two), data, single, validation_steps=2)
    )
    latents = sample_decoder_data.main(
        sample_decoder_data.Config(
            *(data, out / "latents.safetensors", replace(single, init=(control,))),
            samples=3,
            steps=2,
            batch_size=1,
        )
    )
    decoder = train_decoder.main(
        train_decoder.Config(
            *(loop(out / "decoder", **two), data, replace(folder, init=(control,))),
            latents=latents,
            fusion_first=1,
            lpips_weight=1.0,
            gan=train_decoder.GanConfig(0.025, start=1, width=8),
            validation_steps=2,
        )
    )
    finished = replace(single, init=(decoder,))
    release = export.main(export.Config(data, out / "release.safetensors", finished, samples=96))
    return {"control": control, "latents": latents, "decoder": decoder, "release": release}


def test_an_sd15_file_holds_what_the_nodes_ask_for_and_no_base(
    sd15_files: dict[str, Path],
) -> None:
    checkpoint = read_checkpoint(sd15_files["release"])
    assert not checkpoint.has("base.")
    assert not checkpoint.has("discriminator")
    assert checkpoint.info.base_model == "sd15"
    assert checkpoint.info.types == DEFAULT_TYPES
    assert checkpoint.info.latent_scale == 0.18215
    assert checkpoint.info.prediction == "epsilon"
    assert checkpoint.info.clip["name"] == "openai/clip-vit-large-patch14"
    assert checkpoint.info.clip["degradation_view"] == "whole"
    fused = {key.split(".")[0] for key in checkpoint.state("decoder.fusion.")}
    assert fused == {"1", "2"}
    state = checkpoint.state("")
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert state["control.input_hint_block.0.weight"].any()
    assert state["control.zero_convs.0.0.weight"].any()
    assert state["decoder.vae.decoder.conv_out.weight"].any()
    assert state["prompt_processor.prototypes"].any(dim=1).all()


def test_stage_2_of_sd15_trains_the_decoder_only(sd15_files: dict[str, Path]) -> None:
    for prefix in ("control.", "prompt_processor."):
        assert changed(sd15_files["control"], sd15_files["decoder"], prefix) == {False}
    with safe_open(sd15_files["control"].parents[1] / "sd15.safetensors", "pt") as file:
        stock = file.get_tensor("first_stage_model.decoder.conv_out.weight")
    tuned = read_checkpoint(sd15_files["decoder"]).state("decoder.vae.")
    assert not torch.equal(stock, tuned["decoder.conv_out.weight"])


def test_a_file_for_sd15_can_be_taken_apart(
    sd15_files: dict[str, Path], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ablate.Config(
        ablate.AblationData(photos, limit=1, kinds=("noise",)),
        tmp_path,
        sd15_files["release"],
        variants=("no_ps", "stock_decoder"),
        steps=2,
        precision="no",
    )
    assert ablate.main(config) == 1
    printed = capsys.readouterr().err
    assert "give SD 1.5's with --sd15.checkpoint and --sd15.clip" in printed
    base = toy_sd15.model_config(sd15_files["control"].parents[1]).sd15
    assert ablate.main(replace(config, sd15=base)) == 0
    rows = json.loads((tmp_path / "ablation.json").read_text())["variants"]
    assert {name: row["kinds"]["noise"]["psnr"] > 0 for name, row in rows.items()} == {
        "full": True, "no_ps": True, "stock_decoder": True,
    }  # fmt: skip


def test_a_killed_sampling_goes_on_to_the_same_latents(
    sd15_files: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    folder = sd15_files["control"].parents[1]
    config = sample_decoder_data.Config(
        shots(photos, validation_samples=8),
        tmp_path / "latents.safetensors",
        toy_sd15.model_config(folder, init=(sd15_files["control"],)),
        samples=6,
        steps=20,
        batch_size=1,
    )
    program = (
        "import pickle, sys; from training.sample_decoder_data import main; "
        "main(pickle.load(sys.stdin.buffer))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(pickle.dumps(config))
    process.stdin.close()
    parts = tmp_path / "latents.safetensors.parts"
    while process.poll() is None and not list(parts.glob("*.safetensors")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert list(parts.glob("*.safetensors"))
    with pytest.raises(ValueError, match="made with other settings"):
        sample_decoder_data.main(replace(config, steps=3))
    resumed = load_file(sample_decoder_data.main(config))
    straight = load_file(
        sample_decoder_data.main(replace(config, out=tmp_path / "straight.safetensors"))
    )
    assert resumed["latents"].shape == (6, 1, 4, 4, 4)
    torch.testing.assert_close(resumed, straight, rtol=0, atol=0)
    assert not parts.exists()
    assert sample_decoder_data.main(config) == config.out  # complete: nothing to do


def distillation(files: dict[str, Path], photos: Path, out: Path, **changes: Any) -> distill.Config:
    """Of the toy Nano, from the latents that it sampled in two steps."""
    run = loop(out, steps=30, batch_size=2, lr=1e-3, precision="no")
    config = distill.Config(
        *(run, shots(photos), files["latents"], nano(files["decoder"])), train_unet=True
    )
    return replace(config, **changes)


def mean_loss(config: distill.Config, student: Path | None = None) -> float:
    """Of the start of a training, or of the student that it made."""
    models, loaded = open_models(config.model)
    _, batches = distill.build(models, loaded, config)
    if student is not None:
        models, _ = open_models(nano(student))
    loss = distill.make_loss(models, config)
    drawn = (batches.finish(batches[number], torch.device("cpu")) for number in range(4))
    values = [loss(batch, torch.Generator())["loss"] for batch in drawn]
    return float(torch.stack(values).mean().detach())


def test_a_student_with_as_many_steps_as_its_teacher_has_nothing_to_learn(
    files: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    config = distillation(files, photos, tmp_path, steps=2)
    assert mean_loss(config) < 1e-5  # latents are kept in fp16
    assert mean_loss(replace(config, steps=1)) > 1e-4


def test_a_student_comes_nearer_to_its_teacher(
    files: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    config = distillation(files, photos, tmp_path)
    student = distill.main(config)
    assert mean_loss(config, student) < 0.7 * mean_loss(config)
    with pytest.raises(ValueError, match="sampled with another stage 1 than --model has"):
        distill.main(
            replace(config, model=nano(student), loop=loop(tmp_path / "again", batch_size=2))
        )
    for prefix in ("base.vae.", "base.clip_vision.", "decoder."):
        assert changed(files["decoder"], student, prefix) == {False}
    assert changed(files["decoder"], student, "prompt_processor.degradation.") == {False}
    for prefix in ("base.unet.", "control."):
        assert True in changed(files["decoder"], student, prefix)
    assert read_checkpoint(student).self_contained


def test_a_student_of_sd15_leaves_its_unet_alone(
    sd15_files: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    folder = sd15_files["control"].parents[1]
    model = toy_sd15.model_config(folder, init=(sd15_files["decoder"],))
    config = distill.Config(
        loop(tmp_path), shots(photos, validation_samples=8), sd15_files["latents"], model
    )
    student = distill.main(config)
    assert True in changed(sd15_files["decoder"], student, "control.")
    assert not read_checkpoint(student, required=()).has("base.unet.")
    with pytest.raises(ValueError, match="--train-unet: a file for SD"):
        distill.main(replace(config, train_unet=True))
    with pytest.raises(ValueError, match="--steps: found 0; give 1 or 2"):
        distill.main(replace(config, steps=0))


def test_an_ablation_says_so_and_is_refused_for_release(
    files: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    settings = stage_1(tmp_path, photos, files["eyes"], files["base"], validation_steps=1)
    ablation = {"without_semantic": True, "degradation_in_control": "time"}
    ablated = train_control.main(replace(settings, **ablation))
    models, _ = open_models(nano(ablated))
    assert models.ablations == {"without_semantic", "control_time"}
    assert read_checkpoint(ablated).has("control.label_emb.0.2.")
    with pytest.raises(ValueError, match=r"trained as an ablation .control_time, without_semantic"):
        export.main(export.Config(shots(photos), tmp_path / "never.safetensors", nano(ablated)))


def test_sd15_s_unet_cannot_train(photos: Path, tmp_path: Path) -> None:
    settings = stage_1(tmp_path / "run", photos, model=toy_sd15.model_config(tmp_path))
    with pytest.raises(ValueError, match=r"--train-unet: a file for SD 1\.5 holds no UNet"):
        train_control.main(settings)


@pytest.mark.parametrize(("kind", "gain"), [("low_light", 5.0), ("haze", 3.0), ("noise", 2.0)])
def test_a_fresh_detail_path_restores_before_it_is_trained(kind: str, gain: float) -> None:
    """By what it knows: the noise in the photo, and the tone of what stage 1 samples."""
    shipped = Path(__file__).parents[2] / "models/diff_restorer_nano.safetensors"
    models, _ = open_models(ModelConfig(init=(shipped,), fresh_decoder=True))
    models.start_decoder()
    generator = torch.Generator().manual_seed(0)
    clean = photo("astronaut")[..., :256, 100:356].contiguous()
    lq = degrade(kind, clean, 0.6, generator).clamp(0, 1)
    view = clip_view(lq, models.sizes.vision_image)
    near = lq[..., :192, :192].contiguous()
    prompt = models.read({"clip_view": view, "native_view": near})
    path, pixels = models.decoder.extension, to_pixels(lq)
    trunk, hint = VaeTrunk.of(models.vae), models.encode(pixels)
    with torch.no_grad():
        latent = sample(models, hint, prompt.semantic, prompt.degradation, 5, generator)
        features = encoder_features(trunk, pixels, path.levels)
        condition = path.condition(prompt.pooled, photo_statistics(lq))
        restored = aware_decode(trunk, path, latent / models.latent_scale, features, condition)
    assert psnr_gain((restored + 1) / 2, lq, clean) > gain
