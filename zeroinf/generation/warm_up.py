"""Compiles the kernels of packed attention before the first forward needs them.

Triton compiles a kernel for each kind of use, for seconds: parts of prompts, decode steps, and decode steps over so
many keys that several programs share them, each over pages and over what was fetched from host memory. A forward on the
meta device shows the queries, keys and values of the model's layers. Each kind is then launched for rows that have no
tokens, so that nothing is read but a few small tensors that are made for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch

from zeroinf.generation.attention import (
    AttentionKernel,
    PackedLayer,
    PackedView,
    Scores,
    StagedView,
    Tokens,
    View,
    kernel_for,
)
from zeroinf.generation.cache import PagePool
from zeroinf.generation.groups import Group
from zeroinf.generation.micro_batch import BatchState, TokenRules, running
from zeroinf.generation.records import parts, read
from zeroinf.generation.row import Row, Sampling
from zeroinf.generation.seats import Seat
from zeroinf.generation.states import Mixing
from zeroinf.model.anatomy import Anatomy
from zeroinf.model.cache_layout import PAGE_TOKENS, KvDtype, PoolSize, Record, TokenState
from zeroinf.model.kv import ReadsAsZero, dense_experts
from zeroinf.model.mixers import hidden_of
from zeroinf.model.quantized.expansion import expansions, opened

_TOKENS = 2
# Keys behind which a decode step is shared among programs.
_LONG = 1024


@dataclass(frozen=True, slots=True)
class _Like:
    """A tensor's kind and the places of its numbers."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Like:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def made(self, device: torch.device) -> torch.Tensor:
        """A tensor of this kind full of zeros."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device).zero_()


@dataclass(frozen=True, slots=True)
class _Use:
    """A kind of layer, by what it hands to attention."""

    states: tuple[_Like, ...]
    """Queries, keys and values of `_TOKENS` tokens."""
    scale: float
    softcap: float | None
    sinks: _Like | None
    window: int | None


def attention_compilations(
    model: Any,
    anatomy: Anatomy,
    device: torch.device,
    *,
    row_tokens: int,
    pages: bool,
    kv_dtype: KvDtype | None,
    kernel: AttentionKernel | None = None,
) -> list[Callable[[], None]]:
    """Calls that each compile the kernels of one kind of layers in `model`, which lies on the meta device.

    Rows have up to `row_tokens` tokens, their keys and values in `pages`, in host memory as `kv_dtype`, or some in each
    place. `kernel`: None for that of `device`.
    """
    chosen = kernel_for(device) if kernel is None else kernel
    return [
        partial(_compile, use, device, row_tokens=row_tokens, pages=pages, kv_dtype=kv_dtype, kernel=chosen)
        for use in _uses(model, anatomy)
    ]


def _uses(model: Any, anatomy: Anatomy) -> list[_Use]:
    """The kinds of layers in `model`, each once."""
    meta = torch.device("meta")
    found: dict[_Use, None] = {}

    def note(
        layer: PackedLayer, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        states = tuple(_Like.of(each) for each in (query, keys, values))
        sinks = None if scores.sinks is None else _Like.of(scores.sinks)
        found[_Use(states, scores.scale, scores.softcap, sinks, layer.view.window)] = None
        return query.new_empty(query.shape[1], query.shape[0], values.shape[2])

    with ExitStack() as stack:
        for context in (torch.no_grad(), meta, ReadsAsZero(), dense_experts(model)):
            stack.enter_context(context)
        pool = PagePool(model, anatomy, PoolSize(rows=1, tokens=PAGE_TOKENS, pages=2), meta)
        state = BatchState(model, TokenRules(model, None, ()), pool, meta)
        state.kernel, state.mixing = note, _Unmixed
        seat = Seat(Row(index=0, prompt=[0] * _TOKENS, sampling=Sampling(max_new_tokens=1), decode=str), 0, _TOKENS)
        stack.enter_context(opened(expansions(model)))
        inputs = state.batch(Group.packed([seat], [0], [_TOKENS])).inputs()
        stack.enter_context(running(model, state.mixers, packed=True))
        model(**inputs)
    return list(found)


class _Unmixed(Mixing):
    """Hands on something in place of a recurrent module's result, which no attention depends on."""

    def __call__(self, index: int, forward: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        return torch.empty_like(hidden_of(args, kwargs))


def _compile(
    use: _Use,
    device: torch.device,
    *,
    row_tokens: int,
    pages: bool,
    kv_dtype: KvDtype | None,
    kernel: AttentionKernel,
) -> None:
    query, keys, values = (like.made(device) for like in use.states)
    scores = Scores(use.scale, use.softcap, None if use.sinks is None else use.sinks.made(device))
    long = min(_LONG, row_tokens - 1)
    for starts, counts in (((0,), (_TOKENS,)), ((0,) * _TOKENS, (1,) * _TOKENS), ((long,) * _TOKENS, (1,) * _TOKENS)):
        tokens = _without_tokens(starts, counts, device)
        if pages:
            memory = tuple(each.new_zeros(PAGE_TOKENS, each.shape[0], each.shape[2]) for each in (keys, values))
            table = torch.zeros(1, 1, dtype=torch.int64, device=device)
            _attend(memory, PackedView(tokens, table, use.window), kernel, (query, keys, values), scores)
        if kv_dtype is not None:
            record = Record(keys=_token_state(keys), values=_token_state(values), dtype=kv_dtype)
            held = torch.zeros(_TOKENS, record.nbytes, dtype=torch.uint8, device=device)
            new = (keys, values) if kv_dtype == "model" else [each[0] for each in read(record, held[None])]
            _attend(parts(record, held), StagedView(tokens, use.window), kernel, (query, *new), scores)


def _attend(
    memory: tuple[torch.Tensor, ...],
    view: View,
    kernel: AttentionKernel,
    states: Sequence[torch.Tensor],
    scores: Scores,
) -> None:
    query, keys, values = states
    PackedLayer(memory, view, kernel).attend(query, keys, values, scores)


def _without_tokens(starts: tuple[int, ...], counts: tuple[int, ...], device: torch.device) -> Tokens:
    """Tokens for which the host launches what `starts` and `counts` ask for, and of which the device finds none."""
    firsts = tuple(accumulate(counts[:-1], initial=0))
    none = torch.zeros(sum(counts), dtype=torch.int64, device=device)
    rows = torch.zeros(4, len(counts), dtype=torch.int64, device=device)
    return Tokens(starts, counts, firsts, rows, none, none, none)


def _token_state(states: torch.Tensor) -> TokenState:
    heads, _, width = states.shape
    return TokenState(heads=heads, width=width, dtype=str(states.dtype).removeprefix("torch."))
