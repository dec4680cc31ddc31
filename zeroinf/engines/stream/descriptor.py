"""Describes the stream engine to the planner, the options and the runs."""

from __future__ import annotations

from typing import Any

from zeroinf.engines.stream.stream_memory import memory_terms
from zeroinf.planner.descriptor import EngineDescriptor
from zeroinf.planner.plan import Plan
from zeroinf.planner.transfers import placed_transfers


def _load(plan: Plan, source: Any, zero_config: Any, control: Any, device: Any, listener: Any) -> Any:
    from zeroinf.engines.stream.engine import StreamEngine

    return StreamEngine(plan, source, control, device, listener)


def _check_disks(plan: Plan, source: Any, disks: Any, own_config: Any) -> None:
    from zeroinf.engines.stream.stored_weights import check_room

    check_room(plan, source)


STREAM = EngineDescriptor(
    name="stream",
    load=_load,
    memory_terms=memory_terms,
    transfers=placed_transfers,
    check_disks=_check_disks,
    offloads=("none", "cpu", "nvme"),
    options=frozenset(
        {
            "fetch",
            "resident_blocks",
            "pin_memory",
            "wire",
            "static_batches",
            "kv",
            "kv_dtype",
            "kv_attention",
            "share_prefixes",
            "embeddings",
            "expert_parts",
            "routed_tokens",
        }
    ),
    stripes=True,
    places_blocks=True,
    mixes_tiers=True,
    shares_passes=True,
    packs=True,
    has_kernels=True,
    is_replayed=True,
    captures_layers=True,
    runs_quantized=True,
    leaves_unread=True,
    runs_encoders=True,
)
