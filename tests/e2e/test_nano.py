"""The shipped Nano workflow in a running ComfyUI."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diff_restorer.degradations import KINDS
from tests.e2e.graph import Graph, Runner, make_photo
from tools.client import Progress
from tools.environment import ROOT
from tools.errors import ClientError, PromptInterruptedError
from tools.host import PACK_NAME, Host

# Two runs that do the same sums in another order, in bf16, of 255 levels.
ROUNDING = 3.0


def difference(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(first - second).mean())


def test_host_lists_workflows(runner: Runner):
    templates = runner.client.get("/workflow_templates")[PACK_NAME]
    assert set(templates) == {path.stem for path in (ROOT / "workflows").glob("*.json")}


@pytest.mark.parametrize(
    ("size", "mode"), [((97, 53), "RGB"), ((33, 130), "RGB"), ((1, 1), "RGB"), ((96, 72), "L")]
)
def test_result_has_the_photos_exact_size(
    runner: Runner, nano: Graph, size: tuple[int, int], mode: str
):
    nano.set("LoadImage", image=runner.upload(make_photo(*size, mode=mode), f"size{size[0]}.png"))
    (restored,) = runner.pictures(nano)
    assert restored.shape == (size[1], size[0], 3)
    assert np.isfinite(restored).all()


def test_classifier_reports_probabilities(runner: Runner, nano: Graph):
    shown = runner.run(nano).outputs[nano.node("DiffRestorerDegradationClassifier")]
    probabilities = json.loads(shown["text"][0])
    assert set(probabilities) == {*KINDS}
    assert all(0 <= each <= 1 for each in probabilities.values())  # several may be there
    assert max(probabilities.values()) > 0.1
    assert shown["images"]


def test_transparency_is_kept(runner: Runner, nano: Graph):
    alpha = Image.linear_gradient("L").resize((96, 72))
    picture = make_photo()
    picture.putalpha(alpha)
    loaded = nano.set("LoadImage", image=runner.upload(picture, "alpha.png")).node("LoadImage")
    joined = nano.add("JoinImageWithAlpha", image=[loaded, 0], alpha=[loaded, 1])
    nano.replace_link([loaded, 0], [joined, 0])
    (restored,) = runner.pictures(nano)
    assert restored.shape == (72, 96, 4)
    assert np.abs(restored[..., 3] - np.asarray(alpha, np.float32)).max() <= 1


def test_batch_equals_single_photos(runner: Runner, nano: Graph, photo: str):
    (alone,) = runner.pictures(nano)
    loaded = nano.node("LoadImage")
    other = nano.add("LoadImage", image=runner.upload(make_photo(seed=1), "other.png"))
    batch = nano.add("ImageBatch", image1=[loaded, 0], image2=[other, 0])
    nano.replace_link([loaded, 0], [batch, 0])
    nano.nodes[batch]["inputs"]["image1"] = [loaded, 0]
    first, second = runner.pictures(nano)
    assert difference(first, alone) < ROUNDING
    assert difference(second, alone) > 2 * ROUNDING


def test_cfg(runner: Runner, nano: Graph):
    (plain,) = runner.pictures(nano.set("KSampler", cfg=1.0))
    (guided,) = runner.pictures(nano.set("KSampler", cfg=7.5))
    assert guided.shape == plain.shape
    assert difference(guided, plain) > 0


def test_interrupt_and_queue_again(runner: Runner, nano: Graph):
    (undisturbed,) = runner.pictures(nano)

    def stop(report: Progress) -> None:
        if report.node == nano.node("KSampler") and report.step >= 1:
            runner.client.cancel(report.prompt_id)

    large = runner.upload(make_photo(160, 128, seed=3), "large.png")
    other = nano.copy().set("LoadImage", image=large).set("KSampler", steps=500)
    with pytest.raises(PromptInterruptedError):
        runner.run(other, stop)
    # Another seed first, because the host would answer the same graph from its cache.
    runner.run(nano.copy().set("KSampler", seed=99))
    (again,) = runner.pictures(nano.set("KSampler", seed=nano.input("KSampler", "seed")))
    assert np.array_equal(again, undisturbed)
    (resumed,) = runner.pictures(other.set("KSampler", steps=3))
    assert resumed.shape == (128, 160, 3)


def test_another_nano_is_named_in_the_environment(
    comfyui_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Relative to where the user is, which is not where the server runs.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFF_RESTORER_NANO", "mine.safetensors")
    with Host(tmp_path / "server") as host:
        runner = Runner(host)
        graph = Graph.load(photo=runner.upload(make_photo(), "photo.png"))
        file = tmp_path / "mine.safetensors"
        message = f"there is no {file}.*DIFF_RESTORER_NANO: correct or unset"
        with pytest.raises(ClientError, match=message):
            runner.pictures(graph)
