"""The whole pipeline of Nano at toy width: in files and in memory, in steps and in a time box."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diff_restorer.checkpoint import read_checkpoint
from tests.photos import write
from training import pack
from training.errors import NonFiniteError
from training.nano.__main__ import Recipe, main
from training.nano.timetable import SHARES, Timetable
from training.progress import read_table

TOY = """
base = "nano"
[common.model.sizes]
unet_channels = [32, 64]
unet_attention = [false, true]
context_width = 16
vision_width = 32
vision_layers = 2
vision_image = 32
vision_patch = 8
vision_head_width = 16
prompt_hidden = 24
detail_widths = [8, 12, 16]
detail_depths = [1, 1, 1, 1, 1]
[common.data]
part = 48
crop = 32
held_out = 3
validation_samples = 10
[common.loop]
threads = 1
batch_size = 2
validate_every = 1000000
checkpoint_every = 1000000
[nano.autoencoder.data]
part = 48
crop = 32
[nano.vision.data]
part = 48
crop = 32
validation_samples = 10
[train_control]
draws = 1
validation_steps = 1
[train_decoder]
validation_steps = 1
[sample_decoder_data]
steps = 1
samples = 16
[sample_decoder_data.data]
crop = 32
[train_decoder.data]
crop = 32
[export]
samples = 256
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = ("astronaut", "chelsea", "coffee", "rocket")
    return write(tmp_path_factory.mktemp("photos"), names, (96, 80))


@pytest.fixture(scope="module")
def packed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pack") / "photos.pack"
    return pack.main(pack.Config((photos,), out=out, least_side=64))


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Everything from scratch at toy width."""
    preset = tmp_path_factory.mktemp("preset") / "toy.toml"
    preset.write_text(TOY)
    return Recipe(vae=None, preset=str(preset), workers=0, start_steps=4)


@pytest.fixture(scope="module")
def released(toy: Recipe, packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Nano of a few steps, in memory."""
    out = tmp_path_factory.mktemp("released")
    return main(replace(toy, pack=packed, steps="tiny", out=out))


def test_files_and_memory_hand_on_the_same(
    toy: Recipe, packed: Path, released: Path, tmp_path: Path
) -> None:
    """From one VAE on, bit for bit; a second run of the same command trains nothing again."""
    recipe = replace(toy, vae=released, steps="tiny")
    memory = load_file(main(replace(recipe, pack=packed, out=tmp_path / "memory")))
    in_files = replace(recipe, photos=packed, out=tmp_path / "files")
    files = load_file(main(in_files))
    assert files.keys() == memory.keys()
    assert not [key for key in files if not torch.equal(files[key], memory[key])]
    made = {path.name for path in (tmp_path / "memory").rglob("*") if path.is_file()}
    assert not [name for name in made if "export" in name or "state" in name]
    rows = (tmp_path / "files" / "decoder" / "metrics.csv").read_text()
    assert main(in_files).exists()
    assert (tmp_path / "files" / "decoder" / "metrics.csv").read_text() == rows


def test_only_the_vae_is_taken_from_its_file(
    toy: Recipe, packed: Path, released: Path, tmp_path: Path
) -> None:
    recipe = replace(toy, vae=released, steps="tiny", pack=packed, out=tmp_path)
    before, after = load_file(released), load_file(main(recipe))
    for key in before:
        same = torch.equal(before[key], after[key])
        assert same or not key.startswith("base.vae."), key
    assert not torch.equal(
        before["base.unet.input_blocks.0.0.weight"], after["base.unet.input_blocks.0.0.weight"]
    )


def test_a_finished_nano_is_fitted_to_other_photos(
    toy: Recipe, packed: Path, released: Path, tmp_path: Path
) -> None:
    """Stage 1 and the decoder train on; what P_D is read with stays."""
    recipe = replace(toy, init=released, steps="tiny", pack=packed, out=tmp_path)
    before, after = load_file(released), load_file(main(recipe))
    changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert "control" in changed
    assert "decoder" in changed
    for key in before:
        if key.startswith(("base.vae.", "base.clip_vision.", "prompt_processor.degradation.")):
            assert torch.equal(before[key], after[key]), key
    assert not (tmp_path / "vision").exists()


def test_a_time_box_holds_every_stage_and_the_file(
    toy: Recipe, packed: Path, released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Time at work: of what else the machine does, the box would not know.
    monkeypatch.setattr(time, "perf_counter", time.process_time)
    began = time.perf_counter()
    recipe = replace(toy, pack=packed, init=released, minutes=0.75, out=tmp_path)
    fitted = main(recipe)
    assert time.perf_counter() - began < 45 + 3
    assert load_file(fitted).keys() == load_file(released).keys()
    told = read_checkpoint(fitted).info.config
    assert {"train_control", "train_decoder", "nano"} == {name.split(".")[0] for name in told}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary["stages"]) == ["control", "latents", "decoder", "export"]
    assert sum(summary["shares"].values()) == pytest.approx(1, abs=1e-3)
    for name in ("control", "decoder"):
        assert summary["stages"][name]["crops_per_s"] > 0
        rows = read_table(tmp_path / name / "metrics.csv")
        assert float(rows[-1]["eta_s"]) == 0
        assert (tmp_path / name / "curves.png").exists()


def test_a_stage_that_fails_is_named_and_what_was_before_is_kept(
    toy: Recipe, packed: Path, released: Path, tmp_path: Path
) -> None:
    preset = tmp_path / "wild.toml"
    preset.write_text(f'base = "{toy.preset}"\n[train_control.loop]\nlr = 1e30\nclip = 0.0\n')
    recipe = replace(toy, pack=packed, steps="tiny", vae=released, preset=str(preset))
    with pytest.raises(NonFiniteError, match=r"^control: step \d: .* not finite"):
        main(replace(recipe, out=tmp_path / "wild"))
    kept = tmp_path / "wild" / "unfinished.safetensors"
    found = {key.split(".")[0] for key in load_file(kept)}
    assert found == {"base", "prompt_processor"}
    again = replace(recipe, init=kept, preset=toy.preset, out=tmp_path / "again")
    assert main(again).exists()


def test_what_cannot_be_is_said_before_anything_is_done(
    toy: Recipe, packed: Path, tmp_path: Path
) -> None:
    recipe = replace(toy, out=tmp_path / "out")
    cases = {
        "--photos, --pack: give one of them": recipe,
        r"--pack: .*none\.pack does not exist; make it .* training\.pack": replace(
            recipe, pack=tmp_path / "none.pack"
        ),
        "--init: .* does not exist": replace(recipe, pack=packed, init=tmp_path / "none"),
        "--minutes, --steps tiny": replace(recipe, pack=packed, minutes=1, steps="tiny"),
    }
    if not torch.cuda.is_available():
        cases["--device cuda: .* finds no GPU"] = replace(recipe, pack=packed, device="cuda")
    for message, wrong in cases.items():
        with pytest.raises(ValueError, match=message):
            main(wrong)
    assert not (tmp_path / "out").exists()


def test_a_box_too_short_names_the_stage_and_its_share(
    toy: Recipe, packed: Path, tmp_path: Path
) -> None:
    recipe = replace(toy, pack=packed, minutes=0.02, out=tmp_path)
    with pytest.raises(ValueError, match=r"^autoencoder, 0\.0023 of --minutes 0\.02: .* too short"):
        main(recipe)


def test_a_stage_that_ends_early_or_late_leaves_the_others_their_time() -> None:
    assert sum(SHARES.values()) == pytest.approx(1)
    table = Timetable(1.0, ["control", "decoder"], time.perf_counter())
    first = table.slot("control")
    time.sleep(0.1)
    second = table.slot("decoder")
    share = SHARES["control"] / (SHARES["control"] + SHARES["decoder"])
    assert first.ends - first.began == pytest.approx(60 * share)
    assert second.began < first.began + 0.2  # `control` left its time, which is not given away
    assert second.ends - second.began == pytest.approx(60 * (1 - share))
