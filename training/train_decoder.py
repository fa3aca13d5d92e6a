"""Stage 2, the degradation-aware decoder: `python -m training.train_decoder --help`."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from diff_restorer import DetailPath, aware_decode, encode_with_features
from diff_restorer.checkpoint import open_safetensors
from diff_restorer.decoder import PIXELS, Features
from diff_restorer.similarity import psnr

from .batch_files import networks_digest, require_origin
from .common import (
    DataConfig,
    ModelConfig,
    data_for,
    half,
    in_batches,
    to_home,
)
from .config import run_program
from .data import Batch, Batches, Item, RestorationBatches, sampling_noise, seeded, to_device
from .diffusion import sample
from .loop import LoopConfig, Stage, maybe_compile
from .losses import (
    PatchDiscriminator,
    Perceptual,
    adaptive_weight,
    adversarial,
    hinge_discriminator,
    psnr_loss,
)
from .models import Models, own_precision, psnr_gain, suited, to_pixels
from .photos import PhotoStore
from .sheets import save_sheet
from .stages import run_stage, stage_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GanConfig:
    """A hinge PatchGAN, meant for a second run that starts from the first one's file."""

    weight: float = 0.0
    """Weight of the adversarial term, times an adaptive weight of at most 1; 0 is no GAN."""
    start: int = 500
    """Step at which generator and discriminator begin to play."""
    width: int = 64
    """Channels of the discriminator's first layer."""


@dataclass(frozen=True)
class Config:
    """Pixel and perceptual distance on latents of clean photos and of stage 1's samples."""

    loop: LoopConfig
    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    latents: Path | None = None
    """File of `sample_decoder_data`; without it latents are encoded from clean photos."""
    sample_steps: int = 0
    """Without `latents`: sampling steps of latents that stage 1 samples here and now; 0 for none.
    Needs no file, and costs a few evaluations of the UNet at each step."""
    sampled_share: float = 0.5
    """Share of batches whose latents are sampled."""
    latent_noise: float = 0.1
    """Largest standard deviation of the noise on encoded latents (scaled latents have 1)."""
    fusion_first: int = 0
    """Steps in which fusion blocks alone train, before the decoder joins them."""
    pixel_loss: Literal["l1", "psnr"] = "l1"
    """L1 as in StableSR, or minus the PSNR of each photo, which minds small damage more."""
    psnr_floor: float = 1e-4
    """Mean squared error beyond which `psnr` gains nothing. In its first 50 steps a fresh decoder
    gains three times as much on noise with 1e-3: photos that need little hold it back less."""
    lpips_weight: float = 0.0
    """Weight of the perceptual term beside the pixel loss; StableSR's recipe has 1."""
    lpips_weights: Path | None = None
    """torchvision's VGG16 for LPIPS; else the torch hub cache's. Where there is none, the distance
    of local spectra takes its place, and the log says so."""
    gan: GanConfig = field(default_factory=GanConfig)
    """Adversarial term."""
    doubt: float = 0.0
    """Share of photos whose P_D is another photo's or zero."""
    without_degradation: bool = False
    """Ablation: pooled P_D is zero."""
    without_diffusion: bool = False
    """Ablation: the latent of the degraded photo itself is decoded, without noise."""
    trust_tone: bool = False
    """A fresh detail path starts with the sampled latents' tone, however bad that is on the crops
    that are validated: of 64 px a finished stage 1 sees too little."""
    validation_steps: int = 20
    """Sampling steps of the validation pictures."""

    @property
    def reads_latents(self) -> bool:
        """Whether it wants latents that were sampled before."""
        return self.sampled_share > 0 and not self.sample_steps


SAMPLED = "sampled"
"""Key of a batch whose latents are to be sampled, of no size."""


class Sampled(NamedTuple):
    """Latents that stage 1 sampled."""

    numbers: list[int]
    """Of their batches."""
    latents: Tensor
    """(M, B, 4, h, w), scaled."""
    seed: int
    """Of the batches."""
    with_noise: bool = False
    """Whether the noise that they were sampled from is handed on, too."""

    def rows(self, place: int) -> dict[str, Tensor]:
        """Of the batch at that place of `numbers`: `latent`, and `noise` if it is wanted."""
        rows = {"latent": self.latents[place].float()}
        if self.with_noise:
            generator = sampling_noise(self.seed, self.numbers[place])
            rows["noise"] = torch.randn(rows["latent"].shape, generator=generator)
        return rows


class DecoderBatches(Dataset[Any]):
    """Fresh batches without latents, and batches with the latents that stage 1 sampled."""

    def __init__(
        self,
        batches: RestorationBatches,
        sampled: Sampled | None = None,
        share: float = 0.0,
    ) -> None:
        """Puts both together.

        Args:
            batches: Fresh ones, of the size that the latents were sampled in.
            sampled: Latents; without them the batches of `share` ask for latents to be sampled.
            share: Of the batches with sampled latents.
        """
        self.batches, self.sampled, self.share = batches, sampled, share
        self.again = batches.with_seed(sampled.seed) if sampled else batches

    def __len__(self) -> int:
        return len(self.batches)

    def sized(self, batch_size: int) -> DecoderBatches:
        """The same in batches of another size, which sampled ones cannot have."""
        if self.sampled and batch_size != self.batches.batch_size:
            raise ValueError(
                f"--loop.batch-size: found {batch_size}, but the latents were sampled in batches "
                f"of {self.batches.batch_size}"
            )
        return type(self)(self.batches.sized(batch_size), self.sampled, self.share)

    def __getitem__(self, number: int) -> tuple[Item, dict[str, Tensor]]:
        generator = seeded(self.batches.seed, 3, number)
        if float(torch.rand((), generator=generator)) >= self.share:
            return self.batches[number], {}
        if self.sampled is None:
            return self.batches[number], {SAMPLED: torch.empty(0)}
        place = int(torch.randint(len(self.sampled.numbers), (), generator=generator))
        return self.again[self.sampled.numbers[place]], self.sampled.rows(place)

    def finish(self, item: tuple[Item, dict[str, Tensor]], device: torch.device) -> Batch:
        """The batch on `device`, with the key `latent`, (B, 4, h, w), where it was sampled,
        and SAMPLED where it is to be."""
        drawn, more = item
        moved = {key: to_device(value, device) for key, value in more.items()}
        return self.batches.finish(drawn, device) | moved


def read_sampled(
    batches: RestorationBatches, latents: Path, networks: Mapping[str, str] | None = None
) -> Sampled:
    """Latents of a file, which must belong to these photos and settings.

    Args:
        batches: Fresh ones of this run.
        latents: The file.
        networks: Digests by name of what must be as it was when they were sampled.

    Raises:
        ValueError: They came from other photos, settings or networks, so that latents and photos
            would not belong together; or the file does not tell.
    """
    with open_safetensors(latents) as file:
        origin = json.loads((file.metadata() or {}).get("origin", "null"))
    if origin is None:
        raise ValueError(
            f"--latents: {latents} does not tell what its photos were; make it anew with "
            "training.sample_decoder_data"
        )
    require_origin(batches, origin, f"--latents: {latents} was sampled")
    for name, found in (networks or {}).items():
        if origin.get("networks", {}).get(name) != found:
            raise ValueError(
                f"--latents: {latents} was sampled with another {name} than --model has; make it "
                "anew with training.sample_decoder_data"
            )
    held = load_file(latents)
    return Sampled(held["numbers"].tolist(), held["latents"], origin["seed"])


def doubted(pooled: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Pooled P_D (P, C) as it may be wrong: of a share, half is another photo's and half is zero.

    Ours: so that one wrong label does not decide alone what the decoder does to a photo.
    """
    if not share:
        return pooled
    chance = torch.rand(len(pooled), 1, generator=generator, device=generator.device)
    chance = chance.to(pooled.device)
    wrong = torch.where(chance < share / 2, torch.zeros_like(pooled), pooled.roll(1, dims=0))
    return torch.where(chance < share, wrong, pooled)


class DecoderLoss:
    """(batch, generator) -> `loss` and the terms that it is made of, all with their gradients."""

    def __init__(self, models: Models, config: Config) -> None:
        self.models, self.config = models, config
        self.trunk, self.extension = models.decoder.trunk(models.vae), models.decoder.extension
        device = next(models.parameters()).device
        self.perceptual = (
            Perceptual(config.lpips_weights).to(device) if config.lpips_weight else None
        )
        self.discriminator = (
            PatchDiscriminator(config.gan.width).to(device) if config.gan.weight else None
        )
        self.playing = False
        self._read_fast = maybe_compile(self.read, config.loop)
        self._decode_fast = maybe_compile(self.decode, config.loop)

    @property
    def trainable(self) -> nn.Module:
        """The decoder, and the discriminator: one optimizer and one checkpoint for both.

        Each one's terms give the other no gradient, and their norms are limited apart, so that one
        step trains both as alternating steps would, with the images of the same forward pass.
        """
        if self.discriminator is None:
            return self.models.decoder
        return nn.ModuleDict({"decoder": self.models.decoder, "discriminator": self.discriminator})

    def begin_step(self, step: int) -> None:
        """Which parts train at this step."""
        if self.config.fusion_first:
            decoder = self.models.decoder
            for module in (decoder.decoder, decoder.post_quant_conv):
                module.requires_grad_(step >= self.config.fusion_first)
        self.playing = self.discriminator is not None and step >= self.config.gan.start

    @torch.no_grad()
    def read(self, degraded: Tensor, photo: Tensor | None = None) -> tuple[Tensor, Features]:
        """Scaled latent of the pixels `photo`, or of `degraded` itself; features of `degraded`."""
        photos = degraded if photo is None else torch.cat([degraded, photo])
        with own_precision(self.models.vae):
            moments, features = encode_with_features(
                self.trunk, suited(self.models.vae, photos), self.extension.levels
            )
        features = features | {PIXELS: photos}
        count = len(degraded)
        mean = moments[-count:, : self.trunk.latent_channels].float()
        return mean * self.models.latent_scale, {k: v[:count] for k, v in features.items()}

    def decode(
        self, latent: Tensor, features: Features, pooled: Tensor, statistics: Tensor
    ) -> Tensor:
        """Pixels of a scaled latent.

        Args:
            latent: (B, 4, h, w).
            features: Of the degraded photos.
            pooled: Pooled P_D, (B, context_width).
            statistics: `photo_statistics` of the whole degraded photos, (B, 51).
        """
        raw, condition = latent / self.models.latent_scale, self.extension.condition
        modulation = condition(pooled, statistics)
        return aware_decode(self.trunk, self.extension, raw, features, modulation)

    @torch.no_grad()
    def restored(self, batch: Batch, steps: int, generator: torch.Generator) -> Tensor:
        """Degraded crops as the workflows restore them.

        Args:
            batch: `lq`, `statistics` and the views that the prompts are read from, a row per crop.
            steps: Of sampling; 0 decodes the crops' own latents.
            generator: Of the noise to start from, on the CPU as the host's.

        Returns:
            (B, 3, H, W) around [0, 1].
        """
        prompt = self.models.read(batch)
        latent, features = self.read(to_pixels(batch["lq"]))
        if steps:
            tokens = prompt.semantic, prompt.degradation
            latent = sample(self.models, latent, *tokens, steps, generator)
        pixels = self.decode(latent, features, prompt.pooled, batch["statistics"])
        return self.models.without_haze((pixels.float() + 1) / 2, prompt.pooled)

    def _latent_and_features(
        self, batch: dict[str, Tensor], generator: torch.Generator
    ) -> tuple[Tensor, Features]:
        """Scaled latents to decode, sampled or encoded with noise; and features of LQ."""
        config, lq = self.config, to_pixels(batch["lq"])
        if "latent" in batch:
            return batch["latent"], self._read_fast(lq)[1]
        if SAMPLED in batch:
            hint, features = self._read_fast(lq)
            prompt, part = self.models.read(batch), batch["part"]
            tokens = prompt.semantic[part], prompt.degradation[part]
            return sample(self.models, hint, *tokens, config.sample_steps, generator), features
        if config.without_diffusion:
            return self._read_fast(lq)
        encoded, features = self._read_fast(lq, to_pixels(batch["gt"]))
        place = {"generator": generator, "device": generator.device}
        level = config.latent_noise * torch.rand(len(encoded), 1, 1, 1, **place).to(encoded.device)
        return encoded + level * torch.randn(encoded.shape, **place).to(encoded.device), features

    def __call__(self, batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        config, part = self.config, batch["part"]
        with torch.no_grad():
            pooled = self.models.read_pooled(batch)
            latent, features = self._latent_and_features(batch, generator)
        pooled = doubted(pooled, config.doubt, generator)[part]
        pixels = self._decode_fast(latent, features, pooled, batch["statistics"][part]).float()
        image = (pixels + 1) / 2
        l1 = F.l1_loss(image, batch["gt"])
        terms = {"l1": l1}
        total = l1
        if config.pixel_loss == "psnr":
            total = psnr_loss(image, batch["gt"], config.psnr_floor)
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(image, batch["gt"])
            total = total + config.lpips_weight * terms["perceptual"]
        if self.discriminator is not None:
            total = total + self._play(terms, total, batch["gt"], pixels)
        gain = psnr_gain(image.detach(), batch["lq"], batch["gt"])
        return {"loss": total, **terms, "psnr_gain": gain}

    def _play(self, terms: dict[str, Tensor], total: Tensor, gt: Tensor, pixels: Tensor) -> Tensor:
        """What the GAN adds to the loss; adds to `terms` what is logged of it."""
        if self.discriminator is None or not self.playing:
            terms |= dict.fromkeys(
                ("gan", "gan_weight", "discriminator"), total.new_tensor(torch.nan)
            )
            return total.new_zeros(())
        terms["gan"] = adversarial(self.discriminator, pixels)
        terms["gan_weight"] = self.config.gan.weight * adaptive_weight(total, terms["gan"], pixels)
        terms["discriminator"] = hinge_discriminator(self.discriminator, to_pixels(gt), pixels)
        return terms["gan_weight"] * terms["gan"] + terms["discriminator"]


@dataclass(frozen=True)
class Validation:
    """Restores photos that training never sees, draws and scores them."""

    models: Models
    loss: DecoderLoss
    batch: Batch
    config: Config
    samples: bool
    """Whether stage 1 samples the latents; else they are the degraded photos' own."""

    @torch.no_grad()
    def restored(self) -> Tensor:
        """(B, 3, H, W), around [0, 1]."""
        generator = torch.Generator().manual_seed(0)
        steps = self.config.validation_steps if self.samples else 0
        some = in_batches(self.batch, self.config.loop.batch_size)
        return torch.cat([self.loss.restored(batch, steps, generator) for batch in some])

    def psnr(self) -> Tensor:
        """Mean over all photos, dB."""
        return psnr(self.restored(), self.batch["gt"]).mean()

    def __call__(self, step: int, folder: Path) -> dict[str, float]:
        """Draws the sheet of a step; scores, with the mean gain of each kind."""
        lq, gt, image = self.batch["lq"], self.batch["gt"], self.restored()
        before, after = psnr(lq, gt), psnr(image, gt)
        labels = [self.models.types[label] for label in self.batch["label"]]
        captions = [
            f"{kind} {a:.1f} -> {b:.1f} dB"
            for kind, a, b in zip(labels, before, after, strict=True)
        ]
        columns = {"degraded": lq, "restored": image, "clean": gt}
        save_sheet(folder / f"{step:07d}.jpg", columns, captions)
        degraded = torch.tensor([label != "clean" for label in labels])
        scores = {
            "psnr_lq": float(before[degraded].mean()),
            "psnr": float(after[degraded].mean()),
        }
        for kind in self.models.types:
            rows = torch.tensor([label == kind for label in labels])
            score = after if kind == "clean" else after - before
            scores[kind] = float(score[rows].mean())
        return scores


def prepare(models: Models, config: Config) -> None:
    """Freeze everything but the decoder, and leave out what is left out.

    Raises:
        ValueError: Sampled latents are given to a training without diffusion.
    """
    if config.without_diffusion and config.latents:
        raise ValueError("--without-diffusion: it decodes no sampled latents; leave out --latents")
    if config.without_degradation:
        models.leave_out("decoder_without_degradation")
    if config.without_diffusion:
        models.leave_out("without_diffusion")
    models.freeze(half(config.loop.precision))
    models.decoder.requires_grad_(True)


def _check_sampling(models: Models, config: Config, loaded: set[str]) -> None:
    if config.fusion_first and models.decoder.decoder is None:
        raise ValueError("--fusion-first: this decoder has a detail path and no fusion blocks")
    if not config.sample_steps:
        return
    if config.latents or config.without_diffusion:
        other = "--latents" if config.latents else "--without-diffusion"
        raise ValueError(f"--sample-steps: latents come from {other} already; leave out one")
    if missing := {"control.", "base.unet."} - loaded:
        raise ValueError(f"--sample-steps: no file of --model.init has {sorted(missing)}")


@torch.no_grad()
def _doubt_tone(path: DetailPath, score: Callable[[], Tensor]) -> None:
    """Start without the sampled latents' tone where that is worse than the photos' own, as after a
    stage 1 of minutes."""
    trusting = score()
    toned = {key: value.clone() for key, value in path.toned.state_dict().items()}
    for parameter in path.toned.parameters():
        parameter.zero_()
    if score() > trusting:
        log.info("what stage 1 samples has no better tone than the photos: not taken at the start")
    else:
        path.toned.load_state_dict(toned)


def main(config: Config) -> Path:
    """Train, and write the complete file."""
    return run_stage(build, config, ("base.vae.", "base.clip_vision.", "prompt_processor."))


def build(
    models: Models,
    loaded: set[str],
    config: Config,
    store: PhotoStore | None = None,
    sampled: Sampled | None = None,
) -> tuple[Stage, Batches]:
    """The stage, and its data from the photos of `store`.

    Args:
        models: Are changed.
        loaded: File prefixes that they have.
        config: Settings of the program.
        store: Photos that are decoded already.
        sampled: Latents of stage 1, where they are in no file.

    Raises:
        ValueError: As `prepare` and `read_sampled`.
    """
    # Before it is frozen in bf16, which would change it.
    vae = networks_digest(models.vae) if config.latents else ""
    fresh = not loaded & set(models.decoder_parts)
    if fresh:
        models.start_decoder()
    prepare(models, config)
    _check_sampling(models, config, loaded)
    reads = {"gt", "lq", "statistics", models.degradation_key}
    if config.sample_steps:
        reads.add("clip_view")
    train, fixed = data_for(models, config.data, config.loop.seed, reads, store)
    train = train.sized(config.loop.batch_size)
    if config.latents is not None:
        sampled = read_sampled(train, config.latents, {"VAE": vae})
    share = config.sampled_share if sampled or config.sample_steps else 0.0
    batches = DecoderBatches(train, sampled, share)
    loss = DecoderLoss(models, config)

    samples = "control." in loaded and not config.without_diffusion
    validation = Validation(models, loss, to_home(fixed), config, samples)
    path = models.decoder.extension
    hidden = path.hidden() if isinstance(path, DetailPath) else ()
    if fresh and isinstance(path, DetailPath) and not config.trust_tone:
        _doubt_tone(path, validation.psnr)
    others = {prefix for prefix in loaded if not prefix.startswith("decoder.")}
    parts = (*sorted(others | {"prompt_processor."}), *models.decoder_parts)
    sides = () if loss.discriminator is None else (models.decoder, loss.discriminator)
    return (
        stage_of(models, parts, loss.trainable, loss, validation, loss.begin_step, sides, hidden),
        batches,
    )


if __name__ == "__main__":
    run_program(main, Config, __doc__)
