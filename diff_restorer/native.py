"""What a device computes in hardware."""

import platform

import torch


def has_native_bf16(device: torch.device) -> bool:
    """Whether a CPU or an NVIDIA or AMD GPU multiplies bf16 in hardware; elsewhere False.

    On CPUs that is AVX512-BF16, AMX or Arm's BF16. oneDNN's own check also accepts x86 CPUs that
    emulate bf16, at a quarter of the speed of fp32, so there the instruction sets are asked for by
    name.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    if platform.machine().lower() in ("aarch64", "arm64"):
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, test, bool)() for test in tests)
