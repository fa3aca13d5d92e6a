"""Calibration: what is measured, what is fitted, and that only the file's metadata changes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diff_restorer.checkpoint import read_checkpoint, write_checkpoint
from diff_restorer.degradations import KINDS
from tests.photos import write
from tests.training.test_ablate import write_model
from training import calibrate
from training.calibrate import Config, restore_twice, with_trust
from training.calibration import LOOKS, Gains, Row, degraded, fit, near_clean, start_for
from training.data import seeded
from training.evaluation.reading import open_file
from training.evaluation.testsets import read_upright
from training.evaluation.variants import VARIANTS, Photo

TYPES = ("noise", "haze", "clean")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write(tmp_path_factory.mktemp("clean"), ("coffee",), (150, 131))
    return write(folder, ("chelsea",), (150, 90))  # which is too small


@pytest.fixture
def config(photos: Path, tmp_path: Path) -> Config:
    file = write_model(tmp_path / "toy.safetensors", 0)
    return Config(photos, file, rows=tmp_path / "rows.jsonl", crop=128, steps=1, precision="no")


@pytest.fixture
def photo(photos: Path) -> torch.Tensor:
    return read_upright(photos / "coffee.png")[..., :128, :128].contiguous()


def test_near_clean_looks_are_near_and_keep_their_tone(photo: torch.Tensor) -> None:
    found = list(near_clean(photo, seeded(0)))
    assert [sample.name for sample in found] == list(LOOKS)
    for sample in found:
        assert sample.kinds == ()
        assert sample.lq.shape == sample.gt.shape == photo.shape
        toned = sample.name in ("grey", "flat", "dark")
        assert torch.equal(sample.gt, photo) != toned
        damaged = sample.name in ("soft", "sigma 5", "q 80")
        assert torch.equal(sample.gt, sample.lq) != damaged
        assert (sample.lq - sample.gt).abs().mean() < 0.03
        assert torch.equal((255 * sample.lq).round() / 255, sample.lq)


def test_degraded_photos_have_every_kind_and_different_mixes(photo: torch.Tensor) -> None:
    first, second = (list(degraded(photo, KINDS[:8], place, 0)) for place in (0, 1))
    for some in (first, second):
        assert [sample.kinds for sample in some[:8]] == [(kind,) for kind in KINDS[:8]]
        assert all(len(set(sample.kinds)) == 2 for sample in some[8:])
        assert len(some) == 12
        assert all(not torch.equal(sample.lq, photo) for sample in some)
    assert {sample.kinds for sample in first[8:]} != {sample.kinds for sample in second[8:]}
    again = next(degraded(photo, KINDS[:8], 0, 0))
    assert torch.equal(again.lq, first[0].lq)


def test_one_photo_restored_twice(config: Config, photo: torch.Tensor) -> None:
    models = open_file(config.file)
    sample = next(iter(degraded(photo, KINDS[:8], 0, 0)))
    row = restore_twice(models, sample, "coffee.png", config)
    assert row.read != row.clean, "else P_D does nothing in this model"
    assert sum(row.probabilities) == pytest.approx(1, abs=1e-4)
    as_read = Photo(models, sample.lq, sample.gt, (0, "coffee.png"))
    clean = with_trust(as_read, 0.0)
    prototype = models.prompt.prototypes[models.types.index("clean")]
    torch.testing.assert_close(clean.prompt.pooled[0], prototype)
    full, same = (with_trust(as_read, 1.0).restore(VARIANTS["full"], 1),
                  as_read.restore(VARIANTS["full"], 1))  # fmt: skip
    assert torch.equal(full, same)
    assert not torch.equal(clean.restore(VARIANTS["full"], 1), same)


def rows(haze_of_clean: float, count: int = 20) -> list[Row]:
    """Hazy photos that gain 6 dB by their haze of 0.99, and clean ones that lose 10 by theirs."""
    hazy = Row("a", "haze", ("haze",), (0.0, 0.99, 0.01), 20.0, 26.0, 20.0)
    noisy = Row("a", "noise", ("noise",), (0.6, 0.0, 0.4), 20.0, 25.0, 20.0)
    clean = (0.0, haze_of_clean, 1 - haze_of_clean)
    return count * [hazy, noisy, Row("a", "clean", (), clean, 100.0, 30.0, 50.0)]


@pytest.mark.parametrize("haze_of_clean", [0.1, 0.5, 0.8, 0.9])
def test_the_fit_tells_them_apart(haze_of_clean: float) -> None:
    gains = Gains.of(rows(haze_of_clean))
    found = fit(gains, start_for(TYPES, exclusive=True), loss=4)
    assert found.trust(gains.probabilities).tolist()[:3] == pytest.approx([1, 1, 0])
    assert gains.utility(found.trust(gains.probabilities), 4) == pytest.approx(5.5)
    assert found.thresholds["haze"][0] >= haze_of_clean > found.thresholds["noise"][1] - 1


def test_what_cannot_be_told_apart_is_left_alone_where_losses_count() -> None:
    """10 dB lost against 6 gained: not worth it, but if losses counted as nothing much."""
    gains = Gains.of(rows(0.99))
    assert gains.read.tolist()[:3] == pytest.approx([6, 5, -10])
    assert gains.clean.tolist()[:3] == [0, 0, 0], "40 dB are as good as the photo"
    careful, bold = (fit(gains, start_for(TYPES, True), loss) for loss in (4, 0.1))
    assert careful.trust(gains.probabilities).tolist()[:3] == pytest.approx([0, 1, 0])
    assert bold.trust(gains.probabilities).tolist()[:3] == pytest.approx([1, 1, 1])


def test_the_file_says_it_and_is_else_the_same(config: Config, caplog) -> None:
    before = read_checkpoint(config.file)
    tensors = {key: value.clone() for key, value in before.state("").items()}
    out = calibrate.main(replace(config, out=config.file.with_name("out.safetensors")))
    after = read_checkpoint(out)
    assert after.info.abstention is not None
    assert set(after.info.abstention.thresholds) == set(KINDS) - {"clean"}
    assert replace(after.info, abstention=None) == before.info
    assert after.keys == tensors.keys()
    assert all(torch.equal(value, tensors[key]) for key, value in after.state("").items())
    made = [json.loads(line) for line in config.rows.read_text().splitlines()]
    assert len(made) == len(LOOKS) + 12
    assert {row["photo"] for row in made} == {"coffee.png"}
    # Again, with a line that was cut off: the others are not made anew, and the fit is the same.
    lines = config.rows.read_text().splitlines(keepends=True)
    config.rows.write_text("".join(lines[:-1]) + lines[-1][:40] + "\n")
    assert calibrate.main(config) == config.file
    assert read_checkpoint(config.file).info == after.info
    assert len(config.rows.read_text().splitlines()) == len(lines) + 1


def test_what_cannot_be_calibrated(config: Config, tmp_path: Path) -> None:
    source = read_checkpoint(config.file)
    path = tmp_path / "other.safetensors"
    write_checkpoint(path, source.state(""), replace(source.info, types=(*KINDS[:8], "low_res")))
    with pytest.raises(ValueError, match=r"other\.safetensors knows .*, but not 'clean'"):
        calibrate.main(replace(config, file=path))
    blank = source.state("") | {"prompt_processor.prototypes": torch.zeros(9, 16)}
    write_checkpoint(path, blank, source.info)
    with pytest.raises(ValueError, match="holds no class prototypes"):
        calibrate.main(replace(config, file=path))
    with pytest.raises(ValueError, match=r"--loss 0\.5 --steps 1 --limit 48 --crop 128: expected"):
        calibrate.main(replace(config, loss=0.5))
    small = write(tmp_path / "small", ("coffee",), (150, 90))
    with pytest.raises(ValueError, match=r"--photos: .* has no photo of 128 px or more"):
        calibrate.main(replace(config, photos=small))
    assert read_checkpoint(config.file).info.abstention is None
