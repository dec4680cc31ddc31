"""A server that is killed, or loses power, or whose disk fails, at any event: files and batches that clients know stay.

A client uploads a file, begins a batch and waits for it. At each event of the state folder a fault happens; the server
is started again, and the client goes on with what it was told. The default tier takes a few events, others each day
(TEST_SEED); `scripts/test --all` takes the others as well.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from crashes import CRASHES, DIED, Failure, Fault, Faults
from fake_job import exit_code, in_child
from fake_server import DEFAULTS, MODEL, PATH, InstantService, content, journalled, outcome, read_job, run_server
from schedules import Share, Step, scratch
from tiers import tiered

from zeroinf.generation.row import Sampling
from zeroinf.serve.batches import Batches
from zeroinf.serve.files import FileStore
from zeroinf.serve.gateway import Gateway
from zeroinf.serve.settings import Settings
from zeroinf.service.handles import Handle, TokenEvent

REQUESTS = 5
FAULTS: tuple[Fault | Failure, ...] = (*CRASHES, "disk full", "sync fails")
SHARES = ("a few", "the others")
NTH = 25


class Client:
    """What a client knows of a server that is started again and again."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.known: dict[str, str] = {}
        self.lost: list[str] = []
        self.events = 0

    def go_on(self, step: Step) -> int:
        """One server; its exit code."""
        reads, writes = os.pipe()

        def body() -> int:
            tell = os.write  # as it is before faults come over it
            faults = Faults(self.state.parent, step.fault, step.at, step.seed)

            def told(what: str, which: str) -> None:
                tell(writes, json.dumps([what, which]).encode() + b"\n")

            code = run_server(self.state, dict(self.known), REQUESTS, told)
            told("events", str(len(faults.events)))
            return code

        pid = in_child(body)
        os.close(writes)
        with os.fdopen(reads) as pipe:
            for what, which in map(json.loads, pipe):
                if what == "lost":
                    self.lost.append(which)
                elif what == "events":
                    self.events = int(which)
                else:
                    self.known[what] = which
        return exit_code(pid)


@pytest.fixture(scope="module")
def undisturbed() -> tuple[int, object]:
    """Events of a server that nothing befalls, and what its batch comes to."""
    with scratch() as folder:
        client = Client(folder / "state")
        assert client.go_on(Step("kill", 0)) == 0
        assert client.known["completed"]
        return client.events, outcome(client.state, client.known["batch"])


@pytest.mark.parametrize("share", tiered(SHARES, ("a few",)))
@pytest.mark.parametrize("fault", FAULTS)
def test_what_clients_were_told_stays_and_each_request_is_answered_once(
    fault: Fault | Failure, share: str, undisturbed: tuple[int, object]
) -> None:
    seed, (events, expected) = int(os.environ["TEST_SEED"]), undisturbed
    steps = Share(seed, nth=NTH, is_rest=share != "a few").of(range(1, events + 1))
    ended = Counter[int]()
    for at in steps:
        with scratch() as folder:
            client = Client(folder / "state")
            code = client.go_on(Step(fault, at, seed))
            assert code in ((DIED, 0) if fault in CRASHES else (0, 2)), (at, code)
            ended[code] += 1
            assert client.go_on(Step("kill", 0)) == 0, at
            assert client.lost == [], (at, seed)
            assert outcome(client.state, client.known["batch"]) == expected, (at, seed)
            counts = journalled(client.state, client.known["batch"])
            assert set(counts.values()) == {1}, (at, seed)
    assert ended[0] <= len(steps) // 2, "faults that do not happen prove nothing"


def test_the_next_server_counts_failures_as_such(tmp_path: Path) -> None:
    """Beside a line that is refused: the first request is answered, the second one fails, others are under way."""

    class Halting(InstantService):
        def _answer(self, prompt: Sequence[int], sampling: Sampling) -> Handle:
            self._count += 1
            cancelled = TokenEvent(text="", tokens=(), finish_reason="cancelled")
            handle = Handle(self._count, len(prompt), lambda number: handle.heard(cancelled))
            if self._count < 3:
                handle.heard(TokenEvent(text="", tokens=[1], finish_reason=("length", "error")[self._count - 1]))
            return handle

    def server() -> tuple[Gateway, FileStore, Batches]:
        gateway = Gateway(Settings(model_name=MODEL), DEFAULTS)
        gateway.open(service := Halting())  # type: ignore[arg-type]
        files = FileStore(tmp_path / "files", 1 << 30)
        batches = Batches(tmp_path / "batches", files, gateway)
        batches.start(service, read_job)  # type: ignore[arg-type]
        return gateway, files, batches

    def counts(batches: Batches, batch: str) -> tuple[int, int]:
        found = batches.get(batch)
        return found.completed, found.failed

    _, files, batches = server()
    file = files.add(io.BytesIO(content(REQUESTS)), "in.jsonl", "batch").id
    batch = batches.create({"input_file_id": file, "endpoint": PATH, "completion_window": "24h"}).id
    while counts(batches, batch) != (1, 2):
        time.sleep(0.01)
    batches.stop()
    gateway, _, batches = server()
    try:
        while not gateway.batch_requests:  # it has read the journal
            time.sleep(0.01)
        assert counts(batches, batch) == (1, 2)
    finally:
        batches.stop()
