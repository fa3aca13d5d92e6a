"""A small client for ComfyUI's API: upload a photo, run a workflow, fetch its pictures."""

from __future__ import annotations

import asyncio
import io
import json
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import requests
from PIL import Image

Workflow = dict[str, dict[str, Any]]
POLL_SECONDS = 5.0
RECONNECT_SECONDS = 0.5
# What a proxy answers for a server that is down.
GATEWAY_ERRORS = (502, 503, 504)
LARGEST_MESSAGE = 256 * 2**20


class ClientError(RuntimeError):
    """Something between this program and the server went wrong."""


class ServerUnreachableError(ClientError):
    """No ComfyUI answers at the address, or it stopped answering."""


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


@dataclass(frozen=True)
class Result:
    """What a finished run left on the server."""

    prompt_id: str
    outputs: Mapping[str, Mapping[str, list[Any]]]
    """Node id -> kind (``images``, ``text`` ...) -> entries."""
    seconds: float
    """Wall-clock time from queueing to the end."""


class Client:
    """Talks to one ComfyUI server.

    Args:
        server: Address such as ``http://127.0.0.1:8188``.
        timeout: Seconds to wait for a single HTTP answer.
    """

    def __init__(self, server: str = "http://127.0.0.1:8188", timeout: float = 60.0) -> None:
        self.server = (server if "://" in server else f"http://{server}").rstrip("/")
        self.timeout = timeout
        self.id = uuid.uuid4().hex
        self.prompt_id: str | None = None
        """Of the last run, once it is queued."""
        self.session = requests.Session()
        # A proxy cannot reach a server on this machine.
        self.local = urlsplit(self.server).hostname in ("127.0.0.1", "localhost", "::1")
        self.session.trust_env = not self.local

    def get(self, path: str) -> Any:
        """Returns the JSON at a path such as ``/object_info``."""
        return self._request("GET", path).json()

    def require_nodes(self, workflow: Workflow) -> None:
        """Checks that the server knows every node of a workflow.

        Raises:
            WorkflowError: It does not; the message names the nodes.
            ServerUnreachableError: The server does not answer.
        """
        known = self.get("/object_info")
        missing = sorted({node["class_type"] for node in workflow.values()} - set(known))
        if missing:
            raise WorkflowError(
                f"{self.server} has no node {', '.join(missing)}, which the workflow needs. "
                "Install the pack that brings it in that ComfyUI and restart it"
            )

    def upload(self, data: bytes, name: str, *, overwrite: bool = True, subfolder: str = "") -> str:
        """Uploads an image file and returns the value for ``LoadImage``'s ``image`` input.

        Args:
            data: Content of the file, in any format that the server can read.
            name: File name on the server.
            overwrite: Replace a file of that name; otherwise the server picks another name.
            subfolder: Of the server's input folder; made when missing.
        """
        files = {"image": (name, data)}
        fields = {"overwrite": "true" if overwrite else "false", "subfolder": subfolder}
        stored = self._request("POST", "/upload/image", files=files, data=fields).json()
        return "/".join(part for part in (stored["subfolder"], stored["name"]) if part)

    def run(
        self, workflow: Workflow, on_progress: Callable[[Progress], None] | None = None
    ) -> Result:
        """Queues a workflow in API format and waits for its end, also across lost connections.

        Args:
            workflow: Node id -> ``{"class_type", "inputs", ...}``.
            on_progress: Called when a node begins and at each of its steps.

        Raises:
            PromptRejectedError: The server finds a fault in the workflow.
            ExecutionError: A node failed.
            PromptInterruptedError: The run was stopped or removed from the queue.
            ServerUnreachableError: The server does not answer.
            RunLostError: It was there and is gone, and the run with it.
        """
        self.prompt_id = None
        try:
            return asyncio.run(self._run(workflow, on_progress or (lambda progress: None)))
        except RunLostError:
            raise
        except ServerUnreachableError as error:
            if self.prompt_id is None:
                raise
            raise RunLostError(str(error)) from error

    def cancel(self, prompt_id: str) -> None:
        """Stops a run if it is at work, or takes it out of the queue."""
        self._request("POST", "/queue", json={"delete": [prompt_id]})
        self._request("POST", "/interrupt", json={"prompt_id": prompt_id})

    def fetch(self, image: Mapping[str, str]) -> bytes:
        """Returns the file of one entry of a result's ``images``."""
        return self._request("GET", "/view", params=dict(image)).content

    def images(self, result: Result, node: str) -> list[Image.Image]:
        """Returns the pictures that a node of the workflow saved or previewed."""
        entries = result.outputs.get(node, {}).get("images", [])
        return [Image.open(io.BytesIO(self.fetch(entry))) for entry in entries]

    def _request(self, method: str, path: str, **arguments: Any) -> requests.Response:
        try:
            reply = self.session.request(
                method, self.server + path, timeout=self.timeout, **arguments
            )
        except requests.RequestException as error:
            raise ServerUnreachableError(
                f"no ComfyUI answers at {self.server} ({type(error).__name__}). Start one with "
                "`make serve`, or name another with --server."
            ) from error
        if reply.status_code in GATEWAY_ERRORS:
            raise ServerUnreachableError(
                f"no ComfyUI answers at {self.server} (status {reply.status_code} of a proxy)"
            )
        if not reply.ok and path != "/prompt":
            raise ClientError(f"{method} {path}: the server answered {reply.status_code}")
        return reply

    async def _run(self, workflow: Workflow, on_progress: Callable[[Progress], None]) -> Result:
        begun = time.monotonic()
        while not await self._attend(workflow, on_progress):
            # The connection broke, and those that are kept for later requests with it.
            self.session.close()
            # A server that still has the run goes on with it.
            if not await asyncio.to_thread(self._is_known):
                raise RunLostError(f"{self.server} was restarted during the run.")
            await asyncio.sleep(RECONNECT_SECONDS)
        seconds = time.monotonic() - begun
        entry = self._history()
        if entry is None:
            raise PromptInterruptedError(f"run {self.prompt_id} was removed from the queue")
        _check_status(entry["status"], workflow)
        return Result(str(self.prompt_id), entry["outputs"], seconds)

    async def _attend(self, workflow: Workflow, on_progress: Callable[[Progress], None]) -> bool:
        """Connects, queues what is not queued and follows it; whether the run has ended."""
        try:
            async with aiohttp.ClientSession(trust_env=not self.local) as session:
                connecting = session.ws_connect(self._socket, max_msg_size=LARGEST_MESSAGE)
                # Connected before queueing, so that no message is missed.
                async with await asyncio.wait_for(connecting, self.timeout) as socket:
                    if self.prompt_id is None:
                        self.prompt_id = await asyncio.to_thread(self._queue, workflow)
                    return await self._follow(socket, self.prompt_id, on_progress)
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            if self.prompt_id is not None:
                return False
            raise ServerUnreachableError(f"no ComfyUI answers at {self.server}: {error}") from error
        except asyncio.CancelledError:  # Ctrl-C
            if self.prompt_id is not None:
                self.cancel(self.prompt_id)
            raise

    @property
    def _socket(self) -> str:
        return f"{self.server.replace('http', 'ws', 1)}/ws?clientId={self.id}"

    def _queue(self, workflow: Workflow) -> str:
        reply = self._request("POST", "/prompt", json={"prompt": workflow, "client_id": self.id})
        try:
            answer = reply.json()
        except requests.JSONDecodeError as error:
            raise ClientError(f"POST /prompt: the server answered {reply.status_code}") from error
        if reply.ok and not answer.get("node_errors"):
            return answer["prompt_id"]
        if reply.ok:
            # Some outputs are valid, so the server would run those and leave out the rest.
            self.cancel(answer["prompt_id"])
        raise PromptRejectedError(_describe_rejection(answer))

    def _history(self) -> dict[str, Any] | None:
        return self.get(f"/history/{self.prompt_id}").get(self.prompt_id)

    def _is_queued(self) -> bool:
        queue = self.get("/queue")
        items = queue["queue_running"] + queue["queue_pending"]
        return any(item[1] == self.prompt_id for item in items)

    def _is_known(self) -> bool:
        return self._is_queued() or self._history() is not None

    async def _follow(
        self,
        socket: aiohttp.ClientWebSocketResponse[bool],
        prompt_id: str,
        on_progress: Callable[[Progress], None],
    ) -> bool:
        """Whether the run has ended or was dropped by the server, not just the connection."""
        while True:
            try:
                message = await socket.receive(timeout=POLL_SECONDS)
            except asyncio.TimeoutError:
                if not await asyncio.to_thread(self._is_queued):
                    return True
                continue
            if message.type in (
                aiohttp.WSMsgType.CLOSE,
                aiohttp.WSMsgType.CLOSED,
                aiohttp.WSMsgType.CLOSING,
            ):
                return False
            if message.type is not aiohttp.WSMsgType.TEXT:
                continue
            event = json.loads(message.data)
            data = event.get("data", {})
            if data.get("prompt_id") != prompt_id:
                continue
            if event["type"] == "executing" and data["node"] is None:
                return True
            if event["type"] == "executing":
                on_progress(Progress(prompt_id, data["node"], 0, 0))
            elif event["type"] == "progress" and data.get("node"):
                on_progress(Progress(prompt_id, data["node"], int(data["value"]), int(data["max"])))


def load_workflow(path: Path) -> Workflow:
    """Reads a workflow file in API format.

    Raises:
        WorkflowError: The file is missing, no JSON, or in the front end's own format.
    """
    try:
        workflow = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WorkflowError(f"there is no workflow file {path}") from error
    except ValueError as error:
        raise WorkflowError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(workflow, dict) or not all(
        isinstance(node, dict) and "class_type" in node for node in workflow.values()
    ):
        raise WorkflowError(
            f"{path} is not in API format. Use one of workflows/api/, or export yours in ComfyUI "
            "with Workflow > Export (API)."
        )
    return workflow


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
