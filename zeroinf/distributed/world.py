"""Reads this process's rank and world size from the environment variables that every launcher sets."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from zeroinf.errors import EnvironmentProblem


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """Rank, world size and local rank in torch.distributed's meaning."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    """Ranks on this node."""
    launched: bool = False

    @property
    def is_main(self) -> bool:
        """Rank 0 reads the input, writes the output and speaks to the user."""
        return self.rank == 0


def world_from_environment(environ: Mapping[str, str] | None = None) -> World:
    """Read RANK, WORLD_SIZE and LOCAL_RANK; without them the process is alone.

    Raises EnvironmentProblem when a launcher set only some of them, or a rank that its node does not have.
    """
    env = os.environ if environ is None else environ
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    present = [name for name in names if name in env]
    if not present:
        return World()
    missing = [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if name not in env]
    if missing:
        raise EnvironmentProblem(
            f"{', '.join(present)} set, but not {', '.join(missing)}",
            hint="start through `zeroinf run --num-gpus N`, `deepspeed --num_gpus N --module zeroinf run` or torchrun, "
            "or unset them to run alone",
        )
    rank, size, local_rank = (int(env[name]) for name in names)
    # torchrun's name, DeepSpeed's name; a launcher that says neither is taken to use one node.
    local_size = int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or size)
    if not 0 <= local_rank < local_size <= size:
        raise EnvironmentProblem(
            f"rank {rank} of {size} is told to be number {local_rank} of {local_size} on its node",
            hint="set LOCAL_RANK (counted from 0) and LOCAL_WORLD_SIZE as torchrun does",
        )
    return World(rank=rank, size=size, local_rank=local_rank, local_size=local_size, launched=True)
