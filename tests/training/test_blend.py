"""Weights between those before and after a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diff_restorer.checkpoint import CheckpointInfo, read_checkpoint, write_checkpoint
from training.blend import Config, main

INFO = CheckpointInfo(types=("noise", "clean"), base_model="nano", clip={}, scores={"psnr": 1})


def write(path: Path, value: float, width: int = 2, info: CheckpointInfo = INFO) -> Path:
    write_checkpoint(
        path, {"decoder.detail.a": torch.full((width,), value, dtype=torch.half)}, info
    )
    return path


def test_the_share_is_that_of_the_later_file(tmp_path: Path) -> None:
    before, after = write(tmp_path / "a", 1.0), write(tmp_path / "b", 3.0)
    made = read_checkpoint(main(Config(before, after, tmp_path / "c", share=0.25)), required=())
    assert made.state("")["decoder.detail.a"].tolist() == [1.5, 1.5]
    assert made.info.types == INFO.types
    assert made.info.scores == {}
    assert made.info.config["blend"]["share"] == 0.25


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    before, out = write(tmp_path / "a", 1.0), tmp_path / "c"
    wider = write(tmp_path / "b", 1.0, width=3)
    with pytest.raises(ValueError, match=r"decoder\.detail\.a is not alike"):
        main(Config(before, wider, out))
    others = write(tmp_path / "d", 1.0, info=replace(INFO, types=("rain", "clean")))
    with pytest.raises(ValueError, match="types"):
        main(Config(before, others, out))
    with pytest.raises(ValueError, match="--share: must be from 0 to 1, found 2"):
        main(Config(before, before, out, share=2))
    assert not out.exists()
