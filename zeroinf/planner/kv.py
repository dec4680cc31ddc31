"""The KV cache in host memory: the models that support it, and the bytes that it transfers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal

from zeroinf.errors import UsageError
from zeroinf.model.anatomy import Anatomy
from zeroinf.model.cache_layout import KvDtype
from zeroinf.planner.descriptor import descriptor_of, why_padded

Kv = Literal["gpu", "host", "auto"]
"""Where keys and values rest: all on the GPU, all in host memory, or as many rows there as make the most tokens/s."""

KvAttention = Literal["auto", "gpu", "cpu"]
"""Who attends to keys and values in host memory: the GPU, to which they are copied, or, for decode steps, the CPU,
where they rest."""

HostShare = float | Literal["auto"]
"""The part of the rows whose keys and values rest in host memory."""


def host_share(kv: Kv, dtype: KvDtype, engine: str, anatomy: Anatomy) -> HostShare:
    """The share of sequences whose KV cache is in host memory, as `kv` and `dtype` ask.

    Raises UsageError for a setting that the model does not support.
    """
    if kv == "gpu" and dtype != "model":
        raise UsageError(f"--kv-dtype {dtype} is for keys and values in host memory", hint="drop it, or --kv host")
    if not anatomy.can_rest_on_host and (kv == "host" or dtype != "model"):
        raise UsageError(
            f"--kv {kv} --kv-dtype {dtype}: no layer of {anatomy.architecture} keeps keys and values that could rest "
            "in host memory",
            hint="drop it",
        )
    if kv == "auto":  # rows that cannot be regrouped all rest in one place, on the GPU unless told otherwise
        may_split = descriptor_of(engine).shares_passes and anatomy.is_paged and anatomy.can_rest_on_host
        # Few layers of models with states keep anything in host memory, for which forwards would be padded.
        return "auto" if may_split and anatomy.mixers is None else 0.0
    return 1.0 if kv == "host" else 0.0


def check_kv_attention(attention: KvAttention, kv: Kv, engine: str, anatomy: Anatomy) -> None:
    """Raise UsageError where it makes no sense to ask for attention on the CPU."""
    if attention != "cpu":
        return
    if kv == "gpu":
        raise UsageError("--kv-attention cpu has no effect with --kv gpu", hint="drop one of them")
    if reason := why_padded(anatomy, engine):
        raise UsageError(f"--kv-attention cpu needs packed forwards: {reason}", hint="drop it")


def fetched_bytes(anatomy: Anatomy, dtype: KvDtype, tokens: float) -> float:
    """Bytes that cross the link for a step of one row in host memory, of which so many tokens are in the cache."""
    return sum(count * nbytes for nbytes, count in row_bytes(anatomy, dtype, tokens))


def row_bytes(anatomy: Anatomy, dtype: KvDtype, tokens: float) -> list[tuple[float, int]]:
    """Bytes of a row of so many tokens in each kind of layer that can lie in host memory, and how many of these there
    are."""
    kinds = _kinds(anatomy, dtype).items()
    return [(nbytes * (tokens if window is None else min(tokens, window)), count) for (nbytes, window), count in kinds]


@lru_cache(maxsize=64)
def _kinds(anatomy: Anatomy, dtype: KvDtype) -> Mapping[tuple[int, int | None], int]:
    """How many layers have a record of so many bytes and such a window."""
    records = anatomy.records(dtype).items()
    return Counter((record.nbytes, anatomy.cache[index].window) for index, record in records)
