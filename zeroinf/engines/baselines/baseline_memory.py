"""Memory terms of the baselines: weights, KV cache and simulated activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from zeroinf.model.cache_layout import HostSize
from zeroinf.planner.allocator import Event
from zeroinf.planner.choice import Choice
from zeroinf.planner.descriptor import EngineTerms
from zeroinf.planner.memory import Overhead, Term, dynamic_terms, piece_bytes, pieces, process_terms
from zeroinf.planner.plan import Plan
from zeroinf.planner.workload import Workload


def memory_terms(
    asked: Plan, overhead: Callable[[bool], Overhead], own_config: Mapping[str, Any] | None = None
) -> EngineTerms:
    """Memory terms of `asked` with another choice in it, under the baseline that it names."""
    taken = overhead(asked.tensor_parallel.size > 1)

    def gpu(choice: Choice, workload: Workload) -> tuple[Term, ...]:
        return tuple(_gpu_terms(asked, choice, workload, taken))

    def elsewhere(choice: Choice, kv: HostSize | None) -> tuple[Term, ...]:
        return tuple(_host_terms(asked, choice, taken))

    return EngineTerms(gpu=gpu, elsewhere=elsewhere)


def _gpu_terms(asked: Plan, choice: Choice, workload: Workload, overhead: Overhead) -> Iterator[Term]:
    """GPU memory of one rank. Activations are those of the whole model: split over ranks they are smaller."""
    sizes = pieces(asked.anatomy)
    # The first rank of a group has the most heads where they cannot be shared equally.
    mine, whole = (anatomy.kv_bytes_per_token for anatomy in (asked.rank_anatomy(0), asked.anatomy))
    resident = choice.resident_blocks if choice.engine == "accelerate" else len(sizes)
    held = {
        "embeddings, head, norms": piece_bytes(asked.anatomy.outside),
        "resident layers": _share(sum(sizes[:resident]), mine, whole),
        "the block that computes": max(sizes[resident:], default=0),
    }
    yield from (Term("gpu", name, nbytes, "counted") for name, nbytes in held.items() if nbytes)
    cache = tuple(
        event if event.nbytes is None else Event(event.key, _share(event.nbytes, mine, whole))
        for event in workload.cache
    )
    yield from dynamic_terms([n for n in held.values() if n], replace(workload, cache=cache), overhead)


def _share(nbytes: int, mine: int, whole: int) -> int:
    return -(-nbytes * mine // whole) if mine < whole else nbytes


def _host_terms(asked: Plan, choice: Choice, overhead: Overhead) -> Iterator[Term]:
    """Host memory of all ranks: accelerate's have a copy each, the parts of a split model are cut from one that is
    there for a while."""
    sizes = pieces(asked.anatomy)
    on_host = sizes[choice.resident_blocks :]
    if choice.engine == "accelerate" and choice.offload == "cpu" and on_host:
        yield Term("host", "weights", asked.world_size * sum(on_host), "counted")
    if choice.engine == "tensor-parallel":
        yield Term("host", "weights while loading", sum(sizes) + piece_bytes(asked.anatomy.outside), "counted")
    yield from process_terms(asked.world_size, overhead)
