"""The Stable Diffusion 1.5 workflow at full size, with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests import toy_weights
from tests.e2e.graph import Graph, Runner, make_photo
from tools.client import Progress
from tools.environment import ROOT

pytestmark = pytest.mark.slow

SD15_WORKFLOW = ROOT / "workflows/api/restore_sd15.json"


@pytest.fixture(scope="module")
def sd15(runner: Runner) -> Iterator[Graph]:
    files = toy_weights.write_sd15(runner.host.base)
    graph = Graph.load(SD15_WORKFLOW, runner.upload(make_photo(256, 256), "sd15.png"))
    graph.set("CheckpointLoaderSimple", ckpt_name=files["checkpoints"].name)
    graph.set("CLIPVisionLoader", clip_name=files["clip_vision"].name)
    graph.set("DiffRestorerLoader", file=files["diff_restorer"].name)
    yield graph.set("KSampler", steps=2)
    for path in files.values():
        path.unlink()


def test_sd15_workflow_runs(runner: Runner, sd15: Graph):
    steps: list[Progress] = []
    (restored,) = runner.pictures(sd15, steps.append)
    assert restored.shape == (256, 256, 3)
    assert np.isfinite(restored).all()
    sampler = sd15.node("KSampler")
    assert max(report.step for report in steps if report.node == sampler) == 2


def test_nano_parts_do_not_fit(runner: Runner, sd15: Graph, tmp_path: Path):
    wrong = sd15.copy()
    nano = wrong.add("DiffRestorerNanoLoader")
    wrong.replace_link([wrong.node("DiffRestorerLoader"), 0], [nano, 3])
    with pytest.raises(Exception, match=r"clip_vision.*1024"):
        runner.run(wrong)
