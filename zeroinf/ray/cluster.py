"""Reaches the nodes of a Ray cluster: connects, lists nodes, and starts one supervisor on each.

`Cluster` and `NodeConnection` are what the driver needs of a cluster; `RayCluster` does it with Ray. Answers come as
`Answer`s in a queue, from whatever thread.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Literal, Protocol

from zeroinf.errors import EnvironmentProblem
from zeroinf.ray.limits import check_address
from zeroinf.ray.messages import NodeEvent, NodeFailed, NodeInfo, NodeSpec
from zeroinf.ray.supervisor import NodeSupervisor
from zeroinf.service.requests import Work

Device = Literal["cuda", "cpu"]

_STORE_BYTES = 128 << 20
"""Ray's object store where we start Ray: requests and results are small, and host memory is for weights."""
_CLOSE_S = 4.0
"""How long supervisors may take to end their processes in order."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A message of a node, and the connection that it is from."""

    connection: NodeConnection
    events: Sequence[NodeEvent]


Answers = SimpleQueue[Answer]


class NodeConnection(Protocol):
    """A supervisor on a node, as the driver sees it."""

    def exchange(self, draw: Sequence[Work], wait_s: float, linger_s: float) -> None:
        """Do what `NodeSupervisor.exchange` does, without waiting: the answer comes in the cluster's queue, and is a
        NodeFailed where the node or the supervisor is gone. One at a time."""
        ...

    def kill(self) -> None:
        """End it at once. It answers no more."""
        ...


class Cluster(Protocol):
    """The nodes that the driver can use."""

    answers: Answers

    def nodes(self) -> Sequence[NodeInfo]:
        """The nodes that are alive now and have what the job needs."""
        ...

    def start(self, node: NodeInfo, spec: NodeSpec) -> NodeConnection:
        """A supervisor on `node`, which takes all of it. It is there with its first answer."""
        ...

    def close(self, connections: Sequence[NodeConnection]) -> None:
        """End supervisors, in order if they do so within seconds."""
        ...


class RayCluster:
    """A Ray cluster, joined by this process until `leave`."""

    def __init__(self, address: str, *, waits: bool = True, supervisor: type[Any] = NodeSupervisor) -> None:
        """Join the cluster at `address`; `auto` is the one of this machine, `local` starts one of this machine alone.

        Raises EnvironmentProblem where Ray is not installed or there is no cluster, or, unless the job `waits` for
        nodes, where none has what the job needs.
        """
        self.answers: Answers = SimpleQueue()
        self._ray = _joined(address)
        self._actors = self._ray.remote(supervisor)
        self.device: Device = "cuda"
        if os.environ.get("DS_ACCELERATOR") == "cpu" or (address == "local" and not self.nodes()):
            self.device = "cpu"
        if not waits and not self.nodes():
            self.leave()
            what = "GPUs" if self.device == "cuda" else "CPUs"
            raise EnvironmentProblem(
                f"--ray {address}: no node of the cluster has {what} for the job",
                hint="DS_ACCELERATOR=cpu runs on CPUs; --ray-nodes 1: waits for a node to join",
            )

    def nodes(self) -> list[NodeInfo]:
        """Nodes that are alive: all with GPUs, or with CPUs where the job runs on these."""
        alive = [node for node in self._ray.nodes() if node["Alive"]]
        hosts = [str(node["NodeManagerHostname"]) for node in alive]
        found = []
        for node, host in zip(alive, hosts, strict=True):
            gpus, cpus = (int(node["Resources"].get(name, 0)) for name in ("GPU", "CPU"))
            if gpus if self.device == "cuda" else cpus:
                name = host if hosts.count(host) == 1 else f"{host} ({node['NodeID'][:6]})"
                found.append(NodeInfo(id=node["NodeID"], name=name, gpus=gpus, cpus=cpus))
        return found

    def start(self, node: NodeInfo, spec: NodeSpec) -> NodeConnection:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        on_gpus = self.device == "cuda"
        actor = self._actors.options(
            num_gpus=node.gpus if on_gpus else 0,
            num_cpus=0 if on_gpus else node.cpus,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
            max_restarts=0,
        ).remote(spec)
        return _Connection(self._ray, actor, self.answers)

    def close(self, connections: Sequence[NodeConnection]) -> None:
        mine = [each for each in connections if isinstance(each, _Connection)]
        with suppress(Exception):  # whoever is gone has ended
            self._ray.wait([each.actor.close.remote() for each in mine], num_returns=len(mine), timeout=_CLOSE_S)
        for each in mine:
            each.kill()

    def leave(self) -> None:
        """Leave the cluster; one that was started here ends."""
        self._ray.shutdown()


@dataclass(eq=False, slots=True)
class _Connection:
    """A supervisor that is a Ray actor."""

    ray: Any
    actor: Any
    answers: Answers
    is_over: bool = field(default=False)

    def exchange(self, draw: Sequence[Work], wait_s: float, linger_s: float) -> None:
        answer = self.actor.exchange.remote(draw, wait_s, linger_s).future()
        answer.add_done_callback(self._answered)

    def _answered(self, answer: Any) -> None:
        if self.is_over:
            return
        error = answer.exception()
        self.answers.put(Answer(self, answer.result() if error is None else [_failure(error)]))

    def kill(self) -> None:
        self.is_over = True
        with suppress(Exception):  # it is gone already
            self.ray.kill(self.actor)


def _joined(address: str) -> Any:
    check_address(address)
    import ray

    how: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        how |= {"include_dashboard": False, "object_store_memory": _STORE_BYTES}
    # Else Ray warns of what it will do one day, and of answers that nobody waits for any more.
    for name, value in (("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"), ("RAY_IGNORE_UNHANDLED_ERRORS", "1")):
        os.environ.setdefault(name, value)
    try:
        ray.init(address=address, **how)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        words = str(error).strip().splitlines()
        raise EnvironmentProblem(
            f"--ray {address}: {words[0] if words else type(error).__name__}",
            hint="start Ray on this machine (ray start --head, or --address HOST:6379), or use --ray local",
        ) from error
    return ray


def _failure(error: BaseException) -> NodeFailed:
    """Ray's reason why an actor does not answer, in one line."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):  # the supervisor's own error
        return NodeFailed.of(cause, is_final=False)
    words = [line.strip() for line in str(error).splitlines() if line.strip()]
    if "creation task" in words[0]:  # with the traceback of what its node lacks
        return NodeFailed(message=words[-1])
    # Between the first line and the last one there are ids.
    told = words[-1].partition(" Some common causes")[0] if words else type(error).__name__
    return NodeFailed(message=f"Ray lost its supervisor: {told}")
