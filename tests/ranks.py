"""A function run on several ranks, which are processes that fork."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty
from typing import Any

from zeroinf.distributed.control import Control
from zeroinf.distributed.ports import free_port
from zeroinf.distributed.world import World

FORK = multiprocessing.get_context("fork")


def on_ranks(
    size: int, body: Callable[[Control], Any], *, seconds: float = 120, local_size: int | None = None
) -> tuple[list[Any], list[int]]:
    """What `body` returned (or its error) on each rank, None where it never did; and the exit codes.

    Ranks believe that their node has `local_size` of them, all of them by default.
    """
    local_size = local_size or size
    answers: Any = FORK.Queue()
    port = str(free_port())

    def rank_main(rank: int) -> None:
        local = rank % local_size
        words = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": local_size}
        words |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in words.items()})
        control = Control(World(rank=rank, size=size, local_rank=local, local_size=local_size, launched=True), "cpu")
        try:
            answers.put((rank, body(control)))
        except Exception as error:
            answers.put((rank, error))
        answers.close()
        answers.join_thread()
        os._exit(0)

    processes = [FORK.Process(target=rank_main, args=(rank,)) for rank in range(size)]
    for process in processes:
        process.start()
    found: list[Any] = [None] * size
    deadline = time.monotonic() + seconds
    try:
        while (time.monotonic() < deadline and any(process.is_alive() for process in processes)) or not answers.empty():
            with suppress(Empty):  # read while ranks live: one with a long answer ends when it has been read
                rank, answer = answers.get(timeout=0.05)
                found[rank] = answer
    finally:
        for process in processes:
            process.kill()
            process.join()
    return found, [process.exitcode or 0 for process in processes]
