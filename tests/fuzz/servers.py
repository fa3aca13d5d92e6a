"""A real server: prompts with odd values, and proxies before it that give odd answers."""

from __future__ import annotations

import json
import re
from random import Random

import numpy as np

from diff_restorer.checkpoint import CheckpointError
from tests.e2e.graph import Graph, Runner, make_photo
from tests.e2e.holding import Holding
from tests.e2e.test_bad_servers import Answer, Handler, serving
from tests.fuzz.cases import NUMBERS, WORDS, Case, FaultError, Step, some
from tests.fuzz.soak import DECODE, edit, tile
from tools.client import Client
from tools.errors import (
    ClientError,
    ExecutionError,
    PromptRejectedError,
    ServerUnreachableError,
    WorkflowError,
)
from tools.restoration import OUTPUT_TITLE
from tools.workflow import find_node

OURS = "DiffRestorer"
ERRORS = {
    *(each.__name__ for each in (CheckpointError, *CheckpointError.__subclasses__())),
    *("ValueError", "FileNotFoundError"),
}
SEEDS = range(3)


class Prompts:
    """The shipped workflow with odd values and wires in the pack's nodes, over the API."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        photo = runner.upload(make_photo(40, 24), "fuzz.png")
        self.graph = Graph.load(photo=photo).set("KSampler", steps=1)
        edit(self.graph, tile(self.graph), 0.1, DECODE)
        self.expected = [self._pictures(self.graph, seed) for seed in SEEDS]

    def _pictures(self, graph: Graph, seed: int) -> np.ndarray:
        (picture,) = self.runner.pictures(graph.copy().set("KSampler", seed=seed))
        return picture

    def make(self, random: Random) -> Case:
        ours = [node for node, each in self.graph.nodes.items() if OURS in each["class_type"]]
        outputs = [[node, place] for node in self.graph.nodes for place in range(4)]

        def step() -> Step:
            node = random.choice(ours)
            name = random.choice(list(self.graph.nodes[node]["inputs"]))
            values = [*NUMBERS, *WORDS, *NUMBERS, [], {}, [node, 0], ["none", 0], [node], *outputs]
            return ["set", node, name, random.choice(values)]

        return {"steps": some(random, step)}

    def run(self, case: Case) -> None:
        bad = self.graph.copy()
        for _, node, name, value in case["steps"]:
            bad.nodes[node]["inputs"][name] = value
        self.runner.run(bad)
        (picture,) = self.runner.pictures(bad)
        if picture.size == 0 or picture.max() == 0:
            raise FaultError("a black picture as a success")

    def named(self, error: Exception) -> bool:
        # By the host and by the client, before anything ran.
        if isinstance(error, PromptRejectedError | WorkflowError):
            return True
        found = re.fullmatch(r"node \S+ \((.+?)\) failed: (\w+): (.*)", str(error), re.DOTALL)
        if not isinstance(error, ExecutionError) or found is None:
            return False
        node, kind, message = found.groups()
        # Begins with the name of an input or of a file.
        words = re.match(r"\w+: |/\S+: |The batches", message)
        return bool(words) and kind in ERRORS and node.startswith((OURS, "KSampler"))

    def run_next(self) -> None:
        for seed in SEEDS:
            if not np.array_equal(self._pictures(self.graph, seed), self.expected[seed]):
                raise FaultError("the next prompt gives another picture")


class Servers:
    """What answers some requests in the place of a ComfyUI, for the client of all programs."""

    PATHS = ("/upload", "/prompt", "/queue", "/history", "/view", "/object_info", "/ws", "/")

    def __init__(self, runner: Runner, holding: Holding) -> None:
        self.runner = runner
        photo = runner.upload(make_photo(16, 16), "servers.png")
        self.graph = Graph(json.loads(json.dumps(holding.nodes))).set("LoadImage", image=photo)
        self.expected = self._picture(runner.client)

    def _picture(self, client: Client) -> np.ndarray:
        client.upload(b"", "unused.png")
        result = client.run(self.graph.nodes)
        target = find_node(self.graph.nodes, "SaveImage", OUTPUT_TITLE)
        (picture,) = client.images(result, target)
        return np.asarray(picture)

    def make(self, random: Random) -> Case:
        def step() -> Step:
            deep = "[" * random.choice([1, 2000])
            texts = [*WORDS, *map(json.dumps, [[], {}, 0, [[]], {"error": 1}, None]), deep]
            texts += [json.dumps({key: random.choice([*WORDS, [], {}, 0, None])}) for key in
                      ("prompt_id", "queue_running", "name", "error", "node_errors")]  # fmt: skip
            status = random.choice([200, 200, 200, 204, 301, 302, 400, 401, 404, 413, 500, 504])
            answer = random.choice(["text", "cut", "flip", "length"])
            return [
                answer, random.choice(self.PATHS), status, random.choice(texts), random.random()
            ]  # fmt: skip

        return {"steps": some(random, step)}

    def run(self, case: Case) -> None:
        def rule(request: Handler) -> Answer | None:
            for what, path, status, text, place in case["steps"]:
                if not request.path.startswith(path):
                    continue
                if what == "text":
                    return status, {}, text.encode(errors="replace")
                found, headers, content = request.passed()
                data = bytearray(content)
                if what == "cut":
                    del data[int(place * len(data)) :]
                elif what == "flip" and data:
                    data[int(place * len(data))] ^= 1 << (status % 8)
                else:
                    headers = headers | {"Content-Length": str(len(data) + 1)}
                return found, headers, bytes(data)
            return None

        with serving(rule, self.runner.host.port) as (url, _):
            self._picture(Client(url, 5.0))

    def named(self, error: Exception) -> bool:
        return isinstance(error, ClientError | ServerUnreachableError)

    def run_next(self) -> None:
        if not np.array_equal(self._picture(self.runner.client), self.expected):
            raise FaultError("the next run gives another picture")
