"""A cluster without Ray: its nodes answer at once, and die, leave and join as a random number says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from random import Random
from typing import Any

from fake_cluster_results import result_of

from zeroinf.generation.row import Sampling
from zeroinf.jobs.journal_output import JournalOutput
from zeroinf.jobs.output import Job
from zeroinf.options.options import RunOptions
from zeroinf.planner.workload import Lengths
from zeroinf.ray.cluster import Answer, Answers, Cluster, NodeConnection
from zeroinf.ray.driver import Driver
from zeroinf.ray.limits import NodeLimits
from zeroinf.ray.messages import NodeEvent, NodeFailed, NodeInfo, NodeReady, NodeResults, NodeSpec
from zeroinf.ray.report import ClusterReport
from zeroinf.runs.interrupts import Interrupts
from zeroinf.runs.request_feed import JobProgress, Output
from zeroinf.service.observer import Observer
from zeroinf.service.requests import Work

Act = Callable[["FakeNode"], Sequence[NodeEvent] | None]
"""What a node answers when it has its model; None: it is silent from then on."""


class FakeNode(NodeConnection):
    """A supervisor with its model."""

    def __init__(self, info: NodeInfo, capacity: int, answers: Answers, act: Act) -> None:
        self.info, self.capacity, self.answers, self._act = info, capacity, answers, act
        self.held: list[Work] = []
        self.most_held = 0
        self.tokens = 0
        self._is_ready = False
        self._under_way = False

    def exchange(self, draw: Sequence[Work], wait_s: float, linger_s: float) -> None:
        assert not self._under_way, "one exchange at a time"
        self.held += draw
        self.most_held = max(self.most_held, len(self.held))
        events = self._act(self) if self._is_ready or self.capacity == 0 else self._ready()
        self._under_way = events is None
        if events is not None:
            self.answers.put(Answer(self, events))

    def _ready(self) -> Sequence[NodeEvent]:
        self._is_ready = True
        return [NodeReady(capacity=self.capacity, load_s=0.1, plan="fake")]

    def finish(self, count: int) -> NodeResults:
        """The first `count` requests that it holds are done."""
        done, self.held = self.held[:count], self.held[count:]
        self.tokens += sum(work.sampling.max_new_tokens for work in done)
        return NodeResults(results=[result_of(work) for work in done], tokens=self.tokens)

    def kill(self) -> None: ...


class FakeCluster(Cluster):
    """Nodes by name; `act` is what they do."""

    def __init__(self, names: Sequence[str], act: Act, capacity: int = 3) -> None:
        self.answers: Answers = SimpleQueue()
        self.alive = list(names)
        self.started: list[FakeNode] = []
        self.closed: list[NodeConnection] = []
        self.looked: Callable[[], None] = lambda: None
        self._act, self._capacity = act, capacity

    def nodes(self) -> Sequence[NodeInfo]:
        self.looked()
        return [NodeInfo(id=name, name=name, cpus=1) for name in self.alive]

    def start(self, node: NodeInfo, spec: NodeSpec) -> NodeConnection:
        self.started.append(FakeNode(node, self._capacity, self.answers, self._act))
        return self.started[-1]

    def close(self, connections: Sequence[NodeConnection]) -> None:
        self.closed += connections


def unruly(chance: Random) -> Act:
    """A node that answers with some of its results, dies now and then, and then may answer all the same."""

    def act(node: FakeNode) -> Sequence[NodeEvent]:
        if chance.random() < 0.1:
            done = [node.finish(chance.randint(0, 2))] if chance.random() < 0.5 else []
            if chance.random() < 0.5 and node.held:  # a word from beyond
                node.answers.put(Answer(node, [NodeFailed(message="killed")]))
                return [node.finish(2)]
            return [*done, NodeFailed(message="killed")]
        return [node.finish(chance.randint(0, 4))]

    return act


def coming_and_going(cluster: FakeCluster, chance: Random) -> Callable[[], None]:
    """Nodes leave and join, but for the first, at each look."""
    joined = iter(range(1000))

    def looked() -> None:
        if len(cluster.alive) > 1 and chance.random() < 0.2:
            cluster.alive.pop(chance.randrange(1, len(cluster.alive)))
        if len(cluster.alive) < 5 and chance.random() < 0.2:
            cluster.alive.append(f"late-{next(joined)}")

    return looked


def drive(
    job: Job,
    out: Path,
    cluster: Cluster,
    observer: Observer,
    *,
    limits: NodeLimits | None = None,
    resume: bool = False,
    environ: Mapping[str, str] | None = None,
) -> ClusterReport:
    """Complete `job` on `cluster`, as `run_on_cluster` does it."""
    writer = JournalOutput(out, job, overwrite=False, resume=resume, resume_anyway=False)
    output = Output(writer)
    left = writer.left
    writer.begin(1)
    sampling = Sampling(max_new_tokens=1)
    whole: dict[str, Any] = {"requests": len(left), "facts": {}, "environ": environ or {}, "folder": out.parent}
    spec = NodeSpec(
        options=RunOptions(model="fake", sampling=sampling), lengths=Lengths(prompt_tokens=1, new_tokens=1), **whole
    )
    progress = JobProgress(left, len(job.work) - len(left), output)
    driver = Driver(cluster, spec, left, limits or NodeLimits(), progress, observer, Interrupts())
    try:
        report = driver.run()
        output.finish()
    except BaseException:
        output.abandon("it was stopped")
        raise
    return report
