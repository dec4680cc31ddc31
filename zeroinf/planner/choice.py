"""A candidate configuration: the settings that the search varies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from zeroinf.model.cache_layout import KvDtype
from zeroinf.planner.wire import Wire

Offload = Literal["none", "cpu", "nvme"]
Fetch = Literal["replicated", "partitioned"]
"""Each rank pulls all weights over its own link, or its part of them, gathered over the links between GPUs."""
Embeddings = Literal["gpu", "cpu", "disk"]
"""Where tables that tokens read by row rest: with the other weights; in host memory, where rows are gathered; or in the
checkpoint's files, from which rows are read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One way to run: where the weights of the blocks rest, how ranks fetch them, and how many rows run together."""

    engine: str
    offload: Offload
    fetch: Fetch
    batch_size: int
    """Rows that are live at once."""
    micro_batch_rows: int
    """Rows that run one forward together, at the most."""
    prefill_tokens: int
    """Prompt tokens that a pass computes, at the most."""
    resident_blocks: int
    nvme_blocks: int
    host_units: int = 0
    """Of what moves as one piece of blocks on NVMe, so many rest in host memory; where experts come in parts."""
    forward_tokens: int = 0
    """Tokens of one packed forward, at the most; 0: rows of a forward are padded to one length."""
    graph_tokens: int = 0
    """Packed forwards of up to so many tokens replay CUDA graphs of layers; 0: none does."""
    wire: Wire = "model"
    host_rows: int = 0
    """Rows whose keys and values rest in host memory."""
    kv_dtype: KvDtype = "model"
    embeddings: Embeddings = "gpu"
    routed_tokens: int = 0
    """Passes of so many tokens or fewer bring only the experts that these are routed to; where experts are split."""
    expert_parts: int = 1
    """Parts in which the experts of a layer are brought and computed."""
