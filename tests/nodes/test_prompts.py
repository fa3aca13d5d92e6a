"""Prompt Processor and Degradation Classifier: one look at the photo for both."""

from __future__ import annotations

import gc
import json
import weakref
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch

from diff_restorer.checkpoint import write_checkpoint
from tests import toy_weights


@pytest.fixture
def read(look) -> Any:
    return partial(look, "DiffRestorerPromptProcessor")


@pytest.fixture
def classify(look) -> Any:
    return partial(look, "DiffRestorerDegradationClassifier")


@pytest.fixture
def native(pack: ModuleType, tmp_path) -> Any:
    """Vision model and file of a Nano that reads P_D from native views."""
    clip = {**toy_weights.info().clip, "degradation_view": "native"}
    tensors = toy_weights.restorer_tensors() | toy_weights.base_tensors()
    path = tmp_path / "native.safetensors"
    write_checkpoint(path, tensors, toy_weights.info(clip=clip))
    _, vision, _, restorer = pack.nodes.host_nano.load_nano(path)
    return vision, restorer


def test_prompts_are_those_of_the_core(toy, read, photo) -> None:
    """Patch tokens of the whole photo, squashed, without the class token."""
    image = photo(40, 90)
    positive, negative, degradation = read(image)
    hidden = toy.clip_vision.encode_image(image, crop=False)["last_hidden_state"]
    expected = toy.restorer.prompt_processor.model(hidden[:, 1:])
    assert torch.equal(positive[0][0], expected.semantic)
    assert torch.equal(degradation.tokens, expected.degradation)
    assert torch.equal(degradation.pooled, expected.degradation.mean(dim=1))
    assert torch.equal(degradation.probabilities, expected.logits.softmax(dim=-1))
    assert degradation.types == toy_weights.TYPES
    assert negative[0][0].shape == positive[0][0].shape
    assert not negative[0][0].any()


def test_semantic_strength(read, photo) -> None:
    one, half, none = (read(photo(), semantic_strength=value)[0][0][0] for value in (1.0, 0.5, 0.0))
    assert torch.equal(half, one / 2)
    assert not none.any()


def test_one_clip_pass_for_both_nodes(toy, read, classify, photo, calls) -> None:
    passes = calls(toy.clip_vision.model, "forward")
    image = photo(seed=101)
    _, _, degradation = read(image)
    classified = classify(image.clone())[3]
    assert len(passes) == 1
    assert torch.equal(classified.probabilities, degradation.probabilities)


def test_native_views_are_read_for_the_degradation_alone(
    native, read, classify, photo, calls
) -> None:
    """As Nano asks for in its metadata: P_S from the squashed photo, P_D from its windows."""
    vision, restorer = native
    side = vision.image_size
    image = photo(side + 20, side + 6, seed=105, batch=2)
    passes = calls(vision.model, "forward")
    positive, _, degradation = read(image, diff_restorer=restorer, clip_vision=vision)
    classified = classify(image, diff_restorer=restorer, clip_vision=vision)[3]
    assert len(passes) == 2
    assert torch.equal(classified.tokens, degradation.tokens)

    def expected(view: torch.Tensor) -> Any:
        hidden = vision.encode_image(view, crop=False)["last_hidden_state"]
        return restorer.prompt_processor.model(hidden[:, 1:])

    assert torch.equal(positive[0][0], expected(image).semantic)
    windows = [image[:, y : y + side, x : x + side] for y in (0, 20) for x in (0, 6)]
    seen = [expected(window) for window in windows]
    tokens = torch.stack([each.degradation for each in seen]).mean(dim=0)
    assert torch.allclose(degradation.tokens, tokens, atol=1e-5)
    assert torch.allclose(degradation.pooled, tokens.mean(dim=1), atol=1e-5)
    logits = torch.stack([each.logits for each in seen]).mean(dim=0)
    assert torch.allclose(degradation.probabilities, logits.softmax(dim=-1), atol=1e-5)


def test_many_photos_are_read_some_at_a_time(native, read, photo, calls) -> None:
    vision, restorer = native
    images = photo(3 * vision.image_size, 3 * vision.image_size, batch=3)
    passes = calls(vision.model, "forward")
    positive, _, degradation = read(images, diff_restorer=restorer, clip_vision=vision)
    assert len(passes) == 2 * 3, "9 windows of one photo at a time"
    for index in range(3):
        one = images[index : index + 1]
        alone = read(one, diff_restorer=restorer, clip_vision=vision)
        torch.testing.assert_close(positive[0][0][index], alone[0][0][0][0])
        torch.testing.assert_close(degradation.tokens[index], alone[2].tokens[0])
        torch.testing.assert_close(degradation.probabilities[index], alone[2].probabilities[0])


def test_a_vision_model_of_another_size_is_refused(pack: ModuleType, read, photo, tmp_path) -> None:
    clip = {**toy_weights.info().clip, "image_size": 336}
    path = tmp_path / "other.safetensors"
    write_checkpoint(path, toy_weights.restorer_tensors(), toy_weights.info(clip=clip))
    restorer = pack.nodes.host_models.load_restorer(path)
    with pytest.raises(ValueError, match=r"clip_vision: it sees 64 px, but other\.safetensors was"):
        read(photo(), diff_restorer=restorer)


def test_no_stale_results(toy, read, photo, calls) -> None:
    """A photo changed in place, another photo and another vision model are looked at anew."""
    image = photo(seed=102)
    first = read(image)[2].tokens
    passes = calls(toy.clip_vision.model, "forward")
    image[0, :8] = 0
    assert not torch.equal(read(image)[2].tokens, first)
    assert not torch.equal(read(photo(seed=103))[2].tokens, first)
    assert len(passes) == 2
    turned = photo(32, 64, seed=104)
    read(turned)
    read(turned.reshape(1, 64, 32, 3))
    assert len(passes) == 4


def test_another_vision_model_is_asked(toy, pack, read, photo) -> None:
    other = pack.nodes.host_nano.load_nano(toy.path)[1]
    other.model.vision_model.pre_layrnorm.bias.add_(1)
    image = photo(seed=105)
    assert not torch.equal(read(image)[2].tokens, read(image, clip_vision=other)[2].tokens)


def test_vision_models_are_not_kept_alive(toy, pack, read, photo) -> None:
    other = pack.nodes.host_nano.load_nano(toy.path)[1]
    read(photo(seed=106), clip_vision=other)
    watch = weakref.ref(other)
    del other
    gc.collect()
    assert watch() is None


@pytest.mark.parametrize("batch", [1, 3])
def test_text_joins(read, photo, batch: int) -> None:
    text = [
        [torch.randn(1, 77, 32), {"pooled_output": torch.ones(1, 32), "mask": "kept"}],
        [torch.randn(1, 154, 32), {}],
    ]
    alone = read(photo(batch=batch))[0][0][0]
    positive, negative, _ = read(photo(batch=batch), text=text)
    for (tokens, extra), (words, entries) in zip(positive, text, strict=True):
        assert tokens.shape == (batch, words.shape[1] + 16, 32)
        assert torch.equal(tokens[:, : words.shape[1]], words.expand(batch, -1, -1))
        assert torch.equal(tokens[:, words.shape[1] :], alone)
        assert extra.keys() - {"diff_restorer_semantic"} == entries.keys()
    assert negative[0][0].shape == positive[0][0].shape
    assert not negative[0][0].any()


def test_text_reaches_the_unet(toy, read, photo, sample, calls) -> None:
    """The UNet attends to text and P_S together, and another text gives another picture."""
    generator = torch.Generator().manual_seed(5)
    latent = {"samples": torch.zeros(1, 4, 8, 8)}
    contexts = calls(toy.model.model.diffusion_model, "forward")
    found, seen = [], []
    for words in (None, *torch.randn(2, 1, 77, 32, generator=generator)):
        text = None if words is None else [[words, {}]]
        positive, negative, _ = read(photo(), text=text)
        found.append(sample(positive, negative, latent))
        seen.append(contexts[-1][1]["context"])
        if words is not None:
            assert torch.equal(seen[-1][:, :77], words)
            assert torch.equal(seen[-1][:, 77:], seen[0])
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


def test_text_of_another_family(read, photo) -> None:
    with pytest.raises(ValueError, match="text: its tokens are 2048 wide, P_S is 32 wide"):
        read(photo(), text=[[torch.zeros(1, 77, 2048), {}]])


def test_a_vision_model_of_another_width(toy, pack, read, photo, toy_folder) -> None:
    path = toy_weights.write_restorer(toy_folder / "wide.safetensors", clip_width=1024)
    restorer = pack.nodes.host_models.load_restorer(path)
    message = r"clip_vision: its tokens are 64 wide, but wide\.safetensors needs 1024.*ViT-L/14"
    with pytest.raises(ValueError, match=message):
        read(photo(), diff_restorer=restorer)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_channels(read, photo, channels: int) -> None:
    image = photo(channels=channels)
    rgb = image[..., :3] if channels == 4 else image[..., :1].expand(-1, -1, -1, 3)
    assert torch.equal(read(image)[2].tokens, read(rgb.contiguous())[2].tokens)


def test_one_pixel(read, classify, photo) -> None:
    assert torch.isfinite(read(photo(1, 1))[2].tokens).all()
    assert classify(photo(1, 1))[0] in toy_weights.TYPES


def test_classifier(classify, photo) -> None:
    label, confidence, text, degradation, _ = classify(photo())
    found = json.loads(text)
    assert set(found) == set(toy_weights.TYPES)
    assert sum(found.values()) == pytest.approx(1, abs=1e-5)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert next(iter(found.items())) == (label, pytest.approx(confidence))
    assert degradation.prototypes.shape == (8, 32)


def test_degraded_is_whatever_is_not_clean(pack: ModuleType, classify, photo, tmp_path) -> None:
    """Any photo of a batch makes it degraded; a file without clean calls all photos so."""
    assert classify(photo(batch=3))[4] is True
    types = (*toy_weights.TYPES, "clean")
    path = toy_weights.write_restorer(tmp_path / "nine.safetensors", types=types)
    restorer = pack.nodes.host_models.load_restorer(path)
    bias = restorer.prompt_processor.model.classifier.bias
    for seed, (favoured, expected) in enumerate((("clean", False), ("haze", True))):
        bias.zero_()
        bias[types.index(favoured)] = 1e6
        label, *_, degraded = classify(photo(batch=3, seed=seed), diff_restorer=restorer)
        assert label == favoured
        assert degraded is expected


def test_classifier_of_a_batch(classify, photo) -> None:
    label, confidence, text, degradation, _ = classify(photo(batch=3))
    rows = json.loads(text)
    assert len(rows) == 3
    means = {name: sum(row[name] for row in rows) / 3 for name in toy_weights.TYPES}
    assert label == max(means, key=means.__getitem__)
    assert confidence == pytest.approx(means[label])
    assert degradation.batch == 3


@pytest.mark.parametrize(
    ("file", "name", "more"),
    [
        ("classifier", "DiffRestorerDegradationClassifier", {}),
        ("conditioning", "DiffRestorerPromptProcessor", {"semantic_strength": 1.0}),
    ],
)
def test_kinds_are_shown_as_pictures_and_text(
    toy, pack: ModuleType, photo, comfyui, file: str, name: str, more: dict[str, float]
) -> None:
    """/history gets the pictures of all photos and the probabilities."""
    import folder_paths
    from PIL import Image

    node = getattr(getattr(pack.nodes, file), name)
    out = node.PREPARE_CLASS_CLONE(None).EXECUTE_NORMALIZED(
        diff_restorer=toy.restorer, clip_vision=toy.clip_vision, image=photo(batch=2), **more
    )
    told = next(each for each in out.args if hasattr(each, "as_dicts")).as_dicts()
    assert json.loads(out.ui["text"][0]) == told
    assert len(out.ui["images"]) == 2
    for entry in out.ui["images"]:
        with Image.open(f"{folder_paths.get_temp_directory()}/{entry['filename']}") as chart:
            assert chart.size == (480, 264)


def test_chart_bars_are_as_long_as_the_probabilities(pack) -> None:
    shown = {"noise": 0.75, "low_light": 0.25, "haze": 0.0}
    chart = pack.nodes.chart.bar_chart(shown, ("noise",))
    both = pack.nodes.chart.bar_chart(shown, ("noise", "low_light"))
    assert torch.equal(both[:42], chart[:42])
    assert both[60, 140].tolist() == chart[30, 140].tolist() != chart[60, 140].tolist()

    def coloured(row: int) -> int:
        line = chart[12 + 30 * row + 10, 132:404]
        return int(((line.amax(dim=-1) - line.amin(dim=-1)) > 0.1).sum())

    assert coloured(0) == pytest.approx(0.75 * 272, abs=2)
    assert coloured(1) == pytest.approx(0.25 * 272, abs=2)
    assert coloured(2) == 0


def test_inputs_are_not_changed(read, classify, photo) -> None:
    image = photo(channels=4)
    text = [[torch.zeros(1, 4, 32), {"a": 1}]]
    kept = image.clone()
    read(image, text=text)
    classify(image)
    assert torch.equal(image, kept)
    assert text[0][1] == {"a": 1}
    assert text[0][0].shape == (1, 4, 32)
