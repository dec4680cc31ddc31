"""Forms the micro-batches of the next pass from the live rows, within the limits. It changes none of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby, pairwise
from operator import attrgetter

from zeroinf.generation.groups import Group, NextTokens
from zeroinf.generation.pass_limits import Limits
from zeroinf.generation.prefixes import PrefixPage
from zeroinf.generation.seats import Seat

# A prompt joins a micro-batch that is wider by so many tokens, or by a quarter: to compute the padding costs less than
# a forward of its own.
_CHEAP_PADDING_TOKENS = 64


def micro_batches(seats: Sequence[Seat], limits: Limits, *, prompts: bool = True) -> list[Group]:
    """The micro-batches of the next pass over `seats`, with `prompts` or without; none when there is nothing for it."""
    if limits.together:
        return [Group.of(seats)] if seats else []
    if limits.forward_tokens:
        return [group for parts in _parts(seats, limits) for group in _packed(parts, limits)]
    return [*(_prompts(seats, limits) if prompts else ()), *_decodes(seats, limits)]


def _parts(seats: Sequence[Seat], limits: Limits) -> Iterator[list[NextTokens]]:
    """A step of every row that is through its prompt, and as much of the prompts as the pass may compute, in the
    order in which they were admitted, all together or, beyond a break and before it, or with keys on the GPU and in
    host memory, each by themselves. What rows share is computed by the first of them."""
    parts = [NextTokens(seat, seat.computed, 1) for seat in seats if seat.known - seat.computed == 1]
    steps, left, is_whole = len(parts), limits.prefill_tokens, limits.runs_whole
    planned = set[PrefixPage]()
    for seat in (seat for seat in seats if seat.due > 1):
        start = seat.begins_at(planned)
        most = min(left, limits.forward_tokens) if seat.on_host else left
        count = seat.due if is_whole else min(seat.known - start, most)
        if not count or (count > left and len(parts) > steps):
            break
        left -= count
        parts.append(NextTokens(seat, start, count))
        planned.update(parts[-1].pages)
    if not (is_whole or limits.host_tokens):
        yield from [parts] if parts else []
        return
    by_cpu = [bool(limits.cpu_rows) and part.seat.on_host and part.tokens == 1 for part in parts]
    sides = [(not own, *_side(part.seat, limits)) for own, part in zip(by_cpu, parts, strict=True)]
    for side in sorted(set(sides)):  # the CPU begins first
        yield [part for part, own in zip(parts, sides, strict=True) if own == side]


def _packed(parts: Sequence[NextTokens], limits: Limits) -> Iterator[Group]:
    """`parts` in forwards of about as many tokens each, whose prompts may go on in the next one: each layer
    computes it later. Not those in host memory, from which the next one fetches before it has them all, and of
    which one forward has as many as there is staging for. Rows that share what another one computes have a later
    forward."""
    tokens = sum(part.tokens for part in parts)
    may_split = not limits.runs_whole and not parts[0].seat.on_host
    forwards = max(-(-tokens // limits.forward_tokens), -(-len(parts) // limits.micro_batch_rows))
    if limits.cpu_rows and parts[0].seat.on_host and parts[0].tokens == 1:
        forwards = max(forwards, min(limits.cpu_forwards, len(parts)))
    size, rest = -(-tokens // forwards), deque(parts)
    most_staged = limits.staged_tokens if parts[0].seat.on_host and parts[0].tokens > 1 else 0
    while rest:
        left, staged, taken, made = size, 0, list[NextTokens](), set[PrefixPage]()
        while rest and left > 0 and len(taken) < limits.micro_batch_rows:
            part = rest.popleft()
            if (made and part.needs(made)) or (taken and 0 < most_staged < staged + part.start):
                rest.appendleft(part)
                break
            if part.tokens > left and may_split:
                part, after = part.cut(left)
                rest.appendleft(after)
            elif part.tokens > left and taken:
                rest.appendleft(part)
                break
            taken.append(part)
            made.update(part.pages)
            left, staged = left - part.tokens, staged + part.start
        yield Group.packed(*zip(*taken, strict=True))


def _decodes(seats: Sequence[Seat], limits: Limits) -> Iterator[Group]:
    """Rows of which one token is due, the like-long ones together."""
    due = sorted((seat for seat in seats if seat.known - seat.computed == 1), key=attrgetter("known"))
    has_sides = limits.host_tokens or limits.breaks_at is not None
    side_of = partial(_side, limits=limits)
    sides = groupby(sorted(due, key=side_of), side_of) if has_sides else [(None, due)]
    for _, side in sides if due else ():
        alike = list(side)
        parts = -(-len(alike) // limits.micro_batch_rows)
        edges = [len(alike) * part // parts for part in range(parts + 1)]
        yield from (Group.of(alike[start:end]) for start, end in pairwise(edges))


def _prompts(seats: Sequence[Seat], limits: Limits) -> Iterator[Group]:
    """Rows of which more is due, as many as the pass may compute, in the order in which they were admitted."""
    left, opened = limits.prefill_tokens, list[Seat]()
    most = None if limits.runs_whole else limits.prefill_tokens
    is_first = True
    for seat in (seat for seat in seats if seat.due > 1):
        joins = _joins(seat, opened, most, limits)
        if not joins and opened:
            yield Group.of(opened, most)
            opened = []
        before, after = _columns(opened, most), _columns([*opened, seat], most)
        if after - before > left and not is_first:
            break
        left -= after - before
        opened.append(seat)
        is_first = False
    if opened:
        yield Group.of(opened, most)


def _joins(seat: Seat, opened: Sequence[Seat], most: int | None, limits: Limits) -> bool:
    if not opened or len(opened) == limits.micro_batch_rows:
        return False
    first = opened[0]
    if _side(first, limits) != _side(seat, limits) or (first.computed == 0) != (seat.computed == 0):
        return False
    widths = sorted((_due(first, most), _due(seat, most)))
    return widths[1] - widths[0] <= max(_CHEAP_PADDING_TOKENS, widths[1] // 4)


def _side(seat: Seat, limits: Limits) -> tuple[bool, bool]:
    """Rows of one micro-batch agree in it: where they rest, and whether they are beyond a break."""
    return seat.on_host, limits.breaks_at is not None and seat.known > limits.breaks_at


def _due(seat: Seat, most: int | None) -> int:
    return seat.due if most is None else min(seat.due, most)


def _columns(seats: Sequence[Seat], most: int | None) -> int:
    return len(seats) * max((_due(seat, most) for seat in seats), default=0)
