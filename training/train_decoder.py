"""Stage 2, the degradation-aware decoder: `python -m training.train_decoder --help`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from diff_restorer import aware_decode, encode_with_features

from .common import DataConfig, ModelConfig, checkpoint_info, open_data, open_models
from .data import RestorationSamples
from .diffusion import sample
from .loop import LoopConfig, Stage, maybe_compile, run
from .models import psnr, to_pixels
from .sheets import save_sheet


@dataclass(frozen=True)
class Config:
    """L1 on latents that are half encoded from clean photos, half sampled by stage 1."""

    loop: LoopConfig
    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    latents: Path | None = None
    """File of `sample_decoder_data`; without it all latents are encoded from clean photos."""
    sampled_share: float = 0.5
    """Share of samples that take their latent from `latents`."""
    latent_noise: float = 0.1
    """Largest standard deviation of the noise on encoded latents (scaled latents have 1)."""
    validation_steps: int = 20
    """Sampling steps of the validation pictures."""


class DecoderSamples(Dataset[dict[str, Tensor]]):
    """Fresh samples without a latent, and cached ones with the latent that stage 1 sampled."""

    def __init__(
        self, samples: RestorationSamples, latents: Path | None, share: float, shape: torch.Size
    ) -> None:
        cached = load_file(latents) if latents else {}
        self.samples, self.shape = samples, shape
        self.indices, self.latents = cached.get("indices"), cached.get("latents")
        self.share = share if latents else 0.0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        use_cache = float(torch.rand((), generator=generator)) < self.share
        if not use_cache or self.indices is None or self.latents is None:
            empty = {"latent": torch.zeros(self.shape), "sampled": torch.tensor(False)}
            return self.samples[index] | empty
        place = int(torch.randint(len(self.indices), (), generator=generator))
        cached = {"latent": self.latents[place].float(), "sampled": torch.tensor(True)}
        return self.samples[int(self.indices[place])] | cached


def main(config: Config) -> Path:
    """Train, and write the complete file."""
    models, found = open_models(
        config.model, ("base.vae.", "base.clip_vision.", "prompt_processor.")
    )
    if "decoder.vae." not in found:
        models.start_decoder()
    models.requires_grad_(False)
    models.decoder.requires_grad_(True)
    train, validation = open_data(config.data, config.model.sizes, config.loop.seed)
    side = config.data.crop // 8
    shape = torch.Size((config.model.sizes.latent_channels, side, side))
    samples = DecoderSamples(train, config.latents, config.sampled_share, shape)
    trunk, fusion = models.decoder.trunk(models.vae), models.decoder.fusion

    def read(both: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        with torch.no_grad():
            moments, features = encode_with_features(trunk, both, fusion.levels)
            mean = moments[: len(both) // 2, : shape[0]].float() * models.latent_scale
            return mean, {level: f[len(both) // 2 :] for level, f in features.items()}

    def decode(latent: Tensor, features: dict[int, Tensor], pooled: Tensor) -> Tensor:
        return aware_decode(trunk, fusion, latent / models.latent_scale, features, pooled)

    read_fast, decode_fast = maybe_compile(read, config.loop), maybe_compile(decode, config.loop)

    def loss(batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        with torch.no_grad():
            pooled = models.read(batch).pooled
        clean, features = read_fast(to_pixels(torch.cat([batch["gt"], batch["lq"]])))
        level = config.latent_noise * torch.rand(len(clean), 1, 1, 1, generator=generator)
        encoded = clean + level * torch.randn(clean.shape, generator=generator)
        latent = torch.where(batch["sampled"][:, None, None, None], batch["latent"], encoded)
        image = (decode_fast(latent, features, pooled).float() + 1) / 2
        l1 = F.l1_loss(image, batch["gt"])
        gain = psnr(image.detach(), batch["gt"]) - psnr(batch["lq"], batch["gt"])
        return {"loss": l1, "psnr_gain": gain.clamp(-20, 30).mean()}

    @torch.no_grad()
    def validate(step: int, folder: Path) -> dict[str, float]:
        prompt = models.read(validation)
        hint = models.encode(to_pixels(validation["lq"]))
        _, features = read(to_pixels(torch.cat([validation["gt"], validation["lq"]])))
        if "control." in found:
            generator = torch.Generator().manual_seed(0)
            steps = config.validation_steps
            latent = sample(models, hint, prompt.semantic, prompt.degradation, steps, generator)
        else:  # before stage 1: the LQ photo's own latent
            latent = hint
        image = (decode(latent, features, prompt.pooled) + 1) / 2
        before = psnr(validation["lq"], validation["gt"])
        after = psnr(image, validation["gt"])
        labels = [models.types[label] for label in validation["label"]]
        captions = [
            f"{kind} {a:.1f} -> {b:.1f} dB"
            for kind, a, b in zip(labels, before, after, strict=True)
        ]
        columns = {"degraded": validation["lq"], "restored": image, "clean": validation["gt"]}
        save_sheet(folder / f"{step:07d}.jpg", columns, captions)
        degraded = validation["label"] != len(models.types) - 1  # without the clean ones
        scores = {
            "psnr_lq": float(before[degraded].mean()),
            "psnr": float(after[degraded].mean()),
        }
        for kind in models.types:
            rows = torch.tensor([label == kind for label in labels])
            score = after if kind == "clean" else after - before
            scores[kind] = float(score[rows].mean())
        return scores

    def export(path: Path, settings: dict[str, Any]) -> None:
        models.save(
            path,
            (*sorted(found | {"prompt_processor."}), "decoder.fusion.", "decoder.vae."),
            checkpoint_info(models, settings),
            torch.float32,
        )

    return run(Stage(models.decoder, loss, validate, export), samples, config.loop)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
