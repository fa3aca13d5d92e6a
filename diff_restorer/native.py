"""What a device computes in hardware."""

import contextlib
import platform
from pathlib import Path

import torch


def has_native_bf16(device: torch.device) -> bool:
    """Whether a CPU or an NVIDIA or AMD GPU multiplies bf16 faster than fp32; elsewhere False.

    On CPUs that is AMX, AMD's AVX512-BF16 (1.9 times as fast in convs of Nano's sizes) or Arm's
    BF16; not Intel's AVX512-BF16 without AMX (0.6 times as fast). oneDNN's own check also accepts
    x86 CPUs that emulate bf16, at a quarter of the speed of fp32, so there the instruction sets are
    asked for by name.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    if platform.machine().lower() in ("aarch64", "arm64"):
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if getattr(torch.cpu, "_is_amx_tile_supported", bool)():
        return True
    return getattr(torch.cpu, "_is_avx512_bf16_supported", bool)() and not _is_intel()


def _is_intel() -> bool:
    maker = platform.processor()
    with contextlib.suppress(OSError):  # Linux alone has it, and tells it nowhere else
        maker += Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    return "GenuineIntel" in maker
