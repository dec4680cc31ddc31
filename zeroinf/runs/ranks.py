"""Starts and ends the other ranks of a Python session: processes of this machine that load the same model."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

import torch

from zeroinf.distributed.ports import free_port
from zeroinf.distributed.world import World, world_from_environment
from zeroinf.errors import EnvironmentProblem, UsageError, ZeroinfError
from zeroinf.options.options import RunOptions
from zeroinf.planner.workload import Lengths
from zeroinf.service.environment import Environment

_GRACE_S = 10.0
"""How long ranks have to end by themselves."""


@dataclass(frozen=True, slots=True)
class SessionSpec:
    """The options from which every rank of a session is made."""

    options: RunOptions
    lengths: Lengths
    requests: int | None


class Ranks:
    """Ranks 1 to `count` - 1, each a process. This one is rank 0, and says so in its environment until `close`."""

    def __init__(self, count: int, asked: SessionSpec) -> None:
        """Raises UsageError where a launcher has started ranks, or torch.distributed runs already; EnvironmentProblem
        where there are fewer GPUs."""
        _check(count)
        self.world = World(rank=0, size=count, local_rank=0, local_size=count, launched=True)
        sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"), str(count))
        common = {**sizes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self._environment = Environment({**common, "RANK": "0", "LOCAL_RANK": "0"})
        self._environment.note()
        self._processes: list[subprocess.Popen[bytes]] = []
        path = os.pathsep.join(each for each in sys.path if each)
        try:
            for rank in map(str, range(1, count)):
                process = subprocess.Popen(
                    [sys.executable, "-m", "zeroinf.runs.ranks"],
                    env={**os.environ, "RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": path},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,
                )
                self._processes.append(process)
                assert process.stdin is not None
                pickle.dump(asked, process.stdin)
                process.stdin.flush()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the other ranks, and take back what the environment was told."""
        deadline = time.monotonic() + _GRACE_S
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdin is not None:
                process.stdin.close()
        self._environment.restore()


def _check(count: int) -> None:
    if count < 1:
        raise UsageError(f"num_gpus must be at least 1, not {count}")
    if world_from_environment().launched:
        raise UsageError("num_gpus inside a launcher, which has started ranks", hint="drop num_gpus")
    if torch.distributed.is_initialized():
        raise UsageError(
            "num_gpus in a process that has a process group of torch.distributed",
            hint="drop num_gpus, or start zeroinf on each rank of a launcher",
        )
    if os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.device_count() < count:
        raise EnvironmentProblem(
            f"num_gpus {count}, but this machine shows {torch.cuda.device_count()}",
            hint="ask for fewer, or set DS_ACCELERATOR=cpu to run ranks on the CPU",
        )


def main() -> int:
    """A rank: take what is asked from stdin, load, and work until rank 0 closes."""
    asked: SessionSpec = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_rank_0, name="rank-0", daemon=True).start()
    from zeroinf.runs.progress import ProgressObserver
    from zeroinf.runs.session import open_session

    try:
        with open_session(asked.options, asked.lengths, asked.requests, ProgressObserver(shown=False)) as session:
            session.service.wait()
    except ZeroinfError as error:
        if error.message:
            print(f"error: rank {os.environ['RANK']}: {error.message}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    return 0


def _end_with_rank_0() -> None:
    sys.stdin.buffer.read()  # which ends with the process that holds its other end
    time.sleep(_GRACE_S)
    os._exit(1)


if __name__ == "__main__":
    os._exit(main())  # a rank that failed does not wait for collectives that others will never join
