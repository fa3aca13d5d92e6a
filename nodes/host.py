"""The host's folders, devices and number formats (with the other host_*.py the only such code)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import comfy.model_management
import comfy.model_patcher
import folder_paths
import torch
from comfy.cli_args import args
from torch import nn

from ..diff_restorer.native import has_native_bf16

MODEL_FOLDER = "diff_restorer"
# Whoever has trained another Nano names it in the environment; saved workflows stay as they are.
NANO_VARIABLE = "DIFF_RESTORER_NANO"
NANO_FILE = Path(
    os.environ.get(NANO_VARIABLE)
    or Path(__file__).parents[1] / "models" / "diff_restorer_nano.safetensors"
)

# The user's own choice of number format, which goes before ours.
_UNET_FLAGS = (
    *("force_fp32", "force_fp16", "fp32_unet", "fp64_unet", "bf16_unet", "fp16_unet"),
    *("fp8_e4m3fn_unet", "fp8_e5m2_unet", "fp8_e8m0fnu_unet"),
)
_VAE_FLAGS = ("force_fp32", "force_fp16", "fp16_vae", "fp32_vae", "bf16_vae")

# Newer hosts load their own models through CoreModelPatcher.
ModelPatcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)


def register_model_folder() -> None:
    """Make `models/diff_restorer` known to the host, beside folders of extra_model_paths.yaml.

    `folder_paths.add_model_folder_path` alone leaves the set of extensions empty, which would list
    every file.
    """
    default = str(Path(folder_paths.models_dir) / MODEL_FOLDER)
    known, _ = folder_paths.folder_names_and_paths.get(MODEL_FOLDER, ([], set()))
    paths = known if default in known else [*known, default]
    folder_paths.folder_names_and_paths[MODEL_FOLDER] = (paths, {".safetensors"})


def model_files() -> list[str]:
    """Names of the Diff-Restorer files that the host finds."""
    return folder_paths.get_filename_list(MODEL_FOLDER)


def model_path(name: str) -> Path:
    """Full path of one of `model_files`; raises ValueError, which says where it belongs, where
    there is no such file."""
    path = folder_paths.get_full_path(MODEL_FOLDER, name)
    if path is None:
        folders = " or ".join(folder_paths.get_folder_paths(MODEL_FOLDER))
        raise ValueError(
            f"file: no Diff-Restorer file '{name}'. Put a .safetensors file into {folders} and "
            f"refresh; found there: {', '.join(model_files()) or 'none'}."
        )
    return Path(path)


def photo_folders() -> list[str]:
    """Folders below the host's input folder."""
    return folder_paths.get_input_subfolders()


def photos_of_folder(name: str) -> list[Path]:
    """The photos in one of `photo_folders`, in the order of their names; raises ValueError where
    there is no such folder, or no photo in it."""
    folders = photo_folders()
    if name not in folders:  # nor one outside of the input folder
        raise ValueError(
            f"folder: there is no '{name}' in {folder_paths.get_input_directory()}. Found there: "
            f"{', '.join(folders) or 'no folders'}."
        )
    folder = Path(folder_paths.get_input_directory()) / name
    names = [path.name for path in folder.iterdir() if path.is_file()]
    photos = folder_paths.filter_files_content_types(names, ["image"])
    if not photos:
        raise ValueError(f"folder: there are no photos in {folder}.")
    return [folder / name for name in sorted(photos, key=lambda name: (name.lower(), name))]


def file_stamp(path: Path) -> str:
    """Changes when the file does, so that a replaced model is loaded again."""
    stat = path.stat()
    return f"{path}:{stat.st_size}:{stat.st_mtime_ns}"


def _bf16_or_host(device: torch.device, flags: Iterable[str]) -> torch.dtype | None:
    asked = any(getattr(args, flag, False) for flag in flags)
    on_cpu = comfy.model_management.is_device_cpu(device)
    return torch.bfloat16 if on_cpu and not asked and has_native_bf16(device) else None


def nano_unet_dtype() -> torch.dtype | None:
    """bf16 on CPUs that have it, where the host would take fp32; None leaves it to the host."""
    return _bf16_or_host(comfy.model_management.get_torch_device(), _UNET_FLAGS)


def nano_vae_dtype() -> torch.dtype | None:
    """Like `nano_unet_dtype`, for the VAE and its device."""
    return _bf16_or_host(comfy.model_management.vae_device(), _VAE_FLAGS)


def for_cpu(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Lay out the weights as oneDNN's bf16 2D convolutions like them: a quarter less time in the
    VAE. Nothing where `nano_unet_dtype` or `nano_vae_dtype` was None."""
    if dtype is not None:
        cast(Any, module).to(memory_format=torch.channels_last)


def free_memory(device: torch.device, patcher: Any = None) -> int:
    """Free bytes of a device; newer hosts add what they would evict for the model of `patcher`."""
    ask: Any = getattr(patcher, "get_free_memory", comfy.model_management.get_free_memory)
    return int(ask(device))


def at_once(needed: float, device: torch.device, patcher: Any = None) -> int:
    """How many things that need so many bytes each fit into a device's free memory; 0: not one.

    Where the device shares the memory of the system, half of it counts: the rest lives there, too,
    and a CPU has no error of lacking memory to go on from.
    """
    host = comfy.model_management
    shared = host.is_device_cpu(device) or host.is_device_mps(device)
    return int(free_memory(device, patcher) / (2 if shared else 1) // needed)


def is_oom(error: Exception) -> bool:
    """Whether a device has run out of memory, in the words of any of them."""
    host = comfy.model_management
    is_hosts = getattr(host, "is_oom", lambda error: isinstance(error, host.OOM_EXCEPTION))
    on_mps = isinstance(error, RuntimeError) and "MPS backend out of memory" in str(error)
    return bool(is_hosts(error)) or on_mps


def map_folder(size: int) -> Path | None:
    """Where large intermediate results of `size` bytes go: memory (None), or the host's temporary
    folder where they would take more than a quarter of the free memory."""
    if size <= free_memory(torch.device("cpu")) // 4:
        return None
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_interrupt() -> None:
    """Raise the host's exception if the user has cancelled the run."""
    comfy.model_management.throw_exception_if_processing_interrupted()
