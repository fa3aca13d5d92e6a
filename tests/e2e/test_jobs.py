"""Which photos a run restores and where the results go."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.graph import make_photo
from tools import photo, photo_writer
from tools.client import ClientError
from tools.jobs import Job, digest_workflow, find_photos, plan, settle

WORKFLOW = digest_workflow({}, 0)


def put(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    make_photo(16, 16, seed=seed).save(path)
    return path


def finish(job: Job, workflow: str = WORKFLOW) -> None:
    """Writes the output of a job as a batch does."""
    source = photo.read(job.source)
    job.kind, job.probabilities, job.seconds, job.bits = "noise", {"noise": 1.0}, 1.5, 8
    photo_writer.write(job.output, source, job.record(source.digest, workflow))


def outputs(jobs: list[Job], out: Path) -> dict[str, str]:
    return {job.source.name: job.output.relative_to(out).as_posix() for job in jobs}


def test_files_and_folders(tmp_path: Path):
    trip, out = tmp_path / "trip", tmp_path / "out"
    for name in ("sea.jpg", "day 1/Straße.tiff", ".hidden/a.png", "._sea.jpg"):
        put(trip / name)
    (trip / "notes.txt").write_text("none")
    single = put(tmp_path / "more/a.webp")
    assert outputs(plan([trip, single], out), out) == {
        "sea.jpg": "sea_restored.png",
        "a.webp": "a_restored.png",
    }
    assert outputs(plan([trip], out, recursive=True), out) == {
        "sea.jpg": "sea_restored.png",
        "Straße.tiff": "day 1/Straße_restored.tif",
    }


def test_each_photo_once(tmp_path: Path):
    single = put(tmp_path / "trip/sea.jpg")
    (tmp_path / "link.jpg").symlink_to(single)
    named = [single, tmp_path / "trip/../trip/sea.jpg", tmp_path / "trip", tmp_path / "link.jpg"]
    assert [job.source for job in plan(named, tmp_path / "out")] == [single]


def test_results_stay_in_the_out_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("sea.jpg", "below/a..b.jpg", "below/a\\..\\b.jpg"):
        put(tmp_path / name)
    monkeypatch.chdir(tmp_path / "below")
    named = [Path("../sea.jpg"), Path("a..b.jpg"), Path("a\\..\\b.jpg")]
    assert [str(job.output) for job in plan(named, Path("out"))] == [
        "out/sea_restored.png",
        "out/a..b_restored.png",
        "out/a\\..\\b_restored.png",
    ]


def test_twins_get_their_endings(tmp_path: Path):
    for name in ("a.jpg", "a.png", "b.tif", "b.tiff", "c.jpg"):
        put(tmp_path / "in" / name)
    out = tmp_path / "out"
    assert outputs(plan([tmp_path / "in"], out), out) == {
        "a.jpg": "a.jpg_restored.png",
        "a.png": "a.png_restored.png",
        "b.tif": "b.tif_restored.tif",
        "b.tiff": "b.tiff_restored.tif",
        "c.jpg": "c_restored.png",
    }


def test_what_still_collides_fails_alone(tmp_path: Path):
    named = [put(tmp_path / "x/a.jpg"), put(tmp_path / "y/a.jpg", 1), put(tmp_path / "b.jpg")]
    first, second, other = plan(named, tmp_path / "out")
    assert (first.status, second.status, other.status) == ("failed", "failed", "pending")
    for job in (first, second):
        assert all(str(path) in str(job.error) for path in named[:2])
        assert "--out" in str(job.error)


def test_no_photo_is_an_output(tmp_path: Path):
    named = [put(tmp_path / "a.jpg"), put(tmp_path / "a_restored.png", 1)]
    first, second = plan(named, tmp_path)
    assert "would replace the photo" in str(first.error)
    assert second.status == "pending"


def test_results_are_no_photos(tmp_path: Path):
    photos = [put(tmp_path / "in/a.jpg"), put(tmp_path / "in/b.tif", 1)]
    out = tmp_path / "in/out"
    for place in (out, tmp_path / "in", tmp_path / "in/other"):
        for job in plan(photos, place):
            finish(job)
    put(out / "c.png", 2)
    found = find_photos(tmp_path / "in", out, recursive=True)
    assert sorted(found) == photos
    # Photos of others in that folder are photos, once it is not the folder of the results.
    found = find_photos(tmp_path / "in", tmp_path / "elsewhere", recursive=True)
    assert sorted(found) == sorted([*photos, out / "c.png"])


def test_missing_photos_fail_alone(tmp_path: Path):
    missing, present = plan([tmp_path / "nowhere.jpg", put(tmp_path / "a.jpg")], tmp_path / "out")
    assert (missing.status, present.status) == ("failed", "pending")
    assert str(tmp_path / "nowhere.jpg") in str(missing.error)


def test_folders_without_photos_are_named(tmp_path: Path):
    put(tmp_path / "in/deep/a.png")
    with pytest.raises(ClientError, match=r"in \(--recursive.*Accepted are .*\.jpg"):
        plan([tmp_path / "in"], tmp_path / "out")


def test_what_is_done_is_skipped(tmp_path: Path):
    put(tmp_path / "a.jpg")
    (done,) = plan([tmp_path / "a.jpg"], tmp_path / "out")
    finish(done)
    (job,) = plan([tmp_path / "a.jpg"], tmp_path / "out")
    settle(job, WORKFLOW, overwrite=False)
    assert (job.status, job.kind, job.probabilities) == ("skipped", "noise", {"noise": 1.0})
    assert (job.seconds, job.bits) == (1.5, 8)
    (job,) = plan([tmp_path / "a.jpg"], tmp_path / "out")
    settle(job, WORKFLOW, overwrite=True)
    assert job.status == "pending"


@pytest.mark.parametrize("change", ["photo", "workflow", "output"])
def test_nothing_else_is_replaced(tmp_path: Path, change: str):
    put(tmp_path / "a.png")
    (done,) = plan([tmp_path / "a.png"], tmp_path / "out")
    finish(done)
    workflow, words = WORKFLOW, "another photo"
    if change == "photo":
        put(tmp_path / "a.png", seed=1)
    elif change == "workflow":
        workflow, words = digest_workflow({}, 512), "another workflow"
    else:
        words = "no result of this program"
        put(done.output)
    before = done.output.read_bytes()
    (job,) = plan([tmp_path / "a.png"], tmp_path / "out")
    settle(job, workflow, overwrite=False)
    assert job.status == "failed"
    assert words in str(job.error)
    assert "--overwrite" in str(job.error)
    assert done.output.read_bytes() == before
    settle(job := plan([tmp_path / "a.png"], tmp_path / "out")[0], workflow, overwrite=True)
    assert job.status == "pending"
