"""Accounts for every byte of a run: terms with a name, a size and an origin, for the GPU, the host and the disk.

Input: an anatomy, a choice of settings and simulated workloads. Output: `Term`s. Nothing is allocated or measured here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal, Protocol

from zeroinf.model.anatomy import Anatomy, Table, TensorSpec
from zeroinf.model.dtypes import DTYPE_BYTES
from zeroinf.planner.allocator import LARGE_PAGE_BYTES, Allocator, Crossing, Event, Usage, rounded
from zeroinf.planner.choice import Choice, Embeddings, Fetch
from zeroinf.planner.figures import MemoryFigures, fitted_figures
from zeroinf.planner.wire import CODES, Wire, is_coded
from zeroinf.planner.workload import Pass, Step, Workload, in_lock_step

MemoryPlace = Literal["gpu", "host", "disk"]
TermOrigin = Literal["counted", "simulated", "measured", "data sheet", "given", "assumed"]

ALIGNMENT = 512
"""A device allocation starts at 512 bytes, so a tensor at such an offset is aligned as if it had been allocated alone
and the same kernels run on it."""

PIECE_ALIGNMENT = 4096
"""What O_DIRECT wants of lengths and offsets: pieces are read from a disk as they lie in memory."""

CHUNK_BYTES = 1 << 20
"""What one digest of a store covers: pieces begin, and are shared out among ranks, at multiples of it."""

SLOTS: dict[Fetch, int] = {"replicated": 3, "partitioned": 6}
"""On one link: one slot computes, one has arrived, one is on its way. Gathered pieces arrive less evenly: six slots and
four stages moved 15 % more than three and three on four GPUs (docs/benchmarks-archive.md)."""

STAGES = 4

READ_BUFFERS = 3
"""For blocks on NVMe: one is copied to the device, which is quick, while the next is read and another one begun."""

INDEX_BYTES = 8
"""Of a row's number in a table."""

LOADING_STAGES = 3
"""What stays on a GPU passes through these: one is copied while two are filled, which keeps a disk busy."""

REQUESTS = "requests"
MASKS = "masks of structured answers"
SCORES = "scores of given tokens"
KV_STAGING = "KV cache on its way"
ENCODED = "encoder's states, cross-attention"
COMPUTED = "activations, logits, states"

GROWING = ("KV cache", KV_STAGING, COMPUTED, ENCODED)
"""Terms of GPU memory that grow with the rows."""

PAGE_TABLES = "page tables of page-locked memory"
OUTSIDE_TORCH = ("CUDA context", "collectives' buffers", PAGE_TABLES)
"""Terms of GPU memory that torch's allocator does not hold."""

GRAPHS = "CUDA graphs of layers"
SMALL_PAGES = "pages of small tensors"
GAPS = "allocator's pages and gaps"
UNFORESEEN = "unforeseen"

_MIB, _GIB = 1 << 20, 1 << 30

# The driver keeps 8 bytes for each page of 4 KiB that a GPU can reach: one run fits it (docs/benchmarks-archive.md).
PINNED_BYTES_PER_PAGE_TABLE_BYTE = 4096 // 8
"""A GPU's page tables take one byte of its memory for this many bytes of page-locked memory: 8 bytes for each page of
4096.
"""
# The system, the page cache's working set, and what Python collects late.
_HOST_MARGIN = _GIB
MARGIN = "margin for the system"
PROCESSES = "processes with their libraries"


@dataclass(frozen=True, slots=True)
class Term:
    """One named amount of memory, in bytes. `origin` says how it was determined."""

    place: MemoryPlace
    name: str
    nbytes: int
    origin: TermOrigin

    @property
    def grows(self) -> bool:
        """Whether it grows with the rows."""
        return self.name in GROWING


@dataclass(frozen=True, kw_only=True, slots=True)
class Overhead:
    """Memory that a process takes of its GPU besides tensors, and of host memory, in bytes, each with its origin."""

    context: tuple[int, TermOrigin] = (0, "counted")
    workspace: tuple[int, TermOrigin] = (0, "counted")
    collectives: tuple[int, TermOrigin] = (0, "counted")
    process: tuple[int, TermOrigin] = (768 * _MIB, "assumed")
    """Host memory of a process with its libraries; the default is one without CUDA."""
    uncounted: MemoryFigures = field(default_factory=lambda: fitted_figures().memory)


def piece_bytes(tensors: Iterable[TensorSpec]) -> int:
    """Bytes of `tensors` in one contiguous piece."""
    return round_up(sum(round_up(tensor.nbytes, ALIGNMENT) for tensor in tensors), PIECE_ALIGNMENT)


def wire_bytes(tensors: Sequence[TensorSpec], dtype: str, wire: Wire) -> int:
    """Bytes of `tensors` in one contiguous piece as it rests and crosses the link; `dtype` is the model's."""
    if wire == "model":
        return piece_bytes(tensors)
    return _coded_bytes(tensors, is_coded(tensors, dtype, wire), dtype, wire)


def _coded_bytes(tensors: Sequence[TensorSpec], coded: Sequence[bool], dtype: str, wire: Wire) -> int:
    sizes = {True: 0, False: 0}
    for tensor, is_code in zip(tensors, coded, strict=True):
        sizes[is_code] += round_up(tensor.nbytes, ALIGNMENT)
    elements = sizes[True] // DTYPE_BYTES[dtype]
    return round_up(CODES[wire].nbytes(elements) + sizes[False] + CODES[wire].scale_bytes(elements), PIECE_ALIGNMENT)


@lru_cache(maxsize=16)
def _without_tables(anatomy: Anatomy) -> Anatomy:
    return anatomy.without_tables()


def with_layers(anatomy: Anatomy, embeddings: Embeddings) -> Anatomy:
    """The anatomy of what is on the GPU or streams through it; tables whose rows are gathered elsewhere are not."""
    return anatomy if embeddings == "gpu" else _without_tables(anatomy)


def table_pieces(anatomy: Anatomy, embeddings: Embeddings) -> tuple[int, ...]:
    """The bytes of the piece of each table that rests in host memory."""
    if embeddings != "cpu":
        return ()
    sizes = (table.rows * table.row_bytes for table in anatomy.tables)
    return tuple(round_up(size, PIECE_ALIGNMENT) for size in sizes)


def read_bytes(tables: Sequence[Table], tokens: int) -> int:
    """Bytes of host memory for what so many tokens read of any one table in the checkpoint's files, in its dtype."""
    return max((min(tokens * table.rows_per_token, table.rows) * table.row_bytes for table in tables), default=0)


def gathered_tokens(passes: Passes) -> int:
    """Tokens of one forward, at the most."""
    return passes.forward_tokens or max(passes.prefill_tokens, passes.micro_batch_rows)


def gathered_bytes(tables: Sequence[Table], tokens: int) -> tuple[int, int]:
    """Bytes of two buffers for what so many tokens read of any one table: its rows, and their numbers from 0 on."""
    widest = max((table.token_bytes for table in tables), default=0)
    most = max((table.rows_per_token for table in tables), default=0)
    return round_up(tokens * widest, INDEX_BYTES), tokens * most * INDEX_BYTES


def routed_buffer_bytes(part_bytes: int, ranges: int) -> int:
    """Bytes of a buffer for so many ranges of a store, which make up a part of experts: each is read with what shares
    its digests."""
    return round_up(part_bytes, CHUNK_BYTES) + 2 * ranges * CHUNK_BYTES


@lru_cache(maxsize=16)
def pieces(anatomy: Anatomy, wire: Wire = "model") -> tuple[int, ...]:
    """The bytes of each block's piece as it rests and crosses the link."""
    return tuple(wire_bytes(block.tensors, anatomy.dtype, wire) for block in anatomy.blocks)


@lru_cache(maxsize=64)
def units(anatomy: Anatomy, wire: Wire = "model", parts: int = 1) -> tuple[tuple[int, ...], ...]:
    """For each block, the bytes of what moves of it as one piece: the whole, or all but its experts, and then each of
    `parts` parts of these."""
    if parts == 1:
        return tuple((piece,) for piece in pieces(anatomy, wire))
    found = []
    for block in anatomy.blocks:
        coded = dict(zip((t.name for t in block.tensors), is_coded(block.tensors, anatomy.dtype, wire), strict=True))
        found.append(
            tuple(
                piece_bytes(own)
                if wire == "model"
                else _coded_bytes(own, [coded[tensor.name] for tensor in own], anatomy.dtype, wire)
                for own in anatomy.units(block, parts)
            )
        )
    return tuple(found)


def largest_units(anatomy: Anatomy, wire: Wire = "model", parts: int = 1) -> tuple[int, ...]:
    """The bytes of the largest piece of each kind: blocks, or what is left of them without experts, and a part of
    experts. A slot of each kind is in use at a time."""
    every = units(anatomy, wire, parts)
    experts = [size for sizes in every for size in sizes[1:]]
    return (max(sizes[0] for sizes in every), *([max(experts)] if experts else []))


class Passes(Protocol):
    """What a choice and a plan say of their passes."""

    @property
    def forward_tokens(self) -> int: ...
    @property
    def prefill_tokens(self) -> int: ...
    @property
    def micro_batch_rows(self) -> int: ...


def scores_bytes(anatomy: Anatomy, tokens: int) -> int:
    """Bytes of the model's scores in the places of so many tokens, with the two copies that are made of them."""
    return tokens * anatomy.vocabulary * (2 * DTYPE_BYTES[anatomy.dtype] + DTYPE_BYTES["float32"])


def mask_bytes(anatomy: Anatomy, rows: int, *, pinned: bool) -> int:
    """Host memory for the masks of so many rows, a bit for each token of the vocabulary; page-locked by torch, whose
    allocations are powers of two."""
    nbytes = rows * 8 * -(-anatomy.vocabulary // 64)
    return 1 << (nbytes - 1).bit_length() if pinned else nbytes


@lru_cache(maxsize=64)
def store_bytes(anatomy: Anatomy, wire: Wire = "model", embeddings: Embeddings = "gpu", expert_parts: int = 1) -> int:
    """Bytes of a model's store on NVMe: all that is in the model, wherever it rests while it runs."""
    layers = with_layers(anatomy, embeddings)
    blocks = (size for own in units(layers, wire, expert_parts) for size in own)
    sizes = (*blocks, piece_bytes(layers.outside), *table_pieces(anatomy, embeddings))
    return sum(round_up(piece, CHUNK_BYTES) for piece in sizes)


def round_up(size: int, unit: int) -> int:
    """The smallest multiple of `unit` that is at least `size`."""
    return -(-size // unit) * unit


def dynamic_terms(held: Sequence[int], workload: Workload, overhead: Overhead, encoded: int = 0) -> tuple[Term, ...]:
    """The cache, what passes compute, of it `encoded` bytes that last from the first to the last, and what allocator,
    libraries and driver add."""
    workspace, origin = overhead.workspace
    uncounted = overhead.uncounted
    weights, passing = _held((*held, workspace)), _usage(workload)
    allocated = weights.allocated + passing.allocated
    large = round_up(weights.large + passing.allocated + passing.gaps, LARGE_PAGE_BYTES)
    return tuple(
        term
        for term in (
            Term("gpu", "KV cache", passing.cache, "simulated"),
            Term("gpu", ENCODED, encoded, "counted"),
            Term("gpu", COMPUTED, passing.allocated - passing.cache - encoded, "simulated"),
            Term("gpu", "matrix product workspaces", workspace, origin),
            Term("gpu", SMALL_PAGES, weights.small + passing.small + uncounted.small_tensors_bytes, "simulated"),
            Term("gpu", GAPS, max(0, large - allocated), "simulated"),
            Term("gpu", "CUDA context", *overhead.context),
            Term("gpu", "collectives' buffers", *overhead.collectives),
            Term("gpu", UNFORESEEN, uncounted.unforeseen_bytes, "assumed"),
        )
        if term.nbytes
    )


@lru_cache(maxsize=1024)
def _held(sizes: tuple[int, ...]) -> Usage:
    """What allocations of these sizes take that last."""
    allocator = Allocator()
    allocator.replay(Event(index, nbytes) for index, nbytes in enumerate(sizes) if nbytes)
    return allocator.usage


@dataclass(frozen=True, slots=True)
class _Passing:
    """Memory that passes take of torch's allocator beside weights, in bytes; `cache` lasts."""

    cache: int
    allocated: int
    small: int
    """Pages of the pool of small tensors, which are part of `allocated` all the same: neither pool has the other's."""
    gaps: int
    """What pages of the other pool hold beside `allocated`."""


@lru_cache(maxsize=1024)
def roughly(workload: Workload) -> Workload:
    """`workload` with memory that is counted in a fraction of the time, and comes out a little too low; itself where
    there is no quicker way."""
    return replace(workload, roughly=True) if workload.shares_passes else workload


@lru_cache(maxsize=1024)
def _usage(workload: Workload) -> _Passing:
    """Replay passes: the memory that is allocated follows from all micro-batches of a pass. What is lost in pages and
    gaps comes from a replay with a few of each kind, twice: the second time passes find the memory as the first one
    left it."""
    allocator = Allocator()
    allocator.replay(workload.cache)
    if workload.roughly:
        most = allocator.live_bytes + max(peak_bytes(steps) for steps in workload.passes)
        return _Passing(allocator.live_bytes, allocated=most, small=0, gaps=0)
    cache, passes = allocator.live_bytes, [_few(steps) for steps in workload.passes]
    for _ in range(2):
        for steps in passes:
            for number, section in in_lock_step(steps):
                allocator.replay_section(section, number)
        allocator.end_sections()  # as rows do
    few = allocator.usage
    most = few.allocated
    if workload.shares_passes:
        most = cache + max(peak_bytes(steps) for steps in workload.passes)
    share = max(len(steps) / len(some) for steps, some in zip(workload.passes, passes, strict=True))
    return _Passing(cache, allocated=most, small=round(few.small * share), gaps=few.large - few.allocated)


def _few(steps: Pass) -> Pass:
    """The first two micro-batches of each kind."""
    return tuple(step for index, step in enumerate(steps) if steps[:index].count(step) < 2)


def peak_bytes(steps: Pass) -> int:
    """The most that a pass has allocated at any time, beside what lasts."""
    changes = {step: _changes(step) for step in set(steps)}
    live = most = 0
    for phase in range(max(map(len, changes.values()))):
        for step in steps:
            peak, change = changes[step][phase]
            most = max(most, live + peak)
            live += change
    return most


@lru_cache(maxsize=1024)
def _changes(step: Step) -> list[tuple[int, int]]:
    """For each phase of a micro-batch, the most bytes it adds at any time, and what is left of them."""
    sizes: dict[int, int] = {}
    crossings: dict[int, Crossing] = {}
    known: dict[tuple[int, tuple[int, ...]], tuple[int, int, tuple[int, ...]]] = {}
    found = []
    for events in (step.inputs, *step.sections, step.end, step.choice):
        if id(events) not in crossings:
            crossings[id(events)] = Crossing.of(events)
        crossing = crossings[id(events)]
        ending = tuple(sizes.pop(key) for key in crossing.ending)
        if (id(events), ending) not in known:
            known[id(events), ending] = _change(crossing, ending)
        most, live, lasting = known[id(events), ending]
        sizes.update(zip(crossing.lasting, lasting, strict=True))
        found.append((most, live))
    return found


def _change(crossing: Crossing, ending: Sequence[int]) -> tuple[int, int, tuple[int, ...]]:
    """The most bytes that a section adds at any time, what is left of them, and the sizes of what lasts."""
    sizes = dict(zip(crossing.ending, ending, strict=True))
    live = most = 0
    for key, nbytes in crossing.section:
        if nbytes is None:
            live -= sizes.pop(key)
        else:
            sizes[key] = rounded(nbytes)
            live += sizes[key]
            most = max(most, live)
    return most, live, tuple(sizes[key] for key in crossing.lasting)


def layer_bytes(step: Step) -> int:
    """The most that any layer of a forward has allocated at any time."""
    return max((most for most, _ in _changes(step)[1 : 1 + len(step.sections)]), default=0)


def process_terms(world_size: int, overhead: Overhead) -> tuple[Term, ...]:
    """Host memory that `world_size` processes and the system take."""
    nbytes, origin = overhead.process
    return (
        Term("host", PROCESSES, world_size * nbytes, origin),
        Term("host", MARGIN, _HOST_MARGIN, "assumed"),
    )


def store_terms(anatomy: Anatomy, choice: Choice) -> tuple[Term, ...]:
    """Disk space of an engine that copies weights to a store on NVMe."""
    if choice.offload != "nvme" or not choice.nvme_blocks:
        return ()
    return (
        Term("disk", "store", store_bytes(anatomy, choice.wire, choice.embeddings, choice.expert_parts), "counted"),
    )


def taken(terms: Iterable[Term], place: MemoryPlace) -> int:
    """Bytes of one place that the run takes: all terms but the margin, which stays free."""
    return total((term for term in terms if term.name != MARGIN), place)


def reserved(terms: Iterable[Term]) -> int:
    """Bytes of host memory that no settings change."""
    return sum(term.nbytes for term in terms if term.name in (MARGIN, PROCESSES))


def total(terms: Iterable[Term], place: MemoryPlace) -> int:
    """Bytes of all terms of one place: what must be there."""
    return sum(term.nbytes for term in terms if term.place == place)
