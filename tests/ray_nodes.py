"""A Ray cluster of this machine whose nodes have one CPU each, for tests: nodes join, die, and lose processes."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

_STORE_BYTES = 80 << 20  # the least that Ray takes
_MARK, _OURS = "TEST_RAY_NODES", uuid.uuid4().hex
# Nodes that are gone are noticed within two seconds.
_CONFIG = {
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 3,
}


class RayNodes:
    """The nodes beside a head without CPUs. `address` is what `--ray` takes."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": _STORE_BYTES}
        self._cluster = Cluster(initialize_head=True, head_node_args={**head, "_system_config": _CONFIG})
        self.address: str = self._cluster.address
        self.nodes: list[Any] = []

    def add(self, **more: Any) -> Any:
        """One more node; `more` as Ray's own cluster for tests takes it."""
        node = self._cluster.add_node(**{"num_cpus": 1, "object_store_memory": _STORE_BYTES, **more})
        self.nodes.append(node)
        return node

    def remove(self, node: Any) -> None:
        """End all processes of a node, without a word."""
        self._cluster.remove_node(node, allow_graceful=False)
        self.nodes.remove(node)

    def supervisors(self) -> list[psutil.Process]:
        """The processes of actors that supervise a model."""
        return [one for one in _ours() if "Supervisor" in _words(one)[0] and _words(one)[0].startswith("ray::")]

    def workers(self, module: str = "zeroinf.ray.worker") -> list[psutil.Process]:
        """The processes that run the model."""
        return [one for one in _ours() if module in _words(one)]

    def close(self) -> None:
        self._cluster.shutdown()


@contextmanager
def ray_nodes(count: int) -> Iterator[RayNodes]:
    """A cluster of `count` nodes, of which nothing is left behind."""
    tests = Path(__file__).parent
    before = os.environ.get("PYTHONPATH", "")
    os.environ[_MARK] = _OURS
    os.environ["PYTHONPATH"] = os.pathsep.join((str(tests), str(tests.parent), before))
    cluster = RayNodes()
    try:
        for _ in range(count):
            cluster.add()
        yield cluster
    finally:
        os.environ["PYTHONPATH"] = before
        cluster.close()


def _ours() -> Iterator[psutil.Process]:
    """Living processes of clusters of this module: whoever started them may be dead."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(_MARK) == _OURS and process.status() != psutil.STATUS_ZOMBIE and process.cmdline():
                yield process


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline() or [""]
    except psutil.Error:
        return [""]
