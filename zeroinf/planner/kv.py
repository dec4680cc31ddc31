"""The KV cache in host memory: the models that support it, and the bytes that it transfers."""

from __future__ import annotations

from typing import Literal

from zeroinf.errors import UsageError
from zeroinf.model.anatomy import Anatomy, KvDtype
from zeroinf.planner.descriptor import descriptor_of

Kv = Literal["gpu", "host", "auto"]
"""Where keys and values rest: all on the GPU, all in host memory, or as many rows there as make the most tokens/s."""

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
        return "auto" if descriptor_of(engine).shares_passes and anatomy.is_paged and anatomy.can_rest_on_host else 0.0
    return 1.0 if kv == "host" else 0.0


def fetched_bytes(anatomy: Anatomy, dtype: KvDtype, tokens: float) -> float:
    """Bytes that cross the link for a step of one row in host memory, of which so many tokens are in the cache."""
    layers = ((layer.window, layer.record(dtype)) for layer in anatomy.cache)
    return sum(
        record.nbytes * (tokens if window is None else min(tokens, window))
        for window, record in layers
        if record is not None
    )
