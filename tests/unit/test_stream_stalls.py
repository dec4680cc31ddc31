"""The meter of stalls tells computing from waiting for weights, for the host, and between passes."""

from __future__ import annotations

import pytest
import torch

from zeroinf.engines.base import Stalls
from zeroinf.engines.stream import stalls
from zeroinf.engines.stream.stalls import StallMeter
from zeroinf.engines.stream.transfer import ComputeStream


class Gpu:
    """A stream whose work takes time of its own, beside a host that has a clock; both in seconds."""

    def __init__(self) -> None:
        self.host = self.free_at = 0.0

    def launch(self, work: float, host: float = 1.0) -> None:
        """The host takes `host` seconds to launch `work`."""
        self.host += host
        self.free_at = max(self.host, self.free_at) + work

    def wait_until(self, at: float) -> None:
        """Let what comes wait for weights that arrive then."""
        self.free_at = max(self.host, self.free_at, at)

    def synchronize(self) -> None:
        self.host = max(self.host, self.free_at)

    def query(self) -> bool:
        return self.free_at <= self.host


class Event:
    def record(self, gpu: Gpu) -> None:
        self.at, self.gpu = max(gpu.host, gpu.free_at), gpu

    def query(self) -> bool:
        return self.at <= self.gpu.host

    def elapsed_time(self, later: Event) -> float:
        return 1e3 * (later.at - self.at)


@pytest.fixture
def gpu() -> Gpu:
    return Gpu()


@pytest.fixture
def meter(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> StallMeter:
    monkeypatch.setattr(stalls, "new_event", lambda device, **kind: Event())
    compute = ComputeStream(torch.device("cpu"))
    compute.is_there, compute._stream = True, gpu
    return StallMeter(torch.device("cpu"), compute)


def resident(gpu: Gpu, meter: StallMeter, work: float) -> None:
    """A layer of four launches, each of so much work."""
    gpu.host += 0.5
    meter.wanted()
    for _ in range(4):
        gpu.launch(work)
    meter.used()


def found(gpu: Gpu, meter: StallMeter) -> Stalls:
    """All of the passes so far; of the next one no more than its beginning."""
    meter.end_pass()
    gpu.synchronize()
    for _ in range(2):
        meter.wanted()
    return meter.total()


@pytest.mark.parametrize("passes", [1, 80])
def test_layers_that_stay_are_computed_where_work_is_queued(passes: int, gpu: Gpu, meter: StallMeter) -> None:
    for _ in range(passes):
        for _ in range(5):
            resident(gpu, meter, work=3.0)
        meter.end_pass()
    seconds = found(gpu, meter)
    # The first layer of all begins with an idle GPU: a second goes by until its first kernel is launched.
    assert seconds.compute_s == pytest.approx(passes * 5 * 12.0 + 1.0)
    assert (seconds.link_s, seconds.disk_s, seconds.host_s) == (0.0, 0.0, 0.0)


def test_where_the_gpu_has_nothing_queued_it_waits_for_the_host(gpu: Gpu, meter: StallMeter) -> None:
    for _ in range(5):
        resident(gpu, meter, work=0.2)
    seconds = found(gpu, meter)
    # The last layer's work is still queued when the host says that the pass is over.
    assert seconds.host_s + seconds.compute_s == pytest.approx(5 * 4.0 + 4 * 0.5 + 0.2)
    assert seconds.host_s >= 4 * 4.5
    assert seconds.link_s == 0.0


def test_a_wait_for_weights_is_neither_computing_nor_the_hosts(gpu: Gpu, meter: StallMeter) -> None:
    for at in (0, 1, 2):
        resident(gpu, meter, work=0.0 if at else 10.0)
        meter.wanted()
        gpu.wait_until(100.0 * (at + 1))
        meter.there(0.0)
        gpu.launch(5.0)
        meter.used()
    seconds = found(gpu, meter)
    assert seconds.link_s == pytest.approx(300.0 - (1.5 + 40.0) - 2 * 5.0, abs=3.0)
    assert seconds.compute_s + seconds.host_s == pytest.approx(40.0 + 3 * 5.0, abs=3.0)
    assert seconds.disk_s == 0.0


def test_where_the_host_was_held_up_by_the_disk_the_wait_is_the_disks(gpu: Gpu, meter: StallMeter) -> None:
    resident(gpu, meter, work=1.0)
    meter.wanted()
    gpu.host += 50.0
    gpu.wait_until(gpu.host + 7.0)
    meter.there(50.0)
    gpu.launch(5.0)
    meter.used()
    seconds = found(gpu, meter)
    assert seconds.disk_s == pytest.approx(50.0)
    assert seconds.link_s == pytest.approx(7.0 - 1.0)
    assert seconds.host_s == 0.0


def test_what_lies_between_passes_is_no_ones_wait(gpu: Gpu, meter: StallMeter) -> None:
    for _ in range(3):
        for _ in range(2):
            resident(gpu, meter, work=3.0)
        meter.end_pass()
        gpu.launch(20.0)  # the head
        gpu.synchronize()
        gpu.host += 4.0  # the scheduler
    seconds = found(gpu, meter)
    assert seconds.between_s == pytest.approx(3 * 24.0 + 2 * 0.5)
    assert seconds.host_s == 0.0


def test_parts_of_a_layer_that_come_while_it_is_in_use_are_computed_inside_of_it(gpu: Gpu, meter: StallMeter) -> None:
    meter.wanted()
    meter.there(0.0)
    gpu.launch(6.0)
    for arrives in (30.0, 60.0):
        meter.wanted()
        gpu.wait_until(arrives)
        meter.there(0.0)
        gpu.launch(4.0)
        meter.used()
    gpu.launch(2.0)
    meter.used()
    seconds = found(gpu, meter)
    assert seconds.link_s == pytest.approx((30.0 - 7.0) + (60.0 - 34.0))
    assert seconds.compute_s == pytest.approx(7.0 + 4.0 + 4.0 + 2.0)
    assert seconds.host_s == 0.0
