"""States of recurrent layers, kept by row: each live row has a slot, in which its states lie side by side.

In a forward, the module that keeps a layer's states is run by itself: for a token of each of several rows at once, and
for each prompt, or part of one, from the states that its row has come to. Whether rows lie side by side as one sequence
or are padded, such a module sees neither padding nor another row's tokens. What it computes at a time is limited, so
what a forward takes of memory does not grow with its prompts there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from zeroinf.compat.states import StatesOfOneLayer
from zeroinf.generation.upload import to_device
from zeroinf.model.anatomy import Anatomy
from zeroinf.model.cache_layout import PoolSize, RowState
from zeroinf.model.mixers import hidden_of, with_part

# A recurrent module computes so many tokens at a time. In torch alone, a token takes up to half a megabyte there.
_TOKENS_AT_ONCE = 1024
# States of so many bytes, or of one row, are read and written at a time.
_STATE_BYTES_AT_ONCE = 64 << 20


@dataclass(frozen=True, slots=True)
class CallLimits:
    """The limits of one call of a recurrent module."""

    tokens: int
    """Of prompts; a prompt that cannot be cut may have more."""
    rows: int
    """Of which each has one token."""
    chunk_tokens: int
    """A row of a prompt counts as whole chunks of so many."""
    continues: bool
    """Whether prompts can be cut."""

    @classmethod
    def of(cls, anatomy: Anatomy, rows: int) -> CallLimits:
        """Those of a model with states, of which so many rows are live."""
        assert anatomy.mixers is not None
        largest = max(layer.state_bytes for layer in anatomy.cache)
        return cls(
            tokens=_TOKENS_AT_ONCE,
            rows=max(1, min(rows, _STATE_BYTES_AT_ONCE // largest)),
            chunk_tokens=anatomy.mixers.chunk_tokens,
            continues=anatomy.mixers.continues,
        )

    def rows_of(self, tokens: int) -> int:
        """The number of rows with so many tokens each that one call may have."""
        filled = -(-tokens // self.chunk_tokens) * self.chunk_tokens
        return self.rows if tokens == 1 else min(self.rows, max(1, self.tokens // filled))


@dataclass(frozen=True, slots=True)
class RowsPart:
    """The next `count` tokens of some rows, which lie at `starts` among those of a forward."""

    rows: tuple[int, ...]
    """By their places in the forward."""
    starts: tuple[int, ...]
    count: int

    @property
    def is_block(self) -> bool:
        """Whether tokens of all rows lie side by side."""
        return all(start == self.starts[0] + at * self.count for at, start in enumerate(self.starts))

    def take(self, tokens: torch.Tensor) -> torch.Tensor:
        """Its part of `tokens` (tokens, width): (rows, count, width)."""
        first, count = self.starts[0], self.count
        if self.is_block:
            return tokens[first : first + len(self.starts) * count].view(-1, count, tokens.shape[1])
        return torch.stack([tokens[start : start + count] for start in self.starts])

    def put(self, tokens: torch.Tensor, found: torch.Tensor) -> None:
        """Write what was `found` (rows, count, width) in its place."""
        if self.is_block:
            self.take(tokens).copy_(found)
            return
        for start, own in zip(self.starts, found, strict=True):
            tokens[start : start + self.count].copy_(own)


def pieces_of(firsts: Sequence[int], counts: Sequence[int], limits: CallLimits) -> list[RowsPart]:
    """The calls in which the next `counts` tokens of rows, which lie from `firsts` on, are computed: a token of each of
    many rows at once, prompts of one length together, others each by itself or, where that takes fewer calls, in parts
    of powers of two."""
    steps = [row for row, count in enumerate(counts) if count == 1]
    prompts = sorted((row for row, count in enumerate(counts) if count > 1), key=lambda row: -counts[row])
    found = list(_together(steps, dict(enumerate(firsts)), 1, limits))
    ways = [list(_alone(prompts, firsts, counts, limits))]
    if limits.continues:
        ways.append(list(_in_powers(prompts, firsts, counts, limits)))
    return found + min(ways, key=len)


def _together(rows: Sequence[int], starts: dict[int, int], count: int, limits: CallLimits) -> Iterator[RowsPart]:
    most = limits.rows_of(count)
    for at in range(0, len(rows), most):
        part = tuple(rows[at : at + most])
        yield RowsPart(part, tuple(starts[row] for row in part), count)


def _alone(rows: Sequence[int], firsts: Sequence[int], counts: Sequence[int], limits: CallLimits) -> Iterator[RowsPart]:
    for count, alike in groupby(rows, key=lambda row: counts[row]):
        members = list(alike)
        most = limits.tokens if limits.continues else count
        for done in range(0, count, most):
            yield from _together(members, {row: firsts[row] + done for row in members}, min(most, count - done), limits)


def _in_powers(
    rows: Sequence[int], firsts: Sequence[int], counts: Sequence[int], limits: CallLimits
) -> Iterator[RowsPart]:
    left, power = {row: counts[row] for row in rows}, 1 << (limits.tokens.bit_length() - 1)
    while power:
        while members := [row for row in rows if left[row] >= power]:
            yield from _together(
                members, {row: firsts[row] + counts[row] - left[row] for row in members}, power, limits
            )
            for row in members:
                left[row] -= power
        power >>= 1


MakeMixing = Callable[..., "Mixing"]


class StateMemory:
    """The slots of all live rows: `memory` (rows, bytes), uint8, in which the states of each layer have their place."""

    def __init__(self, anatomy: Anatomy, size: PoolSize, memory: torch.Tensor) -> None:
        self.limits = CallLimits.of(anatomy, size.rows)
        self._memory = memory
        self._layers: dict[int, list[tuple[RowState, torch.Tensor]]] = {}
        start = 0
        for index, layer in enumerate(anatomy.cache):
            for state in layer.states:
                part = memory[:, start : start + state.nbytes].view(getattr(torch, state.dtype))
                self._layers.setdefault(index, []).append((state, torch.unflatten(part, 1, state.shape)))
                start += state.stored_bytes

    @property
    def device(self) -> torch.device:
        return self._memory.device

    def clear(self, seats: Sequence[int]) -> None:
        """The rows of `seats` begin: their states are zeros."""
        if seats:
            self._memory.index_fill_(0, to_device(seats, self._memory.device), 0)

    def call(self, index: int, seats: torch.Tensor, run: Callable[[StatesOfOneLayer], Any]) -> Any:
        """What `run` returns, which goes on with the states that the rows of `seats` have in a layer."""
        own = self._layers[index]
        states = [(state.kind, state.number, memory.index_select(0, seats)) for state, memory in own]
        cache = StatesOfOneLayer(index, states)
        del states
        found = run(cache)
        for (_, memory), left in zip(own, cache.left(), strict=True):
            memory.index_copy_(0, seats, left.to(memory.dtype))
        return found


class Mixing:
    """Runs the recurrent modules of one forward, whose rows have slots `seats`, and in it the next `counts` tokens
    each, from `firsts` on, of so many in all."""

    def __init__(
        self, memory: StateMemory, seats: Sequence[int], firsts: Sequence[int], counts: Sequence[int], total: int
    ) -> None:
        self.memory = memory
        self.pieces, self.is_full = pieces_of(firsts, counts, memory.limits), sum(counts) == total
        numbers = [seats[row] for piece in self.pieces for row in piece.rows]
        self.seats = to_device(numbers + [0] * (total - len(numbers)), memory.device)
        """(tokens,), int64: the seats of all pieces one after the other. What a forward takes of memory shall follow
        from its tokens alone."""

    def __call__(self, index: int, forward: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What `forward` of the recurrent module of a layer returns."""
        hidden = hidden_of(args, kwargs)
        tokens, at = hidden.flatten(0, 1), 0
        out: torch.Tensor | None = None
        for piece in self.pieces:
            seats, at = self.seats[at : at + len(piece.rows)], at + len(piece.rows)
            found = self.run(index, forward, args, kwargs, piece.take(tokens), seats)
            if len(self.pieces) == 1 and self.is_full:
                return found.view(*hidden.shape[:2], -1)
            if out is None:
                shape = tokens.shape[0], found.shape[-1]
                out = found.new_empty(shape) if self.is_full else found.new_zeros(shape)
            piece.put(out, found)
            del found
        assert out is not None
        return out.view(*hidden.shape[:2], -1)

    def run(
        self,
        index: int,
        forward: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
        hidden: torch.Tensor,
        seats: torch.Tensor,
    ) -> torch.Tensor:
        """One call of a module, for `hidden` (rows, tokens, width) of the rows of `seats`."""

        def run(cache: StatesOfOneLayer) -> torch.Tensor:
            own_args, own_kwargs = with_part(args, kwargs, hidden, cache)
            found: torch.Tensor = forward(*own_args, **own_kwargs)
            return found

        found: torch.Tensor = self.memory.call(index, seats, run)
        return found
