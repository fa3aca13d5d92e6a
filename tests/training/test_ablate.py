"""The ablation on a toy model: every variant differs where it should and nowhere else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import scipy.stats
import torch
from PIL import Image

from diff_restorer.checkpoint import BASE_PREFIXES, V_PREDICTION
from diff_restorer.degradations import KINDS
from tests import photos as test_photos
from training import ablate
from training.ablate import AblationData, Config, mean_difference, verdict
from training.common import checkpoint_info
from training.diffusion import sample
from training.evaluation.reading import open_file, read_prompt, views
from training.evaluation.testsets import make_lq
from training.evaluation.variants import VARIANTS, Photo
from training.models import Models, to_pixels
from training.networks import Sizes

TOY = Sizes(
    unet_channels=(32, 64), unet_attention=(False, True),
    context_width=16, vision_width=64, vision_layers=2, vision_image=32, vision_patch=8,
    prompt_hidden=24, detail_widths=(), fusion_levels=(0, 2), fusion_growth=4, fusion_depth=1,
    fusion_pixel_width=8,
)  # fmt: skip


def write_model(path: Path, seed: int) -> Path:
    """A self-contained file with random weights in which no part is switched off by zeros."""
    torch.manual_seed(seed)
    models = Models(TOY, KINDS, V_PREDICTION, "native")
    for parameter in models.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    torch.nn.init.normal_(models.prompt.prototypes)
    prefixes = (*BASE_PREFIXES, "prompt_processor.", "control.", *models.decoder_parts)
    models.save(path, prefixes, checkpoint_info(models, {}), torch.float32)
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "toy.safetensors", 0)


@pytest.fixture(scope="module")
def config(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run over all variants, two photos and two kinds."""
    folder = tmp_path_factory.mktemp("clean")
    photos = test_photos.write(folder, ("astronaut", "coffee"), (43, 36))
    config = Config(
        AblationData(photos, kinds=("noise", "clean")), tmp_path_factory.mktemp("out"), file,
        steps=3, precision="no",
    )  # fmt: skip
    assert ablate.main(config) == 0
    return config


@pytest.fixture(scope="module")
def report(config: Config) -> dict:
    return json.loads((config.out / "ablation.json").read_text())


@pytest.fixture(scope="module")
def photo(file: Path) -> Photo:
    gt = test_photos.photo("chelsea")[..., :36, :43]
    lq, _ = make_lq("noise", gt, "chelsea", 0)
    with torch.no_grad():
        return Photo(open_file(file), lq, gt, (0, "chelsea"))


def test_a_file_opens_ready_for_evaluation(file: Path):
    models = open_file(file)
    assert models.sizes == TOY
    assert models.prediction == V_PREDICTION
    assert models.degradation_view == "native"
    assert not any(parameter.requires_grad for parameter in models.parameters())


def test_the_photo_is_read_as_the_nodes_do(photo: Photo):
    image = torch.rand(2, 3, 50, 70)
    seen = views(photo.models, image)
    assert seen["clip_view"].shape == (2, 3, 32, 32)
    assert seen["native_view"].shape == (2 * 6, 3, 32, 32)
    windows = [image[0, :, y : y + 32, x : x + 32] for y in (0, 18) for x in (0, 19, 38)]
    assert torch.allclose(seen["native_view"][:6], torch.stack(windows), atol=0.5 / 255)
    prompt, tokens = read_prompt(photo.models, image)
    again = photo.models.prompt(tokens)
    assert torch.allclose(prompt.pooled[0], again.pooled[:6].mean(dim=0), atol=1e-6)
    whole = photo.models.tokens(seen)[0]
    assert torch.equal(prompt.semantic, photo.models.prompt.semantic(whole)), "of the whole photo"


@torch.no_grad()
def test_the_full_variant_is_the_plain_pipeline(photo: Photo):
    models = photo.models
    latent = photo._latent(VARIANTS["full"], 3)
    other = Photo(models, torch.rand(1, 3, 36, 43), photo.gt, (0, "chelsea"))
    assert not torch.equal(latent, other._latent(VARIANTS["full"], 3))
    assert latent.shape == (1, 4, 5, 6), "43 x 36 px are padded to 48 x 40"
    assert torch.allclose(photo.hint, models.encode(photo.pixels), atol=1e-5)
    restored = photo.restore(VARIANTS["full"], 3)
    assert restored.shape == (1, 3, 36, 43)
    assert torch.equal(restored, (restored * 255).round() / 255)


@torch.no_grad()
def test_variants_share_their_noise(photo: Photo):
    models, prompt = photo.models, photo.prompt
    zeros = torch.zeros_like(prompt.semantic)
    found = photo._latent(VARIANTS["no_ps"], 3)
    again = Photo(models, torch.zeros(1, 3, 36, 43), photo.gt, (0, "chelsea"))
    again.hint, again.prompt = photo.hint, prompt._replace(semantic=zeros)
    assert torch.equal(found, again._latent(VARIANTS["full"], 3))
    generator = torch.Generator().manual_seed(1)
    assert not torch.equal(
        found, sample(models, photo.hint, zeros, prompt.degradation, 3, generator)
    )


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in ("full", "no_ce")])
def test_each_variant_changes_the_result(name: str, photo: Photo):
    full, other = photo.restore(VARIANTS["full"], 3), photo.restore(VARIANTS[name], 3)
    assert not torch.equal(full, other)


@torch.no_grad()
def test_variants_without_the_sampler_do_not_depend_on_it(photo: Photo):
    for name in ("no_diffusion", "gt_latent"):
        assert torch.equal(photo.restore(VARIANTS[name], 2), photo.restore(VARIANTS[name], 3))
    stock = photo.models.decode(photo._latent(VARIANTS["full"], 3))
    found = photo.restore(VARIANTS["stock_decoder"], 3)
    expected = ((stock[..., :36, :43] + 1) / 2).clamp(0, 1)
    assert torch.allclose(found, expected, atol=0.6 / 255)
    clean = photo.models.encode(
        to_pixels(torch.nn.functional.pad(photo.gt, (0, 5, 0, 4), "replicate"))
    )
    assert torch.allclose(photo._latent(VARIANTS["gt_latent"], 3), clean, atol=1e-5)


def test_the_table_has_every_variant_but_the_untrained(config: Config, report: dict):
    assert set(report["variants"]) == set(VARIANTS) - {"no_ce"}
    assert set(report["photos"]) == {
        f"{k}/{n}" for k in ("noise", "clean") for n in ("astronaut", "coffee")
    }
    text = (config.out / "table.md").read_text()
    assert "Not trained, so not measured: trained without CE" in text
    assert "Does each part help?" in text
    assert all(VARIANTS[name].title in text for name in VARIANTS)
    with Image.open(config.out / "ablation.png") as picture:
        assert picture.width > 400


def test_differences_are_paired(report: dict):
    scores, rows = report["photos"], report["variants"]
    gaps = [
        scores[f"noise/{name}"]["no_ps"]["psnr"] - scores[f"noise/{name}"]["full"]["psnr"]
        for name in ("astronaut", "coffee")
    ]
    found = rows["no_ps"]["kinds"]["noise"]
    assert found["difference"] == pytest.approx(sum(gaps) / 2)
    assert found["standard_error"] == pytest.approx(abs(gaps[0] - gaps[1]) / 2)
    # `clean` has a column of its own and no part in the mean.
    assert rows["no_ps"]["difference"] == pytest.approx(found["difference"])
    assert rows["full"]["difference"] == 0


def test_a_second_run_takes_the_stored_scores(config: Config, report: dict):
    path = config.out / "scores/noise/coffee.json"
    stored = json.loads(path.read_text())
    stored["no_ps"]["psnr"] = 12.5
    stored["stock_decoder"]["key"] = "of another file"
    path.write_text(json.dumps(stored))
    ablate.ablate(config)
    again = json.loads((config.out / "ablation.json").read_text())["photos"]["noise/coffee"]
    before = report["photos"]["noise/coffee"]
    assert again["no_ps"]["psnr"] == 12.5
    assert again["stock_decoder"]["psnr"] == before["stock_decoder"]["psnr"]
    assert again["stock_decoder"]["seconds"] != before["stock_decoder"]["seconds"]


def test_a_retrained_file_keeps_its_own_prompts(config: Config, tmp_path: Path):
    other = write_model(tmp_path / "other.safetensors", 1)
    run = replace(
        config,
        out=tmp_path,
        variants=("no_ce", "no_ps"),
        retrained={"no_ce": other, "no_ps": other},
    )
    rows, _ = ablate.ablate(run)
    assert rows["no_ce"]["psnr"] == rows["no_ps"]["psnr"] != rows["full"]["psnr"]
    assert rows["no_ce"]["file"] == "other.safetensors"
    assert "trained without CE (retrained)" in (tmp_path / "table.md").read_text()


def test_standard_errors():
    values = [1.0, 1.0, 4.0]
    found = mean_difference([values])
    assert (found["difference"], found["standard_error"]) == (2.0, pytest.approx(1.0))
    low, high = scipy.stats.ttest_1samp(values, 0).confidence_interval()
    assert 2 * found["interval"] == pytest.approx(high - low)
    assert mean_difference([[0.5]]) == {"difference": 0.5, "standard_error": None, "interval": None}
    # Of two means, as Welch's test of one against the negative of the other has it.
    both, other = mean_difference([values, [0.5, 0.0, 0.7]]), [-0.5, 0.0, -0.7]
    low, high = scipy.stats.ttest_ind(values, other, equal_var=False).confidence_interval()
    assert both["difference"] == pytest.approx((low + high) / 4)
    assert both["interval"] == pytest.approx((high - low) / 4)
    assert mean_difference([[1.0, 1.0]])["interval"] == 0
    row = {"title": "no P_S", "difference": -0.3, "standard_error": 0.1, "interval": 0.25}
    assert verdict(row).endswith("ahead: yes")
    assert "no difference" in verdict({**row, "interval": 0.4})
    assert "better without" in verdict({**row, "difference": 0.3})


def test_bad_names_and_files_are_named(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for change, message in (
        ({"variants": ("no_pds",)}, "no_pds"),
        ({"retrained": {"nothing": config.file}}, "nothing"),
        ({"file": tmp_path / "nowhere.safetensors"}, "no such file"),
        ({"data": replace(config.data, kinds=("fog",))}, "fog"),
    ):
        assert ablate.main(replace(config, **change)) == 1
        assert message in capsys.readouterr().err
