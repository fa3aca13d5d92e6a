"""The pack as the host loads it, in this process, with toy models."""

from __future__ import annotations

import asyncio
import copy
import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

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
def toy(pack: ModuleType, toy_folder: Path) -> SimpleNamespace:
    """A toy Nano in fp32: model, clip_vision, vae, restorer."""
    from comfy.cli_args import args

    path = toy_weights.write_nano(toy_folder / "nano.safetensors")
    with mock.patch.multiple(args, fp32_unet=True, fp32_vae=True), torch.inference_mode():
        parts = pack.nodes.host_nano.load_nano(path)
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
def look(toy: SimpleNamespace, run: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
    """Execute a node that reads photos, with the toy's models."""

    def execute(node_id: str, image: torch.Tensor, **inputs: Any) -> tuple[Any, ...]:
        entries = {"diff_restorer": toy.restorer, "clip_vision": toy.clip_vision, "image": image}
        return run(node_id, **(entries | inputs))

    return execute


@pytest.fixture(scope="session")
def prepare(toy: SimpleNamespace, run: Callable[..., Any], look: Any) -> Callable[..., Any]:
    """The graph up to the sampler: prompts, degradation, controlled prompts and latent."""

    def make(image: torch.Tensor, **control: Any) -> SimpleNamespace:
        positive, negative, degradation = look("DiffRestorerPromptProcessor", image)
        entries = {"positive": positive, "negative": negative, "degradation": degradation}
        entries |= {"diff_restorer": toy.restorer, "image": image, "vae": toy.vae}
        controlled = run("DiffRestorerDegradationControl", **(entries | control))
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
def sample_on(pack: ModuleType) -> Callable[..., torch.Tensor]:
    """KSampler of the host, on a model and what `prepare` makes."""
    host_nodes = importlib.import_module("nodes")

    def run_sampler(
        model: Any, restoration: Any, steps: int = 2, cfg: float = 1.0, sampler: str = "euler"
    ) -> torch.Tensor:
        return host_nodes.common_ksampler(
            model, 1, steps, cfg, sampler, "normal",
            restoration.positive, restoration.negative, restoration.latent,
        )[0]["samples"]  # fmt: skip

    return run_sampler


@pytest.fixture(scope="session")
def sample(toy: SimpleNamespace, sample_on: Callable[..., torch.Tensor]) -> Any:
    """The same on the toy's model."""

    def run_sampler(positive: Any, negative: Any, latent: dict, **settings: Any) -> torch.Tensor:
        inputs = SimpleNamespace(positive=positive, negative=negative, latent=latent)
        return sample_on(toy.model, inputs, **settings)

    return run_sampler


@pytest.fixture
def calls() -> Iterator[Callable[..., list[Any]]]:
    """Record the real calls of a method, which still does its work."""
    with ExitStack() as patches:

        def record(owner: Any, name: str) -> list[Any]:
            spy = mock.patch.object(owner, name, autospec=True, side_effect=getattr(owner, name))
            return patches.enter_context(spy).call_args_list

        yield record


@pytest.fixture
def keep() -> Iterator[Callable[[torch.nn.Module], object]]:
    """Gives a network the weights back that it has now, once the test is over."""
    with ExitStack() as ends:
        yield lambda module: ends.callback(
            module.load_state_dict, copy.deepcopy(module.state_dict())
        )
