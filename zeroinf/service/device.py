"""Chooses the device of a rank."""

from __future__ import annotations

import os

import torch

from zeroinf.distributed.world import World
from zeroinf.errors import EnvironmentProblem


def pick_device(world: World) -> torch.device:
    """This rank's GPU, or the CPU where there is none or DeepSpeed's own DS_ACCELERATOR=cpu asks for it.

    The GPU is not touched: what is free on it is planned with.

    Raises EnvironmentProblem when there are GPUs, but fewer than ranks.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if world.local_rank >= torch.cuda.device_count():
        raise EnvironmentProblem(
            f"local rank {world.local_rank} has no GPU: this machine shows {torch.cuda.device_count()}",
            hint="start fewer ranks, or check CUDA_VISIBLE_DEVICES",
        )
    return torch.device("cuda", world.local_rank)
