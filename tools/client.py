"""A small client for ComfyUI's API: upload a photo, run a workflow, fetch its pictures."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import struct
import time
import uuid
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import aiohttp
from PIL import Image

Workflow = dict[str, dict[str, Any]]
Socket = aiohttp.ClientWebSocketResponse
POLL_SECONDS = 5.0
RECONNECT_SECONDS = 0.5
TRANSFER_SECONDS = 1200.0
"""Of one request, however the bytes drip."""
LONGEST_RUN = 86400.0
STOP_SECONDS = 5.0
"""For a server to take note that a run is cancelled."""
LARGEST_MESSAGE = 256 * 2**20
LARGEST_ANSWER = 2**30
DAMAGED = (
    *(OSError, SyntaxError, struct.error, zlib.error, Image.DecompressionBombError),
    *(ValueError, TypeError, LookupError, AttributeError, OverflowError, EOFError),
    RuntimeError,  # of the AVIF plugin; and RecursionError, of deep JSON
)
"""What Pillow and parsers raise for damaged data."""


class ClientError(RuntimeError):
    """Something between this program and the server went wrong."""


class AddressError(ClientError):
    """The address of a server is none."""


class ServerUnreachableError(ClientError):
    """No ComfyUI answers at the address, it stopped answering, or something else answers."""


class TooLargeError(ClientError):
    """The server, or a proxy before it, takes no file of this size; another one may."""


class RunLostError(ServerUnreachableError):
    """The server died, stopped answering or was restarted during a run."""


class WorkflowError(ClientError):
    """The workflow file is not what the client needs."""


class PromptRejectedError(ClientError):
    """The server refused the workflow; the message carries its reasons per node."""


class ExecutionError(ClientError):
    """A node failed while the workflow ran; the message carries its error."""


class PromptInterruptedError(ClientError):
    """The run was interrupted, or taken out of the queue before it began."""


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


class AsyncClient:
    """Talks to one ComfyUI server.

    Whatever is not ComfyUI's own answer is the server's fault, never the photo's: a proxy, a login
    page, a tunnel without an end.

    Args:
        url: Address such as ``http://127.0.0.1:8188``, or ``https://user:password@host/path``.
        timeout: Seconds without a byte that a single HTTP answer may take.

    Raises:
        AddressError: It is none.
    """

    def __init__(self, url: str = "http://127.0.0.1:8188", timeout: float = 60.0) -> None:
        self.url = url
        self.server, self.headers = _parse_address(url)
        """The address without its password, for messages and reports."""
        self.timeout = timeout
        # A proxy cannot reach a server on this machine.
        self.local = urlsplit(self.server).hostname in ("127.0.0.1", "localhost", "::1")

    async def get(self, path: str) -> Any:
        """Returns the JSON at a path such as ``/object_info``."""
        _, data = await self._request("GET", path)
        with self.expecting(path):
            return json.loads(data)

    async def check(self) -> None:
        """Asks for a sign of life.

        Raises:
            ServerUnreachableError: No ComfyUI answers.
        """
        stats = await self.get("/system_stats")
        with self.expecting("/system_stats"):
            stats["system"]["comfyui_version"]

    async def require_nodes(self, workflow: Workflow) -> None:
        """Checks that the server knows every node of a workflow.

        Raises:
            WorkflowError: It does not; the message names the nodes.
            ServerUnreachableError: No ComfyUI answers.
        """
        known = await self.get("/object_info")
        with self.expecting("/object_info"):
            known["LoadImage"]["input"]  # else another service that speaks JSON
        missing = sorted({node["class_type"] for node in workflow.values()} - set(known))
        if missing:
            raise WorkflowError(
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
        _, answer = await self._request("POST", "/upload/image", data=form)
        with self.expecting("/upload/image"):
            stored = json.loads(answer)
            return "/".join(part for part in (stored["subfolder"], stored["name"]) if part)

    async def run(self, workflow: Workflow, on_progress: OnProgress | None = None) -> Result:
        """Queues a workflow in API format and waits for its end, also across lost connections.

        Who cancels this cancels the run.

        Args:
            workflow: Node id -> ``{"class_type", "inputs", ...}``.
            on_progress: Called when a node begins and at each of its steps; never if a proxy
                refuses WebSockets.

        Raises:
            PromptRejectedError: The server finds a fault in the workflow.
            ExecutionError: A node failed.
            PromptInterruptedError: The run was stopped or removed from the queue.
            ServerUnreachableError: The server does not answer.
            RunLostError: It was there and is gone, and the run with it.
        """
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
        except asyncio.CancelledError:  # Ctrl-C
            await self._let_go(run_id)
            raise
        except TimeoutError as error:
            await self._let_go(run_id)
            raise RunLostError(f"{self.server} did not end a run in {LONGEST_RUN:g} s.") from error
        except ServerUnreachableError as error:
            if queued:
                raise RunLostError(str(error)) from error
            raise
        if entry is None and ended:
            raise PromptInterruptedError(f"run {run_id} was removed from the queue")
        if entry is None:
            raise RunLostError(f"{self.server} was restarted during the run.")
        with self.expecting("/history"):
            _check_status(entry["status"], workflow)
            return Result(run_id, dict(entry["outputs"]), seconds)

    async def cancel(self, prompt_id: str) -> None:
        """Stops a run if it is at work, or takes it out of the queue."""
        await self._request("POST", "/queue", json={"delete": [prompt_id]})
        await self._request("POST", "/interrupt", json={"prompt_id": prompt_id})

    async def images(self, result: Result, node: str) -> list[Image.Image]:
        """Returns the pictures that a node of the workflow saved or previewed."""
        with self.expecting("/history"):
            entries = [dict(entry) for entry in result.outputs.get(node, {}).get("images", [])]
        pictures: list[Image.Image] = []
        for entry in entries:
            _, data = await self._request("GET", "/view", params=entry)
            with self.expecting("/view"):
                pictures.append(await asyncio.to_thread(_decode, data))
        return pictures

    @contextmanager
    def expecting(self, path: str) -> Iterator[None]:
        """Takes an answer that cannot be read as the fault of the server, not of the photo."""
        try:
            yield
        except ClientError:
            raise
        except DAMAGED as error:
            raise ServerUnreachableError(
                f"what answers at {self.server} is no ComfyUI, or something between changes its "
                f"answers: {path} gave what ComfyUI never gives ({error}). "
                "Check the address, and log in to the proxy or tunnel if there is one"
            ) from error

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(trust_env=not self.local, headers=self.headers)

    async def _request(self, method: str, path: str, **arguments: Any) -> tuple[int, bytes]:
        """The one place that tells whose fault an answer is. A refused prompt is an answer."""
        timeout = aiohttp.ClientTimeout(
            TRANSFER_SECONDS, sock_connect=self.timeout, sock_read=self.timeout
        )
        arguments |= {"timeout": timeout, "allow_redirects": False}
        try:
            async with (
                self._session() as session,
                session.request(method, self.server + path, **arguments) as reply,
            ):
                data = bytearray()
                async for block in reply.content.iter_any():
                    data += block
                    if len(data) > LARGEST_ANSWER:
                        raise ServerUnreachableError(
                            f"{self.server}{path} gave over {LARGEST_ANSWER >> 20} MiB"
                        )
        # ValueError: a name that no host can have.
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise ServerUnreachableError(
                f"no ComfyUI answers at {self.server} ({type(error).__name__}). Start one with "
                "`make serve`, or name another with --server."
            ) from error
        if 200 <= reply.status < 300 or (path == "/prompt" and reply.status == 400):
            return reply.status, bytes(data)
        raise self._refusal(f"{method} {path}", reply)

    def _refusal(self, request: str, reply: aiohttp.ClientResponse) -> ClientError:
        status = reply.status
        if status == 413:
            return TooLargeError(
                f"{self.server} takes no file of this size (status 413). Pass --max-side, or raise "
                "the limit: --max-upload-size of ComfyUI, client_max_body_size of nginx"
            )
        text = f"no ComfyUI answers at {self.server}: {request} gave status {status}"
        if 300 <= status < 400:
            text += f", on to {_without_password(reply.headers.get('Location', 'nowhere'))}. Give "
            text += "the address that a browser shows in the end with --server"
        elif status in (401, 403, 407):
            text += ". If it wants a login, give it with the address: http://user:password@host"
        else:
            text += ", as a proxy does for a server that is down or elsewhere"
        return ServerUnreachableError(text)

    async def _queue(self, run_id: str, workflow: Workflow) -> None:
        """Queues the workflow under an id of ours, which finds it again."""
        try:
            await self._submit(run_id, workflow)
        except ServerUnreachableError:
            # The answer is lost; the run need not be.
            if not await self._is_known(run_id):
                raise

    async def _submit(self, run_id: str, workflow: Workflow) -> None:
        prompt = {"prompt": workflow, "client_id": run_id, "prompt_id": run_id}
        status, data = await self._request("POST", "/prompt", json=prompt)
        with self.expecting(f"POST /prompt with status {status}"):
            answer = json.loads(data)
            if status == 400:
                raise PromptRejectedError(_describe_rejection(answer))
            if answer["prompt_id"] != run_id:
                raise ValueError(f"prompt_id {answer['prompt_id']}")
            if answer.get("node_errors"):
                # Some outputs are valid, so the server would run those and leave out the rest.
                await self.cancel(run_id)
                raise PromptRejectedError(_describe_rejection(answer))

    async def _let_go(self, run_id: str) -> None:
        """Cancels a run that nobody waits for any more; a server that is gone has none."""
        with suppress(ClientError):
            # In a thread, which ends also if this is cancelled once more.
            await asyncio.to_thread(Client(self.url, STOP_SECONDS).cancel, run_id)

    async def _history(self, run_id: str) -> dict[str, Any] | None:
        history = await self.get(f"/history/{run_id}")
        with self.expecting("/history"):
            return history.get(run_id)

    async def _is_queued(self, run_id: str) -> bool:
        queue = await self.get("/queue")
        with self.expecting("/queue"):
            items = queue["queue_running"] + queue["queue_pending"]
            return any(item[1] == run_id for item in items)

    async def _is_known(self, run_id: str) -> bool:
        try:
            return await self._is_queued(run_id) or await self._history(run_id) is not None
        except ServerUnreachableError:
            return False

    @asynccontextmanager
    async def _listen(self, run_id: str) -> AsyncIterator[Socket | None]:
        """Messages about a run; none if a proxy refuses WebSockets, which only hides progress."""
        address = f"{self.server.replace('http', 'ws', 1)}/ws?clientId={run_id}"
        async with self._session() as session:
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
    """An `AsyncClient` for programs without an event loop; see there."""

    def __init__(self, url: str = "http://127.0.0.1:8188", timeout: float = 60.0) -> None:
        self.asynchronous = AsyncClient(url, timeout)
        self.server = self.asynchronous.server

    def get(self, path: str) -> Any:
        return asyncio.run(self.asynchronous.get(path))

    def check(self) -> None:
        asyncio.run(self.asynchronous.check())

    def require_nodes(self, workflow: Workflow) -> None:
        asyncio.run(self.asynchronous.require_nodes(workflow))

    def upload(self, data: bytes, name: str, subfolder: str = "") -> str:
        return asyncio.run(self.asynchronous.upload(data, name, subfolder))

    def run(
        self, workflow: Workflow, on_progress: Callable[[Progress], None] | None = None
    ) -> Result:
        """As `AsyncClient.run`; ``on_progress`` is called in a thread, where it may use this."""

        async def report(progress: Progress) -> None:
            if on_progress:
                await asyncio.to_thread(on_progress, progress)

        return asyncio.run(self.asynchronous.run(workflow, report))

    def cancel(self, prompt_id: str) -> None:
        asyncio.run(self.asynchronous.cancel(prompt_id))

    def images(self, result: Result, node: str) -> list[Image.Image]:
        return asyncio.run(self.asynchronous.images(result, node))


def _decode(data: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(data))
    picture.load()
    return picture


def _parse_address(url: str) -> tuple[str, dict[str, str]]:
    """The address without password, query and what a browser adds; and the header of the login."""
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        host, port = parts.hostname, parts.port
        if not host or parts.scheme not in ("http", "https"):
            raise ValueError(f"it has no {'http:// or https://' if host else 'host'}")
    except ValueError as error:
        raise AddressError(
            f"{_without_password(url)} is no address of a server: {error}. "
            "Accepted are such as http://127.0.0.1:8188"
        ) from error
    place = f"[{host}]" if ":" in host else host
    place += f":{port}" if port else ""
    headers: dict[str, str] = {}
    if parts.username is not None:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
    return f"{parts.scheme}://{place}{parts.path.rstrip('/')}", headers


def _without_password(url: str) -> str:
    before, separator, after = url.rpartition("@")
    return f"{before.partition('://')[0]}://{after}" if separator and "://" in before else after


def load_workflow(path: Path) -> Workflow:
    """Reads a workflow file in API format.

    Raises:
        WorkflowError: The file is missing, no JSON, or in the front end's own format.
    """
    try:
        workflow = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WorkflowError(f"there is no workflow file {path}") from error
    except (ValueError, RecursionError) as error:
        raise WorkflowError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(workflow, dict) or not all(map(_is_node, workflow.values())):
        raise WorkflowError(
            f"{path} is not in API format. Use one of workflows/api/, or export yours in ComfyUI "
            "with Workflow > Export (API)."
        )
    return workflow


def _is_node(node: Any) -> bool:
    return (
        isinstance(node, dict)
        and isinstance(node.get("class_type"), str)
        and isinstance(node.get("inputs"), dict)
        and isinstance(node.get("_meta", {}), dict)
    )


def find_node(workflow: Workflow, class_type: str, title: str | None = None) -> str:
    """Returns the id of the one node of a class (and title) in a workflow.

    Raises:
        WorkflowError: There is no such node, or there are several.
    """
    found = [
        node_id
        for node_id, node in workflow.items()
        if node["class_type"] == class_type
        and (title is None or node.get("_meta", {}).get("title") == title)
    ]
    if len(found) != 1:
        named = f" titled {title!r}" if title else ""
        raise WorkflowError(
            f"the workflow has {len(found)} {class_type} nodes{named}; exactly one is needed"
        )
    return found[0]


def _describe_rejection(answer: dict[str, Any]) -> str:
    error = answer.get("error") or {}
    if isinstance(error, str):
        return error
    lines = [" ".join(filter(None, (error.get("message"), error.get("details")))).strip()]
    for node_id, node in (answer.get("node_errors") or {}).items():
        for fault in node["errors"]:
            text = ": ".join(filter(None, (fault.get("message"), fault.get("details"))))
            lines.append(f"node {node_id} ({node['class_type']}): {text}")
    return "\n".join(filter(None, lines)) or json.dumps(answer)


def _check_status(status: dict[str, Any], workflow: Workflow) -> None:
    for event, data in status["messages"]:
        if event == "execution_interrupted":
            raise PromptInterruptedError(f"the run was interrupted at node {data['node_id']}")
        if event == "execution_error":
            title = workflow.get(data["node_id"], {}).get("_meta", {}).get("title")
            name = f"{data['node_type']}{f', {title!r}' if title else ''}"
            # The host writes types of custom nodes with the folder of the pack in front.
            kind = data["exception_type"].rpartition(".")[2]
            message = data["exception_message"].strip()
            raise ExecutionError(f"node {data['node_id']} ({name}) failed: {kind}: {message}")
    if not status["completed"]:
        raise ExecutionError(f"the run ended as {status['status_str']!r} without a reason")
