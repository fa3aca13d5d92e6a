"""The pack as the host loads it, in this process, with toy models."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests import toy_weights
from tools import in_process


@pytest.fixture(autouse=True)
def _as_in_the_host() -> Iterator[None]:
    """The executor runs every node without autograd."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def run(pack: ModuleType) -> Callable[..., tuple[Any, ...]]:
    """Execute a node by id, as the executor does: on a locked clone, with defaults filled in."""
    return in_process.execute


@pytest.fixture(scope="session")
def schemas(pack: ModuleType) -> dict[str, Any]:
    """What the nodes declare, by their ids, in the order in which the host lists them."""
    extension = asyncio.run(pack.comfy_entrypoint())
    nodes = asyncio.run(extension.get_node_list())
    return {node.GET_SCHEMA().node_id: node.GET_SCHEMA() for node in nodes}


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("toy")


@pytest.fixture(scope="session")
def toy(pack: ModuleType, toy_folder: Path) -> SimpleNamespace:
    """A toy Nano in fp32: model, clip_vision, vae, restorer."""
    from comfy.cli_args import args

    path = toy_weights.write_nano(toy_folder / "nano.safetensors")
    args.fp32_unet = args.fp32_vae = True
    try:
        with torch.inference_mode():
            parts = pack.nodes.host_nano.load_nano(path)
    finally:
        args.fp32_unet = args.fp32_vae = False
    names = ("model", "clip_vision", "vae", "restorer")
    return SimpleNamespace(**dict(zip(names, parts, strict=True)), path=path)


@pytest.fixture(scope="session")
def photo() -> Callable[..., torch.Tensor]:
    """Random pictures (B, H, W, C) in [0, 1] that are smooth enough to survive a VAE."""

    def make(height: int = 64, width: int = 64, batch: int = 1, channels: int = 3, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.rand(batch, channels, 4, 4, generator=generator)
        fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
        return fine.movedim(1, -1).contiguous()

    return make


@pytest.fixture(scope="session")
def prepare(toy: SimpleNamespace, run: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
    """The graph up to the sampler: prompts, degradation, controlled prompts and latent."""

    def make(image: torch.Tensor, **control: Any) -> SimpleNamespace:
        positive, negative, degradation = run(
            "DiffRestorerPromptProcessor",
            diff_restorer=toy.restorer,
            clip_vision=toy.clip_vision,
            image=image,
        )
        controlled = run(
            "DiffRestorerDegradationControl",
            **{
                "positive": positive,
                "negative": negative,
                "diff_restorer": toy.restorer,
                "degradation": degradation,
                "image": image,
                "vae": toy.vae,
            }
            | control,
        )
        return SimpleNamespace(
            prompts=(positive, negative),
            degradation=degradation,
            positive=controlled[0],
            negative=controlled[1],
            latent=controlled[2],
            control=controlled[0][0][1].get("control"),
        )

    return make


@pytest.fixture(scope="session")
def decode_with(
    toy: SimpleNamespace, run: Callable[..., tuple[Any, ...]], prepare: Callable[..., Any]
) -> Callable[..., torch.Tensor]:
    """The Aware VAE Decode of a file on a photo's own latent."""

    def make(restorer: Any, image: torch.Tensor, **inputs: Any) -> torch.Tensor:
        restoration = prepare(image, diff_restorer=restorer)
        entries = {
            "samples": restoration.latent,
            "vae": toy.vae,
            "diff_restorer": restorer,
            "degradation": restoration.degradation,
            "image": image,
        }
        return run("DiffRestorerAwareVAEDecode", **(entries | inputs))[0]

    return make


@pytest.fixture(scope="session")
def sample(toy: SimpleNamespace) -> Callable[..., torch.Tensor]:
    """KSampler of the host."""
    host_nodes = importlib.import_module("nodes")

    def run_sampler(
        positive: Any,
        negative: Any,
        latent: dict,
        steps: int = 2,
        cfg: float = 1.0,
        sampler: str = "euler",
    ) -> torch.Tensor:
        return host_nodes.common_ksampler(
            toy.model, 1, steps, cfg, sampler, "normal", positive, negative, latent
        )[0]["samples"]

    return run_sampler


@pytest.fixture
def calls() -> Iterator[Callable[..., list[Any]]]:
    """Record the real calls of a method, which still does its work."""
    undo = []

    def record(owner: Any, name: str) -> list[Any]:
        original, seen = getattr(owner, name), []
        own = vars(owner).get(name)  # of a class; an object has its class's

        def recorded(*args: Any, **kwargs: Any) -> Any:
            seen.append((args, kwargs))
            return original(*args, **kwargs)

        setattr(owner, name, recorded)
        undo.append(lambda: delattr(owner, name) if own is None else setattr(owner, name, own))
        return seen

    yield record
    for restore in undo:
        restore()
