"""A server that is killed, or loses power, or whose disk fails, at any event: files and batches that clients know stay.

A client uploads a file, begins a batch and waits for it. At each event of the state folder a fault happens; the server
is started again, and the client goes on with what it was told. The default tier takes a few events, others each day
(TEST_SEED); `scripts/test --all` takes the others as well.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from crashes import CRASHES, DIED, Failure, Fault, Faults
from fake_job import exit_code, in_child
from fake_server import journalled, outcome, run_server
from schedules import Share, Step, scratch
from tiers import tiered

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
