"""Proxies, tunnels and other services in the place of a ComfyUI: no photo pays for them."""

from __future__ import annotations

import base64
import hashlib
import http.client
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.e2e.graph import Runner, make_photo
from tests.e2e.holding import Holding, put_photos, read_report, run
from tools import restore
from tools.batch import Batch, Event, Options, Server
from tools.client import Client
from tools.errors import AddressError, ServerUnreachableError
from tools.jobs import plan
from tools.workflow import load_workflow

Answer = tuple[int, dict[str, str], bytes]
Rule = Callable[["Handler"], Answer | None]
HTML = {"Content-Type": "text/html"}


class Handler(BaseHTTPRequestHandler):
    """Answers by the rule; passes on what it has none for. It knows no WebSockets."""

    rule: Rule
    target: int | None
    log: list[str]

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.log.append(f"{self.command} {self.path.partition('?')[0]}")
        self.passed = lambda: self.pass_on(body)
        answer = type(self).rule(self)
        if answer is None:
            answer = (400, {}, b"no upgrade") if self.path.startswith("/ws") else self.passed()
        status, headers, content = answer
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = handle_any  # noqa: N815

    def pass_on(self, body: bytes) -> Answer:
        assert self.target is not None
        connection = http.client.HTTPConnection("127.0.0.1", self.target)
        headers = {"Content-Type": self.headers.get("Content-Type", "")}
        connection.request(self.command, self.path, body, headers)
        reply = connection.getresponse()
        return reply.status, {"Content-Type": reply.headers["Content-Type"] or ""}, reply.read()

    def log_message(self, format: str, *args: object) -> None:
        pass


class Quiet(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are what these tests are about."""


@contextmanager
def serving(rule: Rule, target: int | None = None) -> Iterator[tuple[str, list[str]]]:
    """A server that follows a rule; its URL and the requests that it saw."""
    log: list[str] = []
    members = {"rule": staticmethod(rule), "target": target, "log": log}
    with Quiet(("127.0.0.1", 0), type("Ruled", (Handler,), members)) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", log
        finally:  # else its thread would go on polling a closed socket, as fast as it can
            server.shutdown()


def always(status: int, content: bytes = b"", **headers: str) -> Rule:
    return lambda request: (status, headers, content)


def on(path: str, rule: Rule) -> Rule:
    return lambda request: rule(request) if request.path.startswith(path) else None


def cut_view(request: Handler) -> Answer:
    status, headers, content = request.passed()
    return status, headers | {"Content-Length": str(len(content))}, content[:100]


def shorten_view(request: Handler) -> Answer:
    status, headers, content = request.passed()
    return status, headers, content[: len(content) // 2]


def lose_the_answer(request: Handler) -> Answer:
    request.passed()
    raise ConnectionAbortedError


BAD: dict[str, Rule] = {
    "tunnel without an end": always(404, b"tunnel not found"),
    "server behind is down": always(530, b"<html>origin", **HTML),
    "maintenance page": always(200, b"<html>back soon", **HTML),
    "login page": always(302, Location="/login"),
    "JSON of another service": always(200, b'{"detail": "ok"}'),
    "JSON that is a list": always(200, b"[]"),
    "no uploads": on("/upload", always(504)),
    "small uploads only": on("/upload", always(413)),
    "no prompts": on("/prompt", always(200, b"<html>login", **HTML)),
    "prompts without an id": on("/prompt", always(200, b"[1]")),
    "no queue": on("/queue", always(200, b"{}")),
    "history of another shape": on("/history", always(200, b"[[]]")),
    "picture cut off": on("/view", cut_view),
    "picture shortened": on("/view", shorten_view),
    "no picture": on("/view", always(200, b"<html>login", **HTML)),
}
ADVICE = {"small uploads only": "--max-side"}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_server_drains_no_queue(runner: Runner, holding: Holding, tmp_path: Path, case: str):
    jobs = plan(put_photos(tmp_path / "in", 6), tmp_path / "out")
    with serving(BAD[case], runner.host.port) as (url, log):
        servers = [Server(url), Server(runner.host.url)]
        Batch(servers, holding.nodes, jobs, Options(wait=2)).run()
    assert [(job.status, job.server) for job in jobs] == [("done", runner.host.url)] * 6
    assert log, "the bad server was not even asked"


@pytest.mark.parametrize("case", BAD)
def test_a_bad_server_alone_ends_the_run_in_time(
    runner: Runner, holding: Holding, tmp_path: Path, case: str
):
    jobs = plan(put_photos(tmp_path / "in", 2), tmp_path / "out")
    news: list[Event] = []
    begun = time.monotonic()
    with serving(BAD[case], runner.host.port) as (url, log):
        Batch([Server(url)], holding.nodes, jobs, Options(wait=1)).run(news.append)
    assert time.monotonic() - begun < 15
    assert len(log) < 100
    for job in jobs:
        assert job.status == "failed"
        assert url in str(job.error)
        assert ADVICE.get(case, "") in str(job.error)
    texts = Counter(event.text for event in news if event.text and "in flight" not in event.text)
    assert max(texts.values(), default=1) == 1, "each reason is told once"


def test_a_login_that_expires(runner: Runner, holding: Holding, tmp_path: Path):
    jobs = plan(put_photos(tmp_path / "in", 4), tmp_path / "out")
    uploads: list[str] = []

    def expire(request: Handler) -> Answer | None:
        uploads.extend([request.path] if request.path.startswith("/upload") else [])
        return (401, {}, b"") if len(uploads) > 2 else None

    with serving(expire, runner.host.port) as (url, _):
        Batch([Server(url)], holding.nodes, jobs, Options(wait=1)).run()
    assert [job.status for job in jobs] == ["done", "done", "failed", "failed"]
    assert "http://user:password@host" in str(jobs[-1].error)


def close_at_once(request: Handler) -> Answer:
    key = request.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
    accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
    return (
        101,
        {"Upgrade": "websocket", "Connection": "upgrade", "Sec-WebSocket-Accept": accept},
        b"",
    )


SILENT: dict[str, Rule] = {
    "no WebSockets": lambda request: None,
    "WebSockets that close at once": on("/ws", close_at_once),
}


@pytest.mark.parametrize("case", SILENT)
def test_a_proxy_may_hide_the_progress(runner: Runner, holding: Holding, tmp_path: Path, case: str):
    jobs = plan(put_photos(tmp_path / "in", 2), tmp_path / "out")
    with serving(SILENT[case], runner.host.port) as (url, _):
        Batch([Server(url)], holding.nodes, jobs, Options()).run()
    assert [(job.status, job.attempts) for job in jobs] == [("done", 1)] * 2


def test_a_lost_answer_is_no_second_run(runner: Runner, holding: Holding, tmp_path: Path):
    jobs = plan(put_photos(tmp_path / "in", 2), tmp_path / "out")
    with serving(on("/prompt", lose_the_answer), runner.host.port) as (url, log):
        Batch([Server(url)], holding.nodes, jobs, Options()).run()
    assert [job.status for job in jobs] == ["done"] * 2
    assert (log.count("POST /prompt"), holding.runs) == (2, 2)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            always(301, Location="https://a:secret@host/x"),
            r"status 301, on to https://host/x\. Give",
        ),
        (always(302, Location="http://127.0.0.1/"), "status 302"),
        (always(401), "user:password@host"),
        (always(200, b"{}"), "is no ComfyUI"),
        (always(200, b"[" * 100_000), "is no ComfyUI"),
        (always(200, b"<html>"), "is no ComfyUI"),
    ],
)
def test_what_is_no_comfyui_is_named(rule: Rule, message: str):
    workflow = load_workflow(restore.NANO_WORKFLOW)
    with serving(rule) as (url, _):
        for ask in (Client(url).check, lambda: Client(url).require_nodes(workflow)):
            with pytest.raises(ServerUnreachableError, match=message) as caught:
                ask()
            assert url in str(caught.value)
            assert "secret" not in str(caught.value)


@pytest.mark.parametrize("host", ["a b", "a" * 300, "-", "%"])
def test_a_host_that_cannot_be_is_named(host: str):
    with pytest.raises((AddressError, ServerUnreachableError), match=r"answers at|is no address"):
        Client(f"http://{host}:1").check()


def test_an_answer_without_an_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tools.connection.TRANSFER_SECONDS", 0.5)

    def drip(request: Handler) -> Answer:
        request.send_response(200)
        request.end_headers()
        for _ in range(50):
            request.wfile.write(b" ")
            time.sleep(0.1)
        return 200, {}, b""

    begun = time.monotonic()
    with serving(drip) as (url, _), pytest.raises(ServerUnreachableError, match=url):
        Client(url).check()
    assert time.monotonic() - begun < 8


@pytest.mark.parametrize(
    ("url", "server"),
    [
        ("127.0.0.1:8188", "http://127.0.0.1:8188"),
        ("http://host:8188/#abc", "http://host:8188"),
        ("http://host:8188/?workflow=a", "http://host:8188"),
        ("https://host/comfy/", "https://host/comfy"),
        ("http://me:secret@host:1", "http://host:1"),
        ("http://[::1]:8188", "http://[::1]:8188"),
    ],
)
def test_addresses_as_people_copy_them(url: str, server: str):
    assert Client(url).server == server


@pytest.mark.parametrize(
    "url", ["http://", "http://[::1", "ftp://host", "http://host:port", "http://a:secret@host:x"]
)
def test_what_is_no_address_is_named(tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str]):
    (path,) = put_photos(tmp_path / "in", 1)
    with pytest.raises(AddressError):
        Client(url)
    assert restore.main([str(path), "--out", str(tmp_path / "out"), "--server", url]) == 1
    printed = capsys.readouterr().err
    assert "is no address of a server" in printed
    assert "http://127.0.0.1:8188" in printed
    assert "secret" not in printed


def test_a_password_reaches_the_server_and_no_report(
    runner: Runner, holding: Holding, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (path,) = put_photos(tmp_path / "in", 1)

    def guard(request: Handler) -> Answer | None:
        return (
            None if request.headers.get("Authorization") == "Basic bWU6c2VjcmV0" else (401, {}, b"")
        )

    with serving(guard, runner.host.port) as (url, _):
        arguments = [str(path), "--out", str(tmp_path / "out"), "--workflow", str(holding.workflow)]
        arguments += ["--server", url.replace("//", "//me:secret@")]
        assert restore.main(arguments) == 0
    printed = "".join(capsys.readouterr())
    assert "secret" not in printed + (tmp_path / "out" / restore.REPORT_NAME).read_text()
    assert read_report(tmp_path / "out")["photos"][0]["server"] == url


def test_one_server_without_the_pack_is_left_out(
    runner: Runner, holding: Holding, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (path,) = put_photos(tmp_path / "in", 1)
    bare = b'{"LoadImage": {"input": {}}}'
    with serving(on("/object_info", always(200, bare)), runner.host.port) as (url, _):
        assert run(holding, runner, path, "--out", tmp_path / "out", "--server", url) == 0
    assert f"{url} has no node" in capsys.readouterr().err


def test_names_of_uploads_survive(runner: Runner):
    stored = runner.upload(make_photo(8, 8), 'Straße "1" 東京.png')
    assert stored == 'Straße "1" 東京.png'
