"""Stage 1, control module and prompt processor: `python -m training.train_control --help`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diff_restorer.checkpoint import V_PREDICTION
from diff_restorer.similarity import psnr

from .common import DataConfig, ModelConfig, data_for, half, in_batches, to_home
from .config import run_program
from .data import Batches
from .diffusion import TIMESTEPS, first_step_noise, sample, scheduler
from .encode_control_data import encoded, read_encoded
from .loop import LoopConfig, Stage, maybe_compile
from .losses import Classification, band_means, kind_loss, kind_scores
from .models import SD15, Models, to_pixels
from .photos import PhotoStore
from .sheets import save_sheet
from .stages import run_stage, stage_of
from .stepping import Loss


@dataclass(frozen=True)
class Config:
    """Noise MSE + weighted classification loss (Diff-Restorer, stage 1)."""

    loop: LoopConfig
    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    encoded: Path | None = None
    """Folder of `encode_control_data`, whose batches are trained on: half the arithmetic of a step
    (counted, SD 1.5 at 512 px), for as many degradations of each photo as were encoded."""
    ce_weight: float = 0.1
    """Weight of the classification loss; 0 is the ablation without it."""
    classification: Classification = "ce"
    """Cross-entropy of one kind per photo, or binary cross-entropy of each kind for mixed ones."""
    mild: float = 0.0
    """Severity below which a kind counts less in that loss, which is ours; at 0 all count alike."""
    semantic_dropout: float = 0.1
    """Share of samples whose P_S is zero, so that CFG stays possible."""
    draws: int = 1
    """Timesteps and noises per photo and step: where encoding photos costs more than denoising
    them, as in Nano, more of them learn faster."""
    first_step: float = 0.0
    """Share of the draws that are at the last timestep, from the degraded photo under noise, as the
    sampler's first step is; it decides on brightness and haze. Ours."""
    train_degradation: bool = True
    """Train P_D and the classifier, too, as the paper does. Nano's come from the training of its
    vision encoder, on larger batches: stage 1 took 2 % of the accuracy away."""
    train_unet: bool = False
    """Train the UNet, too. The paper freezes SD 1.5's; Nano has none to start from."""
    semantic_gradient: Literal["unet", "decoder"] = "unet"
    """Where P_S learns from: the whole UNet, as in the paper, or its middle and decoder alone, for
    5 % less arithmetic and without the encoder's activations. The UNet reads it everywhere either
    way, so that files and nodes are the same. Ours."""
    without_semantic: bool = False
    """Ablation: P_S is zero."""
    degradation_in_control: Literal["context", "time", "none"] = "context"
    """How P_D enters the control module: as cross-attention context; as ablations, pooled and added
    to the time embedding, or not at all (its context is then P_S)."""
    validation_steps: int = 20
    """Sampling steps of the validation pictures."""


def prepare(models: Models, config: Config) -> nn.Module:
    """Freeze what is frozen and leave out what is left out; returns what trains.

    Raises ValueError where SD 1.5's UNet would train, which no file of ours could keep, or the
    classification loss is taken from a classifier that does not train.
    """
    if not config.train_degradation and config.ce_weight != Config.ce_weight:
        raise ValueError(
            f"--ce-weight {config.ce_weight}: without --train-degradation nothing learns from the "
            "classification loss, so its weight changes nothing; give both"
        )
    if config.train_unet and models.base_model == SD15:
        raise ValueError("--train-unet: a file for SD 1.5 holds no UNet; it stays frozen")
    if config.train_degradation:  # else the file keeps the way that its classifier was trained
        models.train_classifier(config.classification)
    if config.without_semantic:
        models.leave_out("without_semantic")
    if config.degradation_in_control != "context":
        models.leave_out(f"control_{config.degradation_in_control}")
    models.freeze(half(config.loop.precision))
    trainable = nn.ModuleList([models.control, models.prompt])
    if config.train_unet:
        trainable.append(models.unet)
    trainable.requires_grad_(True)
    if not config.train_degradation:
        models.prompt.degradation.requires_grad_(False)
        models.prompt.classifier.requires_grad_(False)
    if config.without_semantic:
        models.prompt.semantic.requires_grad_(False)
    if config.semantic_gradient == "decoder":
        for block in models.unet.down_blocks:
            block.register_forward_pre_hook(_without_gradient_of_p_s, with_kwargs=True)
    if config.model.gradient_checkpointing:
        models.checkpoint_gradients()
    return trainable


def _without_gradient_of_p_s(
    _: nn.Module, args: tuple[Any, ...], given: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before a block of the UNet's encoder."""
    p_s = given.get("encoder_hidden_states")  # not where a block has no attention
    return args, given if p_s is None else given | {"encoder_hidden_states": p_s.detach()}


def make_loss(models: Models, config: Config) -> Loss:
    """(batch, generator) -> `loss` and the terms that it is made of."""
    process = scheduler(models.prediction, models.base_model)

    def repeated(value: Tensor) -> Tensor:
        return value.repeat(config.draws, *[1] * (value.ndim - 1))

    def predict(
        noisy: Tensor, timestep: Tensor, hint: Tensor, whole: Tensor, close: Tensor, part: Tensor,
        keep: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        prompt = models.prompt_of(whole, close)
        p_s, p_d = (repeated(p[part]) for p in (prompt.semantic, prompt.degradation))
        predicted = models.denoise(noisy, timestep, hint, p_s * keep, p_d)
        return predicted.float(), prompt.logits.float()

    predict_fast = maybe_compile(predict, config.loop)
    encode = maybe_compile(models.encode, config.loop)

    def loss(batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        size = config.draws * len(batch["part"])
        place = {"generator": generator, "device": generator.device}
        with torch.no_grad():
            seen = encoded(models, batch, encode)
            clean, hint = repeated(seen.clean), repeated(seen.hint)
        timestep = torch.randint(0, TIMESTEPS, (size,), **place).to(clean.device)
        noise = torch.randn(clean.shape, **place).to(clean.device)
        if config.first_step:
            first = torch.rand(size, **place).to(clean.device) < config.first_step
            timestep = torch.where(first, TIMESTEPS - 1, timestep)
            from_photo = first_step_noise(process, noise, clean, hint)
            noise = torch.where(first[:, None, None, None], from_photo, noise)
        dropped = torch.rand(size, 1, 1, **place).to(clean.device) < config.semantic_dropout
        noisy = process.add_noise(clean, noise, timestep)
        keep = (~dropped).float()
        predicted, logits = predict_fast(
            noisy, timestep, hint, seen.whole, seen.close, batch["part"], keep
        )
        velocity = models.prediction == V_PREDICTION
        target = process.get_velocity(clean, noise, timestep) if velocity else noise
        per_sample = F.mse_loss(predicted, target, reduction="none").flatten(1).mean(dim=1)
        mse = per_sample.mean()
        kinds = kind_loss(logits, batch, config.classification, config.mild)
        terms = {"loss": mse + config.ce_weight * kinds, "mse": mse, config.classification: kinds}
        return terms | band_means(per_sample, timestep, TIMESTEPS)

    return loss


def main(config: Config) -> Path:
    """Train, and write a file with everything that `--model.init` had and stage 1 made."""
    needed = ("base.vae.", "base.clip_vision.")
    if not config.train_degradation:
        needed += ("prompt_processor.",)
    return run_stage(build, config, needed)


def build(
    models: Models, loaded: set[str], config: Config, store: PhotoStore | None = None
) -> tuple[Stage, Batches]:
    """The stage, and its data from the photos of `store`; raises ValueError as `prepare`, or where
    `encoded` has been made of other photos or networks."""
    reads = {"gt", "lq", "clip_view", models.degradation_key}
    fresh, fixed = data_for(models, config.data, config.loop.seed, reads, store)
    train: Batches = fresh
    if config.encoded is not None:
        # Before the networks are frozen in bf16: by their own weights they are known.
        train = read_encoded(config.encoded, fresh.sized(config.loop.batch_size), models)
    if "control." not in loaded:
        models.start_control()
    trainable = prepare(models, config)
    validation = to_home(fixed)

    @torch.no_grad()
    def validate(step: int, folder: Path) -> dict[str, float]:
        generator = torch.Generator().manual_seed(0)
        images: list[Tensor] = []
        logits: list[Tensor] = []
        for batch in in_batches(validation, config.loop.batch_size):
            prompt = models.read(batch)
            hint, steps = models.encode(to_pixels(batch["lq"])), config.validation_steps
            latent = sample(models, hint, prompt.semantic, prompt.degradation, steps, generator)
            images.append((models.decode(latent) + 1) / 2)
            logits.append(prompt.logits)
        image = torch.cat(images)
        labels = [models.types[label] for label in validation["label"]]
        save_sheet(
            folder / f"{step:07d}.jpg",
            {"degraded": validation["lq"], "stage 1": image, "clean": validation["gt"]},
            labels,
        )
        degraded = torch.tensor([label != "clean" for label in labels])
        scores = kind_scores(torch.cat(logits), validation["kinds"], config.classification)
        return {
            "psnr_lq": float(psnr(validation["lq"], validation["gt"])[degraded].mean()),
            "psnr": float(psnr(image, validation["gt"])[degraded].mean()),
            **{name: float(value) for name, value in scores.items()},
        }

    made = sorted(loaded | {"base.unet.", "control.", "prompt_processor."})

    return stage_of(models, made, trainable, make_loss(models, config), validate), train


if __name__ == "__main__":
    run_program(main, Config, __doc__)
