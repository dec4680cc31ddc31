"""The driver of a run on a cluster: nodes die, leave and join, and each request has one result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
from fake_cluster import FakeCluster, FakeNode, coming_and_going, drive, unruly
from fake_cluster_results import result_of
from fake_job import entries, read_job
from observers import Notes

from zeroinf.errors import ClusterError, UsageError
from zeroinf.jobs.output import Job
from zeroinf.jobs.status import read_status
from zeroinf.ray import driver
from zeroinf.ray.limits import NodeLimits
from zeroinf.ray.messages import NodeEvent, NodeFailed


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_LOOK_EVERY_S", "_TELL_EVERY_S", "_RESTART_AFTER_S", "_POLL_S"):
        monkeypatch.setattr(driver, name, 0.0)


@pytest.fixture(scope="module")
def job() -> Job:
    return read_job(entries(40))


class Said(Notes):
    """An observer that remembers errors, too."""

    def failed(self, text: str) -> None:
        self.notes.append(text)


def lines_of(job: Job) -> str:
    results = [(work.id, result_of(work)) for work in job.work]
    return "".join(
        f'{{"id": "{name}", "completion": "{one.completion}", "finish_reason": "length", '
        f'"prompt_tokens": {one.prompt_tokens}, "completion_tokens": {one.completion_tokens}}}\n'
        for name, one in results
    )


def steady(node: FakeNode) -> Sequence[NodeEvent]:
    return [node.finish(2)]


@pytest.mark.parametrize("seed", range(30))
def test_nodes_that_die_leave_and_join_lose_no_request_and_double_none(seed: int, job: Job, tmp_path: Path) -> None:
    chance = Random(seed)
    cluster = FakeCluster(["a", "b", "c"], unruly(chance))
    cluster.looked = coming_and_going(cluster, chance)
    out = tmp_path / "out.jsonl"
    for attempt in range(20):  # where all nodes died thrice in a row the job ends, and is resumed
        try:
            drive(job, out, cluster, Notes(), resume=attempt > 0)
            break
        except ClusterError:
            continue
    assert out.read_text() == lines_of(job)


def test_a_node_whose_plan_fails_is_named_and_left_out(job: Job, tmp_path: Path) -> None:
    def act(node: FakeNode) -> Sequence[NodeEvent]:
        if node.info.name == "small":
            return [NodeFailed(message="needs 9 GiB more", exit_code=3, is_final=True)]
        return steady(node)

    cluster, said = FakeCluster(["small", "large"], act), Said()
    report = drive(job, tmp_path / "out.jsonl", cluster, said)
    assert [node.info.name for node in cluster.started] == ["small", "large"]
    assert any(text.startswith("small is left out: needs 9 GiB more (exit code 3)") for text in said.notes)
    assert {node.name: node.requests for node in report.nodes} == {"small": 0, "large": 40}
    assert (tmp_path / "out.jsonl").read_text() == lines_of(job)


def test_all_nodes_failing_ends_the_job_with_their_exit_code(job: Job, tmp_path: Path) -> None:
    cluster = FakeCluster(["a", "b"], lambda node: [NodeFailed(message="does not fit", exit_code=3, is_final=True)])
    with pytest.raises(ClusterError, match="all 2 nodes failed; a: does not fit") as caught:
        drive(job, tmp_path / "out.jsonl", cluster, Said())
    assert caught.value.exit_code == 3


def test_a_node_that_dies_again_and_again_is_left_out(job: Job, tmp_path: Path) -> None:
    cluster = FakeCluster(["a"], lambda node: [NodeFailed(message="killed by SIGKILL", exit_code=137)])
    with pytest.raises(ClusterError, match="the only node failed; a: killed by SIGKILL") as caught:
        drive(job, tmp_path / "out.jsonl", cluster, Said())
    assert (len(cluster.started), caught.value.exit_code) == (3, 1)


def test_what_a_silent_node_holds_goes_to_others(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_SILENT_S", 0.05)
    silenced: list[FakeNode] = []

    def act(node: FakeNode) -> Sequence[NodeEvent] | None:
        if node.info.name == "a" and (node in silenced or not silenced):
            silenced[:] = [node]
            return None
        return steady(node)

    said = Said()
    drive(job, tmp_path / "out.jsonl", FakeCluster(["a", "b"], act), said)
    assert any(text.startswith("lost a: no answer") for text in said.notes)
    assert (tmp_path / "out.jsonl").read_text() == lines_of(job)


def test_the_job_begins_with_the_least_nodes_and_uses_no_more_than_the_most(job: Job, tmp_path: Path) -> None:
    cluster, said = FakeCluster(["a"], steady), Said()
    looks = iter(range(10_000))

    def looked() -> None:
        if next(looks) == 3:
            assert not cluster.started
            cluster.alive += ["b", "c"]

    cluster.looked = looked
    drive(job, tmp_path / "out.jsonl", cluster, said, limits=NodeLimits(least=2, most=2))
    assert len(cluster.started) == 2
    assert "waits for 2 nodes of the cluster: 1 there" in said.notes


def test_a_node_gets_two_batches_while_there_is_plenty_and_none_ahead_while_others_have_room(
    job: Job, tmp_path: Path
) -> None:
    cluster = FakeCluster(["a"], steady, capacity=5)
    drive(job, tmp_path / "out.jsonl", cluster, Notes())
    assert cluster.started[0].most_held == 10
    few = Job(work=job.work[:12], refusals=(), fingerprint={})
    cluster = FakeCluster(["a", "b"], steady, capacity=6)
    drive(few, tmp_path / "few.jsonl", cluster, Notes())
    assert [node.most_held for node in cluster.started] == [6, 6]


def test_status_tells_how_many_nodes_are_at_work(job: Job, tmp_path: Path) -> None:
    drive(job, tmp_path / "out.jsonl", FakeCluster(["a", "b"], steady), Notes())
    status = read_status(tmp_path / "out.jsonl")
    assert (status.nodes, status.done, status.left) == (2, 40, 0)


@pytest.mark.parametrize(
    ("text", "least", "most"), [("2:8", 2, 8), ("2:", 2, None), ("4", 1, 4), (":4", 1, 4), ("1:1", 1, 1)]
)
def test_limits_of_nodes_are_read(text: str, least: int, most: int | None) -> None:
    assert NodeLimits.parse(text) == NodeLimits(least=least, most=most, waits=True)


@pytest.mark.parametrize("text", ["", ":", "0", "3:2", "two", "1:2:3", "-1"])
def test_other_limits_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--ray-nodes"):
        NodeLimits.parse(text)
