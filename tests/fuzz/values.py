"""What nodes are given: numbers, words, pictures, latents and prompts, of which few make sense."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from tests.e2e.graph import make_photo
from tests.fuzz.cases import NUMBERS, WORDS, Case, FaultError, Step, raised_by_the_pack, some
from tests.fuzz.toys import Toys, check_picture
from tools import in_process

DTYPES = ("float16", "bfloat16", "float32", "float64", "uint8", "int64", "bool", "complex64")
FILLS: list[Any] = [*NUMBERS[:-1], "random", "random", "one nan", "one inf"]
SHAPES = {
    "IMAGE": [[0, 8, 8, 3], [1, 8, 8], [1, 1, 1, 3], [1, 9, 13, 1], [1, 9, 13, 2], [2, 16, 8, 3],
              [1, 20, 28, 4], [3, 20, 28, 3], [1, 20, 28, 5], [1, 0, 8, 3], [1, 3, 20, 28], [],
              [1, 20, 28, 3], [1, 700, 3, 3]],
    "LATENT": [[0, 4, 3, 4], [1, 4, 3, 4], [2, 4, 3, 4], [3, 4, 3, 4], [1, 4, 1, 3, 4], [4, 3, 4],
               [1, 16, 3, 4], [1, 4, 4, 3], [1, 4, 8, 8], [1, 4, 0, 4], [1, 8, 3, 4]],
    "CONDITIONING": [[1, 4, 32], [1, 0, 32], [1, 4, 64], [2, 4, 32], [3, 4, 32], [4, 32],
                     [0, 4, 32], [1, 4, 32, 1], [1, 77, 768]],
}  # fmt: skip
NODES = {
    "DiffRestorerPromptProcessor": 0,
    "DiffRestorerDegradationControl": 2,
    "DiffRestorerAwareVAEDecode": 0,
    "DiffRestorerDegradationClassifier": None,
    "DiffRestorerEditDegradation": None,
    "DiffRestorerColorFix": 0,
    "DiffRestorerSimulateDegradation": 0,
    "DiffRestorerMeasure": None,
    "DiffRestorerTiledDiffusion": 1,
    "DiffRestorerFolderPhoto": 0,
}
"""Node -> which of its outputs is looked at."""


FOLDER = "fuzz"
"""Of photos, below the host's input folder."""


class Values:
    """Each node alone, with good input but for a few things."""

    def __init__(self, toys: Toys) -> None:
        self.toys = toys
        nodes: Any = importlib.import_module("nodes")
        schemas = {name: nodes.NODE_CLASS_MAPPINGS[name].GET_SCHEMA() for name in NODES}
        self.inputs = {name: {e.id: e for e in schema.inputs} for name, schema in schemas.items()}
        host_folders: Any = importlib.import_module("folder_paths")
        photos = Path(host_folders.get_input_directory()) / FOLDER
        photos.mkdir(exist_ok=True)
        make_photo(28, 20).save(photos / "photo.png")
        *_, restorer = toys.parts
        with torch.inference_mode():
            positive, negative, degradation = in_process.execute(
                "DiffRestorerPromptProcessor", diff_restorer=restorer, image=toys.photo
            )
            latent = in_process.execute(
                "DiffRestorerDegradationControl", positive=positive, negative=negative,
                degradation=degradation,
            )[2]  # fmt: skip
        models = ("MODEL", "CLIP_VISION", "VAE", "DIFF_RESTORER")
        self.good = {
            **dict(zip(models, toys.parts, strict=True)),
            "DEGRADATION": degradation,
            "IMAGE": toys.photo,
            "CONDITIONING": positive,
            "LATENT": latent,
        }

    def make(self, random: Random) -> Case:
        node = random.choice(list(NODES))
        entries = self.inputs[node]

        def step() -> Step:
            name = random.choice(list(entries))
            kind = str(entries[name].get_io_type())
            shape = random.choice(SHAPES.get(kind, [[1]]))
            tensor = [shape, random.choice(DTYPES), random.choice(FILLS)]
            if random.random() < 0.2 or (kind not in SHAPES and kind not in ("FLOAT", "INT")):
                other = [*self.good, *WORDS, *NUMBERS, [], {}, [[]], [1]]
                return ["set", name, random.choice(other)]
            if kind not in SHAPES:
                return ["set", name, random.choice(NUMBERS)]
            return ["tensor", name, *tensor]

        return {"node": node, "steps": some(random, step)}

    def run(self, case: Case) -> None:
        entries = self.inputs[case["node"]]
        inputs = {}
        for name, entry in entries.items():
            kind = str(entry.get_io_type())
            if kind in self.good:
                inputs[name] = self.good[kind]
            elif name == "folder":
                inputs[name] = FOLDER
            elif getattr(entry, "default", None) is None and getattr(entry, "options", None):
                inputs[name] = entry.options[0]
        for what, name, *rest in case["steps"]:
            if what == "set":
                (value,) = rest
                known = isinstance(value, str) and value in self.good
                inputs[name] = self.good[value] if known else value
            else:
                kind, tensor = str(entries[name].get_io_type()), _tensor(*rest)
                wrapped = {"LATENT": {"samples": tensor}, "CONDITIONING": [[tensor, {}]]}
                inputs[name] = wrapped.get(kind, tensor)
        before = {name: _numbers(value) for name, value in inputs.items()}
        with torch.inference_mode():
            outputs = in_process.execute(case["node"], **inputs)
        for name, value in inputs.items():
            if not _same(_numbers(value), before[name]):
                raise FaultError(f"{name} was changed")
        self._check(case["node"], outputs)

    def _check(self, node: str, outputs: tuple[Any, ...]) -> None:
        place = NODES[node]
        if place is None:
            return
        if node == "DiffRestorerPromptProcessor":
            for tensor in _numbers(outputs[0]):
                if not tensor.isfinite().all():
                    raise FaultError("a prompt that is not finite")
        elif node == "DiffRestorerDegradationControl":
            if not outputs[place]["samples"].isfinite().all():
                raise FaultError("a latent that is not finite")
        else:
            check_picture(outputs[place])

    def named(self, error: Exception) -> bool:
        begins = re.match(r"[a-z_]+: |The batches do not go together: ", str(error))
        return isinstance(error, ValueError) and bool(begins) and raised_by_the_pack(error)

    def run_next(self) -> None:
        if not torch.equal(self.toys.restore(*self.toys.parts), self.toys.expected):
            raise FaultError("the next restoration is another one")


def _tensor(shape: list[int], dtype: str, fill: Any) -> Tensor:
    kind = getattr(torch, dtype)
    if isinstance(fill, int | float):
        return torch.full(shape, float(fill), dtype=torch.float64).to(kind)
    tensor = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    if fill != "random" and tensor.numel():
        tensor.view(-1)[-1] = torch.nan if fill == "one nan" else torch.inf
    return (tensor * 255 if kind in (torch.uint8, torch.int64) else tensor).to(kind)


def _numbers(value: Any) -> list[Tensor]:
    """All tensors of an input or output, as they are now."""
    if isinstance(value, Tensor):
        return [value.clone()]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for each in value for tensor in _numbers(each)]
    return []


def _same(first: list[Tensor], second: list[Tensor]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)
