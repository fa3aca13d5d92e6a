"""Which photos a run restores and where the results go."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.graph import make_photo
from tests.e2e.holding import read_report
from tools import photo, photo_writer, restore
from tools.environment import ROOT
from tools.errors import ClientError
from tools.host import free_port
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


def test_names_that_are_one_to_some_disks_are_told_apart(tmp_path: Path):
    """As on macOS and exFAT, whatever this disk does."""
    names = ("x/IMG.jpg", "y/img.jpg", "x/\u00e9.png", "y/e\u0301.png", "a.png")
    named = [put(tmp_path / name, seed) for seed, name in enumerate(names)]
    jobs = plan(named, tmp_path / "out")
    assert {job.status for job in jobs} == {"pending"}
    assert len({job.output.name.casefold() for job in jobs}) == len(names)
    assert jobs[0].output.name.startswith("IMG.jpg~")
    assert jobs[-1].output.name == "a_restored.png"
    # The same in another place, or a second run would restore them again.
    again = plan(named[:2], Path("elsewhere"))
    assert [job.output.name for job in again] == [job.output.name for job in jobs[:2]]


def test_folders_that_are_one_to_some_disks_are_told_apart(tmp_path: Path):
    for seed, name in enumerate(("in/A/b.png", "in/a/b.png")):
        put(tmp_path / name, seed)
    jobs = plan([tmp_path / "in"], tmp_path / "out", recursive=True)
    assert {job.status for job in jobs} == {"pending"}
    assert len({str(job.output).casefold() for job in jobs}) == len(jobs)


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
    assert sorted(found.photos) == photos
    # Photos of others in that folder are photos, once it is not the folder of the results.
    found = find_photos(tmp_path / "in", tmp_path / "elsewhere", recursive=True)
    assert sorted(found.photos) == sorted([*photos, out / "c.png"])


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


def test_notes_of_other_programs_are_no_records(tmp_path: Path):
    # training.evaluate writes such, under the same key.
    note = {"key": "0" * 16, "probabilities": {"noise": 1.0}, "seconds": 1.0}
    source = photo.read(put(tmp_path / "in/a.png"))
    photo_writer.write(tmp_path / "in/b.png", source, note)
    photo_writer.write(tmp_path / "in/c.png", source, {"version": 1, "photo": 3})
    found = find_photos(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in found.photos] == ["a.png", "b.png", "c.png"]
    first = plan([tmp_path / "in"], tmp_path / "out")[0]
    photo_writer.write(first.output, source, note)
    settle(first, WORKFLOW, overwrite=False)
    assert "is no result of this program" in str(first.error)


def test_a_damaged_result_is_restored_again(tmp_path: Path):
    put(tmp_path / "a.jpg")
    (done,) = plan([tmp_path / "a.jpg"], tmp_path / "out")
    finish(done)
    data = bytearray(done.output.read_bytes())
    data[-20:-16] = bytes(4)
    done.output.write_bytes(data)
    (job,) = plan([tmp_path / "a.jpg"], tmp_path / "out")
    settle(job, WORKFLOW, overwrite=False)
    assert job.status == "pending"


def test_names_as_long_as_they_may_be(tmp_path: Path):
    names = ["a" * 246 + ".png", "a" * 245 + "b.png", "京" * 82 + ".png", "b" * 239 + ".png"]
    jobs = plan([put(tmp_path / "in" / name) for name in names], tmp_path)
    assert len({job.output for job in jobs}) == len(names)
    for job in jobs:
        assert len(os.fsencode(job.output.name)) <= 255
        finish(job)
        settle(job, WORKFLOW, overwrite=False)
        assert job.status == "skipped"


def test_a_name_that_no_file_can_have_fails_alone(tmp_path: Path):
    (tmp_path / "loop.png").symlink_to("loop.png")
    named = [tmp_path / ("a" * 300 + ".png"), tmp_path / "loop.png", put(tmp_path / "b.png")]
    assert [job.status for job in plan(named, tmp_path / "out")] == ["failed", "failed", "pending"]
    assert [path.name for path in find_photos(tmp_path, tmp_path / "out").photos] == ["b.png"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_pipes_are_no_photos(tmp_path: Path):
    os.mkfifo(tmp_path / "x.png")
    photo_path = put(tmp_path / "a.png")
    assert find_photos(tmp_path, tmp_path / "out").photos == [photo_path]
    assert "is no file" in str(plan([tmp_path / "x.png"], tmp_path / "out")[0].error)


def test_a_folder_that_cannot_be_read_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    paths = [put(tmp_path / "in/a.png"), put(tmp_path / "in/open/b.png")]
    closed = tmp_path / "in/closed"
    put(closed / "c.png")
    scan = os.scandir

    def refuse(path: str) -> object:
        if Path(path) == closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may read everything
    *jobs, failed = plan([tmp_path / "in"], tmp_path / "out", recursive=True)
    assert [(job.source, job.status) for job in jobs] == [(path, "pending") for path in paths]
    assert (failed.source, failed.status) == (closed, "failed")
    assert failed.error == f"the folder {closed} cannot be read: Permission denied"
    assert [job.status for job in plan([closed], tmp_path / "out")] == ["failed"]


def main_without_server(*arguments: Path | str) -> int:
    gone = f"http://127.0.0.1:{free_port()}"
    return restore.main([*map(str, arguments), "--server", gone])


def test_pictures_that_are_left_out_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    put(tmp_path / "in/a.gif")
    for name in ("b.heic", "c.HEIC", "d.txt", "e.nef"):
        (tmp_path / "in" / name).touch()
    assert [job.source.name for job in plan([tmp_path / "in"], tmp_path / "out")] == ["a.gif"]
    main_without_server(tmp_path / "in", "--out", tmp_path / "out")
    printed = capsys.readouterr().err
    assert "2 .heic" in printed
    assert "1 .nef" in printed
    assert ".txt" not in printed


def test_only_what_is_looked_into_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    put(tmp_path / "in/a.png")
    for name in (".trash/a.heic", "out/b.heic", "deep/c.heic", ".d.heic"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).touch()
    main_without_server(tmp_path / "in", "--recursive", "--out", tmp_path / "in/out")
    assert f"{tmp_path / 'in'}: 1 .heic left out" in capsys.readouterr().err


def test_an_out_that_cannot_be_written_is_named_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").touch()
    out = tmp_path / "file/out"
    assert main_without_server(put(tmp_path / "a.png"), "--out", out) == 1
    assert f"--out {out} cannot be written: Not a directory" in capsys.readouterr().err


def test_a_subfolder_that_cannot_be_written_is_named_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    put(tmp_path / "in/day 1/deep/a.png")
    out = tmp_path / "out"
    out.mkdir()
    (out / "day 1").touch()
    assert main_without_server(tmp_path / "in", "--recursive", "--out", out) == 1
    printed = capsys.readouterr().err
    assert "a_restored.png cannot be written: Not a directory" in printed
    assert "answers at" not in printed, "no server is needed to say so"


def test_two_runs_do_not_share_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    out.mkdir()
    old, young = (out / f"{photo_writer.PART_PREFIX}{name}" for name in ("old", "young"))
    young.touch()
    old.touch()
    os.utime(old, (0, 0))
    with restore.reserve(out):
        assert (old.exists(), young.exists()) == (False, True)
        assert main_without_server(put(tmp_path / "a.png"), "--out", out) == 1
    assert f"another run writes to --out {out}" in capsys.readouterr().err
    main_without_server(tmp_path / "a.png", "--out", out)
    assert "no ComfyUI answers" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_hides_no_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").touch()
    report = tmp_path / "file/report.json"
    arguments = (tmp_path / "none.png", "--out", tmp_path / "out", "--report", report)
    assert main_without_server(*arguments) == 1
    assert "1 failed. No report" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_every_name_can_be_printed(tmp_path: Path, encoding: str):
    name = "京 \x1b[31m.png"
    (tmp_path / name).write_bytes(b"no picture")
    (tmp_path / "out").mkdir()
    source = put(tmp_path / "in" / name)
    (done,) = plan([source], tmp_path / "out")
    workflow = restore.load_workflow(restore.NANO_WORKFLOW)
    finish(done, digest_workflow(workflow, 0))
    missing = tmp_path / f"none {name}"
    program = subprocess.run(
        [sys.executable, "-m", "tools.restore", source, missing, "--out", tmp_path / "out"],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": f"{encoding}:strict"},
        capture_output=True,
        check=False,
    )
    assert program.returncode == 1, program.stderr
    assert b"Traceback" not in program.stderr
    assert b"\\u4eac \\x1b[31m.png" in program.stderr
    assert read_report(tmp_path / "out")["counts"]["skipped"] == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"1": {"class_type": "LoadImage"}}', ""),
        ('{"1": []}', ""),
        ("[" * 100_000, ""),
        ('{"1": {"inputs": {}}}', ""),
        ((ROOT / "workflows/restore_nano.json").read_text(), "not in API format"),
        (None, "there is no workflow file"),
    ],
    ids=range(6),
)
def test_what_is_no_workflow_is_named(
    tmp_path: Path, text: str | None, message: str, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "workflow.json"
    if text is not None:
        path.write_text(text)
    arguments = (put(tmp_path / "a.png"), "--out", tmp_path / "out", "--workflow", path)
    assert main_without_server(*arguments) == 1
    printed = capsys.readouterr().err
    assert str(path) in printed
    assert message in printed


def test_ray_is_asked_for_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "tools.cluster", raising=False)
    monkeypatch.delattr("tools.cluster", raising=False)
    assert restore.main([str(tmp_path), "--out", str(tmp_path / "out"), "--ray", "auto"]) == 1
    assert 'pip install "ray[data]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["s3://bucket/photos"], "name it with --ray"),
        (["photos", "--out", "gs://bucket/out"], "name it with --ray"),
        (["photos", "--per-node", "2"], "name it with --ray"),
        (["one", "two", "--ray", "auto"], "one folder"),
        (["photos", "--ray", "auto", "--server", "http://127.0.0.1:1"], "no --server"),
        (["photos", "--ray", "auto", "--actors", "100", "1"], "--actors 100 1: the least comes"),
        (["photo.jpg", "--wait", "-1"], "--wait: -1 is too small: 0 is the least"),
        (["photo.jpg", "--attempts", "0"], "--attempts: 0 is too small: 1 is the least"),
        (["photo.jpg", "--max-side", "x"], "--max-side: invalid int value: 'x'"),
    ],
)
def test_bad_arguments_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit, match="2"):
        restore.main(arguments)
    assert message in capsys.readouterr().err
