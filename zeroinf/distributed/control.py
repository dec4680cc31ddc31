"""The control channel between ranks: collectives on small Python objects over CPU sockets, and a shared key-value
store.

Input and output: picklable values. It is never used for tensors of the model.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from zeroinf.distributed.ports import free_port
from zeroinf.distributed.waits import Activity
from zeroinf.distributed.world import World
from zeroinf.errors import RankError, ZeroinfError

# Loading a large model can take one rank much longer than another, so nobody gives up early; a rank that dies is
# noticed by PeerWatch, not by a timeout.
_COLLECTIVE_TIMEOUT = timedelta(hours=24)


_T = TypeVar("_T")


class OtherRankFailedError(ZeroinfError):
    """Rank 0 has failed and reports the error. This rank ends without a message, with the same exit code."""

    def __init__(self, reason: str, exit_code: int) -> None:
        super().__init__("")
        self.reason, self.exit_code = reason, exit_code

    def __reduce__(self) -> tuple[type[OtherRankFailedError], tuple[str, int]]:
        return OtherRankFailedError, (self.reason, self.exit_code)

    def __str__(self) -> str:
        return f"rank 0 failed: {self.reason}"


class _OwnProcessGroup:
    """The process group of torch.distributed, if it was started here: it goes with its last user."""

    users = 0


def join_process_group(world: World, device: str) -> Callable[[], None]:
    """Start torch.distributed unless it runs, over NCCL where `device` is cuda and over gloo where it is cpu.

    Returns a function that leaves the process group; the last user to leave destroys it. A process group that the
    caller of zeroinf had started is used and left as it is.
    """
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    if not world.launched and not _OwnProcessGroup.users:  # DeepSpeed reads it, too
        alone["MASTER_PORT"] = str(free_port())
        os.environ.update(alone)
    if dist.is_initialized() and not _OwnProcessGroup.users:
        return lambda: None
    if not _OwnProcessGroup.users:
        if device == "cuda":
            dist.init_process_group(
                "nccl", timeout=_COLLECTIVE_TIMEOUT, device_id=torch.device("cuda", world.local_rank)
            )
        else:
            dist.init_process_group("gloo", timeout=_COLLECTIVE_TIMEOUT)
    _OwnProcessGroup.users += 1
    return _leave_process_group


def _leave_process_group() -> None:
    _OwnProcessGroup.users -= 1
    if not _OwnProcessGroup.users and dist.is_initialized():
        dist.destroy_process_group()


class Control:
    """Collectives on small objects between ranks, over a gloo group of its own. With one rank every call returns at
    once.

    `store` holds shared counters and results; its server is rank 0's process. `activity` says what this rank does now,
    so that other ranks can name it while they wait.
    """

    def __init__(self, world: World, device: str) -> None:
        self.world = world
        self.activity = Activity()
        self.store: dist.Store = dist.HashStore()
        self._first = 0
        self._calls = 0
        """Collectives of this group so far: ranks of it that wait at the same one wait together."""
        self._leave: Callable[[], None] = lambda: None
        if world.size > 1:
            self._leave = join_process_group(world, device)
            self._group = dist.new_group(backend="gloo", timeout=_COLLECTIVE_TIMEOUT)
            self.store = self._shared_store()

    def _shared_store(self) -> dist.Store:
        address = os.environ["MASTER_ADDR"]
        server = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False) if self.world.is_main else None
        port = self.broadcast(server.port if server else None)
        if server:
            return server
        return dist.TCPStore(address, port, is_master=False, wait_for_workers=False)

    def subgroup(self, size: int) -> Control:
        """The channel among `size` neighbouring ranks, including this one; its `world` is theirs, its store is shared
        by all.

        Every rank must call it. `size` divides the number of ranks.
        """
        if size == self.world.size:
            return self
        part, rank = copy.copy(self), self.world.rank % size
        part.world = replace(self.world, rank=rank, size=size)
        part._calls = 0
        if size > 1:
            starts = range(0, self.world.size, size)
            groups = [
                dist.new_group(range(at, at + size), backend="gloo", timeout=_COLLECTIVE_TIMEOUT) for at in starts
            ]
            part._first = self.world.rank - rank
            part._group = groups[self.world.rank // size]
        return part

    def broadcast(self, value: Any) -> Any:
        """The first rank's value, on every rank."""
        if self.world.size == 1:
            return value
        box = [value]
        with self._collective("broadcast"):
            dist.broadcast_object_list(box, src=self._first, group=self._group)
        return box[0]

    def run_on_main(self, work: Callable[[], _T]) -> _T:
        """Call `work` on rank 0 only and return its result on every rank. If it fails there, every rank raises."""
        if not self.world.is_main:
            answer = self.broadcast(None)
            if isinstance(answer, OtherRankFailedError):
                raise answer
            return answer  # type: ignore[no-any-return]
        try:
            found = work()
        except BaseException as error:
            code = error.exit_code if isinstance(error, ZeroinfError) else ZeroinfError.exit_code
            self.broadcast(OtherRankFailedError(str(error), code))
            raise
        self.broadcast(found)
        return found

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if self.world.size == 1:
            return [value]
        values: list[Any] = [None] * self.world.size
        with self._collective("gather"):
            dist.all_gather_object(values, value, group=self._group)
        return values

    def all_reduce_max(self, *values: int) -> tuple[int, ...]:
        """The largest of each value over all ranks. Every rank must call it the same number of times."""
        return self.start_all_reduce_max(*values)()

    def start_all_reduce_max(self, *values: int) -> Callable[[], tuple[int, ...]]:
        """Start `all_reduce_max` without waiting. The returned function waits for the result; ranks exchange values
        meanwhile.
        """
        if self.world.size == 1:
            return lambda: values
        tensor = torch.tensor(values, dtype=torch.int64)
        at = self._collective_name("agreement")
        with _connection_errors_as_rank_errors():
            work = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group, async_op=True)

        def answer() -> tuple[int, ...]:
            with self.activity.waiting(at, self._ranks), _connection_errors_as_rank_errors():
                work.wait()
            return tuple(tensor.tolist())

        return answer

    @property
    def _ranks(self) -> range:
        """The ranks of this group, by their numbers among all ranks."""
        return range(self._first, self._first + self.world.size)

    def _collective_name(self, kind: str) -> str:
        """The name of the next collective, the same on every rank that comes to it."""
        self._calls += 1
        ranks = self._ranks
        return f"{kind} {self._calls} of ranks {ranks.start} to {ranks.stop - 1}"

    @contextmanager
    def _collective(self, kind: str) -> Iterator[None]:
        with self.activity.waiting(self._collective_name(kind), self._ranks), _connection_errors_as_rank_errors():
            yield

    def close(self) -> None:
        """Leave together with all other ranks, so that no rank loses the store while it still uses it."""
        if self.world.size > 1:
            try:
                with self._collective("end"):
                    dist.barrier(group=self._group)
            finally:
                self.abort()

    def abort(self) -> None:
        """Leave at once, for example after an error. The other ranks notice that this one is gone."""
        if self.world.size > 1:
            dist.destroy_process_group(self._group)
            self._leave()


@contextmanager
def _connection_errors_as_rank_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RankError(f"lost the connection to another rank: {str(error).splitlines()[0]}") from error
