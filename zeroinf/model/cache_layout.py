"""The layout of a KV cache and of recurrent states: what a token, a row, a page and a pool take, on the GPU and in host
memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Literal

from zeroinf.model.dtypes import DTYPE_BYTES

# What torch aligns its own allocations to on a GPU: kernels find their operands as they would on their own.
_POOL_ALIGNMENT = 512

PAGE_TOKENS = 16
"""Tokens of a page, in which a row gets room in the KV cache's pool."""

RECORD_ALIGNMENT = 16
"""Records, and the parts of each, begin at multiples of it: attention kernels read 16 bytes at a time."""
STEP_ALIGNMENT = 8
"""A GPU reads what the CPU has attended to in whole numbers of so many bytes."""
_SCALE_BYTES = 4

FETCHED_UNITS, SENT_UNITS = 3, 2
"""Staging for keys and values of host memory, one unit for each block of a micro-batch: one is attended to, two are on
their way; new ones are written to one unit while those of the other leave."""
LONG_RUN_BYTES = 1 << 20
"""Keys and values of so many bytes side by side take a link about twice as long as it takes the host to ask for their
copy, so copy engines move them, which fill a link. Shorter ones are copied by one kernel for all rows."""

KvDtype = Literal["model", "int8"]
"""How keys and values rest in host memory: as the model has them, or as a byte each with a scale a token and head."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenState:
    """The keys, or the values, that one token of one row adds to a layer's cache: (heads, width) elements."""

    heads: int
    width: int
    dtype: str

    @property
    def nbytes(self) -> int:
        return self.heads * self.width * DTYPE_BYTES[self.dtype]

    def pooled_bytes(self, pages: int) -> int:
        """Bytes that this takes in a pool of so many pages: where the next one begins."""
        return -(-pages * PAGE_TOKENS * self.nbytes // _POOL_ALIGNMENT) * _POOL_ALIGNMENT


@dataclass(frozen=True, kw_only=True, slots=True)
class RowState:
    """A state of a recurrent layer, of one row: it does not grow with the row's tokens."""

    kind: Literal["conv", "recurrent"]
    """Inputs that a short convolution sees again, or what a recurrence goes on with."""
    number: int
    """Which of the layer's states of this kind."""
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def stored_bytes(self) -> int:
        """Bytes that it takes among the others of its row: where the next one begins."""
        return -(-self.nbytes // RECORD_ALIGNMENT) * RECORD_ALIGNMENT


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolSize:
    """The capacity of a KV cache's pool: `rows` live rows of up to `tokens` tokens, in `pages` pages together."""

    rows: int
    tokens: int
    pages: int
    prefix_pages: int = 0
    """Of these, those that may hold what prompts begin with in common; 0: each row has pages of its own alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostSize:
    """The capacity of the KV cache in host memory: `tokens` of all rows there, and of one micro-batch."""

    tokens: int
    seen_columns: int
    """Columns that one micro-batch attends to, rows times columns, at the most."""
    new_columns: int
    """Columns that one micro-batch adds, at the most."""
    dtype: KvDtype = "model"
    cpu_rows: int = 0
    """Rows for whose decode steps the CPU attends, at the most; 0: the GPU attends, to what is copied to it."""
    query_heads: int = 0
    """Heads of the queries that cross the link for that."""
    cpu_forwards: int = 1
    """Forwards of these steps in a pass: of two, one is computed by the GPU while the CPU attends for the other."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """The layout of a token's keys and values in host memory and on the link: where each part begins, in bytes.

    Keys, values, and, of codes, a float32 scale for each head of the keys and of the values.
    """

    keys: TokenState
    values: TokenState
    dtype: KvDtype

    @cached_property
    def starts(self) -> tuple[int, int, int, int, int]:
        """Offsets in bytes of keys, values, scales of keys, scales of values, and of the next record."""
        coded = self.dtype == "int8"
        sizes = [state.heads * state.width if coded else state.nbytes for state in (self.keys, self.values)]
        sizes += [state.heads * _SCALE_BYTES if coded else 0 for state in (self.keys, self.values)]
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + -(-size // RECORD_ALIGNMENT) * RECORD_ALIGNMENT)
        keys, values, key_scales, value_scales, end = starts
        return keys, values, key_scales, value_scales, end

    @property
    def nbytes(self) -> int:
        return self.starts[-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCache:
    """The growth of one layer's KV cache (or recurrent state) for a row, as transformers' own cache keeps it."""

    fixed_bytes: int
    bytes_per_token: int
    window: int | None = None
    keys: TokenState | None = None
    values: TokenState | None = None
    states: tuple[RowState, ...] = ()
    """All that `fixed_bytes` are, where that is known."""

    @property
    def is_understood(self) -> bool:
        """Whether nothing is kept but states, and keys and values of tokens."""
        growing = not self.bytes_per_token or bool(self.pooled)
        return growing and self.fixed_bytes == sum(state.nbytes for state in self.states)

    def nbytes(self, tokens: int) -> int:
        """Bytes that one row of `tokens` tokens holds in this layer."""
        kept = tokens if self.window is None else min(tokens, self.window)
        return self.fixed_bytes + self.bytes_per_token * kept

    @property
    def pooled(self) -> tuple[TokenState, ...]:
        """Keys and values, if they are all that this layer keeps of a token: pages can hold them."""
        return (self.keys, self.values) if self.keys is not None and self.values is not None else ()

    @property
    def state_bytes(self) -> int:
        """Bytes of the states of one row, as they lie in a pool."""
        return sum(state.stored_bytes for state in self.states)

    def record(self, dtype: KvDtype) -> Record | None:
        """The layout of a token of this layer in host memory; None where that cannot hold it."""
        if self.keys is None or self.values is None:
            return None
        return Record(keys=self.keys, values=self.values, dtype=dtype)

    def row_pages(self, tokens: int) -> int:
        """Pages that a row of so many tokens takes in a pool; those of a window are used again and again."""
        if not self.pooled:
            return 0
        return -(-(tokens if self.window is None else min(tokens, self.window)) // PAGE_TOKENS)

    def with_heads_shared(self, parts: int, part: int) -> LayerCache:
        """This layer's cache with a share of its heads, as `Anatomy.with_heads_shared` says."""
        if self.keys is None or self.values is None or self.fixed_bytes:
            raise ValueError("a layer keeps more than keys and values")
        keys, values = (replace(state, heads=_share(state.heads, parts, part)) for state in (self.keys, self.values))
        return replace(self, keys=keys, values=values, bytes_per_token=keys.nbytes + values.nbytes)

    def pool_pages(self, size: PoolSize) -> int:
        """Pages of this layer in a pool: no more than all its rows and prefixes can take, and one for padding."""
        return min(size.pages, size.rows * self.row_pages(size.tokens) + size.prefix_pages) + 1

    def pooled_bytes(self, size: PoolSize) -> int:
        """Bytes of this layer's keys and values in a pool; 0 where a pool cannot hold them."""
        return sum(state.pooled_bytes(self.pool_pages(size)) for state in self.pooled)


def _share(heads: int, parts: int, part: int) -> int:
    if heads < parts:
        raise ValueError(f"its keys and values have {heads} heads")
    return heads // parts + (part < heads % parts)
