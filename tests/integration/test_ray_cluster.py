"""`zeroinf run --ray` and `zeroinf.ray.Generate` on Ray clusters of this machine, with a real model.

Outputs are compared, byte for byte, with that of a plain run in float32.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from ray_nodes import RayNodes, ray_nodes

from zeroinf.jobs.status import read_status

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]
REQUESTS = 24
STARTED_S, ENDED_S = 120, 240
ENVIRON = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def command(folder: Path, out: Path, *more: str) -> list[str]:
    words = ["run", "-m", "demo", "--dtype", "float32", "-b", "3", "-i", str(folder / "in.jsonl"), "-o", str(out)]
    return [sys.executable, "-m", "zeroinf", *words, *more]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The input, and the output of a plain run."""
    folder = tmp_path_factory.mktemp("ray")
    asked = ({"id": f"r{i}", "prompt": f"The number {i} is", "max_tokens": 6 + i * 5 % 9} for i in range(REQUESTS))
    (folder / "in.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))
    subprocess.run(command(folder, folder / "plain.jsonl", "-q"), env={**os.environ, **ENVIRON}, check=True)
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayNodes]:
    with ray_nodes(1) as nodes:
        yield nodes


class Run:
    """A run on the cluster, in a process of its own."""

    def __init__(self, folder: Path, out: Path, cluster: RayNodes, *more: str) -> None:
        self._folder, self.out = folder, out
        self._errors = out.with_suffix(".errors").open("a")
        arguments = command(folder, out, "--ray", cluster.address, *more)
        self.process = subprocess.Popen(arguments, env={**os.environ, **ENVIRON}, stderr=self._errors)

    @property
    def done(self) -> int:
        """Results in the journal."""
        return read_status(self.out).done if self.out.with_name(self.out.name + ".journal").exists() else 0

    @property
    def words(self) -> str:
        return self.out.with_suffix(".errors").read_text()

    def until(self, what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + STARTED_S
        while not what():
            assert self.process.poll() is None, self.words
            assert time.monotonic() < deadline, self.words
            time.sleep(0.05)

    def check(self) -> None:
        """It ends, with the output of a plain run."""
        assert self.process.wait(ENDED_S) == 0, self.words
        assert self.out.read_bytes() == (self._folder / "plain.jsonl").read_bytes()


@pytest.fixture
def run(folder: Path, cluster: RayNodes, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def start(*more: str) -> Run:
        runs.append(Run(folder, tmp_path / "out.jsonl", cluster, *more))
        return runs[-1]

    yield start
    for one in runs:
        one.process.kill()
    gone(cluster)


def gone(cluster: RayNodes) -> None:
    deadline = time.monotonic() + 60
    while cluster.workers() + cluster.supervisors() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not cluster.workers() + cluster.supervisors(), "processes of nodes outlived their job"


def nodes_of(report: Path) -> dict[str, int]:
    return {node["name"]: node["requests"] for node in json.loads(report.read_text(encoding="utf-8"))["nodes"]}


def test_one_node_gives_what_a_plain_run_gives_and_a_killed_actor_is_started_again(
    run: Callable[..., Run], cluster: RayNodes
) -> None:
    job = run()
    job.until(lambda: job.done > 2)
    cluster.supervisors()[0].kill()
    job.check()
    assert "lost " in job.words


def test_a_process_that_is_killed_is_named_with_its_exit_code(run: Callable[..., Run], cluster: RayNodes) -> None:
    job = run()
    job.until(lambda: job.done > 2)
    cluster.workers()[0].kill()
    job.check()
    assert "its process was killed by SIGKILL" in job.words
    assert "(exit code 137)" in job.words


def test_a_late_node_gets_work_and_one_that_dies_gives_it_back(
    run: Callable[..., Run], cluster: RayNodes, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    job = run("--report", str(report))
    job.until(lambda: job.done > 1)
    late = cluster.add()
    job.until(lambda: job.words.count("is ready after") == 2)
    assert read_status(job.out).state == "running"
    job.until(lambda: read_status(job.out).nodes == 2 or job.done > REQUESTS - 6)
    cluster.remove(late)
    job.check()


def test_two_and_three_nodes_give_what_a_plain_run_gives_and_a_killed_driver_goes_on(
    run: Callable[..., Run], cluster: RayNodes, tmp_path: Path
) -> None:
    while len(cluster.nodes) < 3:
        cluster.add()
    job = run("--ray-nodes", "2:2")
    job.until(lambda: job.done > 4)
    os.kill(job.process.pid, signal.SIGKILL)
    job.process.wait()
    gone(cluster)
    report = tmp_path / "report.json"
    job = run("--resume", "--ray-nodes", "3:3", "--report", str(report))
    job.check()
    assert len(nodes_of(report)) == 3
    assert "resuming with" in job.words


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_order(number: signal.Signals, run: Callable[..., Run], cluster: RayNodes) -> None:
    job = run()
    job.until(lambda: job.done > 2)
    job.process.send_signal(number)
    assert job.process.wait(ENDED_S) == 128 + number, job.words
    assert "finished results are saved in" in job.words
    gone(cluster)
    run("--resume").check()


def test_a_plan_that_fails_ends_the_job_with_its_exit_code(run: Callable[..., Run]) -> None:
    job = run("--host-memory", "1MiB")
    assert job.process.wait(STARTED_S) == 3, job.words
    assert "is left out" in job.words


def test_map_batches_returns_every_id_once(cluster: RayNodes, tmp_path: Path) -> None:
    script = tmp_path / "stage.py"
    script.write_text(
        f"""
import ray
from zeroinf.ray import Generate
ray.init({cluster.address!r}, log_to_driver=False)
asked = ray.data.from_items([dict(id=i, prompt=f"The number {{i}} is" if i % 10 else None) for i in range(60)])
asked.repartition(6).write_parquet({str(tmp_path / "in")!r})
settings = dict(model="demo", dtype="float32", max_prompt_tokens=16, max_new_tokens=4, batch_size=8)
done = ray.data.read_parquet({str(tmp_path / "in")!r}).map_batches(
    Generate, fn_constructor_kwargs=settings, batch_format="pyarrow", batch_size=5,
    concurrency={min(2, len(cluster.nodes))}, num_cpus=0, max_concurrency=2,
)
done.write_parquet({str(tmp_path / "out")!r})
"""
    )
    subprocess.run([sys.executable, script], env={**os.environ, **ENVIRON}, check=True, timeout=ENDED_S)
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(tmp_path / "out").to_pylist()
    assert sorted(row["id"] for row in rows) == list(range(60))
    assert all((row["completion"] is None) == (row["id"] % 10 == 0) for row in rows)
    assert all((row["error"] is None) == (row["id"] % 10 != 0) for row in rows)


def test_a_cluster_of_one_machine_that_is_started_for_the_run_ends_with_it(
    folder: Path, tmp_path: Path, cluster: RayNodes
) -> None:
    before = {one.pid for one in psutil.process_iter()}
    out = tmp_path / "out.jsonl"
    subprocess.run(
        command(folder, out, "--ray", "local", "-q"), env={**os.environ, **ENVIRON}, check=True, timeout=ENDED_S
    )
    assert out.read_bytes() == (folder / "plain.jsonl").read_bytes()
    left = [one for one in psutil.process_iter() if one.pid not in before and "raylet" in one.name()]
    assert not psutil.wait_procs(left, timeout=60)[1]
