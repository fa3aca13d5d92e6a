"""Spreads photos over ComfyUI servers, and goes on when servers die or come back."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from tools import errors, photo, photo_writer
from tools.client import AsyncClient, Progress
from tools.host import Host, HostError
from tools.jobs import Job, digest_workflow
from tools.photo_writer import OutputError
from tools.restoration import restore_pixels
from tools.workflow import Workflow

POLL_SECONDS = 0.5
MOST_DOUBLINGS = 4
"""Of the pause before a server that answers, but fails, gets the next photo."""
PROBE_TIMEOUT = 5.0


@dataclass(frozen=True)
class Options:
    """How a batch is run."""

    max_side: int = 0
    """Larger photos are shrunk to this longest side in pixels; 0 keeps every size."""
    wait: float = 300.0
    """Seconds that a server may take to answer, and to restore a photo, after it failed to."""
    attempts: int = 3
    """How often a photo may be in flight when its server dies before it counts as the cause."""


@dataclass(frozen=True)
class Server:
    """One ComfyUI that takes photos, one at a time."""

    url: str
    """With its password, if it has one; for messages see `AsyncClient.server`."""
    answers: bool = True
    """Whether it did when the batch began; otherwise it is waited for first."""
    revive: Callable[[], Awaitable[None]] | None = None
    """Starts it again if it is dead; for servers of this program."""
    clear: Callable[[], None] | None = None
    """Removes what settled photos left in its folders; for servers that nobody else uses."""


def server_of(host: Host) -> Server:
    """A ComfyUI of this program, which is running, and is started again if it dies."""

    async def revive() -> None:
        try:
            if not host.running():
                await asyncio.to_thread(host.restart)
        except HostError as error:
            raise errors.ServerUnreachableError(str(error)) from error
        except asyncio.CancelledError:
            host.kill()  # else the thread would wait for its start
            raise

    return Server(host.url, revive=revive, clear=host.clear)


@dataclass(frozen=True)
class Event:
    """What the batch tells while it runs."""

    text: str | None = None
    """News about a server."""
    job: Job | None = None
    """A photo that has got on, or is settled: see its ``status``."""
    progress: Progress | None = None
    """Of the job, while it is with a server."""


class CallerFault(BaseException):  # not an Exception: no server and no photo is to blame
    """Carries what ``on_event`` raised."""


@dataclass
class Worker:
    """A server, and what it has failed at since it restored a photo."""

    server: Server
    client: AsyncClient
    since: float
    """When it began to fail."""
    faults: int = 0
    """How often it was no ComfyUI for a photo, in whatever way."""
    lost: int = 0
    """How many runs it lost."""
    reason: str = ""
    """Why, the last time."""


class Batch:
    """Photos, servers and the state between them.

    Each server has a task that takes the next photo whenever it is free. A photo whose server
    died goes to the front of the queue, so any living server takes it next; one that a server did
    not even begin goes to the end, so that a bad server costs time and not photos. Whatever
    servers do, it is bounded: by `Options.wait` without a restored photo, by `Options.attempts`
    for the photo that they die of. The workflow has the titles of `tools.restoration`.
    """

    def __init__(
        self, servers: Sequence[Server], workflow: Workflow, jobs: Sequence[Job], options: Options
    ) -> None:
        self.servers = servers
        self.workflow = workflow
        self.digest = digest_workflow(workflow, options.max_side)
        self.options = options
        self.pending = deque(job for job in jobs if job.status == "pending")
        self.flying = 0
        """How many photos are with servers."""
        self.returned = asyncio.Event()
        """One of them is pending again."""
        self.given_up: dict[str, str] = {}
        """Servers that get no more photos, and why."""
        self.tasks: list[asyncio.Task[None]] = []
        self.on_event: Callable[[Event], None] = lambda event: None

    def run(self, on_event: Callable[[Event], None] = lambda event: None) -> None:
        """Restores all pending photos; ``Job.status`` says what became of each.

        Args:
            on_event: Called in this thread, while nothing else goes on. An exception in it ends the
                batch, as Ctrl-C does: what is done is kept, the servers' runs are cancelled.
        """
        self.on_event = on_event
        try:
            if self.pending:
                asyncio.run(self._run())
        except BaseExceptionGroup as faults:
            fault = faults.exceptions[0]
            raise fault.args[0] if isinstance(fault, CallerFault) else fault from None
        reasons = "; ".join(f"{url} {reason}" for url, reason in self.given_up.items())
        for job in self.pending:
            job.fail(f"no server was left to restore it: {reasons}")
            on_event(Event(job=job))

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            self.tasks = [group.create_task(self._serve(server)) for server in self.servers]

    async def _serve(self, server: Server) -> None:
        """Gives a server photos until it is given up, or the last photo is settled."""
        client = AsyncClient(server.url)
        worker = Worker(server, client, time.monotonic())
        there = server.answers or await self._wait_for(worker)
        while there:
            while not self.pending:  # one in flight may yet come back
                self.returned.clear()
                await self.returned.wait()
            if await self._try(worker, self._take(client.server)):
                worker = Worker(server, client, 0.0)
            else:
                there = await self._wait_for(worker)

    def _take(self, server: str) -> Job:
        # Rather one that another server has lost than one that this server has.
        anew = (each for each in self.pending if each.server != server)
        job = self.pending[0] if self._is_last() else next(anew, self.pending[0])
        self.pending.remove(job)
        self.flying += 1
        job.server = server
        job.attempts += 1
        return job

    async def _try(self, worker: Worker, job: Job) -> bool:
        """Restores a photo, fails it or puts it back; whether its server is still there.

        The one place that decides whose fault it is: the server's, and another may have the photo;
        the photo's, and it fails; or the user's, and all ends.
        """
        try:
            await self._restore(worker, job)
        except errors.RunLostError as error:
            self._lose(worker, job, error)
            return False
        except errors.PromptRejectedError as error:
            # Not the photo's fault: this server cannot run this workflow.
            self._put_back(job)
            self._give_up(worker, f"refuses the workflow: {error}")
            return False
        except OutputError:
            job.attempts -= 1
            raise
        except (errors.ClientError, OSError, MemoryError) as error:
            of_server = isinstance(error, errors.ServerUnreachableError)
            # Another server may take what is too large for this one.
            if of_server or (isinstance(error, errors.TooLargeError) and not self._is_last()):
                self._pass_on(worker, job, str(error))
                return False
            job.fail(str(error) or type(error).__name__)
        self._land(worker, job)
        return True

    async def _restore(self, worker: Worker, job: Job) -> None:
        async def report(progress: Progress) -> None:
            self._tell(Event(job=job, progress=progress))

        source = await asyncio.to_thread(photo.read, job.source, self.options.max_side)
        prefix = uuid.uuid4().hex if worker.server.clear else None
        restoration = await restore_pixels(
            worker.client, self.workflow, source.pixels, report, prefix
        )
        notes = []
        if restoration.pixels.dtype != source.color.dtype:
            notes = ["its 16 bits are filled from a result of 8 bits: the workflow gives alpha"]
        result = await asyncio.to_thread(source.with_color, restoration.pixels, *notes)
        job.kind, job.probabilities = restoration.kind, restoration.probabilities
        job.seconds, job.bits = round(restoration.seconds, 3), result.bits
        job.notes, job.error = list(result.notes), None
        record = job.record(source.digest, self.digest)
        await asyncio.to_thread(photo_writer.write, job.output, result, record)
        job.status = "done"

    def _land(self, worker: Worker, job: Job) -> None:
        """Ends a photo's flight for good; the last one ends all that servers wait for."""
        self.flying -= 1
        if worker.server.clear:  # it has no other photo: each gets one at a time
            worker.server.clear()
        self._tell(Event(job=job))
        if not (self.pending or self.flying):
            for task in self.tasks:
                task.cancel()

    def _put_back(self, job: Job, *, ran: bool = False) -> None:
        job.attempts -= not ran
        self.flying -= 1
        (self.pending.appendleft if ran else self.pending.append)(job)
        self.returned.set()

    def _lose(self, worker: Worker, job: Job, error: errors.RunLostError) -> None:
        """Gives a photo to the next free server, or fails it if it is what servers die of."""
        self._say(f"{error} {job.source} was in flight.")
        # It did take the photo, so it has all the time to come back.
        worker.since, worker.lost = time.monotonic(), worker.lost + 1
        if worker.lost >= self.options.attempts and not self._is_last():
            self._give_up(worker, f"lost {worker.lost} runs in a row: {error}")
        if job.attempts < self.options.attempts:
            self._put_back(job, ran=True)
        else:
            job.fail(f"its server died {job.attempts} times while it ran, the last time: {error}")
            self._land(worker, job)

    def _pass_on(self, worker: Worker, job: Job, reason: str) -> None:
        """Leaves a photo that a server did not even begin to others."""
        if not worker.faults and not worker.lost:
            worker.since = time.monotonic()
        worker.faults += 1
        if reason != worker.reason:
            self._say(reason)
        worker.reason = reason
        self._put_back(job)

    def _give_up(self, worker: Worker, reason: str) -> None:
        self.given_up[worker.client.server] = reason
        self._say(f"{worker.client.server} {reason}. It gets no more photos.")

    def _is_last(self) -> bool:
        return len(self.servers) - len(self.given_up) <= 1

    async def _wait_for(self, worker: Worker) -> bool:
        """Whether the server answers again in time.

        One that answers, but fails all the same, is asked less and less often, and not for ever.
        """
        probe, wait = AsyncClient(worker.server.url, PROBE_TIMEOUT), f"{self.options.wait:g} s"
        deadline = worker.since + self.options.wait
        doublings = min(worker.faults, MOST_DOUBLINGS)
        pause = POLL_SECONDS * 2**doublings if doublings > 1 else 0.0
        told = False
        while probe.server not in self.given_up:
            await asyncio.sleep(max(min(pause, deadline - time.monotonic()), 0.0))
            try:
                if worker.server.revive:
                    await worker.server.revive()
                await probe.check()
            except errors.ClientError as error:
                if time.monotonic() >= deadline:
                    self._give_up(worker, f"did not answer for {wait}: {error}")
                elif not told:
                    self._say(f"Waiting up to {wait} for {probe.server}.")
                    told = True
                pause = POLL_SECONDS
            else:
                if worker.faults > 1 and time.monotonic() >= deadline:
                    self._give_up(worker, f"restored nothing for {wait}: {worker.reason}")
                    continue
                if told:
                    self._say(f"{probe.server} answers again.")
                return True
        return False

    def _say(self, text: str) -> None:
        self._tell(Event(text=text))

    def _tell(self, event: Event) -> None:
        try:
            self.on_event(event)
        except Exception as error:
            raise CallerFault(error) from error
