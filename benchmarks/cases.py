"""What is measured; each case runs in a process of its own and returns figures for JSON."""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from logging.handlers import BufferingHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from diff_restorer.similarity import psnr

from .measuring import PeakMemory, computes_bf16, interleaved, on_gpu, timed
from .stage import (
    LARGE_FILE,
    RANDOM_RESTORER,
    Graph,
    Prompts,
    Sd15,
    load_restorer,
    nano,
    open_host,
    picture,
    sample,
    stock,
)

Figures = dict[str, Any]
LEVER_SIDE = 256
"""Longer side of the photos that the levers are tried on: many runs are needed."""
CONTRAST = 2 * 60 / 255
"""Standard deviation of a photo's pixels in [-1, 1]."""
NANO_STEPS = 3
"""Of Nano's workflows."""


@dataclass(frozen=True)
class Setting:
    """What a case is given."""

    folder: Path
    """Base directory of ComfyUI."""
    rounds: int
    side: int = 0
    """Of the picture in pixels, where the case has several."""
    pixels: Path = Path()
    """Where a large picture goes, .npy."""


def step(setting: Setting) -> Figures:
    """A sampling step under Degradation Control against one under the stock ControlNet."""
    open_host(setting.folder)
    sd15, image = Sd15(), picture(512, 512)
    graph = sd15.graph
    ours = graph.control(image)
    theirs = sd15.stock_control(image)
    prompts = {"stock": theirs, "ours": (ours.positive, ours.negative)}
    each = _per_step(graph, prompts, ours.latent, 4, setting.rounds)
    return {"seconds_per_step": each, "ratio": each["ours"] / each["stock"]}


def _per_step(
    graph: Graph, prompts: Mapping[str, Prompts], latent: dict[str, Any], more: int, rounds: int
) -> dict[str, float]:
    """Seconds of a step: what `more` steps take longer than one, without what a run costs once."""

    def run(given: Prompts, steps: int) -> Callable[[], Any]:
        return lambda: sample(graph.model, *given, latent, steps)

    seconds = interleaved(
        {
            f"{name} {steps}": run(given, steps)
            for name, given in prompts.items()
            for steps in (1, 1 + more)
        },
        rounds,
    )
    return {name: (seconds[f"{name} {1 + more}"] - seconds[f"{name} 1"]) / more for name in prompts}


def decode(setting: Setting) -> Figures:
    """Aware VAE Decode at 512 px against the host's decode, and with the encode against both."""
    open_host(setting.folder)
    graph, image = Sd15().graph, picture(512, 512)
    found = graph.control(image)
    bare = {"samples": found.latent["samples"]}
    seconds = interleaved(
        {
            "VAEDecode": lambda: graph.vae.decode(bare["samples"]),
            "VAEEncode + VAEDecode": lambda: graph.vae.decode(graph.vae.encode(image)),
            "aware, features reused": lambda: graph.decode(found, found.latent),
            "aware, features made": lambda: graph.decode(found, bare),
        },
        setting.rounds,
    )
    return {
        "seconds": seconds,
        "reused": seconds["aware, features reused"] / seconds["VAEDecode"],
        "made": seconds["aware, features made"] / seconds["VAEEncode + VAEDecode"],
    }


def vision(setting: Setting) -> Figures:
    """Prompt Processor and Classifier together against one CLIPVisionEncode."""
    open_host(setting.folder)
    sd15, rounds = Sd15(), 3 * setting.rounds
    # Each photo once: one that was seen before would be remembered.
    pictures = iter([picture(512, 512, seed) for seed in range(2 * (rounds + 1))])

    def read() -> None:
        image = next(pictures)
        for node in ("DiffRestorerPromptProcessor", "DiffRestorerDegradationClassifier"):
            sd15.graph.look(node, image)

    def encode() -> None:
        image = next(pictures)
        stock("CLIPVisionEncode", clip_vision=sd15.clip_vision, image=image, crop="none")

    seconds = interleaved({"CLIPVisionEncode": encode, "ours": read}, rounds)
    return {"seconds": seconds, "ratio": seconds["ours"] / seconds["CLIPVisionEncode"]}


def load(setting: Setting) -> Figures:
    """Loading a file, checked and without a map, and its tensors as the host reads them under
    `--disable-mmap`, in place of our reading."""
    pack = open_host(setting.folder)
    host: Any = importlib.import_module("comfy.utils")
    host.DISABLE_MMAP = True  # a file that is mapped may change under a running server
    restorer = setting.folder / RANDOM_RESTORER
    files: dict[str, tuple[Path, Callable[[], Any]]] = {
        "Nano": (pack.nodes.host.NANO_FILE, nano),
        "SD 1.5": (restorer, lambda: load_restorer(restorer.name)),
    }
    figures: Figures = {}
    for name, (path, whole) in files.items():

        def ours(path: Path = path) -> dict[str, Tensor]:
            return pack.diff_restorer.checkpoint.read_checkpoint(path).state("")

        def theirs(path: Path = path) -> dict[str, Tensor]:
            return host.load_torch_file(str(path))

        with PeakMemory() as memory:
            sizes = [tensor.nbytes / 1e9 for tensor in ours().values()]
        seconds = interleaved({"host": theirs, "ours": ours, "whole": whole}, 5 * setting.rounds)
        rest = seconds["whole"] - seconds["ours"]
        figures[name] = {
            "seconds": seconds,
            "ratio": seconds["whole"] / (rest + seconds["host"]),
            "reading": seconds["ours"] / seconds["host"],
            "file_gb": sum(sizes),
            "peak_gb": memory.gb,
            "largest_gb": max(sizes),
        }
    return figures


def untiled(setting: Setting) -> Figures:
    """Aware VAE Decode of a whole picture, however much memory the host thinks that it takes."""

    def run(graph: Graph) -> Callable[..., Tensor]:
        graph.vae.memory_used_decode = graph.vae.memory_used_encode = lambda *_: 1.0
        return graph.decode

    return _large(setting, run, whole=True, tile_size=0)


def exact(setting: Setting) -> Figures:
    """Aware VAE Decode in exact tiles of 512 px."""
    return _large(setting, lambda graph: graph.decode, tiling="exact", tile_size=512)


def fast(setting: Setting) -> Figures:
    """Aware VAE Decode in blended tiles of 512 px."""
    return _large(setting, lambda graph: graph.decode, tiling="fast", tile_size=512, overlap=64)


def stock_tiled(setting: Setting) -> Figures:
    """The host's VAEDecodeTiled in tiles of 512 px with its default overlap."""

    def run(graph: Graph) -> Callable[..., Tensor]:
        return lambda _, latent: stock(
            "VAEDecodeTiled", samples=latent, vae=graph.vae, tile_size=512, overlap=64,
            temporal_size=64, temporal_overlap=8,
        )[0]  # fmt: skip

    return _large(setting, run)


def stock_untiled(setting: Setting) -> Figures:
    """The host's VAEDecode of a whole picture."""

    def run(graph: Graph) -> Callable[..., Tensor]:
        return lambda _, latent: stock("VAEDecode", samples=latent, vae=graph.vae)[0]

    return _large(setting, run, whole=True)


def _large(
    setting: Setting,
    decode_of: Callable[[Graph], Callable[..., Tensor]],
    whole: bool = False,
    **settings: Any,
) -> Figures:
    """Decode a large picture without carried features; its pixels go into a file.

    A picture of 64 px is decoded before, so that weights and threads are there.

    Raises:
        MemoryError: The picture should have been decoded `whole`, and the host took tiles.
    """
    pack = open_host(setting.folder, "fp32")
    graph = Graph(*pack.nodes.host_nano.load_nano(setting.folder / LARGE_FILE))
    _give_contrast(graph.vae)
    decode_one, log = decode_of(graph), BufferingHandler(10**6)
    logging.getLogger().addHandler(log)
    for side in (64, setting.side):
        image = picture(side, side)
        degradation = graph.look("DiffRestorerPromptProcessor", image)[2]
        generator = torch.Generator().manual_seed(side)
        latent = {"samples": torch.randn(1, 4, side // 8, side // 8, generator=generator)}
        controlled: Any = SimpleNamespace(image=image, degradation=degradation)
        with PeakMemory() as memory:
            start = time.perf_counter()
            pixels = decode_one(controlled, latent, **settings)
            seconds = time.perf_counter() - start
    lines = [record.getMessage() for record in log.buffer]
    if whole and any("tile" in line for line in lines):
        raise MemoryError(f"{setting.side} px do not fit into memory whole: {lines}")
    levels = (255 * pixels[0].float().cpu()).numpy()
    np.save(setting.pixels, levels.astype(np.float16))
    return {"seconds": seconds, "peak_gb": memory.gb}


def _give_contrast(vae: Any) -> None:
    """Random weights shall decode to a photo's contrast, or errors would not be those of photos."""
    module = vae.first_stage_model
    latent = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    pixels = module.decode(latent.to(vae.device, vae.vae_dtype)).float()
    last = module.decoder.conv_out
    factor = float(CONTRAST / pixels.std())
    last.weight = torch.nn.Parameter(last.weight * factor, requires_grad=False)
    last.bias = torch.nn.Parameter((last.bias - pixels.mean()) * factor, requires_grad=False)


def area(setting: Setting) -> Figures:
    """Nano's graph for large photos, as in workflows/restore_large.json."""
    open_host(setting.folder, "own")
    graph = nano()
    for side in (128, setting.side):  # the first one warms up
        image = picture(side, side)
        with PeakMemory() as memory:
            seconds = timed(lambda image=image: _restore_large(graph, image))
    return {"seconds": seconds, "peak_gb": memory.gb, "megapixels": setting.side**2 / 1e6}


def _restore_large(graph: Graph, image: Tensor) -> Tensor:
    found = graph.control(image)
    model, degradation = graph.tiled(image)
    latent = sample(model, found.positive, found.negative, found.latent, NANO_STEPS)
    return graph.decode(replace(found, degradation=degradation), latent)


def peak(setting: Setting) -> Figures:
    """What share of the device's peak Nano's networks reach on a tile of 512 px."""
    open_host(setting.folder, "own")
    graph, image = nano(), picture(512, 512)
    found = graph.control(image)
    device = importlib.import_module("comfy.model_management").get_torch_device()
    side = 4096 if on_gpu() else 2048
    dtype = torch.bfloat16 if computes_bf16() else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    rate = 2 * side**3 / interleaved({"matmul": lambda: a @ b}, 3 * setting.rounds)["matmul"]
    prompts = {
        "UNet and control, a step": (found.positive, found.negative), "UNet, a step": found.prompts,
    }  # fmt: skip
    seconds = _per_step(graph, prompts, found.latent, 4, 3 * setting.rounds)
    flops = {
        name: _flops(lambda given=given: sample(graph.model, *given, found.latent, 1))
        for name, given in prompts.items()
    }
    latent = sample(graph.model, found.positive, found.negative, found.latent, NANO_STEPS)
    decoding = {"decoder": lambda: graph.decode(found, latent)}
    seconds |= interleaved(decoding, 3 * setting.rounds)
    flops["decoder"] = _flops(decoding["decoder"])
    parts = {
        name: {
            "seconds": seconds[name],
            "gflop": flops[name] / 1e9,
            "share": flops[name] / seconds[name] / rate,
        }
        for name in flops
    }
    return {"peak_gflops": rate / 1e9, "format": str(dtype).partition(".")[2], "parts": parts}


def _flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


LEVERS: dict[str, dict[str, Any]] = {
    **{
        f"{sampler} {scheduler}, {steps} steps": {
            "steps": steps, "sampler": sampler, "scheduler": scheduler,
        }
        for sampler, scheduler in (
            ("euler", "sgm_uniform"), ("uni_pc", "normal"), ("dpmpp_2m", "sgm_uniform"),
        )
        for steps in (1, 2, 4, 5, 8, 12, 20, 50)
        if steps > 1 or sampler == "euler"
    },
    "8 steps, control until 50 %": {"control": {"end_percent": 0.5}},
    "8 steps, control until 80 %": {"control": {"end_percent": 0.8}},
    "8 steps, control from 20 %": {"control": {"start_percent": 0.2}},
    "8 steps, CFG 1.5": {"cfg": 1.5},
    "8 steps, CFG 1.5, control for the positive alone": {"cfg": 1.5, "bare_negative": True},
}  # fmt: skip
"""Name -> settings of one sampling, over 8 steps of euler sgm_uniform."""


def levers(setting: Setting) -> Figures:
    """What each lever does to time and PSNR: Nano on the eight degraded photos of the demo."""
    from tools.demo import SAMPLES, degrade_photo
    from tools.photo import read

    open_host(setting.folder, "own")
    graph = nano()
    rows: dict[str, Any] = {
        name: {"seconds": 0.0, "psnr": []} for name in ("degraded photo", *LEVERS)
    }
    for shown in SAMPLES:
        clean = read(shown.photo, LEVER_SIDE).picture
        lq, gt = (
            torch.from_numpy(np.asarray(photo, np.float32) / 255)[None]
            for photo in (degrade_photo(clean, shown), clean)
        )
        rows["degraded photo"]["psnr"].append(float(psnr(lq, gt)))
        warm = graph.control(lq)
        sample(graph.model, warm.positive, warm.negative, warm.latent, 1)
        for name, given in LEVERS.items():
            seconds, picture = _restored(graph, lq, **given)
            rows[name]["seconds"] += seconds / len(SAMPLES)
            rows[name]["psnr"].append(float(psnr(picture.float().cpu(), gt)))
    for row in rows.values():
        row["mean_psnr"] = float(np.mean(row["psnr"]))
    return {"kinds": [shown.kind for shown in SAMPLES], "rows": rows}


def _restored(
    graph: Graph,
    lq: Tensor,
    steps: int = 8,
    control: Mapping[str, float] | None = None,
    bare_negative: bool = False,
    **sampling: Any,
) -> tuple[float, Tensor]:
    """Seconds of the sampling, and the restored picture.

    Args:
        control: Settings of Degradation Control.
        bare_negative: Give the sampler the negative prompt without control.
    """
    found, latent = graph.control(lq, **(control or {})), {}
    negative = found.prompts[1] if bare_negative else found.negative

    def run() -> None:
        latent.update(
            sample(graph.model, found.positive, negative, found.latent, steps, **sampling)
        )

    return timed(run), graph.decode(found, latent)


LARGE = tuple(case.__name__ for case in (untiled, stock_untiled, exact, fast, stock_tiled))
"""Cases that decode one large picture; whole ones come before tiled ones."""
NANO = tuple(case.__name__ for case in (area, peak, levers))
"""Cases that need no random weights."""
CASES: dict[str, Callable[[Setting], Figures]] = {
    case.__name__: case
    for case in (
        *(step, decode, vision, load, untiled, stock_untiled, exact, fast, stock_tiled, peak),
        *(area, levers),
    )
}  # fmt: skip
