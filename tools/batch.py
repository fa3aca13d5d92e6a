"""Spreads photos over ComfyUI servers, and goes on when servers die or come back."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tools import photo, photo_writer
from tools.client import (
    Client,
    ClientError,
    Progress,
    PromptRejectedError,
    RunLostError,
    ServerUnreachableError,
    TooLargeError,
    Workflow,
)
from tools.jobs import Job, digest_workflow
from tools.photo_writer import OutputError
from tools.restoration import restore_photo

POLL_SECONDS = 0.5
MOST_DOUBLINGS = 4
"""Of the pause before a server that answers, but fails, gets the next photo."""
PROBE_TIMEOUT = 5.0
STOP_TIMEOUT = 5.0


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
    """With its password, if it has one; for messages see `Client.server`."""
    answers: bool = True
    """Whether it did when the batch began; otherwise it is waited for first."""
    revive: Callable[[], None] | None = None
    """Starts it again if it is dead; for servers of this program."""


@dataclass(frozen=True)
class Event:
    """What the batch tells while it runs, in the caller's thread."""

    text: str | None = None
    """News about a server."""
    job: Job | None = None
    """A photo that has got on, or is settled: see its ``status``."""
    progress: Progress | None = None
    """Of the job, while it is with a server."""


@dataclass
class Trouble:
    """What a server has failed at since it restored a photo."""

    since: float
    faults: int = 0
    """How often it was no ComfyUI for a photo, in whatever way."""
    lost: int = 0
    """How many runs it lost."""
    reason: str = ""
    """Why, the last time."""


class Batch:
    """Photos, servers and the state between them.

    Each server has a thread that takes the next photo whenever it is free. A photo whose server
    died goes to the front of the queue, so any living server takes it next; one that a server did
    not even begin goes to the end, so that a bad server costs time and not photos. Whatever
    servers do, it is bounded: by `Options.wait` without a restored photo, by `Options.attempts`
    for the photo that they die of.

    Args:
        servers: At least one.
        workflow: In API format, with the titles of `tools.restoration`.
        jobs: The pending ones are restored.
        options: See there.
    """

    def __init__(
        self, servers: Sequence[Server], workflow: Workflow, jobs: Sequence[Job], options: Options
    ) -> None:
        self.servers = servers
        self.workflow = workflow
        self.digest = digest_workflow(workflow, options.max_side)
        self.options = options
        self.pending = deque(job for job in jobs if job.status == "pending")
        self.flying: dict[Client, Job] = {}
        """The photo that each server has."""
        self.given_up: dict[str, str] = {}
        """Servers that get no more photos, and why."""
        self.changed = threading.Condition()
        self.stopped = threading.Event()
        """Nothing is left to do, or the run is being given up."""
        self.fault: BaseException | None = None
        """Of this program, in one of the threads."""
        self.events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()

    def run(self, on_event: Callable[[Event], None] = lambda event: None) -> None:
        """Restores all pending photos; ``Job.status`` says what became of each.

        Args:
            on_event: Called in this thread. An exception in it ends the batch, as Ctrl-C does:
                what is done is kept, the servers' runs are cancelled.
        """
        # Daemons, so that a server which does not let go of its run cannot keep the program.
        threads = [
            threading.Thread(target=self._serve, args=(server,), daemon=True)
            for server in self.servers
        ]
        for thread in threads:
            thread.start()
        try:
            for _ in threads:
                while (event := self.events.get()) is not None:
                    on_event(event)
        except BaseException:
            self._stop()
            for thread in threads:
                thread.join(STOP_TIMEOUT)
            raise
        if self.fault is not None:
            raise self.fault
        reasons = "; ".join(f"{url} {reason}" for url, reason in self.given_up.items())
        for job in self.pending:
            job.fail(f"no server was left to restore it: {reasons}")
            on_event(Event(job=job))

    def _stop(self) -> None:
        """Ends the threads: no photo is taken any more, runs are taken from the servers."""
        with self.changed:
            self.pending.clear()
            self.stopped.set()
            self.changed.notify_all()
            clients = list(self.flying)
        for client in clients:
            if client.prompt_id is not None:
                # A server that is gone has no run any more.
                with contextlib.suppress(ClientError):
                    Client(client.url, PROBE_TIMEOUT).cancel(client.prompt_id)

    def _serve(self, server: Server) -> None:
        """The thread of one server."""
        try:
            client = Client(server.url)
            trouble = Trouble(time.monotonic())
            if not server.answers and not self._wait_for(server, trouble):
                return
            while (job := self._take(client)) is not None:
                if self._try(client, job, trouble):
                    trouble = Trouble(0.0)
                elif not self._wait_for(server, trouble):
                    return
        except BaseException as error:
            self.fault = error
            self._stop()
        finally:
            self.events.put(None)

    def _try(self, client: Client, job: Job, trouble: Trouble) -> bool:
        """Restores a photo, fails it or puts it back; whether its server is still there."""
        try:
            self._restore(client, job)
        except RunLostError as error:
            self._lose(client, job, error)
            # It did take the photo, so it has all the time to come back.
            trouble.since, trouble.lost = time.monotonic(), trouble.lost + 1
            if trouble.lost >= self.options.attempts and not self._is_last():
                self._give_up(client.server, f"lost {trouble.lost} runs in a row: {error}")
            return False
        except (ServerUnreachableError, TooLargeError) as error:
            if isinstance(error, ServerUnreachableError) or not self._is_last():
                self._pass_on(client, job, trouble, str(error))
                return False
            job.fail(str(error))
            self._land(client, job)
        except PromptRejectedError as error:
            # Not the photo's fault: this server cannot run this workflow.
            self._put_back(client, job)
            self._give_up(client.server, f"refuses the workflow: {error}")
            return False
        except OutputError:
            job.attempts -= 1
            raise
        except (ClientError, OSError, MemoryError) as error:
            if not self.stopped.is_set():  # otherwise its run was cancelled by us
                job.fail(str(error) or type(error).__name__)
            self._land(client, job)
        return True

    def _pass_on(self, client: Client, job: Job, trouble: Trouble, reason: str) -> None:
        """Leaves a photo that a server did not even begin to others."""
        if not trouble.faults and not trouble.lost:
            trouble.since = time.monotonic()
        trouble.faults += 1
        if reason != trouble.reason:
            self._say(reason)
        trouble.reason = reason
        self._put_back(client, job)

    def _take(self, client: Client) -> Job | None:
        """The next photo; waits as long as one in flight may yet come back."""
        with self.changed:
            while not self.pending:
                if self.stopped.is_set() or not self.flying:
                    self.stopped.set()
                    self.changed.notify_all()
                    return None
                self.changed.wait()
            # Rather one that another server has lost than one that this server has.
            anew = (each for each in self.pending if each.server != client.server)
            job = self.pending[0] if self._is_last() else next(anew, self.pending[0])
            self.pending.remove(job)
            self.flying[client] = job
            job.server = client.server
            job.attempts += 1
            return job

    def _restore(self, client: Client, job: Job) -> None:
        source = photo.read(job.source, self.options.max_side)

        def report(progress: Progress) -> None:
            if self.stopped.is_set():  # since before it was queued
                client.cancel(progress.prompt_id)
            self.events.put(Event(job=job, progress=progress))

        restoration = restore_photo(client, self.workflow, source, report)
        notes = []
        if restoration.pixels.dtype != source.color.dtype:
            notes = ["its 16 bits are filled from a result of 8 bits: the workflow gives alpha"]
        result = source.with_color(restoration.pixels, *notes)
        job.kind, job.probabilities = restoration.kind, restoration.probabilities
        job.seconds, job.bits = round(restoration.seconds, 3), result.bits
        job.notes, job.error = list(result.notes), None
        photo_writer.write(job.output, result, job.record(source.digest, self.digest))
        job.status = "done"
        self._land(client, job)

    def _land(self, client: Client, job: Job) -> None:
        """Ends a photo's flight for good."""
        self.events.put(Event(job=job))
        with self.changed:
            del self.flying[client]
            self.changed.notify_all()

    def _put_back(self, client: Client, job: Job, *, ran: bool = False) -> None:
        with self.changed:
            job.attempts -= not ran
            del self.flying[client]
            if not self.stopped.is_set():
                (self.pending.appendleft if ran else self.pending.append)(job)
            self.changed.notify_all()

    def _lose(self, client: Client, job: Job, error: RunLostError) -> None:
        self._say(f"{error} {job.source} was in flight.")
        if job.attempts < self.options.attempts:
            return self._put_back(client, job, ran=True)
        job.fail(f"its server died {job.attempts} times while it ran, the last time: {error}")
        return self._land(client, job)

    def _give_up(self, url: str, reason: str) -> None:
        self.given_up[url] = reason
        self._say(f"{url} {reason}. It gets no more photos.")

    def _is_last(self) -> bool:
        return len(self.servers) - len(self.given_up) <= 1

    def _wait_for(self, server: Server, trouble: Trouble) -> bool:
        """Whether the server answers again in time, while there may be work for it.

        One that answers, but fails all the same, is asked less and less often, and not for ever.
        """
        probe = Client(server.url, PROBE_TIMEOUT)
        if probe.server in self.given_up:
            return False
        deadline = trouble.since + self.options.wait
        doublings = min(trouble.faults, MOST_DOUBLINGS)
        pause = POLL_SECONDS * 2**doublings if doublings > 1 else 0.0
        told = False
        while not self._idle():
            with self.changed:  # the last photo ends every pause
                self.changed.wait_for(self._idle, max(min(pause, deadline - time.monotonic()), 0.0))
            try:
                if server.revive:
                    server.revive()
                probe.check()
                if trouble.faults > 1 and time.monotonic() >= deadline:
                    wait = f"{self.options.wait:g} s"
                    self._give_up(probe.server, f"restored nothing for {wait}: {trouble.reason}")
                    return False
                if told:
                    self._say(f"{probe.server} answers again.")
                return True
            except ClientError as error:
                if time.monotonic() >= deadline:
                    reason = f"did not answer for {self.options.wait:g} s: {error}"
                    self._give_up(probe.server, reason)
                    return False
            if not told:
                self._say(f"Waiting up to {self.options.wait:g} s for {probe.server}.")
                told = True
            pause = POLL_SECONDS
        return False

    def _idle(self) -> bool:
        with self.changed:
            return self.stopped.is_set() or not (self.pending or self.flying)

    def _say(self, text: str) -> None:
        self.events.put(Event(text=text))
