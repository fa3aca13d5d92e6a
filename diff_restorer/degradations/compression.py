"""JPEG for a batch, in torch: the arithmetic of libjpeg, which Pillow uses."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

LUMINANCE_TABLE = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55,
    14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62,
    18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
)  # fmt: skip
"""Of the JPEG standard (ITU-T T.81, K.1), row by row; libjpeg scales it by quality."""
_CHROMINANCE = (
    17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99,
    24, 26, 56, 99, 99, 99, 99, 99, 47, 66, 99, 99, 99, 99, 99, 99,
    *(99,) * 32,
)  # fmt: skip
_WAVE, _SAMPLE = torch.arange(8.0)[:, None], torch.arange(8.0)
_DCT = ((2 * _SAMPLE + 1) * _WAVE * math.pi / 16).cos() * torch.where(
    _WAVE == 0, 0.125, 0.25
).sqrt()
"""Rows are cosines: `_DCT @ column` is the transform of 8 pixels."""
_TO_YCC = torch.tensor(
    [
        [0.299, 0.587, 0.114],
        [-0.168735892, -0.331264108, 0.5],
        [0.5, -0.418687589, -0.081312411],
    ]
)
_TO_RGB = torch.tensor([[1, 0, 1.402], [1, -0.344136286, -0.714136286], [1, 1.772, 0]])
_TIE = 1 - 1e-6
"""Takes what lies on a half away from zero; all else is at least 1/2040 off."""


def compress_jpeg(image: Tensor, quality: Tensor, halve_chroma: Tensor) -> Tensor:
    """What JPEG leaves of photos: encodes and decodes without the lossless part.

    Args:
        image: (B, 3, H, W) in [0, 1], of any size.
        quality: (B,) on the CPU, 1 to 100, rounded to whole numbers.
        halve_chroma: (B,) booleans on the CPU; true for 4:2:0 with libjpeg's "fancy" upsampling,
            false for 4:4:4.

    Returns:
        (B, 3, H, W) in [0, 1], in steps of 1/255.

    Source: ITU-T T.81 annex K for the tables; libjpeg's jccolor.c, jcsample.c, jcdctmgr.c,
    jcparam.c, jdsample.c and jdcolor.c for the rounding. The cosine transform is in floating point;
    libjpeg's is in whole numbers, so single levels differ.
    """
    groups = [(halve_chroma == halved).nonzero()[:, 0] for halved in (True, False)]
    if len(groups[0]) in (0, len(image)):
        return _compress(image, quality, halve=len(groups[0]) > 0)
    result = torch.empty_like(image)
    for group, halve in zip(groups, (True, False), strict=True):
        place = group.to(image.device, non_blocking=True)
        result[place] = _compress(image[place], quality[group], halve=halve)
    return result


def _compress(image: Tensor, quality: Tensor, *, halve: bool) -> Tensor:
    """One chroma format for the whole batch; all planes are centred on zero."""
    height, width = image.shape[-2:]
    pixels = (image.flatten(2) * 255).round_()
    planes = (_TO_YCC.to(image.device, non_blocking=True) @ pixels).round_().view_as(image)
    planes[:, 0] -= 128
    luma_steps, chroma_steps = (
        _steps(table, quality).to(image.device, non_blocking=True)[:, None]
        for table in (LUMINANCE_TABLE, _CHROMINANCE)
    )
    if halve:
        luma = _through_blocks(planes[:, :1], luma_steps)
        chroma = _doubled(_through_blocks(_halved(planes[:, 1:]), chroma_steps))
        planes = torch.cat((luma, chroma[..., :height, :width]), 1)
    else:
        steps = torch.cat((luma_steps, chroma_steps, chroma_steps), 1)
        planes = _through_blocks(planes, steps).contiguous()
    planes[:, 0] += 128
    decoded = _TO_RGB.to(image.device, non_blocking=True) @ planes.flatten(2)
    return decoded.round_().clamp_(0, 255).div_(255).view_as(image)


def _steps(table: tuple[int, ...], quality: Tensor) -> Tensor:
    """The steps of quantization at each quality, (B, 8, 8) on the host."""
    quality = quality.round()[:, None]
    percent = torch.where(quality < 50, (5000 / quality).floor(), 200 - 2 * quality)
    return ((torch.tensor(table) * percent + 50) / 100).floor().clamp(1, 255).view(-1, 8, 8)


def _through_blocks(planes: Tensor, steps: Tensor) -> Tensor:
    """Transforms blocks of 8 x 8, quantizes by `steps` (B, 1 or C, 8, 8), and back.

    Planes are (B, C, H, W) of any size, whole numbers in [-128, 127], before and after.
    """
    height, width = planes.shape[-2:]
    padded = F.pad(planes, (0, -width % 8, 0, -height % 8), mode="replicate")
    dct = _DCT.to(planes.device, non_blocking=True)
    batch, count, rows, columns = padded.shape
    stripes = dct @ padded.view(batch, count, rows // 8, 8, columns)
    blocks = stripes.view(*stripes.shape[:4], columns // 8, 8)
    # libjpeg's coefficients come in eighths, so halves are common; it rounds them away from zero.
    eighths = (blocks @ dct.T).mul_(8).round_()
    steps = steps[:, :, None, :, None]
    kept = eighths.div_(8 * _TIE * steps).round_().mul_(steps)
    decoded = (dct.T @ (kept @ dct).flatten(4)).view(padded.shape)[..., :height, :width]
    # Flat blocks lie on halves, too, which go up; the thousandth keeps them from falling below.
    return decoded.add_(0.501).floor_().clamp_(-128, 127)


def _halved(chroma: Tensor) -> Tensor:
    """Means of 2 x 2 pixels; halves go up in every other column only."""
    height, width = chroma.shape[-2:]
    padded = F.pad(chroma, (0, -width % 16, 0, height % 2), mode="replicate")
    means = F.avg_pool2d(padded, 2)
    means[..., ::2] += 0.25
    means[..., 1::2] += 0.5
    return means.floor_()


def _doubled(chroma: Tensor) -> Tensor:
    """Triangle filter: each new pixel is 3/4 of the nearest old one and 1/4 of the next, per axis.

    As in libjpeg, sums round up to the left and down to the right.
    """
    padded = F.pad(chroma, (1, 1, 1, 1), mode="replicate")
    near = 3 * padded[..., 1:-1, :]
    rows = torch.stack((near + padded[..., :-2, :], near + padded[..., 2:, :]), -2).flatten(2, 3)
    near = 3 * rows[..., 1:-1]
    left, right = near + rows[..., :-2], near + rows[..., 2:]
    pairs = torch.stack((left.add_(8), right.add_(7)), -1)
    return pairs.div_(16).floor_().flatten(3)
