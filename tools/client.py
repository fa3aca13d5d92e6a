"""A small client for ComfyUI's API: upload a photo, run a workflow, fetch its pictures."""

from __future__ import annotations

import asyncio
import inspect
import io
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

import aiohttp
from PIL import Image

from tools import errors
from tools.connection import Connection
from tools.workflow import Workflow, check_order, title_of

Socket = aiohttp.ClientWebSocketResponse
POLL_SECONDS = 5.0
RECONNECT_SECONDS = 0.5
LONGEST_RUN = 86400.0
STOP_SECONDS = 5.0
"""For a server to take note that a run is cancelled."""
LARGEST_MESSAGE = 256 * 2**20


@dataclass(frozen=True)
class Progress:
    """One report of a running node."""

    prompt_id: str
    node: str
    """Id of the node in the workflow."""
    step: int
    """Steps done; 0 when the node begins."""
    steps: int
    """Steps in all; 0 when the node does not say."""


OnProgress = Callable[[Progress], Awaitable[None]]


@dataclass(frozen=True)
class Result:
    """What a finished run left on the server."""

    prompt_id: str
    outputs: Mapping[str, Mapping[str, list[Any]]]
    """Node id -> kind (``images``, ``text`` ...) -> entries."""
    seconds: float
    """Wall-clock time from queueing to the end."""


class AsyncClient(Connection):
    """Talks to one ComfyUI server; see `Connection` for its arguments."""

    async def check(self) -> None:
        """Raises `ServerUnreachableError` if no ComfyUI gives a sign of life."""
        await self.get("/system_stats", lambda stats: stats["system"]["comfyui_version"])

    async def require_nodes(self, workflow: Workflow) -> None:
        """Raises `WorkflowError`, which names them, if the server lacks nodes of a workflow."""

        def missing_of(known: Any) -> list[str]:
            known["LoadImage"]["input"]  # else another service that speaks JSON
            return sorted({node["class_type"] for node in workflow.values()} - set(known))

        if missing := await self.get("/object_info", missing_of):
            raise errors.WorkflowError(
                f"{self.server} has no node {', '.join(missing)}, which the workflow needs. "
                "Install the pack that brings it in that ComfyUI and restart it"
            )

    async def upload(self, data: bytes, name: str, subfolder: str = "") -> str:
        """Uploads an image file and returns the value for ``LoadImage``'s ``image`` input.

        Args:
            data: Content of the file, in any format that the server can read.
            name: File name on the server; a file of that name is replaced.
            subfolder: Of the server's input folder; made when missing.
        """
        form = aiohttp.FormData(quote_fields=False)
        form.add_field("image", data, filename=name)
        form.add_field("overwrite", "true")
        form.add_field("subfolder", subfolder)

        def place(stored: Any) -> str:
            return "/".join(part for part in (stored["subfolder"], stored["name"]) if part)

        return await self.ask("POST", "/upload/image", place, data=form)

    async def run(self, workflow: Workflow, on_progress: OnProgress | None = None) -> Result:
        """Queues a workflow in API format and waits for its end, also across lost connections.

        Who cancels this cancels the run.

        Args:
            on_progress: Called when a node begins and at each of its steps; never if a proxy
                refuses WebSockets. An exception in it cancels the run, too.

        Raises:
            WorkflowError: Nodes wait for one another.
            PromptRejectedError: The server finds a fault in the workflow.
            ExecutionError: A node failed.
            PromptInterruptedError: The run was stopped or removed from the queue.
            ServerUnreachableError: The server does not answer.
            RunLostError: It was there and is gone, and the run with it.
        """
        check_order(workflow)
        run_id, begun = str(uuid.uuid4()), time.monotonic()
        queued = ended = False
        try:
            async with asyncio.timeout(LONGEST_RUN):
                # A server that still has the run goes on with it when the connection breaks.
                while not queued or await self._is_queued(run_id):
                    # Connected before queueing, so that no message is missed.
                    async with self._listen(run_id) as socket:
                        if not queued:
                            await self._queue(run_id, workflow)
                            queued = True
                        if socket is not None:
                            ended = await self._follow(socket, run_id, on_progress)
                    if ended:
                        break
                    await asyncio.sleep(RECONNECT_SECONDS)
                seconds = time.monotonic() - begun
                entry = await self._history(run_id)
        except TimeoutError as error:
            await self._let_go(run_id)
            raise errors.RunLostError(
                f"{self.server} did not end a run in {LONGEST_RUN:g} s."
            ) from error
        except errors.ServerUnreachableError as error:
            if queued:
                raise errors.RunLostError(str(error)) from error
            raise
        except errors.ClientError:
            raise
        except BaseException:  # Ctrl-C, or of on_progress
            await self._let_go(run_id)
            raise
        if entry is None and ended:
            raise errors.PromptInterruptedError(f"run {run_id} was removed from the queue")
        if entry is None:
            raise errors.RunLostError(f"{self.server} was restarted during the run.")
        with self.expecting("/history"):
            _check_status(entry["status"], workflow)
            return Result(run_id, dict(entry["outputs"]), seconds)

    async def cancel(self, prompt_id: str) -> None:
        """Stops a run if it is at work, or takes it out of the queue."""
        await self.request("POST", "/queue", json={"delete": [prompt_id]})
        await self.request("POST", "/interrupt", json={"prompt_id": prompt_id})

    async def images(self, result: Result, node: str) -> list[Image.Image]:
        """Returns the pictures that a node of the workflow saved or previewed."""

        def decode(data: bytes) -> Image.Image:
            with errors.DECODING:
                picture = Image.open(io.BytesIO(data))
                picture.load()
            return picture

        with self.expecting("/history"):
            entries = [dict(entry) for entry in result.outputs.get(node, {}).get("images", [])]
        pictures: list[Image.Image] = []
        for entry in entries:
            data = await self.request("GET", "/view", params=entry)
            with self.expecting("/view"):
                try:
                    pictures.append(await asyncio.to_thread(decode, data))
                except Image.DecompressionBombError as error:  # no other server makes it smaller
                    raise errors.ClientError(
                        f"the picture of node {node} is too large: {error}. Pass --max-side"
                    ) from error
        return pictures

    async def _queue(self, run_id: str, workflow: Workflow) -> None:
        """Queues the workflow under an id of ours, which finds it again."""

        def check(answer: Any) -> dict[str, Any]:
            if "error" not in answer and answer["prompt_id"] != run_id:
                raise ValueError(f"prompt_id {answer['prompt_id']}")
            return dict(answer)

        prompt = {"prompt": workflow, "client_id": run_id, "prompt_id": run_id}
        try:
            answer = await self.ask("POST", "/prompt", check, json=prompt)
        except errors.ServerUnreachableError:
            known = False
            with suppress(errors.ServerUnreachableError):
                known = await self._is_queued(run_id) or await self._history(run_id) is not None
            if not known:
                raise
            return  # The answer is lost; the run is not.
        with self.expecting("/prompt"):
            if "error" in answer:
                raise errors.PromptRejectedError(_describe_rejection(answer))
            if answer.get("node_errors"):
                # Some outputs are valid, so the server would run those and leave out the rest.
                await self.cancel(run_id)
                raise errors.PromptRejectedError(_describe_rejection(answer))

    async def _let_go(self, run_id: str) -> None:
        """Cancels a run that nobody waits for any more; a server that is gone has none."""
        with suppress(errors.ClientError):
            # In a thread, which ends also if this is cancelled once more.
            await asyncio.to_thread(Client(self.url, STOP_SECONDS).cancel, run_id)

    async def _history(self, run_id: str) -> dict[str, Any] | None:
        return await self.get(f"/history/{run_id}", lambda history: history.get(run_id))

    async def _is_queued(self, run_id: str) -> bool:
        items = ("queue_running", "queue_pending")
        return await self.get(
            "/queue", lambda queue: any(item[1] == run_id for each in items for item in queue[each])
        )

    @asynccontextmanager
    async def _listen(self, run_id: str) -> AsyncIterator[Socket | None]:
        """Messages about a run; none if a proxy refuses WebSockets, which only hides progress."""
        address = f"{self.server.replace('http', 'ws', 1)}/ws?clientId={run_id}"
        async with self.session() as session:
            try:
                async with asyncio.timeout(self.timeout):
                    socket = await session.ws_connect(address, max_msg_size=LARGEST_MESSAGE)
            except (aiohttp.ClientError, OSError):
                socket = None
            yield socket

    async def _follow(self, socket: Socket, run_id: str, on_progress: OnProgress | None) -> bool:
        """Whether the run has ended or was dropped by the server, not just the connection."""
        asked = time.monotonic()
        while True:
            # Also under a stream of other messages.
            if time.monotonic() - asked > POLL_SECONDS:
                if not await self._is_queued(run_id):
                    with suppress(ConnectionResetError):
                        await socket.ping()
                        return True
                    return False  # a server that was started again knows it no more
                asked = time.monotonic()
            try:
                message = await socket.receive(timeout=POLL_SECONDS)
            except TimeoutError:
                continue
            if message.type is aiohttp.WSMsgType.BINARY:
                continue
            if message.type is not aiohttp.WSMsgType.TEXT:
                return False
            with self.expecting("/ws"):
                event = json.loads(message.data)
                kind, data = event["type"], event.get("data") or {}
                if kind not in ("executing", "progress") or data.get("prompt_id") != run_id:
                    continue
                if kind == "executing" and data["node"] is None:
                    return True
                steps = int(data.get("value", 0)), int(data.get("max", 0))
                progress = Progress(run_id, str(data["node"]), *steps)
            if on_progress:
                await on_progress(progress)


class Client:
    """`AsyncClient` for programs without an event loop: its methods, which wait for their end."""

    def __init__(self, url: str = "http://127.0.0.1:8188", timeout: float = 60.0) -> None:
        self.asynchronous = AsyncClient(url, timeout)
        self.server = self.asynchronous.server

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(AsyncClient, name, None)
        if not inspect.iscoroutinefunction(method):
            raise AttributeError(f"a client has no {name!r}")
        return lambda *given, **named: asyncio.run(method(self.asynchronous, *given, **named))

    def run(
        self, workflow: Workflow, on_progress: Callable[[Progress], None] | None = None
    ) -> Result:
        """As `AsyncClient.run`; ``on_progress`` is called in a thread, where it may use this."""

        async def report(progress: Progress) -> None:
            if on_progress:
                await asyncio.to_thread(on_progress, progress)

        return asyncio.run(self.asynchronous.run(workflow, report))


def _describe_rejection(answer: dict[str, Any]) -> str:
    error = answer.get("error") or {}
    if isinstance(error, str):
        return error
    lines = [" ".join(filter(None, (error.get("message"), error.get("details")))).strip()]
    for node_id, node in (answer.get("node_errors") or {}).items():
        for fault in node["errors"]:
            text = ": ".join(filter(None, (fault.get("message"), fault.get("details"))))
            # The host quotes the value, twice, however long it is.
            lines.append(f"node {node_id} ({node['class_type']}): {shorten(text, 300)}")
    return "\n".join(filter(None, lines)) or json.dumps(answer)


def _check_status(status: dict[str, Any], workflow: Workflow) -> None:
    for event, data in status["messages"]:
        if event == "execution_interrupted":
            raise errors.PromptInterruptedError(
                f"the run was interrupted at node {data['node_id']}"
            )
        if event == "execution_error":
            title = title_of(workflow.get(data["node_id"], {}))
            name = f"{data['node_type']}{f', {title!r}' if title else ''}"
            # The host writes types of custom nodes with the folder of the pack in front.
            kind = data["exception_type"].rpartition(".")[2]
            message = data["exception_message"].strip()
            raise errors.ExecutionError(
                f"node {data['node_id']} ({name}) failed: {kind}: {message}"
            )
    if not status["completed"]:
        raise errors.ExecutionError(f"the run ended as {status['status_str']!r} without a reason")
