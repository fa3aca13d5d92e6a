"""Opening files: where they are looked for, what is refused, in which number format."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from diff_restorer.native import has_native_bf16
from tests import toy_weights


@pytest.fixture
def folder(comfyui: Path, pack: ModuleType) -> Path:
    """models/diff_restorer of the host."""
    path = comfyui / "models" / "diff_restorer"
    path.mkdir(parents=True, exist_ok=True)
    return path


def test_folder_lists_only_safetensors(pack: ModuleType, folder: Path) -> None:
    (folder / "notes.txt").write_text("")
    (folder / "old.ckpt").write_text("")
    toy_weights.write_restorer(folder / "toy.safetensors")
    assert pack.nodes.host.model_files() == ["toy.safetensors"]
    options = pack.nodes.loaders.DiffRestorerLoader.define_schema().inputs[0].options
    assert options == ["toy.safetensors"]


def test_folders_of_the_user_stay(
    pack: ModuleType, folder: Path, tmp_path: Path, monkeypatch
) -> None:
    """extra_model_paths.yaml is read before the pack is loaded, with no extensions."""
    import folder_paths

    toy_weights.write_restorer(tmp_path / "elsewhere.safetensors")
    known = folder_paths.folder_names_and_paths
    monkeypatch.setitem(known, "diff_restorer", ([str(tmp_path)], set()))
    pack.nodes.host.register_model_folder()
    pack.nodes.host.register_model_folder()
    paths, extensions = known["diff_restorer"]
    assert paths == [str(tmp_path), str(folder)]
    assert extensions == {".safetensors"}
    assert "elsewhere.safetensors" in pack.nodes.host.model_files()


def test_an_empty_folder_explains_itself(pack: ModuleType, run, monkeypatch) -> None:
    loaders = pack.nodes.loaders
    monkeypatch.setattr(pack.nodes.host, "model_files", list)
    options = loaders.DiffRestorerLoader.define_schema().inputs[0].options
    assert options == ["(put a .safetensors file into models/diff_restorer)"]
    with pytest.raises(ValueError, match=r"no Diff-Restorer file.*models.diff_restorer.*: none"):
        run("DiffRestorerLoader", file=options[0])


def test_load(folder: Path, run) -> None:
    toy_weights.write_restorer(folder / "toy.safetensors", types=("noise", "clean"))
    (restorer,) = run("DiffRestorerLoader", file="toy.safetensors")
    assert restorer.info.types == ("noise", "clean")
    assert restorer.sizes.clip_width == 64
    assert restorer.fusion.model.levels == (0, 1, 2)
    assert restorer.latent_format.scale_factor == 0.18215


@pytest.mark.parametrize("file", ["toy.safetensors", None])
def test_a_replaced_file_is_loaded_again(folder: Path, pack: ModuleType, file: str | None) -> None:
    """Links are not known yet when the host asks; what cannot be told counts as changed."""
    node = pack.nodes.loaders.DiffRestorerLoader
    path = toy_weights.write_restorer(folder / "toy.safetensors")
    before = node.fingerprint_inputs(file=file)
    assert node.fingerprint_inputs(file=file) == before
    os.utime(path, (1, 1))
    assert node.fingerprint_inputs(file=file) != before


@pytest.mark.parametrize(
    ("prefix", "key", "part", "more"),
    [
        ("control.", "zero_convs.0.0.bias", "control module", r"\)"),
        ("control.", "input_hint_block.0.weight", "control module", r"\)"),
        ("control.", "input_blocks.0.0.weight", "control module", ""),
        ("prompt_processor.", "semantic.0.weight", "prompt processor", r"\)"),
        ("prompt_processor.", "prototypes", "prompt processor", r"\)"),
        ("decoder.fusion.", "1.film.bias", "fusion blocks", r"\)"),
        ("decoder.detail.", "merge.1.weight", "detail path", ""),
        ("decoder.detail.", "out.bias", "detail path", ""),
    ],
)
def test_wrong_files(folder: Path, run, prefix: str, key: str, part: str, more: str) -> None:
    """`more` is what has to follow the first key that is missing."""
    path, detail = folder / "wrong.safetensors", part == "detail path"
    toy_weights.write_without(path, prefix + key, detail=detail)
    message = rf"{part} does not fit \(missing: {re.escape(key)}{more}"
    try:
        with pytest.raises(ValueError, match=message) as caught:
            run("DiffRestorerLoader", file="wrong.safetensors")
    finally:
        path.unlink()
    assert str(path) in str(caught.value)


def test_unexpected_and_misshapen_tensors(pack: ModuleType, tmp_path: Path) -> None:
    tensors = toy_weights.restorer_tensors()
    tensors["control.surprise"] = torch.zeros(1)
    tensors["control.time_embed.2.bias"] = torch.zeros(7)
    path = toy_weights.write(tmp_path / "odd.safetensors", tensors)
    message = r"unexpected: surprise, time_embed\.2\.bias \(7,\) instead of \(128,\)"
    with pytest.raises(ValueError, match=message):
        pack.nodes.host_models.load_restorer(path)


def test_types_and_classifier_disagree(pack: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    info = toy_weights.info(types=("noise",))
    pack.diff_restorer.checkpoint.write_checkpoint(path, toy_weights.restorer_tensors(), info)
    with pytest.raises(ValueError, match="classifier has 8 outputs, the metadata name 1 types"):
        pack.nodes.host_models.load_restorer(path)


WIDE = toy_weights.UNetSizes(context=64)


@pytest.mark.parametrize(
    ("prefix", "part"), [("control.", "control module"), ("decoder.fusion.", "decoder")]
)
def test_parts_of_two_models(pack: ModuleType, tmp_path: Path, prefix: str, part: str) -> None:
    """Each of which is whole."""
    tensors, other = toy_weights.restorer_tensors(), toy_weights.restorer_tensors(unet=WIDE)
    tensors |= {key: value for key, value in other.items() if key.startswith(prefix)}
    path = toy_weights.write(tmp_path / "odd.safetensors", tensors)
    message = rf"odd\.safetensors: the {part} does not fit: it takes P_D that is 64 wide, .* 32"
    with pytest.raises(ValueError, match=message):
        pack.nodes.host_models.load_restorer(path)


def test_nano_is_complete(toy) -> None:
    assert toy.model.model.model_config.unet_config["context_dim"] == 32
    assert toy.model.model.latent_format.scale_factor == 0.18215
    assert toy.clip_vision.image_size == 64
    assert toy.clip_vision.image_mean == [0.48, 0.46, 0.41]
    assert toy.vae.latent_channels == 4
    stock = 2178 * 8 * 8 * 64 * 4
    assert toy.vae.memory_used_decode((1, 4, 8, 8), torch.float32) == stock * 32 / 128


def test_nano_is_missing(run, pack: ModuleType, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(pack.nodes.host, "NANO_FILE", tmp_path / "nano.safetensors")
    with pytest.raises(FileNotFoundError, match=r"Nano's weights are missing.*install it again"):
        run("DiffRestorerNanoLoader")
    monkeypatch.setenv("DIFF_RESTORER_NANO", "nano.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no /.*in DIFF_RESTORER_NANO: correct or unset"):
        run("DiffRestorerNanoLoader")


def test_nano_must_be_self_contained(pack: ModuleType, tmp_path: Path) -> None:
    path = toy_weights.write_restorer(tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match=r"half\.safetensors: holds no UNet.*Load Diff-Restorer"):
        pack.nodes.host_nano.load_nano(path)


@pytest.mark.parametrize(
    ("key", "part"),
    [
        ("base.unet.out.2.bias", "UNet"),
        ("base.vae.decoder.conv_out.bias", "VAE"),
        ("base.vae.decoder.conv_in.weight", "VAE"),
        ("base.clip_vision.vision_model.post_layernorm.bias", "vision model"),
        ("base.clip_vision.visual_projection.weight", "vision model"),
    ],
)
def test_damaged_nano(pack: ModuleType, tmp_path: Path, key: str, part: str) -> None:
    """The host's own loaders would only log a missing tensor and go on with random numbers."""
    tensors = toy_weights.restorer_tensors() | toy_weights.base_tensors()
    del tensors[key]
    path = toy_weights.write(tmp_path / "nano.safetensors", tensors)
    with pytest.raises(ValueError, match=rf"nano\.safetensors: the {part} does not fit"):
        pack.nodes.host_nano.load_nano(path)


def _fully(module: torch.nn.Module) -> bool:
    return not any(tensor.is_meta for tensor in [*module.parameters(), *module.buffers()])


def test_nothing_stays_without_memory(toy) -> None:
    """Networks are built on the device meta; what has no weights in the file needs them, too."""
    modules = (toy.model.model, toy.clip_vision.model, toy.vae.first_stage_model)
    assert all(map(_fully, modules))
    assert all(map(_fully, (toy.restorer.control.network, toy.restorer.prompt_processor.model)))


def test_a_loaded_file_may_be_overwritten(pack: ModuleType, toy_folder: Path) -> None:
    """Of mapped files that kills the server, or changes its pictures."""
    path, fp32 = toy_folder / "fp32.safetensors", torch.float32
    tensors = toy_weights.restorer_tensors(dtype=fp32) | toy_weights.base_tensors(dtype=fp32)
    pack.diff_restorer.checkpoint.write_checkpoint(path, tensors, toy_weights.info())
    model, clip_vision, vae, restorer = pack.nodes.host_nano.load_nano(path)
    mapped = Path("/proc/self/maps")
    if mapped.exists():
        assert str(path) not in mapped.read_text()
    modules = [model.model.diffusion_model, clip_vision.model, vae.first_stage_model]
    modules += [restorer.prompt_processor.model, restorer.control.network, restorer.fusion.model]
    before = [{k: v.clone() for k, v in each.state_dict().items()} for each in modules]
    path.write_bytes(bytes(path.stat().st_size))
    path.write_bytes(b"")
    for module, weights in zip(modules, before, strict=True):
        assert all(torch.equal(weights[key], value) for key, value in module.state_dict().items())


def test_the_host_is_told_how_large_a_file_is(pack: ModuleType, toy_folder: Path) -> None:
    path = toy_weights.write_restorer(toy_folder / "sized.safetensors", dtype=torch.float32)
    size = pack.nodes.host_models.load_restorer(path).get_ram_usage()
    assert 0 <= path.stat().st_size - size < 100_000  # the header


SHAPES = {
    "prompt_processor.semantic.0.weight": "prompt processor",
    "control.input_blocks.0.0.weight": "control module",
    "control.time_embed.0.weight": "control module",
    "control.input_hint_block.0.weight": "control module",
    "decoder.fusion.1.out.weight": "decoder's fusion blocks",
    "base.unet.input_blocks.0.0.weight": "UNet",
    "base.unet.input_blocks.1.0.in_layers.0.weight": "UNet",
    "base.vae.decoder.conv_in.weight": "VAE",
    "base.vae.decoder.up.0.block.0.conv1.weight": "VAE",
    "base.vae.post_quant_conv.weight": "VAE",
    "base.clip_vision.vision_model.embeddings.patch_embedding.weight": "vision model",
    "base.clip_vision.vision_model.embeddings.position_embedding.weight": "vision model",
    "base.clip_vision.visual_projection.weight": "vision model",
}


@pytest.mark.parametrize("key", SHAPES)
@pytest.mark.parametrize("shape", [(), (1,), (2, 1, 1, 1), (200_000, 1), (200_000, 1, 1, 1)])
def test_odd_shapes_are_named_and_cost_nothing(
    pack: ModuleType, tmp_path: Path, key: str, shape: tuple[int, ...]
) -> None:
    """A width of 200,000 would take hundreds of gigabytes, were a network of it allocated."""
    tensors = toy_weights.restorer_tensors() | toy_weights.base_tensors()
    assert key in tensors
    tensors[key] = torch.zeros(shape, dtype=torch.float16)
    path = toy_weights.write(tmp_path / "odd.safetensors", tensors)
    with pytest.raises(ValueError, match=rf"odd\.safetensors: the {SHAPES[key]} does not fit"):
        pack.nodes.host_nano.load_nano(path)


@pytest.mark.parametrize("key", [*SHAPES, "decoder.fusion.1.film.bias"])
def test_weights_that_are_no_numbers(pack: ModuleType, tmp_path: Path, key: str) -> None:
    tensors = toy_weights.restorer_tensors() | toy_weights.base_tensors()
    tensors[key] = tensors[key].clone()
    tensors[key].view(-1)[-1] = float("nan")
    path = toy_weights.write(tmp_path / "odd.safetensors", tensors)
    with pytest.raises(ValueError, match=rf"odd\.safetensors: tensor {key} holds NaN"):
        pack.nodes.host_nano.load_nano(path)


def test_bf16_only_where_it_pays(pack: ModuleType, monkeypatch) -> None:
    """The user's flags go first, then the CPU's abilities; GPUs are the host's affair."""
    import comfy.model_management
    from comfy.cli_args import args

    host = pack.nodes.host
    monkeypatch.setattr(host, "has_native_bf16", lambda device: True)
    assert host.nano_unet_dtype() == host.nano_vae_dtype() == torch.bfloat16
    for flag in ("fp32_unet", "fp16_unet", "force_fp32"):
        with monkeypatch.context() as patch:
            patch.setattr(args, flag, True)
            assert host.nano_unet_dtype() is None
    for flag in ("fp32_vae", "force_fp32"):
        with monkeypatch.context() as patch:
            patch.setattr(args, flag, True)
            assert host.nano_vae_dtype() is None
    with monkeypatch.context() as patch:
        patch.setattr(comfy.model_management, "get_torch_device", lambda: torch.device("cuda"))
        assert host.nano_unet_dtype() is None
    monkeypatch.setattr(host, "has_native_bf16", lambda device: False)
    assert host.nano_unet_dtype() is None


def test_the_feature_test_agrees_with_the_kernel() -> None:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        pytest.skip("needs Linux")
    flags = cpuinfo.read_text()
    slow = "GenuineIntel" in flags and "amx_tile" not in flags
    listed = not slow and any(name in flags for name in ("avx512_bf16", "amx_tile", " bf16"))
    assert has_native_bf16(torch.device("cpu")) == listed


def test_every_lack_of_memory_is_known(pack: ModuleType) -> None:
    import comfy.model_management

    is_oom = pack.nodes.host.is_oom
    assert is_oom(comfy.model_management.OOM_EXCEPTION("toy"))
    assert is_oom(RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"))
    assert not is_oom(RuntimeError("out of range"))
    assert not is_oom(comfy.model_management.InterruptProcessingException())
