"""How one stage of Nano hands its result to the next: in files that resume, or in memory."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .. import export, sample_decoder_data, train_decoder
from ..common import checkpoint_info, home, open_models
from ..config import settings, table_name
from ..loop import Spent, fit
from ..photos import PhotoStore
from ..progress import peak_memory
from ..stages import run_stage

log = logging.getLogger(__name__)

TRAINING = ("data", "forward and backward", "optimizer")
"""Parts of a stage's time in which it sees crops."""


@dataclass(frozen=True)
class Slot:
    """A stage's time."""

    name: str
    """Of the stage and its run folder."""
    began: float
    """When it began, of `time.perf_counter`."""
    ends: float
    """When it is over; infinite where steps are counted."""

    @property
    def middle(self) -> float:
        """Half of it is over."""
        return (self.began + self.ends) / 2


class InFiles:
    """Each stage starts from the files of earlier ones, and goes on where its checkpoint is."""

    def __init__(self, init: tuple[Path, ...]) -> None:
        """Starts from these files."""
        self._files = init
        self._latents: Path | None = None
        self._has_decoder = False

    def train(self, program: Any, config: Any, slot: Slot) -> None:
        config = self._opened(config)
        if program is train_decoder and config.reads_latents:
            config = replace(config, latents=self._latents)
        self._files += (run_stage(program.build, config, began=slot.began),)
        self._has_decoder = self._has_decoder or program is train_decoder

    def sample(self, config: sample_decoder_data.Config, slot: Slot) -> None:
        self._latents = sample_decoder_data.main(self._opened(config), until=slot.ends)

    def export(self, config: export.Config, slot: Slot) -> Path:
        return export.main(self._opened(config), until=slot.middle)

    def _opened(self, config: Any) -> Any:
        fresh = config.model.fresh_decoder and not self._has_decoder  # else that of this run
        return replace(config, model=replace(config.model, init=self._files, fresh_decoder=fresh))


@dataclass
class InMemory:
    """One set of networks on the device, and one of decoded photos, from first to last."""

    model: Any
    """Settings of the networks, with the files to start from."""
    seed: int
    """Of the weights that no file has."""
    spent: dict[str, Spent] = field(default_factory=dict)
    """Where the time of each stage went."""

    def __post_init__(self) -> None:
        self.models, self.loaded = open_models(self.model, (), self.seed)
        self._store: PhotoStore | None = None
        self._sampled: train_decoder.Sampled | None = None

    def train(self, program: Any, config: Any, slot: Slot) -> None:
        extra = {}
        if program is train_decoder and config.reads_latents:
            extra["sampled"] = self._sampled
        stage, data = program.build(
            self.models, self.loaded, config, self._photos(config.data), **extra
        )
        try:
            self.spent[slot.name] = fit(stage, data, config.loop, config, slot.began)
        except SystemExit:  # interrupted, and its weights are kept
            self.loaded |= set(stage.parts)
            self._count(slot.name, slot.began)
            raise
        self.loaded |= set(stage.parts)
        self.models.history |= {table_name(type(config)): settings(config)}

    def sample(self, config: sample_decoder_data.Config, slot: Slot) -> None:
        self.models.requires_grad_(False)
        batches = sample_decoder_data.open_batches(self.models, config, self._photos(config.data))
        began = time.perf_counter()
        numbers, latents = list[int](), list[torch.Tensor]()
        for number, latent in sample_decoder_data.sampled(
            self.models, batches, sample_decoder_data.batch_numbers(config), config
        ):
            numbers.append(number)
            latents.append(latent)
            if time.perf_counter() > slot.ends:
                break
        self._sampled = train_decoder.Sampled(numbers, torch.stack(latents), config.seed)
        self._count(slot.name, began)

    def export(self, config: export.Config, slot: Slot) -> Path:
        began = time.perf_counter()
        parts = sorted(self.loaded)
        info = checkpoint_info(self.models, {})
        fixed, written = export.write(
            self.models, parts, info, config, self._photos(config.data), slot.middle
        )
        path = export.read_back(config, fixed, written)
        self._count("export", began)
        return path

    def _count(self, name: str, began: float) -> None:
        seconds = time.perf_counter() - began
        self.spent[name] = Spent(seconds, {name: seconds}, 0, 0, peak_memory(home()))

    def rescue(self, path: Path) -> None:
        """Write what has been trained so far, for `--init`."""
        if not self.spent:
            return
        info = checkpoint_info(self.models, {})
        path.parent.mkdir(parents=True, exist_ok=True)
        self.models.save(path, sorted(self.loaded), info, torch.float32)
        log.warning(
            "what was trained before (%s) is in %s, which --init takes",
            *(", ".join(self.spent), path),
        )

    def _photos(self, data: Any) -> PhotoStore:
        """Those that are decoded, the same for all stages."""
        self._store = self._store or PhotoStore(data.memory_mb)
        return self._store

    def tell(self, out: Path, seconds: float) -> None:
        """Log where the time went, stage by stage, and leave it in <out>/summary.json; `seconds`
        are those of the whole, what no stage counts included."""
        stages = {name: _row(stage) for name, stage in self.spent.items()}
        for name, row in stages.items():
            log.info(
                "%s: %.1f s, %d steps, %d crops, %.3g crops/s while training",
                *(name, row["seconds"], row["steps"], row["crops"], row["crops_per_s"]),
            )
        parts: dict[str, float] = {}
        for stage in self.spent.values():
            for part, taken in stage.parts.items():
                parts[part] = parts.get(part, 0.0) + taken
        parts["other"] = seconds - sum(parts.values())
        shares = {part: round(taken / seconds, 4) for part, taken in parts.items()}
        peak = max((stage.peak_bytes for stage in self.spent.values()), default=0.0) / 1e9
        line = ", ".join(f"{part} {share:.1%}" for part, share in shares.items())
        log.info("%.1f s: %s; peak memory %.2f GB", seconds, line, peak)
        summary = {
            "device": torch.cuda.get_device_name() if home().type == "cuda" else "cpu",
            "seconds": round(seconds, 2),
            "shares": shares,
            "peak_gb": round(peak, 3),
            "stages": stages,
        }
        (out / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")


def _row(spent: Spent) -> dict[str, float]:
    training = sum(spent.parts.get(part, 0.0) for part in TRAINING)
    return {
        "seconds": round(spent.seconds, 2),
        "steps": spent.steps,
        "crops": spent.samples,
        "crops_per_s": round(spent.samples / training, 2) if training else 0.0,
    }
