"""Shares the tokens of a job's prompts between the ranks of a node: 4 bytes a token, stored once however many ranks
there are.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from zeroinf.distributed.control import Control
from zeroinf.engines.stream.host_memory import HostMemory, view_of
from zeroinf.service.requests import Work

_TOKEN_BYTES = array("i").itemsize
_WORK_BYTES = 2300
"""Of a request beside its tokens: its fields, id and digest, what the queue and the journal keep of it, and what the
process keeps of its text (measured for a thousand characters: docs/benchmarks-archive.md)."""
_CHUNK_BYTES = 64 << 20


def request_bytes(prompt_tokens: Sequence[int], ranks: int) -> int:
    """Host memory that requests with so many tokens take on a node with so many ranks."""
    return _TOKEN_BYTES * sum(prompt_tokens) + ranks * _WORK_BYTES * len(prompt_tokens)


def share_work(control: Control, work: tuple[Work, ...] | None) -> tuple[Work, ...]:
    """The `work` of rank 0 on every rank, its tokens in memory that all ranks of a node map. The others give None.

    What rank 0 gives is left without tokens: nobody needs them twice.
    """
    if control.world.size == 1:
        assert work is not None
        return work
    counts = array("i", map(len, (item.prompt for item in work))) if work is not None else None
    counts = control.broadcast(counts)
    ends = list(accumulate(counts))
    if not ends:
        return ()
    memory = HostMemory(ends[-1] * _TOKEN_BYTES, control, pin=False)
    tokens = view_of(memory.bytes).cast("B").cast("i")
    if work is not None:
        for item, end in zip(work, ends, strict=True):
            own = as_array(item.prompt)
            tokens[end - len(own) : end] = own
            del own[:]
    if control.world.local_size < control.world.size:
        _to_other_nodes(control, tokens)
    bare = control.broadcast(None if work is None else tuple(replace(item, prompt=()) for item in work))
    control.all_gather(None)  # nobody reads before all of it is there
    starts = (end - count for end, count in zip(ends, counts, strict=True))
    return tuple(replace(item, prompt=tokens[start:end]) for item, start, end in zip(bare, starts, ends, strict=True))


def as_array(tokens: Sequence[int]) -> array[int]:
    """`tokens` as 4 bytes each: themselves, where they are so already."""
    return tokens if isinstance(tokens, array) else array("i", tokens)


def _to_other_nodes(control: Control, tokens: memoryview) -> None:
    step = _CHUNK_BYTES // _TOKEN_BYTES
    for start in range(0, len(tokens), step):
        part = control.broadcast(bytes(tokens[start : start + step]) if control.world.is_main else None)
        if control.world.local_rank == 0 and not control.world.is_main:
            tokens[start : start + step] = memoryview(part).cast("i")
