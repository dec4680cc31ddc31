"""Reads what Ray has given this process of its node: GPUs, and the memory that it may take."""

from __future__ import annotations

import os
from dataclasses import replace

from zeroinf.hardware.snapshot import read_machine
from zeroinf.options.options import RunOptions

_NO_MONITOR, _MEMORY_SHARE = "RAY_memory_monitor_refresh_ms", "RAY_memory_usage_threshold"
"""Ray's variables: 0 for no limit of memory; the share of a node's memory above which Ray kills processes."""
_RAY_MEMORY_SHARE = 0.95
"""That share, where the variable does not say another."""


def ranks_here() -> int | None:
    """As many ranks as there are GPUs for this process; None where one or none is enough."""
    gpus = len([one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one])
    return gpus if gpus > 1 and os.environ.get("DS_ACCELERATOR") != "cpu" else None


def within_ray(options: RunOptions) -> RunOptions:
    """The options with host memory limited to what Ray lets a node take before it kills the process that took most."""
    if os.environ.get(_NO_MONITOR) == "0":
        return options
    share = float(os.environ.get(_MEMORY_SHARE, _RAY_MEMORY_SHARE))
    memory = read_machine(()).memory
    room = max(0, memory.available_bytes - int((1 - share) * memory.total_bytes))
    return replace(options, host_memory=room if options.host_memory is None else min(room, options.host_memory))
