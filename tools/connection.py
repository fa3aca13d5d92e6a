"""The address of a server and its answers; and whose fault it is if they are none."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp
from yarl import URL

from tools import errors

TRANSFER_SECONDS = 1200.0
"""Of one request, however the bytes drip."""
LARGEST_ANSWER = 2**30


class Connection:
    """Asks one server.

    Whatever is not ComfyUI's own answer is the server's fault, never the photo's: a proxy, a login
    page, a tunnel without an end.

    Args:
        url: Address such as ``http://127.0.0.1:8188``, or ``https://user:password@host/path``;
            what is none raises `AddressError`.
        timeout: Seconds without a byte that a single HTTP answer may take.
    """

    def __init__(self, url: str = "http://127.0.0.1:8188", timeout: float = 60.0) -> None:
        self.url, self.timeout = url, timeout
        try:
            address = URL(url if "://" in url else f"http://{url}")
            if not address.host or address.scheme not in ("http", "https"):
                raise ValueError(f"it has no {'http:// or https://' if address.host else 'host'}")
        except ValueError as error:
            raise errors.AddressError(
                f"{_without_password(url)} is no address of a server: {error}. "
                "Accepted are such as http://127.0.0.1:8188"
            ) from error
        # Without what a browser adds.
        self.server = str(address.with_user(None).with_query(None).with_fragment(None)).rstrip("/")
        """The address without its password, for messages and reports."""
        self.headers: dict[str, str] = {}
        if address.user is not None:
            login = aiohttp.BasicAuth(address.user, address.password or "", "utf-8")
            self.headers["Authorization"] = login.encode()
        # A proxy cannot reach a server on this machine.
        self.local = address.host in ("127.0.0.1", "localhost", "::1")

    def session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(trust_env=not self.local, headers=self.headers)

    async def get(self, path: str, read: Callable[[Any], Any] = lambda answer: answer) -> Any:
        """Returns the JSON at a path such as ``/object_info``, or what ``read`` finds in it."""
        return await self.ask("GET", path, read)

    async def ask(
        self, method: str, path: str, read: Callable[[Any], Any], **arguments: Any
    ) -> Any:
        """Returns what ``read`` finds in the JSON of an answer; else the server is unreachable."""
        data = await self.request(method, path, **arguments)
        with self.expecting(path):
            return read(json.loads(data))

    async def request(self, method: str, path: str, **arguments: Any) -> bytes:
        """The one place that tells whose fault an answer is. A refused prompt is an answer."""
        timeout = aiohttp.ClientTimeout(
            TRANSFER_SECONDS, sock_connect=self.timeout, sock_read=self.timeout
        )
        arguments |= {"timeout": timeout, "allow_redirects": False}
        try:
            async with (
                self.session() as session,
                session.request(method, self.server + path, **arguments) as reply,
            ):
                data = bytearray()
                async for block in reply.content.iter_any():
                    data += block
                    if len(data) > LARGEST_ANSWER:
                        raise errors.ServerUnreachableError(
                            f"{self.server}{path} gave over {LARGEST_ANSWER >> 20} MiB"
                        )
        # ValueError: a name that no host can have.
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise errors.ServerUnreachableError(
                f"no ComfyUI answers at {self.server} ({type(error).__name__}). Start one with "
                "`make serve`, or name another with --server."
            ) from error
        if 200 <= reply.status < 300 or (path == "/prompt" and reply.status == 400):
            return bytes(data)
        raise self._refusal(f"{method} {path}", reply)

    def _refusal(self, request: str, reply: aiohttp.ClientResponse) -> errors.ClientError:
        status = reply.status
        if status == 413:
            return errors.TooLargeError(
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
        return errors.ServerUnreachableError(text)

    @contextmanager
    def expecting(self, path: str) -> Iterator[None]:
        """Takes an answer that cannot be read as the fault of the server, not of the photo."""
        try:
            yield
        except errors.ClientError:
            raise
        except errors.DAMAGED as error:
            what = error if isinstance(error, ValueError) else "JSON of another shape"
            raise errors.ServerUnreachableError(
                f"what answers at {self.server} is no ComfyUI, or something between changes its "
                f"answers: {path} gave what ComfyUI never gives ({what}). "
                "Check the address, and log in to the proxy or tunnel if there is one"
            ) from error


def _without_password(url: str) -> str:
    before, separator, after = url.rpartition("@")
    return f"{before.partition('://')[0]}://{after}" if separator and "://" in before else after
