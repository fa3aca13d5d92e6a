"""What every program does first: read its arguments, data and starting file."""

from __future__ import annotations

import functools
import logging
import os
import subprocess
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diff_restorer.checkpoint import (
    BASE_PREFIXES,
    EPSILON,
    Checkpoint,
    CheckpointInfo,
    read_checkpoint,
)
from diff_restorer.degradations import ALL_KINDS, KINDS
from diff_restorer.native import has_native_bf16
from diff_restorer.prompt_processor import DEFAULT_TYPES
from diff_restorer.views import WHOLE

from .data import PICTURES, Mixing, RestorationBatches, split
from .models import CLIP_MEAN, CLIP_STD, NANO, SD15, Models, check_base
from .networks import Sizes, sizes_of
from .pairs import PairedPhotos
from .photos import CleanPhotos, PhotoStore
from .pretrained import Sd15Config, open_base

log = logging.getLogger(__name__)

Precision = Literal["auto", "no", "bf16", "fp16"]
"""Mixed precision; `auto` is bf16 where the device computes in it, else `no`. fp16 needs a GPU."""


@dataclass(frozen=True)
class DataConfig:
    """Where photos come from, and how they are degraded and cut.

    Clean photos are degraded on the fly; pairs bring their own degradation. All kinds are drawn
    equally often, whatever the source, but for those to `oversample`.
    """

    photos: Path | None = None
    """Clean photos: a folder, a text list, a CSV manifest or tar shards. Without them the clean
    halves of the pairs are degraded."""
    pairs: tuple[Path | str, ...] = ()
    """Paired sets in their published layouts (GoPro, LOL, Rain100, RESIDE, Snow100K, RainDrop,
    RealSR, DA-CLIP's type/LQ|GT) or as tar shards: PATH, or KIND=PATH or LAYOUT=PATH where the
    folder does not say it."""
    pair_share: float = 0.5
    """Share of pairs among the photos of a kind that has pairs; with 1 it has no others."""
    looks: float = 0.0
    """Share of clean photos that get another exposure, contrast, white balance or no colour before
    they are degraded, so that a dark, flat or grey photo alone is no sign of damage."""
    softer: float = 0.0
    """Share of clean photos that first lose up to 2.5 times in resolution, so that the soft pixels
    of a camera are not taken for blur; not those that blur is put on."""
    oversample: tuple[str, ...] = ()
    """Kinds to draw more often, such as `noise noise jpeg`: each mention adds a kind's own share
    once more. Meant for a run that goes on from a finished file to mend its weakest kinds."""
    mixing: Mixing = field(default_factory=Mixing)
    """Several degradations at once (clean photos only)."""
    part: int = 320
    """Side of the parts of photos that are degraded, pixels; `crop` where that is more, and for
    SD 1.5, whose P_S and P_D are read from what is denoised, as in the nodes."""
    crop: int = 128
    """Side of the training crop in pixels, a multiple of 8 * 2^(UNet levels - 1)."""
    crops_per_part: int = 1
    """Crops that share a degraded part and its P_D: degrading costs more than cutting."""
    held_out: int = 40
    """Every n-th photo, and every n-th clean photo of each kind of pairs, is for validation."""
    validation_samples: int = 18
    """Fixed samples (held-out photos, all kinds in turn) that are validated and drawn."""
    memory_mb: int = 4096
    """Decoded photos kept in memory by each training process; the others are decoded anew."""


@dataclass(frozen=True)
class ModelConfig:
    """The networks: Nano's own, or Stable Diffusion 1.5's with `sd15.checkpoint`."""

    init: tuple[Path, ...] = ()
    """Diff-Restorer files to start from; later files win where parts repeat."""
    sizes: Sizes = field(default_factory=Sizes)
    """Widths and depths of Nano, as far as the files of `init` do not tell them."""
    sd15: Sd15Config = field(default_factory=Sd15Config)
    """Stable Diffusion 1.5 and its vision tower, frozen."""
    types: tuple[str, ...] = ()
    """Names of the degradation types where no file of `init` has a classifier, whose names stay;
    none: Nano has the eight and `clean`, SD 1.5 the eight."""
    fresh_decoder: bool = False
    """Leave the decoders of `init` behind and start the one that `sizes` names, as to give a
    finished Nano a detail path."""
    gradient_checkpointing: bool = False
    """Less memory for a third more time: stage 1 computes activations twice."""


def open_models(
    config: ModelConfig, needed: tuple[str, ...] = (), seed: int = 0
) -> tuple[Models, set[str]]:
    """Build the networks on the device of this process, and load `config.init`; `seed` is that of
    the random weights that no file replaces.

    Returns:
        The models and the file prefixes that were loaded.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: A file is of another kind, or a part that is `needed` is in none of the files.
    """
    return load_models(config, [read_checkpoint(path, ()) for path in config.init], needed, seed)


def load_models(
    config: ModelConfig, files: Sequence[Checkpoint], needed: tuple[str, ...] = (), seed: int = 0
) -> tuple[Models, set[str]]:
    """`open_models` with the files of `config.init` that somebody has opened."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(seed)
    has_base = config.sd15.checkpoint is not None
    for file in files:
        check_base(file, SD15 if has_base else NANO)
    sizes = _sizes(config, files, config.sd15.sizes() if has_base else config.sizes)
    types = _types(config, files, DEFAULT_TYPES if has_base else KINDS)
    loaded = set[str]()
    if has_base:
        base = open_base(config.sd15, sizes)
        models = Models(base.sizes, types, EPSILON, WHOLE, base)
        loaded |= set(BASE_PREFIXES)
    else:
        models = Models(sizes, types)
    for file in files:
        loaded |= models.load(file, decoder=not config.fresh_decoder)
    if missing := [prefix for prefix in needed if prefix not in loaded]:
        raise ValueError(f"--model.init: {missing} not found in {[str(f.path) for f in files]}")
    return models.to(home()), loaded


def _sizes(config: ModelConfig, files: Sequence[Checkpoint], given: Sizes) -> Sizes:
    """Of the networks that the files hold, else those given."""
    sizes = functools.reduce(lambda known, file: sizes_of(file, known), files, given)
    if config.fresh_decoder:
        names = [f.name for f in fields(Sizes) if f.name.startswith(("detail_", "fusion_"))]
        sizes = replace(sizes, **{name: getattr(given, name) for name in names})
    return sizes


def _types(
    config: ModelConfig, files: Sequence[Checkpoint], default: tuple[str, ...]
) -> tuple[str, ...]:
    """Those of the last file with a classifier, else the configured types, else `default`."""
    if unknown := set(config.types) - set(ALL_KINDS):
        raise ValueError(f"--model.types: unknown {sorted(unknown)}; known are {ALL_KINDS}")
    classifiers = [file for file in files if file.has("prompt_processor.")]
    if not classifiers:
        return config.types or default
    types = classifiers[-1].info.types
    if config.types and config.types != types:
        log.info("--model.types: %s has its own, which stay: %s", classifiers[-1].path, types)
    return types


def home() -> torch.device:
    """The device of this process, as accelerate chooses it."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def mixed_precision(precision: Precision) -> str:
    """accelerate's name for it: `no`, `bf16` or `fp16`."""
    if precision != "auto":
        return precision
    return "bf16" if has_native_bf16(home()) else "no"


def half(precision: Precision) -> torch.dtype:
    """The dtype of frozen networks under that mixed precision."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}
    return dtypes[mixed_precision(precision)]


def autocast(precision: Precision) -> torch.autocast:
    """The context in which networks compute with that mixed precision, as in training."""
    dtype = half(precision)
    return torch.autocast(home().type, dtype, enabled=dtype != torch.float32)


def to_home(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch on the device of this process."""
    return {key: value.to(home()) for key, value in batch.items()}


def data_for(
    models: Models, config: DataConfig, seed: int, reads: Set[str], store: PhotoStore | None = None
) -> tuple[RestorationBatches, dict[str, Tensor]]:
    """`open_data` as these networks read it; also raises ValueError where several crops would share
    what SD 1.5 reads for each."""
    if models.base_model == SD15:
        if config.crops_per_part > 1:
            raise ValueError(
                f"--data.crops-per-part: found {config.crops_per_part}, but with SD 1.5 P_S is "
                "read from the whole of what is denoised, so that crops can share none; give 1"
            )
        config = replace(config, part=config.crop)
    return open_data(config, models.sizes, seed, models.types, reads, store)


def open_data(
    config: DataConfig,
    sizes: Sizes,
    seed: int,
    kinds: Sequence[str] = KINDS,
    reads: Set[str] = PICTURES,
    store: PhotoStore | None = None,
) -> tuple[RestorationBatches, dict[str, Tensor]]:
    """Training batches and one fixed validation batch from photos that training never sees.

    Validation has one kind per photo, all in turn, one crop of each and everything to read,
    whatever the training has, so that its scores compare. A `store` may hold photos that are
    decoded already.

    Raises ValueError where there is neither a photo nor a pair, nothing is left for one of both
    parts, or a setting cannot be.
    """
    _check(config, sizes)
    if not config.photos and not config.pairs:
        raise ValueError("--data.photos or --data.pairs: give clean photos, paired sets, or both")
    store = store or PhotoStore(config.memory_mb)
    pairs = (
        PairedPhotos(config.pairs, store, kinds).split(config.held_out)
        if config.pairs
        else (None, None)
    )
    if config.photos:
        photos = CleanPhotos(config.photos, store)
        kept = [index for index in range(len(photos)) if index % config.held_out]
        parts = photos.subset(kept), photos.subset(range(0, len(photos), config.held_out))
    else:
        parts = tuple(part.clean() if part else [] for part in pairs)
    if not all(parts):
        raise ValueError(
            f"--data: {len(parts[0])} photos are left for training and {len(parts[1])} for "
            f"validation, which takes every one in {config.held_out}; give more photos"
        )
    train, validation = (
        RestorationBatches(
            parts[place],
            part=config.part,
            crop=config.crop,
            crops_per_part=config.crops_per_part,
            clip_size=sizes.vision_image,
            seed=seed + place,
            reads=reads if place == 0 else PICTURES,
            kinds=kinds,
            mixing=config.mixing if place == 0 else None,
            pairs=pairs[place],
            pair_share=config.pair_share,
            looks=config.looks if place == 0 else 0.0,
            softer=config.softer if place == 0 else 0.0,
            oversample=config.oversample if place == 0 else (),
        )
        for place in (0, 1)
    )
    return train, validation.fixed(config.validation_samples)


def _check(config: DataConfig, sizes: Sizes) -> None:
    multiple = 8 * 2 ** (len(sizes.unet_channels) - 1)
    if config.crop < multiple or config.crop % multiple:
        raise ValueError(
            f"--data.crop: {config.crop} pixels do not fit this UNet; give a multiple of {multiple}"
        )
    if config.crops_per_part < 1:
        raise ValueError(f"--data.crops-per-part: found {config.crops_per_part}; give at least 1")
    if config.held_out < 2:
        raise ValueError(
            f"--data.held-out: found {config.held_out}; give at least 2, of which one trains"
        )
    if config.validation_samples < 1:
        raise ValueError(
            f"--data.validation-samples: found {config.validation_samples}; give at least 1"
        )


def in_batches(batch: dict[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    """Samples, at most `size` at a time: what trains in memory must also be validated in it."""
    return split(batch, -(-len(batch["part"]) // size))


def checkpoint_info(models: Models, config: dict[str, Any]) -> CheckpointInfo:
    """Metadata of a file made by this run, whose program and settings are `config`."""
    sizes = models.sizes
    return CheckpointInfo(
        types=models.types,
        base_model=models.base_model,
        clip={
            "name": "openai/clip-vit-large-patch14" if models.base_model == SD15 else "nano",
            "image_size": sizes.vision_image,
            "mean": list(CLIP_MEAN),
            "std": list(CLIP_STD),
            "degradation_view": models.degradation_view,
        },
        latent_scale=models.latent_scale,
        prediction=models.prediction,
        classification=models.classification,
        config=models.history
        | config
        | ({"ablations": sorted(models.ablations)} if models.ablations else {}),
        git_revision=git_revision(),
        scores={},
        abstention=models.abstention,
    )


def git_revision() -> str:
    """Revision of the code, or `unknown` outside a checkout."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
