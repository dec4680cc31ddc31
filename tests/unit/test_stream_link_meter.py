"""The meter of a link adds up the time of copies, and leaves out what they wait for before."""

from __future__ import annotations

import pytest
import torch

from zeroinf.engines.stream import transfer
from zeroinf.engines.stream.transfer import LinkMeter, ReplicatedTransfer


class Stream:
    """A stream of copies whose work is over up to `reached`; both in seconds."""

    def __init__(self) -> None:
        self.end, self.reached = 0.0, 0.0


class Event:
    def record(self, stream: Stream) -> None:
        self.at, self.stream = stream.end, stream

    def query(self) -> bool:
        return self.at <= self.stream.reached

    def elapsed_time(self, later: Event) -> float:
        return 1e3 * (later.at - self.at)


def test_only_copies_that_are_over_count_and_waits_between_them_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "new_event", lambda device, **kind: Event())
    stream = Stream()
    meter = LinkMeter(torch.device("cpu"), stream)
    for wait_s, copy_s in [(0.0, 2.0), (5.0, 1.0), (0.5, 4.0)]:
        stream.end += wait_s
        with meter.copying():
            stream.end += copy_s
    stream.reached = 10.0
    assert meter.seconds() == pytest.approx(3.0)
    stream.reached = stream.end
    assert meter.seconds() == pytest.approx(7.0)
    for _ in range(1000):
        with meter.copying():
            stream.end += 1.0
        stream.reached = stream.end
    assert meter.seconds() == pytest.approx(1007.0)


def test_nothing_crosses_a_link_on_the_cpu() -> None:
    carrier = ReplicatedTransfer(torch.device("cpu"))
    carrier.transfer(torch.ones(4, dtype=torch.uint8), 4, torch.zeros(4, dtype=torch.uint8), None, None, None)
    assert carrier.meter.seconds() == 0.0
