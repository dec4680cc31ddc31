"""Memory terms of the stream engine: slots that layers pass through, page-locked host memory, and the store on NVMe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from zeroinf.model.anatomy import Anatomy, expert_ranges
from zeroinf.model.cache_layout import HostSize
from zeroinf.planner.allocator import LARGE_PAGE_BYTES
from zeroinf.planner.choice import Choice, Embeddings
from zeroinf.planner.coded_products import by_expert, expanded_bytes
from zeroinf.planner.descriptor import EngineTerms
from zeroinf.planner.graphs import graph_bytes
from zeroinf.planner.memory import (
    CHUNK_BYTES,
    GRAPHS,
    KV_STAGING,
    LOADING_STAGES,
    PAGE_TABLES,
    PIECE_ALIGNMENT,
    PINNED_BYTES_PER_PAGE_TABLE_BYTE,
    READ_BUFFERS,
    STAGES,
    Overhead,
    Term,
    dynamic_terms,
    gathered_bytes,
    gathered_tokens,
    largest_units,
    piece_bytes,
    process_terms,
    read_bytes,
    round_up,
    routed_buffer_bytes,
    store_terms,
    table_pieces,
    units,
    with_layers,
)
from zeroinf.planner.plan import Plan
from zeroinf.planner.walks import walks
from zeroinf.planner.wire import Wire, is_coded
from zeroinf.planner.workload import Workload

OUTSIDE: dict[Embeddings, str] = {
    "gpu": "embeddings, head, norms",
    "cpu": "head, norms",
    "disk": "head, norms",
}


def memory_terms(
    asked: Plan, overhead: Callable[[bool], Overhead], own_config: Mapping[str, Any] | None = None
) -> EngineTerms:
    """Memory terms of `asked` with another choice in it."""
    return stream_terms(asked.anatomy, asked.world_size, overhead)


def stream_terms(anatomy: Anatomy, world_size: int, overhead: Callable[[bool], Overhead]) -> EngineTerms:
    """Memory terms of a model on so many ranks; `overhead` says what a process takes, by whether its ranks gather."""

    def gpu(choice: Choice, workload: Workload) -> tuple[Term, ...]:
        return stream_gpu_terms(anatomy, choice, workload, world_size, overhead(choice.fetch == "partitioned"))

    def elsewhere(choice: Choice, kv: HostSize | None) -> tuple[Term, ...]:
        host = stream_host_terms(anatomy, choice, world_size, overhead(choice.fetch == "partitioned"), kv)
        return (*host, *store_terms(anatomy, choice))

    return EngineTerms(gpu=gpu, elsewhere=elsewhere)


def stream_gpu_terms(
    anatomy: Anatomy, choice: Choice, workload: Workload, world_size: int, overhead: Overhead
) -> tuple[Term, ...]:
    """GPU memory of one rank of the stream engine at its highest."""
    parts = world_size if choice.fetch == "partitioned" else 1
    kv = workload.host
    slots, stages, resident = list[int](), list[int](), list[int]()
    layers = with_layers(anatomy, choice.embeddings)
    for walk in walks(anatomy, choice):
        for lane in walk.lanes:
            slots += [_pulled_bytes(lane.largest, choice, world_size) * parts] * lane.slots(choice.fetch)
            resident += lane.resident
        if parts > 1 and walk.streamed_bytes:
            stages += [_pulled_bytes(max(lane.largest for lane in walk.lanes), choice, world_size)] * STAGES
    fixed = {
        OUTSIDE[choice.embeddings]: [piece_bytes(layers.outside)],
        "resident layers": resident,
        "slots": slots,
        "staging buffers (load only)": stages,
        "expanded slot": _expanded(layers, choice, workload),
        "expanded block": [] if workload.expansion is None else [workload.expansion.nbytes],
        "rows of embeddings": list(_gathered_bytes(anatomy, choice)),
        KV_STAGING: [] if kv is None else [*anatomy.staging_bytes(kv)],
    }
    counted = [Term("gpu", name, sum(given), "counted") for name, given in fixed.items() if given]
    locked = sum(_locked_bytes(anatomy, choice, world_size, workload.host).values())
    counted += [Term("gpu", PAGE_TABLES, locked // PINNED_BYTES_PER_PAGE_TABLE_BYTE, "assumed")] if locked else []
    held = [nbytes for given in fixed.values() for nbytes in given]
    encoded = anatomy.encoder.bytes_per_token * workload.shape.prefill_tokens if anatomy.encoder is not None else 0
    if choice.graph_tokens:
        nbytes = graph_bytes(workload, choice.graph_tokens, overhead.workspace[0])
        counted.append(Term("gpu", GRAPHS, round_up(nbytes, LARGE_PAGE_BYTES), "simulated"))
    return (*counted, *dynamic_terms(held, workload, overhead, encoded))


def _expanded(layers: Anatomy, choice: Choice, workload: Workload) -> list[int]:
    """The slots where coded layers lie in full, and parts of experts."""
    if choice.wire == "model":
        return []
    if not workload.multiplies_codes or not by_expert(layers, choice.wire):
        return list(largest_units(layers, "model", choice.expert_parts))
    return [expanded_bytes(layers, choice.wire, choice.expert_parts)]


def stream_host_terms(
    anatomy: Anatomy, choice: Choice, world_size: int, overhead: Overhead, kv: HostSize | None = None
) -> tuple[Term, ...]:
    """Host memory of all ranks of a node: what streams from there once, the ring that NVMe blocks pass through, and
    room for keys and values.

    What stays on a GPU passes through stages on its way there, before there is a ring; what lies outside the blocks
    comes last.
    """
    of_one = _locked_bytes(anatomy, choice, world_size, kv)
    locked, rings = of_one["weights"], of_one["NVMe read ring"] * world_size
    layers = with_layers(anatomy, choice.embeddings)
    resident = [size for walk in walks(anatomy, choice) for lane in walk.lanes for size in lane.resident]
    largest, outside = max(resident, default=0), piece_bytes(layers.outside)
    stages = max(outside, largest) + largest * min(LOADING_STAGES - 1, len(resident))
    terms = [
        Term("host", "weights, page-locked", locked, "counted"),
        Term("host", "embeddings, page-locked", of_one["tables"], "counted"),
        Term("host", "gathered rows, page-locked", of_one["gathered rows"] * world_size, "counted"),
        Term("host", "rows read from files", _read_bytes(anatomy, choice) * world_size, "counted"),
        Term("host", "KV cache, page-locked", of_one["keys and values"] * world_size, "counted"),
        Term("host", "attention on the CPU, page-locked", of_one["steps"] * world_size, "counted"),
        Term("host", "NVMe read ring, page-locked", rings, "counted"),
        Term("host", "routed experts from NVMe, page-locked", of_one["routed experts"] * world_size, "counted"),
        Term("host", "staging buffers (load only)", max(0, stages - rings), "counted"),
        Term("host", "weights on their way through transformers", _passing_bytes(anatomy, choice, locked), "counted"),
        *process_terms(world_size, overhead),
    ]
    return tuple(term for term in terms if term.nbytes)


def _locked_bytes(anatomy: Anatomy, choice: Choice, world_size: int, kv: HostSize | None) -> dict[str, int]:
    """Page-locked memory that one rank's GPU reaches: what ranks share, and what is its own."""
    all_walks = walks(anatomy, choice)
    layers = with_layers(anatomy, choice.embeddings)
    read = [_pulled_bytes(lane.largest_read, choice, world_size) for walk in all_walks for lane in walk.lanes]
    return {
        "weights": sum(walk.host_bytes for walk in all_walks),
        "tables": sum(table_pieces(anatomy, choice.embeddings)),
        "gathered rows": sum(_gathered_bytes(anatomy, choice)[:1]),
        "keys and values": 0 if kv is None else kv.tokens * anatomy.host_token_bytes(kv.dtype),
        "steps": 0 if kv is None else _power_of_two(_step_bytes(anatomy, kv)),
        "NVMe read ring": READ_BUFFERS * sum(read),
        "routed experts": sum(
            _routed_bytes(layers, choice, lane.largest)
            for walk in all_walks
            for lane in walk.lanes[1:]
            if lane.largest_read
        ),
    }


def _routed_bytes(layers: Anatomy, choice: Choice, part: int) -> int:
    """Bytes of the buffer for experts that are read from the store one by one, as many as the largest part holds."""
    if not choice.routed_tokens:
        return 0
    return routed_buffer_bytes(part, _most_ranges(layers, choice.wire, choice.expert_parts))


@lru_cache(maxsize=64)
def _most_ranges(layers: Anatomy, wire: Wire, parts: int) -> int:
    """Ranges of the store that make up a part of experts, at the most."""
    most = 0
    for one in layers.experts:
        tensors = layers.blocks[one.block].tensors
        coded = is_coded(tensors, layers.dtype, wire)  # their codes and scales lie apart
        ranges = sum(1 + code for tensor, code in zip(tensors, coded, strict=True) if tensor.name in one.tensors)
        most = max(most, ranges * len(expert_ranges(one.count, parts)[0]))
    return most


def _step_bytes(anatomy: Anatomy, kv: HostSize) -> int:
    """Bytes of the queries and results of attention on the CPU, which the GPU writes and reads on the host."""
    return kv.cpu_rows * anatomy.step_row_bytes(kv)


def _power_of_two(nbytes: int) -> int:
    """The bytes that torch page-locks for so many."""
    return 1 << (nbytes - 1).bit_length() if nbytes else 0


def _pulled_bytes(piece: int, choice: Choice, world_size: int) -> int:
    """Bytes of a piece that each rank pulls."""
    if choice.fetch == "replicated":
        return piece
    return round_up(-(-piece // world_size), CHUNK_BYTES if choice.offload == "nvme" else PIECE_ALIGNMENT)


def _gathered_bytes(anatomy: Anatomy, choice: Choice) -> tuple[int, ...]:
    """Bytes of the buffers for what a forward gathers of tables that are not on the GPU; empty where there are none."""
    if choice.embeddings == "gpu" or not anatomy.tables:
        return ()
    return gathered_bytes(anatomy.tables, gathered_tokens(choice))


def _read_bytes(anatomy: Anatomy, choice: Choice) -> int:
    """Bytes of what a forward reads of a table in the checkpoint's files."""
    return read_bytes(anatomy.tables, gathered_tokens(choice)) if choice.embeddings == "disk" else 0


def _passing_bytes(anatomy: Anatomy, choice: Choice, locked_bytes: int) -> int:
    """Host memory that loading takes beside stages and page-locked weights.

    One piece is converted from what the checkpoint holds of it while another one is copied; of weights that are loaded
    as a whole each is let go when it has been copied.
    """
    if anatomy.loads == "in place":
        return 0
    tables = table_pieces(anatomy, choice.embeddings)
    by_row = choice.embeddings != "gpu" and not anatomy.unreadable_rows
    largest, every = _loaded_bytes(anatomy, choice.embeddings, choice.expert_parts, by_row=by_row)
    whole = max(0, every - locked_bytes - sum(tables)) if anatomy.loads == "as a whole" else 0
    return 3 * largest + whole


@lru_cache(maxsize=64)
def _loaded_bytes(anatomy: Anatomy, embeddings: Embeddings, parts: int, *, by_row: bool) -> tuple[int, int]:
    """Bytes of the largest piece that is loaded as a whole, and of all; tables may be loaded `by_row`."""
    layers = with_layers(anatomy, embeddings)
    own = (size for sizes in units(layers, "model", parts) for size in sizes)
    sizes, tables = [piece_bytes(layers.outside), *own], table_pieces(anatomy, embeddings)
    return max(*sizes, *(() if by_row else tables)), sum(sizes) + sum(tables)
