"""Describes DeepSpeed's ZeRO-3 engine to the planner, the options and the runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zeroinf.engines.zero.config import nvme_pool_bytes
from zeroinf.engines.zero.zero_memory import memory_terms
from zeroinf.engines.zero.zero_transfers import zero_transfers
from zeroinf.errors import DoesNotFitError
from zeroinf.hardware.machine import Disk
from zeroinf.planner.descriptor import EngineDescriptor
from zeroinf.planner.plan import Plan
from zeroinf.sizes import gib


def _load(plan: Plan, source: Any, zero_config: Any, control: Any, device: Any, listener: Any) -> Any:
    from zeroinf.engines.zero.engine import ZeroEngine

    assert zero_config is not None
    return ZeroEngine(plan, source, zero_config, control.world)


def _check_disks(plan: Plan, source: Any, disks: Sequence[Disk], own_config: Mapping[str, Any] | None) -> None:
    """Refuse disks that lack what DeepSpeed's NVMe offload needs, which fails late or by SIGABRT without it."""
    from zeroinf.hardware.aio_op import read_aio_op
    from zeroinf.hardware.checks import check_aio_op, check_memlock, require
    from zeroinf.hardware.snapshot import read_memory

    if disks[0].free_bytes < plan.anatomy.weight_bytes:
        raise DoesNotFitError(
            f"the weights take {gib(plan.anatomy.weight_bytes)}, "
            f"but {disks[0].path} has {gib(disks[0].free_bytes)} free",
            hint="make room there, choose another folder, or --offload cpu",
        )
    require(
        [
            *check_aio_op(read_aio_op(with_gpu=plan.device == "cuda"), asked=True),
            check_memlock(read_memory(), asked=True, needed_bytes=nvme_pool_bytes(plan, own_config)),
        ]
    )


ZERO = EngineDescriptor(
    name="zero",
    load=_load,
    memory_terms=memory_terms,
    transfers=zero_transfers,
    check_disks=_check_disks,
    offloads=("none", "cpu", "nvme"),
    options=frozenset({"pin_memory", "aio", "zero_config"}),
    libraries=("deepspeed",),
    overlaps=False,
    plans_pageable=True,
)
