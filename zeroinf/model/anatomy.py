"""The anatomy of a model: every tensor, table, expert and layer, and what a KV cache takes for all layers together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Literal

from zeroinf.model.cache_layout import (
    FETCHED_UNITS,
    RECORD_ALIGNMENT,
    SENT_UNITS,
    STEP_ALIGNMENT,
    HostSize,
    KvDtype,
    LayerCache,
    PoolSize,
    Record,
)
from zeroinf.model.dtypes import DTYPE_BYTES

USUAL_CHUNK = 64
"""Tokens that recurrent layers compute together where their config does not say."""

UNTIED = "untied_parameters"
"""Set on a config: the names of parameters that have values of their own, although transformers' class or the config
itself says that they are tied. transformers leaves them apart when it sees the weights."""


Loading = Literal["in place", "piece by piece", "as a whole"]
"""How weights get from a checkpoint to where they rest: straight from its files; block by block through transformers,
which renames, splits or fuses them; or, where that cannot be, with all of them in host memory first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """One parameter or buffer. `dtype` is a torch dtype's name without `torch.`; `name` is the full dotted name."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    is_buffer: bool = False

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One layer of a decoder, or of an encoder: what a pass visits, and what moves as one piece."""

    index: int
    tensors: tuple[TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    @property
    def parameters(self) -> int:
        return sum(t.numel for t in self.tensors if not t.is_buffer)


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixers:
    """The modules that keep states of recurrent layers, each of which is run by itself for some rows of a forward."""

    paths: tuple[str, ...] = ()
    """Of each layer's cache: the dotted path of its module in the model, empty where it has no states."""
    continues: bool = True
    """Whether they go on from a state with several tokens, so that a prompt can be cut in parts."""
    kind: str = ""
    """Their class, or the one that does not."""
    chunk_tokens: int = USUAL_CHUNK
    """What they compute for few tokens takes as much memory as for so many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoder:
    """The encoder of a sequence-to-sequence model, which reads the prompts; the decoder begins with one token of its
    own.
    """

    blocks: int
    """So many of the model's blocks, the first ones, are its."""
    bytes_per_token: int
    """What a prompt's token leaves for the decoder, a row: its last state, and keys and values of cross-attention."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantized:
    """A checkpoint whose weights are quantized already, which rest, move and are held by modules as they are."""

    method: str
    """As its config names it."""
    parameters: int
    """Of the model in full: what its tensors hold is packed."""


def expert_ranges(count: int, parts: int) -> tuple[range, ...]:
    """The experts of each of about so many equal parts of `count` experts."""
    size = -(-count // parts)
    return tuple(range(start, min(start + size, count)) for start in range(0, count, size))


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """Experts of a block that can be brought and computed in parts."""

    block: int
    count: int
    module: str
    """Full dotted name of the module."""
    tensors: tuple[str, ...]
    """Full dotted names of its parameters whose first dimension is the experts'."""
    each: int
    """Experts that each token is routed to."""
    is_transposed: bool = False
    """Weights are (experts, inputs, outputs), not (experts, outputs, inputs)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A matrix of which each token reads a few rows, such as input embeddings, and nothing uses the whole."""

    tensor: str
    """Full dotted name of the parameter."""
    rows: int
    width: int
    dtype: str
    rows_per_token: int = 1

    @property
    def elements(self) -> int:
        return self.rows * self.width

    @property
    def row_bytes(self) -> int:
        return self.width * DTYPE_BYTES[self.dtype]

    @property
    def token_bytes(self) -> int:
        """Bytes that a token reads."""
        return self.rows_per_token * self.row_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Anatomy:
    """A language model, counted: every tensor once, tied weights once."""

    architecture: str
    dtype: str
    blocks_path: str
    blocks: tuple[Block, ...]
    outside: tuple[TensorSpec, ...]
    tied: tuple[tuple[str, str], ...]
    cache: tuple[LayerCache, ...]
    """Of the decoder's layers."""
    hidden_size: int
    vocabulary: int
    context_limit: int | None
    loads: Loading = "in place"
    encoder: Encoder | None = None
    """None for a causal model, whose prompts are read by the blocks that answer them."""
    quantized: Quantized | None = None
    """None where tensors are weights themselves, in `dtype` for the most part."""
    padded_because: str = "its attention was not looked at"
    """Why rows of a forward are padded to one length; empty where they can be packed into one sequence."""
    tables: tuple[Table, ...] = ()
    """Those of the tensors that tokens read by row: they need not be where the others are."""
    unreadable_rows: str = ""
    """Why rows of tables cannot be read from the checkpoint's files one by one; empty where they can."""
    unread: tuple[str, ...] = ()
    """Full dotted names of modules outside of the blocks that text does not go through, such as a vision tower."""
    mixers: Mixers | None = None
    """None where no layer keeps states, or rows cannot be told apart in them."""

    experts: tuple[Experts, ...] = ()
    """Those of blocks that can be split."""

    def __hash__(self) -> int:
        """Hash a few facts: equal anatomies are the same object, as a rule, and hashing all tensors takes a while."""
        return hash((self.architecture, self.dtype, len(self.blocks), self.hidden_size, self.vocabulary))

    def without_tables(self) -> Anatomy:
        """This anatomy without the tensors that tokens read by row."""
        apart = {table.tensor for table in self.tables}
        outside = tuple(tensor for tensor in self.outside if tensor.name not in apart)
        blocks = tuple(
            block
            if apart.isdisjoint(tensor.name for tensor in block.tensors)
            else replace(block, tensors=tuple(tensor for tensor in block.tensors if tensor.name not in apart))
            for block in self.blocks
        )
        return replace(self, outside=outside, blocks=blocks, tables=())

    def without_unread(self) -> Anatomy:
        """This anatomy without the tensors of modules that text does not go through."""
        prefixes = tuple(f"{name}." for name in self.unread)
        outside = tuple(tensor for tensor in self.outside if not tensor.name.startswith(prefixes))
        return replace(self, outside=outside) if prefixes else self

    def units(self, block: Block, parts: int) -> tuple[tuple[TensorSpec, ...], ...]:
        """The tensors of `block` as they move: all but its experts, then `parts` parts of these; all, if it has
        none."""
        experts = next((one for one in self.experts if one.block == block.index), None) if parts > 1 else None
        if experts is None:
            return (block.tensors,)
        own = [tensor for tensor in block.tensors if tensor.name in experts.tensors]
        return (
            tuple(tensor for tensor in block.tensors if tensor.name not in experts.tensors),
            *(
                tuple(replace(tensor, shape=(len(some), *tensor.shape[1:])) for tensor in own)
                for some in expert_ranges(experts.count, parts)
            ),
        )

    def tensors(self) -> Iterator[TensorSpec]:
        """Every parameter and buffer, once."""
        yield from self.outside
        for block in self.blocks:
            yield from block.tensors

    @property
    def parameters(self) -> int:
        if self.quantized is not None:
            return self.quantized.parameters
        return sum(t.numel for t in self.tensors() if not t.is_buffer)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters as they rest (buffers are not stored in checkpoints and are left out)."""
        return sum(t.nbytes for t in self.tensors() if not t.is_buffer)

    @property
    def encoder_blocks(self) -> int:
        """The number of first blocks that are an encoder's."""
        return self.encoder.blocks if self.encoder is not None else 0

    @property
    def block_bytes(self) -> int:
        """Bytes of all blocks: what crosses the link in a pass over all of them when nothing is resident."""
        return sum(block.nbytes for block in self.blocks)

    @property
    def outside_bytes(self) -> int:
        return sum(t.nbytes for t in self.outside)

    @property
    def largest_parameter(self) -> int:
        """Elements of the largest single parameter."""
        return max(t.numel for t in self.tensors() if not t.is_buffer)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes one token of one row adds to the cache while no window is full."""
        return sum(layer.bytes_per_token for layer in self.cache)

    @property
    def is_paged(self) -> bool:
        """Whether a pool holds the whole cache, so that rows can be regrouped at every pass."""
        return self.encoder is None and (self.mixers is not None or all(layer.pooled for layer in self.cache))

    @property
    def whole_because(self) -> str:
        """Why prompts are computed in one part, however long they are; empty where they can be cut."""
        if self.mixers is None or self.mixers.continues:
            return ""
        return f"{self.mixers.kind} goes on from a state with one token at a time"

    @property
    def state_bytes(self) -> int:
        """Bytes of all states of one row in a pool."""
        if self.mixers is None:
            return 0
        return sum(count * layer.state_bytes for layer, count in _alike(self).items())

    def row_tokens(self, prompt_tokens: int, new_tokens: int) -> int:
        """Tokens of a row in the cache at the most; of a prompt that an encoder reads, none are there."""
        return (prompt_tokens if self.encoder is None else 1) + new_tokens

    def positions(self, prompt_tokens: int, new_tokens: int) -> int:
        """Positions that a row takes up, which `context_limit` limits: encoder and decoder have so many each."""
        return prompt_tokens + new_tokens if self.encoder is None else max(prompt_tokens, new_tokens)

    def row_pages(self, tokens: int) -> int:
        """Pages that a row of so many tokens takes, in the layer that needs most of them; others have room for it."""
        return max((layer.row_pages(tokens) for layer in _alike(self)), default=0)

    def pool_bytes(self, size: PoolSize) -> int:
        """Bytes of the one allocation that holds keys and values, and the states of rows behind them."""
        of_layers = sum(count * layer.pooled_bytes(size) for layer, count in _alike(self).items())
        return of_layers + size.rows * self.state_bytes

    @property
    def can_rest_on_host(self) -> bool:
        """Whether host memory can hold keys and values: some layer keeps them, and none reads those of another."""
        return any(layer.pooled for layer in self.cache) and len(self.cache) == len(self.blocks)

    def records(self, dtype: KvDtype) -> dict[int, Record]:
        """The layout of a token in host memory for each layer that can lie there, by the layer's number."""
        return dict(_records(self, dtype))

    def host_token_bytes(self, dtype: KvDtype) -> int:
        """Bytes of a token of one row in host memory, in all layers together."""
        return sum(_record_bytes(self, dtype))

    def step_row_bytes(self, size: HostSize) -> int:
        """Bytes that cross the link, there and back, for a step of one row in one layer where the CPU attends: its new
        record, queries, sinks and results, which are read in whole numbers."""
        return _step_row_bytes(self, size.dtype, size.query_heads)

    def staging_bytes(self, size: HostSize) -> tuple[int, int]:
        """Bytes of the two allocations on the GPU: for keys and values that arrive, and for those that leave."""
        widest = max(_record_bytes(self, size.dtype), default=0)
        return FETCHED_UNITS * size.seen_columns * widest, SENT_UNITS * size.new_columns * widest

    def with_heads_shared(self, parts: int, part: int) -> Anatomy:
        """This anatomy with a share of the heads in each layer's cache: number `part` of `parts`, of which the first
        get what is over.

        Raises ValueError where a share is empty, or a layer keeps anything else than keys and values.
        """
        if parts == 1:
            return self
        return replace(self, cache=tuple(layer.with_heads_shared(parts, part) for layer in self.cache))


@lru_cache(maxsize=64)
def _alike(anatomy: Anatomy) -> Mapping[LayerCache, int]:
    """The kinds of caches that layers have, and how many have each."""
    return Counter(anatomy.cache)


@lru_cache(maxsize=64)
def _records(anatomy: Anatomy, dtype: KvDtype) -> Mapping[int, Record]:
    """What `Anatomy.records` says, which a search asks for thousands of times."""
    found = {index: layer.record(dtype) for index, layer in enumerate(anatomy.cache)}
    return {index: record for index, record in found.items() if record is not None}


@lru_cache(maxsize=64)
def _record_bytes(anatomy: Anatomy, dtype: KvDtype) -> tuple[int, ...]:
    return tuple(record.nbytes for record in _records(anatomy, dtype).values())


@lru_cache(maxsize=64)
def _step_row_bytes(anatomy: Anatomy, dtype: KvDtype, query_heads: int) -> int:
    rows = [
        record.nbytes
        + query_heads * (record.keys.width + record.values.width) * DTYPE_BYTES[record.keys.dtype]
        + query_heads * DTYPE_BYTES["float32"]
        + STEP_ALIGNMENT
        for record in _records(anatomy, dtype).values()
    ]
    return -(-max(rows, default=0) // RECORD_ALIGNMENT) * RECORD_ALIGNMENT
