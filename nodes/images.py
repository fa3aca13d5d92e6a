"""Images of the host, (B, H, W, C) in [0, 1]: checks, channels, padding, batches."""

from __future__ import annotations

import hashlib
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ..diff_restorer.weights import is_finite


def kind_of(value: Any) -> str:
    """What something is, for a message."""
    return "nothing" if value is None else f"a {type(value).__name__}"


def check_finite(name: str, value: Tensor, remedy: str) -> None:
    """Raises ValueError for what would end as a black picture: values that are not finite."""
    if not is_finite(value):
        raise ValueError(f"{name}: holds NaN or infinite values. {remedy}")


def check_image(image: Any, name: str) -> None:
    """Raises ValueError for what is no image: of another shape, empty, or with NaN or infinite
    values."""
    if not isinstance(image, Tensor) or not image.is_floating_point():
        kind = str(image.dtype) if isinstance(image, Tensor) else kind_of(image)
        raise ValueError(
            f"{name}: found {kind}, expected images with values from 0 to 1. The node before "
            "must hand on what Load Image does."
        )
    if image.ndim != 4 or image.shape[-1] not in (1, 2, 3, 4) or 0 in image.shape:
        raise ValueError(
            f"{name}: expected images (batch, height, width, channels) with 1 to 4 channels, "
            f"found shape {tuple(image.shape)}."
        )
    check_finite(
        name,
        image,
        "They come from the node before, often a VAE decode in fp16: start the host with "
        "--fp32-vae.",
    )


def split_alpha(image: Tensor) -> tuple[Tensor, Tensor | None]:
    """Take an image (B, H, W, 1 to 4) apart, as fp32 from 0 to 1: what is brighter, as in EXR
    files, is white. Two channels are grey and alpha.

    Returns:
        RGB (B, H, W, 3) and alpha (B, H, W, 1), None where the image has none.
    """
    image, channels = image.float().clamp(0, 1), image.shape[-1]
    alpha = image[..., -1:] if channels in (2, 4) else None
    rgb = image[..., :3] if channels > 2 else image[..., :1].expand(*image.shape[:3], 3)
    # Contiguous, because another memory layout changes the last bits of a convolution.
    return rgb.contiguous(), alpha


def pad_to_multiple(rgb: Tensor, multiple: int) -> Tensor:
    """Repeat the right and bottom edges until both sides are multiples of `multiple` pixels.

    Replication rather than reflection, because it also works on an image of one pixel.
    """
    height, width = rgb.shape[1:3]
    pad = (0, -width % multiple, 0, -height % multiple)
    return F.pad(rgb.movedim(-1, 1), pad, mode="replicate").movedim(1, -1) if any(pad) else rgb


def common_batch(**batches: int) -> int:
    """The batch size of inputs that must go together, where 1 goes with any; raises ValueError for
    two others that differ."""
    sizes = {size for size in batches.values() if size != 1}
    if len(sizes) > 1:
        given = ", ".join(f"{name} {size}" for name, size in batches.items())
        raise ValueError(
            f"The batches do not go together: {given}. They must be equal, or 1 to be used for all."
        )
    return sizes.pop() if sizes else 1


def to_batch(tensor: Tensor, batch: int) -> Tensor:
    """Repeat a batch as a whole until there are `batch`, a multiple of it: 1, 2, 1, 2."""
    if len(tensor) == batch:
        return tensor
    if len(tensor) == 1:
        return tensor.expand(batch, *tensor.shape[1:])
    return tensor.repeat(batch // len(tensor), *[1] * (tensor.ndim - 1))


def digest(rgb: Tensor) -> bytes:
    """Recognises photos by their bytes: nodes before may have changed them in place."""
    content = hashlib.blake2b(rgb.float().cpu().contiguous().numpy().data, digest_size=32)
    return content.digest() + str(tuple(rgb.shape)).encode()
