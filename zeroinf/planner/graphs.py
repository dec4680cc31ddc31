"""CUDA graphs of layers in a plan: whether a run has any, for which token counts, and the memory that they take."""

from __future__ import annotations

from zeroinf.model.anatomy import Anatomy
from zeroinf.planner.descriptor import descriptor_of, why_padded

MOST_GRAPHS = 512
"""Layers that are captured, one for each size: the driver keeps some memory for each."""

GRAPH_TOKENS = 1024
"""Forwards of more tokens compute for longer than their launches take."""

_SIZES = (*(1 << power for power in range(7)), *range(128, 513, 64), 640, 768, 896, GRAPH_TOKENS)


def graph_sizes(most: int) -> tuple[int, ...]:
    """Token counts that forwards of up to `most` tokens are rounded up to."""
    return (*(size for size in _SIZES if size < most), most)


def why_launched(anatomy: Anatomy, engine: str, device: str) -> str:
    """Why layers are launched kernel by kernel; empty where forwards of few tokens replay CUDA graphs."""
    if device != "cuda":
        return "there is no GPU"
    if not descriptor_of(engine).captures_layers:
        return f"the {engine} engine runs transformers' own layers"
    if why_padded(anatomy, engine):
        return "forwards are padded"
    if anatomy.quantized is not None:
        return "quantized weights are expanded to other addresses each time"
    return ""
