"""CUDA graphs of layers in a plan: whether a run has any, for which token counts, and the memory that they take."""

from __future__ import annotations

from zeroinf.model.anatomy import Anatomy
from zeroinf.planner.descriptor import descriptor_of, why_padded
from zeroinf.planner.workload import Workload

MOST_GRAPHS = 512
"""Layers that are captured, one for each size: the driver keeps some memory for each."""

REPLAYED_TOKENS = (128, 256, 512, 1024)
"""Forwards of up to one of these replay graphs: larger ones compute for longer than their launches take."""

_SIZES = (*(1 << power for power in range(7)), *range(128, 513, 64), 640, 768, 896, 1024)

# Memory of all graphs beside what the driver keeps of them, at the most: fewer tokens are replayed where it is more.
_MOST_BYTES = 256 << 20
_DRIVER_BYTES = 64 << 20


def graph_sizes(most: int) -> tuple[int, ...]:
    """Token counts that forwards of up to `most` tokens are rounded up to."""
    return (*(size for size in _SIZES if size < most), most)


def graph_tokens(workload: Workload) -> int:
    """The most tokens of a forward that replays graphs; 0 where none does."""
    found = () if workload.packed is None else workload.packed.replayed
    return max((tokens for tokens, nbytes in found if 2 * nbytes <= _MOST_BYTES), default=0)


def graph_bytes(workload: Workload, tokens: int, workspace_bytes: int) -> int:
    """GPU memory of graphs for forwards of up to so many tokens: a layer's, as much again at the most for buffers of
    its inputs and outputs; the workspaces of their stream's products; what the driver keeps."""
    assert workload.packed is not None
    return 2 * dict(workload.packed.replayed)[tokens] + workspace_bytes + _DRIVER_BYTES


def why_launched(
    anatomy: Anatomy, engine: str, device: str, *, expert_parts: int = 1, on_host: bool = False, scored: bool = False
) -> str:
    """Why layers are launched kernel by kernel; empty where forwards of few tokens replay CUDA graphs. `on_host` and
    `scored` as in `why_padded`."""
    if device != "cuda":
        return "there is no GPU"
    if not descriptor_of(engine).captures_layers:
        return f"the {engine} engine runs transformers' own layers"
    if why_padded(anatomy, engine, on_host=on_host, scored=scored):
        return "forwards are padded"
    if expert_parts > 1:
        return "experts come in parts"
    return ""
