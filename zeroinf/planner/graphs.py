"""CUDA graphs of layers in a plan: whether a run has any, for which token counts, and the memory that they take."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from functools import lru_cache

from zeroinf.model.anatomy import Anatomy
from zeroinf.planner.descriptor import descriptor_of, why_padded
from zeroinf.planner.workload import Workload

MOST_GRAPHS = 512
"""Layers that are captured, one for each size: the driver keeps some memory for each."""

REPLAYED_TOKENS = (128, 256, 512, 768, 1024, 1536, 2048, 2560, 3072, 4096)
"""Forwards of up to one of these replay graphs, or of up to the most tokens that they have."""

FLAT_TOKENS, SERVED_TIMES = 256, 4
"""Forwards of up to so many tokens take a GPU about as long as some of fewer: one of a size that has no graph yet
replays that of a larger one, of up to so many times as many tokens."""

# In steps of an eighth from 512 on: a forward computes 6 % more than it has tokens, on average.
_SIZES = (
    *(1 << power for power in range(7)),
    *range(128, 513, 64),
    *(
        size
        for power in (9, 10, 11)
        for size in range((1 << power) + (1 << power - 3), (2 << power) + 1, 1 << power - 3)
    ),
)

# Memory of all graphs beside what the driver keeps of them, at the most: fewer tokens are replayed where it is more.
_MOST_BYTES = 1 << 30
_DRIVER_BYTES = 64 << 20


@lru_cache(maxsize=1024)
def graph_sizes(most: int) -> tuple[int, ...]:
    """Token counts that forwards of up to `most` tokens are rounded up to."""
    return (*(size for size in _SIZES if size < most), most)


def graph_options(anatomy: Anatomy, workload: Workload, launches_bind: Callable[[int], bool]) -> tuple[int, ...]:
    """What is worth comparing of the most tokens of a forward that replays graphs, the most first; 0: none does. Graphs
    may serve every forward, those of passes in which as many rows enter as end, or steps alone, as they do in mixtures
    of experts: no run has shown yet what graphs of prompts gain there. `launches_bind`: whether a forward of so many
    tokens, launched kernel by kernel, takes the host about as long as the GPU."""
    packed, shape = workload.packed, workload.shape
    fitting = [tokens for tokens, nbytes in packed.replayed if 2 * nbytes <= _MOST_BYTES] if packed else []
    if not fitting:
        return (0,)
    entering = min(shape.prefill_tokens, shape.rows / workload.new_tokens * workload.prompt_tokens)
    served = (shape.rows,) if anatomy.experts else (fitting[-1], shape.rows + entering, shape.rows)
    sizes = dict.fromkeys(next((size for size in fitting if size >= tokens), fitting[-1]) for tokens in served)
    return (*filter(launches_bind, sizes), 0)


def graph_size(tokens: float, most: int) -> float:
    """The tokens that a forward of so many computes where those of up to `most` replay graphs."""
    return graph_sizes(most)[bisect_left(graph_sizes(most), tokens)] if tokens <= most else tokens


def graph_bytes(workload: Workload, tokens: int, workspace_bytes: int) -> int:
    """GPU memory of graphs for forwards of up to so many tokens: a layer's, as much again at the most for buffers of
    its inputs and outputs; the workspaces of their stream's products; what the driver keeps."""
    assert workload.packed is not None
    return 2 * dict(workload.packed.replayed)[tokens] + workspace_bytes + _DRIVER_BYTES


def launched_share(anatomy: Anatomy) -> float:
    """The part of the layers that have no graphs where others do: those with recurrent modules."""
    paths = anatomy.mixers.paths if anatomy.mixers is not None else ()
    return sum(map(bool, paths)) / max(1, len(paths))


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
    if launched_share(anatomy) == 1:
        return "all layers are recurrent"
    return ""
