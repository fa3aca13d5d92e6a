"""Model files: headers, shapes, number formats, offsets, values, metadata and what is no file."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from diff_restorer import checkpoint
from tests import toy_weights
from tests.fuzz.cases import NUMBERS, WORDS, Case, FaultError, Step, raised_by_the_pack, some
from tests.fuzz.toys import Toys
from tests.toy_weights import UNetSizes, VaeSizes, VisionSizes

FORMATS = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
}
NAMES = {dtype: name for name, dtype in FORMATS.items()}
MOST_NUMBERS = 2**20
SPECIAL = ("fifo", "folder", "sparse", "empty", "pickle", "loop", "device", "html", "missing")
SIZES = (0, 1, 2, 3, 5, 8, 16, 31, 32, 33, 64, 128, 320, 1000, 4096, 2**20)
PARTS = ("prompt_processor.", "control.", "decoder.", *checkpoint.BASE_PREFIXES)
OTHER = {
    "context": {"unet": UNetSizes(context=64)},
    "width": {"unet": UNetSizes(channels=64)},
    "levels": {"unet": UNetSizes(mult=(1, 1, 2), attention_levels=(1, 2))},
    "vae": {"vae": VaeSizes(mult=(1, 2, 2, 2))},
    "latent": {"vae": VaeSizes(latent_channels=16)},
    "scale": {"vae": VaeSizes(mult=(1, 2, 2))},
    "vision": {"vision": VisionSizes(width=128)},
    "patch": {"vision": VisionSizes(patch=8)},
    "detail": {"detail": True},
    "tuned": {"tuned_decoder": True},
    "types": {"types": ("noise", "clean")},
}
"""Files whose parts fit each other, but not those of another file."""


def tensors_of(**changes: Any) -> dict[str, Tensor]:
    """A complete toy file."""
    base = {name: changes[name] for name in ("unet", "vae", "vision") if name in changes}
    rest = {name: value for name, value in changes.items() if name != "vision"}
    if "vision" in changes:
        rest["clip_width"] = changes["vision"].width
    return toy_weights.restorer_tensors(**rest) | toy_weights.base_tensors(**base)


class Files:
    """Files for both loaders, and a restoration with what opens."""

    def __init__(self, toys: Toys, folder: Path) -> None:
        self.toys, self.folder = toys, folder
        self.good = tensors_of()
        self.others: dict[str, dict[str, Tensor]] = {}
        self.metadata = toy_weights.info().to_metadata()

    def make(self, random: Random) -> Case:
        names = list(self.good)

        def step() -> Step:
            name = random.choice(names)
            dtype, number = random.choice(list(FORMATS)), random.choice(NUMBERS)
            shape = [random.choice(SIZES) for _ in range(random.randrange(6))]
            same = list(self.good[name].shape)
            if same:
                same[random.randrange(len(same))] = random.choice(SIZES)
            entry = random.choice(
                [
                    ["dtype", random.choice([*FORMATS, *WORDS, *NUMBERS])],
                    ["shape", random.choice([shape, same, *NUMBERS, *WORDS, [number], [shape]])],
                    ["data_offsets", [random.choice([*NUMBERS, *SIZES]) for _ in range(2)]],
                    ["data_offsets", random.choice([*NUMBERS, *WORDS, [], [0, 1, 2]])],
                ]
            )
            key = random.choice([*self.metadata, "abstention", random.choice(WORDS)])
            return random.choice(
                [
                    ["tensor", name, dtype, shape, 0],
                    ["tensor", name, random.choice(["F16", "BF16", "F32"]), same, 0.01],
                    ["tensor", name, dtype, list(self.good[name].shape), 1],
                    ["value", name, random.randrange(10**6), random.choice(NUMBERS)],
                    ["scale", name, random.choice([0, 1e-30, 100, 1e6, 1e30])],
                    ["entry", name, *entry],
                    ["drop", name],
                    ["rename", name, random.choice([*names, f"{name}.1", *WORDS])],
                    ["meta", key, random.choice([*WORDS, *map(str, NUMBERS), *NUMBERS])],
                    ["meta", key, json.dumps(self._damaged_metadata(random, key))],
                    ["take", random.choice(PARTS), random.choice(list(OTHER))],
                    ["leave", random.choice(PARTS)],
                    ["bit", random.randrange(2**20), random.randrange(8)],
                    ["length", random.choice([*SIZES, 2**23, 2**32, 2**63, 2**64 - 1])],
                    ["cut", random.random()],
                    ["append", random.choice([1, 8, 10_000])],
                ]
            )

        if random.random() < 0.03:
            return {"loader": "nano", "steps": [["special", random.choice(SPECIAL)]]}
        return {"loader": random.choice(["nano", "file"]), "steps": some(random, step)}

    def _damaged_metadata(self, random: Random, key: str) -> Any:
        """JSON that is near to what the entry holds."""
        try:
            value = json.loads(self.metadata.get(key, "{}"))
        except ValueError:
            value = {}
        odd = random.choice([*NUMBERS, *WORDS, [], {}, [1, 2, 3], [[]]])
        if isinstance(value, dict) and value:
            return value | {random.choice(list(value)): odd}
        if isinstance(value, list) and value:
            return [*value[1:], odd]
        return odd

    def run(self, case: Case) -> None:
        path = self.folder / "case.safetensors"
        with contextlib.suppress(OSError):
            path.rmdir()
        path.unlink(missing_ok=True)
        self.write(path, case["steps"])
        parts = self.toys.load(path, case["loader"] == "nano")
        self.toys.restore(*parts)

    def write(self, path: Path, steps: list[Step]) -> None:
        """The good file with its changes: of tensors first, of the header, then of bytes."""
        tensors, metadata = dict(self.good), dict[str, Any](self.metadata)
        late: list[Step] = []
        for step in steps:
            if not self._change(tensors, metadata, *step):
                late.append(step)
        header: dict[str, Any] = {"__metadata__": metadata}
        parts, end = [], 0
        for name, tensor in tensors.items():
            # .view of what has no sizes or values is refused by torch.
            part = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            dtype = NAMES[tensor.dtype]
            offsets = [end, end + len(part)]
            header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": offsets}
            parts.append(part)
            end += len(part)
        for what, *rest in late:
            if what == "entry" and rest[0] in header:
                header[rest[0]][rest[1]] = rest[2]
        text = bytearray(json.dumps(header).encode())
        length = len(text)
        data = b"".join(parts)
        for what, *rest in late:
            if what == "bit":
                text[rest[0] % len(text)] ^= 1 << rest[1]
            elif what == "length":
                length = rest[0]
            elif what == "append":
                data += bytes(rest[0])
        whole = length.to_bytes(8, "little") + bytes(text) + data
        for what, *rest in late:
            if what == "cut":
                whole = whole[: int(rest[0] * len(whole))]
        path.write_bytes(whole)
        for what, *rest in late:
            if what == "special":
                self._make_special(path, rest[0])

    def _change(
        self, tensors: dict[str, Tensor], metadata: dict[str, Any], what: str, *rest: Any
    ) -> bool:
        """Whether it was a change of what the file holds."""
        if what == "meta":
            metadata[rest[0]] = rest[1]
        elif what == "take":
            prefix, name = rest
            if name not in self.others:
                self.others[name] = tensors_of(**OTHER[name])
            self._change(tensors, metadata, "leave", prefix)
            other = self.others[name]
            tensors.update((key, other[key]) for key in other if key.startswith(prefix))
        elif what == "leave":
            for key in [key for key in tensors if key.startswith(rest[0])]:
                del tensors[key]
        elif what in ("tensor", "value", "scale", "drop", "rename"):
            name, *details = rest
            if name in tensors:
                self._change_tensor(tensors, what, name, details)
        else:
            return False
        return True

    def _change_tensor(
        self, tensors: dict[str, Tensor], what: str, name: str, details: list[Any]
    ) -> None:
        if what == "drop":
            del tensors[name]
        elif what == "rename":
            tensors[details[0]] = tensors.pop(name)
        elif what == "scale":
            tensors[name] = tensors[name] * details[0]
        elif what == "tensor":
            dtype, shape, value = details
            while torch.Size(shape).numel() > MOST_NUMBERS:
                shape = [min(side, max(shape) // 2) for side in shape]
            tensors[name] = torch.full(shape, value).to(FORMATS[dtype])
        elif tensors[name].numel():
            place, value = details
            flat = tensors[name].clone().reshape(-1)
            with contextlib.suppress(TypeError, ValueError, RuntimeError, OverflowError):
                flat[place % len(flat)] = float(value)  # which not all types can hold
            tensors[name] = flat.reshape(tensors[name].shape)

    def _make_special(self, path: Path, what: str) -> None:
        if what == "sparse":
            os.truncate(path, 2**42)
        elif what == "html":
            path.write_bytes(b"<!DOCTYPE html><html>404</html>" * 50)
        elif what == "pickle":
            toy_weights.write_pickle(path)
        elif what == "empty":
            path.write_bytes(b"")
        else:
            path.unlink()
            if what == "fifo":
                os.mkfifo(path)
            elif what == "folder":
                path.mkdir()
            elif what == "loop":
                path.symlink_to(path)
            elif what == "device":
                path.symlink_to("/dev/zero")

    def named(self, error: Exception) -> bool:
        kinds = (ValueError, FileNotFoundError)
        return isinstance(error, kinds) and raised_by_the_pack(error)

    def run_next(self) -> None:
        if not torch.equal(self.toys.restore(*self.toys.parts), self.toys.expected):
            raise FaultError("the next restoration is another one")
