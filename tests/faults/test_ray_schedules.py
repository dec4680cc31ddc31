"""Random schedules of faults over a Ray cluster: nodes die and join, processes and drivers are killed.

Nodes have no model, everything else is real: Ray, supervisors, processes, queue, journal and output.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import ray_job
from fake_cluster_results import result_of
from fake_job import entries, read_job
from ray_nodes import RayNodes, ray_nodes
from schedules import journalled

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]
REQUESTS, PAUSE_S = 60, 0.05
SCHEDULES = 20


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayNodes]:
    with ray_nodes(2) as nodes:
        yield nodes


def _fault(cluster: RayNodes, chance: random.Random, driver: int) -> str:
    """Something bad, or a new node; its name."""
    kinds = ["supervisor", "worker", "driver"]
    kinds += ["remove"] * (len(cluster.nodes) > 1) + ["add"] * (len(cluster.nodes) < 3)
    kind = chance.choice(kinds)
    with suppress(psutil.Error, ProcessLookupError):
        match kind:
            case "supervisor" if found := cluster.supervisors():
                chance.choice(found).kill()
            case "worker" if found := cluster.workers("fake_worker"):
                chance.choice(found).kill()
            case "driver":
                os.kill(driver, signal.SIGKILL)
            case "remove":
                cluster.remove(chance.choice(cluster.nodes))
            case "add":
                cluster.add()
    return kind


@pytest.mark.parametrize("seed", range(SCHEDULES))
def test_no_request_is_lost_or_doubled(seed: int, cluster: RayNodes, tmp_path: Path) -> None:
    chance = random.Random(seed)
    out = tmp_path / "out.jsonl"
    faults = []
    for attempt in range(8):
        process = ray_job.started(cluster.address, out, REQUESTS, PAUSE_S)
        assert process.pid is not None
        while attempt < 3 and len(faults) < 4 and process.is_alive():
            time.sleep(chance.uniform(0.5, 2.5))
            if process.is_alive() and (out.with_name("out.jsonl.journal")).exists():
                faults.append(_fault(cluster, chance, process.pid))
        process.join(60)
        counts = journalled(out)
        assert max(counts.values(), default=1) == 1, faults
        if process.exitcode == 0:
            break
        process.kill()
    job = read_job(entries(REQUESTS))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert Counter(line["id"] for line in lines) == Counter(work.id for work in job.work), faults
    assert [line["completion"] for line in lines] == [result_of(work).completion for work in job.work]
    deadline = time.monotonic() + 60
    while cluster.workers("fake_worker") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not cluster.workers("fake_worker"), "a node's process outlived its job"
    print(seed, faults)
