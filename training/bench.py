"""Stage 1 against diffusers' ControlNet training step, and the data path alone:
`python -m training.bench --help`.

Both steps train a control module of the same UNet on the same batch and resolution, in the
precision that training takes on this device (bf16 where it computes in it, else fp32); weights are
random. Diffusers' step is that of its examples/controlnet/train_controlnet.py: one VAE encode, 77
text tokens, a hint image of the same size, a frozen UNet. Ours reads the degraded photo by CLIP,
encodes both photos, trains the prompt processor through the whole UNet and classifies. It is
measured as it is, with several noises per photo (`--draws`), and on photos that were encoded before
(`--encoded`). Each variant is a process of its own, so that peak memory is its own, too.
"""

from __future__ import annotations

import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from diff_restorer.checkpoint import EPSILON
from diff_restorer.prompt_processor import DEFAULT_TYPES
from diff_restorer.views import WHOLE
from tools.ending import in_words

from .common import DataConfig, ModelConfig, half, home, open_data
from .data import RestorationBatches
from .diffusion import TIMESTEPS, scheduler
from .encode_control_data import encoded
from .loop import LoopConfig
from .models import SD15_LATENT_SCALE, Models
from .networks import SD15_SIZES, Sizes, build_unet, build_vae, build_vision
from .pretrained import Base
from .progress import peak_memory
from .train_control import Config as ControlConfig
from .train_control import make_loss, prepare

log = logging.getLogger(__name__)

TOY = replace(
    SD15_SIZES,
    vae_channels=(32, 64, 128, 128),
    unet_channels=(64, 128, 256, 256),
    context_width=192,
    vision_width=256,
    vision_layers=6,
    prompt_hidden=256,
)
"""SD 1.5's blocks at a fifth of its width, with a tower in proportion."""
SIZES = {"toy": TOY, "sd15": SD15_SIZES}
SPEED_BAR, ENCODED_BAR, DEGRADATION_BAR = 1.0, 1.3, 0.1


@dataclass(frozen=True)
class Measurement:
    """One measurement."""

    step: Literal["ours", "diffusers"]
    size: Literal["toy", "sd15"]
    resolution: int
    batch_size: int
    steps: int
    checkpointing: bool = False
    compile: bool = False
    draws: int = 1
    """Timesteps and noises per photo."""
    encoded: bool = False
    """Photos were encoded before; that is in no figure, but for the peak memory of a CPU."""

    @property
    def name(self) -> str:
        """As it is called in the report."""
        options = (f" --draws {self.draws}" if self.draws > 1 else "") + (
            " --encoded" if self.encoded else ""
        )
        return self.step + options


@dataclass(frozen=True)
class Config:
    """Measure both steps at toy size and at SD 1.5's; on a GPU, the table of batch sizes, too."""

    out: Path = Path("bench_train.json")
    """JSON file of all figures."""
    sizes: tuple[Literal["toy", "sd15"], ...] = ("toy", "sd15")
    """Which sizes."""
    resolution: int = 0
    """Side of photos in pixels; 0 is 512 on a GPU, else 128 (toy) and 256 (SD 1.5)."""
    batch_size: int = 0
    """Samples per step; 0 is 8 on a GPU, else 4 (toy) and 1 (SD 1.5)."""
    steps: int = 0
    """Measured steps after one to warm up; 0 is 10, or 2 at SD 1.5's size on a CPU."""
    draws: int = 4
    """Timesteps and noises per photo of the variant that has several."""
    table_batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Batch sizes of the GPU's table; each takes four processes, two of which compile."""
    data: Path | None = None
    """Clean photos: measure the data path of Nano's stage 2 alone on them, on one core or on the
    GPU, and nothing else."""
    variant: str = ""
    """A `Measurement` as JSON: measure it in this process and print JSON (used by the program)."""


@in_words
def main(config: Config) -> None:
    """Measure in processes, log the tables and write the figures."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if config.variant:
        sys.stdout.write(json.dumps(measure(Measurement(**json.loads(config.variant)))) + "\n")
        return
    if config.data is not None:
        results = [measure_data(config.data, crops) for crops in (1, 4)]
        config.out.write_text(json.dumps(results, indent=1))
        return
    gpu = torch.cuda.is_available()
    results: list[dict[str, Any]] = []
    for size in config.sizes:
        large = size == "sd15"
        ours = Measurement(
            "ours",
            size,
            config.resolution or (512 if gpu else 256 if large else 128),
            config.batch_size or (8 if gpu else 1 if large else 4),
            config.steps or (2 if large and not gpu else 10),
        )
        variants = (
            *(replace(ours, step="diffusers"), ours),
            *(replace(ours, draws=config.draws), replace(ours, encoded=True)),
        )
        rows = [in_process(variant) for variant in variants]
        results += rows
        _report(*rows)
    if gpu and "sd15" in config.sizes:
        results += _table(config.resolution or 512, config.table_batches)
    config.out.write_text(json.dumps(results, indent=1))
    log.info("written to %s", config.out)


def in_process(measurement: Measurement) -> dict[str, Any]:
    """`measure` in a fresh process; a failure, such as too little memory, becomes an entry."""
    settings = json.dumps(asdict(measurement))
    command = [sys.executable, "-m", "training.bench", "--variant", settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return asdict(measurement) | {"name": measurement.name, "error": lines[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def _report(theirs: dict[str, Any], *ours: dict[str, Any]) -> None:
    """Logs a table, and adds to our rows what they are of diffusers'.

    A noised sample is one photo at one timestep under one noise; diffusers' step has one of each.
    """
    settings = map(theirs.get, ("size", "resolution", "batch_size"))
    device = "GPU" if torch.cuda.is_available() else "CPU"
    log.info("\n%s size, %d px, batch %d, %s:", *settings, device)
    log.info("  %-20s photos/s  noised samples/s  processor s per noised sample  peak GB", "")
    for row in (theirs, *ours):
        if "error" in row:
            log.info("  %-20s failed: %s", row["name"], row["error"])
            continue
        figures = map(row.get, ("name", "photos_per_s", "noised_per_s", "cpu_s", "peak_gb"))
        log.info("  %-20s %8.3f  %16.3f  %29.2f  %7.2f", *figures)
    for row in ours:
        if "error" in theirs | row:
            continue
        row["ratio"] = round(row["noised_per_s"] / theirs["noised_per_s"], 3)
        row["cpu_ratio"] = round(theirs["cpu_s"] / row["cpu_s"], 3)
        row["memory_ratio"] = round(row["peak_gb"] / theirs["peak_gb"], 3)
        ratios = map(row.get, ("name", "ratio", "cpu_ratio", "memory_ratio"))
        log.info("  %s: %.2fx diffusers' noised samples/s (by processor time %.2fx), memory %.2fx; "
                 "bar: %.1fx", *ratios, ENCODED_BAR if row["encoded"] else SPEED_BAR)  # fmt: skip
        if not row["encoded"]:
            log.info("    degradations take %.1f %% of a step's time (bar: %.0f %%)",
                     100 * row["degradation_share"], 100 * DEGRADATION_BAR)  # fmt: skip


def _table(resolution: int, batches: tuple[int, ...]) -> list[dict[str, Any]]:
    """Throughput and memory on a GPU per batch, with and without checkpointing and compile."""
    rows: list[dict[str, Any]] = []
    log.info("\nbatch  checkpointing  compile  photos/s  peak GB")
    for batch in batches:
        for checkpointing in (False, True):
            for compiled in (False, True):
                row = in_process(
                    Measurement("ours", "sd15", resolution, batch, 10, checkpointing, compiled)
                )
                rows.append(row)
                outcome = row.get("error") or f"{row['photos_per_s']:9.2f}  {row['peak_gb']:7.1f}"
                log.info("%5d  %13s  %7s  %s", batch, checkpointing, compiled, outcome)
    return rows


def measure(measurement: Measurement) -> dict[str, Any]:
    """Photos and noised samples per second of a step on a batch that is there, peak memory, and the
    share of step and degrading together that degrading takes.

    `cpu_s` is the processor time of a noised sample, all threads: on a CPU that others use, too, it
    compares where the clock does not.
    """
    torch.manual_seed(0)
    device, precision = home(), half("auto")
    sizes = SIZES[measurement.size]
    step, ready, parameters = (our_step if measurement.step == "ours" else diffusers_step)(
        measurement, sizes
    )
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    batches = _batches(measurement, sizes)
    seconds: list[float] = []
    busy: list[float] = []
    degrading: list[float] = []
    peaks: list[float] = []
    gpu = device.type == "cuda"
    clock = time.perf_counter if gpu else time.process_time
    for index in range(measurement.steps + (3 if measurement.compile else 1)):
        item = batches[index]  # drawn and cut by data processes
        _synchronize()
        mark = clock()
        batch = batches.finish(item, device)
        _synchronize()
        degrading.append(clock() - mark)
        batch = ready(batch)
        _synchronize()
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        mark, worked = time.perf_counter(), time.process_time()
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            loss = step(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _synchronize()
        seconds.append(time.perf_counter() - mark)
        busy.append(time.process_time() - worked)
        peaks.append(peak_memory(device) / 1e9)
        log.info("%s step %d: %.2f s", measurement.step, index, seconds[-1])
    typical, work, cost = (
        statistics.median(values[-measurement.steps :]) for values in (seconds, busy, degrading)
    )
    photos, draws = measurement.batch_size, measurement.draws
    figures: dict[str, Any] = {
        "name": measurement.name,
        "photos_per_s": photos / typical,
        "noised_per_s": draws * photos / typical,
        "cpu_s": work / (draws * photos),
        "seconds": [round(value, 3) for value in seconds],
        "precision": str(precision).partition(".")[2],
        "threads": torch.get_num_threads(),
        "peak_gb": max(peaks),
    }
    if measurement.step == "ours":
        figures["degradation_s"] = cost
        figures["degradation_share"] = cost / (cost + (typical if gpu else work))
    return asdict(measurement) | figures


def measure_data(photos: Path, crops_per_part: int, batches: int = 60) -> dict[str, Any]:
    """Crops per second, and per second of processor time, that stage 2 is given: 16 of 128 px and
    the P_D view of each part in a batch, all kinds, photos decoded before."""
    torch.set_num_threads(1)
    config = DataConfig(photos, crops_per_part=crops_per_part, validation_samples=1)
    train, _ = open_data(config, Sizes(), seed=0, reads={"gt", "lq", "native_view", "statistics"})
    train = train.sized(16)
    train.finish(train[0], home())
    _synchronize()
    mark, worked = time.perf_counter(), time.process_time()
    for number in range(1, batches + 1):
        train.finish(train[number], home())
    _synchronize()
    passed, work = time.perf_counter() - mark, time.process_time() - worked
    figures = {"crops_per_part": crops_per_part, "crops_per_s": 16 * batches / passed,
             "crops_per_cpu_s": 16 * batches / work}  # fmt: skip
    log.info("data path, %d crops per part: %.1f crops/s, %.1f per second of processor",
             *figures.values())  # fmt: skip
    return figures


def _batches(measurement: Measurement, sizes: Sizes) -> RestorationBatches:
    """Of random photos."""
    generator = torch.Generator().manual_seed(0)
    side = 2 * measurement.resolution
    coarse = torch.rand(4, 3, 24, 24, generator=generator)
    smooth = F.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)
    return RestorationBatches(
        [(photo * 255).byte() for photo in smooth],
        batch_size=measurement.batch_size,
        crop=measurement.resolution,
        clip_size=sizes.vision_image,
        seed=0,
        kinds=DEFAULT_TYPES,
        reads={"gt", "lq", "clip_view"},
    )


Step = Callable[[dict[str, Tensor]], Tensor]
Ready = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""What happens to a batch before it is measured."""


def our_step(measurement: Measurement, sizes: Sizes) -> tuple[Step, Ready, list[nn.Parameter]]:
    """Stage 1 as `training.train_control` runs it."""
    base = Base(sizes, build_unet(sizes), build_vae(sizes), build_vision(sizes))
    models = Models(sizes, DEFAULT_TYPES, EPSILON, WHOLE, base)
    loop = LoopConfig(out=Path(tempfile.gettempdir()), compile=measurement.compile)
    config = ControlConfig(
        loop,
        DataConfig(Path("none"), crop=measurement.resolution),
        ModelConfig(gradient_checkpointing=measurement.checkpointing),
        draws=measurement.draws,
    )
    trainable = prepare(models, config)
    nn.Module.to(models, home())
    loss = make_loss(models, config)
    generator = torch.Generator(home()).manual_seed(0)

    def ready(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return batch | encoded(models, batch)._asdict() if measurement.encoded else batch

    return lambda batch: loss(batch, generator)["loss"], ready, list(trainable.parameters())


def diffusers_step(
    measurement: Measurement, sizes: Sizes
) -> tuple[Step, Ready, list[nn.Parameter]]:
    """The step of diffusers' train_controlnet.py: ControlNet in fp32, the rest in bf16 or fp32."""
    from diffusers import ControlNetModel
    from transformers import CLIPTextConfig, CLIPTextModel

    device, frozen = home(), half("auto")
    unet = build_unet(sizes)
    control: Any = ControlNetModel.from_unet(unet)
    nn.Module.to(control.train(), device)
    text: Any = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=sizes.context_width,
            intermediate_size=4 * sizes.context_width,
            num_hidden_layers=sizes.vision_layers // 2,
            num_attention_heads=sizes.context_width // 64,
        )
    )
    vae = build_vae(sizes)
    for module in (unet, vae, text):
        nn.Module.to(module.requires_grad_(False), device, frozen)
    if measurement.checkpointing:
        control.enable_gradient_checkpointing()
    process = scheduler(EPSILON)

    def step(batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast(device.type, enabled=False):  # the script casts these by hand
            pixels = (batch["gt"] * 2 - 1).to(frozen)
            latents = vae.encode(pixels).latent_dist.sample() * SD15_LATENT_SCALE
            noise = torch.randn_like(latents)
            timestep = torch.randint(0, TIMESTEPS, (len(latents),), device=device)
            noisy = process.add_noise(latents.float(), noise.float(), timestep).to(frozen)
            words = torch.randint(0, 49408, (len(latents), 77), device=device)
            context = text(words, return_dict=False)[0]
        down, middle = control(
            noisy,
            timestep,
            encoder_hidden_states=context,
            controlnet_cond=batch["lq"].to(frozen),
            return_dict=False,
        )
        with torch.autocast(device.type, enabled=False):
            predicted = unet(
                noisy,
                timestep,
                encoder_hidden_states=context,
                down_block_additional_residuals=[h.to(frozen) for h in down],
                mid_block_additional_residual=middle.to(frozen),
                return_dict=False,
            )[0]
        return F.mse_loss(predicted.float(), noise.float())

    return step, lambda batch: batch, list(control.parameters())


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))
