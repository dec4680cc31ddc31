"""Decides which rows run in the next pass and in which micro-batches. It knows tokens and pages, and no tensors."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, islice, pairwise
from operator import attrgetter
from typing import NamedTuple

from zeroinf.generation.prefixes import PrefixCache, PrefixPage
from zeroinf.generation.range_allocator import RangeAllocator
from zeroinf.generation.row import Row
from zeroinf.model.anatomy import PAGE_TOKENS
from zeroinf.planner.plan import Plan
from zeroinf.planner.timing import Resource

# A prompt joins a micro-batch that is wider by so many tokens, or by a quarter: to compute the padding costs less than
# a forward of its own.
_CHEAP_PADDING_TOKENS = 64

_ON_THE_GPU: tuple[Resource, ...] = ("arithmetic", "GPU memory", "kernel launches")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The limits of a pass."""

    rows: int
    """Rows that are live at once."""
    pages: int
    """Pages of the pool, for all of them."""
    micro_batch_rows: int
    prefill_tokens: int
    """Prompt tokens that a pass computes, padding included; longer prompts take several passes."""
    breaks_at: int | None = None
    """Beyond so many tokens a model computes all keys anew, such as with other rotary factors: prompts run whole."""
    static: bool = False
    """Rows are admitted only when no other is live."""
    together: bool = False
    """All live rows are one micro-batch, prompts included, and none is admitted before all have ended."""
    keeps_ended: bool = False
    """A row that has ended keeps its place in its micro-batch: the model has states that cannot be regrouped."""
    host_tokens: int = 0
    """Tokens that host memory has room for: rows for which there are no pages rest there."""
    evenly: bool = False
    """Rows that run together begin with equally many tokens: a decoder behind an encoder may not take padding."""
    forward_tokens: int = 0
    """Tokens of one packed forward, in which rows lie side by side; 0: rows of a forward are padded to one length."""
    entering_rows: int = 1
    """Rows wait until there is room for so many, where a forward for the prompt of each would take longer."""
    whole: bool = False
    """A prompt is computed in one part, however long it is."""
    keeps_states: bool = False
    """A pass changes states of its rows, so it cannot be made again: they are computed anew."""
    scores_alone: bool = False
    """Sequences that are scored have passes of their own: all forwards of a pass attend in one way."""
    score_tokens: int = 0
    """Tokens of a forward of sequences that are scored, at the most; 0: as many as a pass computes of prompts."""
    prefix_pages: int = 0
    """Pages that may hold what prompts begin with in common; 0: rows share none."""
    staged_tokens: int = 0
    """Tokens that one packed forward fetches from host memory, at the most; 0: as many as its rows have."""
    cpu_rows: int = 0
    """Rows in host memory for whose steps the CPU attends, at the most: steps and prompts have forwards of their own.
    0: the GPU attends."""
    cpu_forwards: int = 1
    """Forwards of such steps in a pass, at least, where there are as many rows."""
    runs_ahead: bool = False
    """A pass begins before the tokens of the last one are known, where these hardly end all rows: passes are bound by
    the GPU, which would wait for the host. Passes that are bound by a link lose nothing by waiting."""

    def __post_init__(self) -> None:
        if self.together and self.pages and self.host_tokens:
            raise ValueError("rows of one micro-batch lie all on the GPU or all in host memory")
        if self.prefix_pages and (not self.forward_tokens or self.host_tokens or self.breaks_at is not None):
            raise ValueError("prefixes are shared in packed forwards alone, on the GPU, where no key is computed anew")

    @property
    def runs_whole(self) -> bool:
        """Whether no prompt is cut in parts."""
        return self.whole or self.breaks_at is not None

    @classmethod
    def of(cls, plan: Plan, *, shares_passes: bool, breaks_at: int | None) -> Limits:
        """The limits of `plan`, for an engine whose passes serve several micro-batches or one."""
        regroups, packs = plan.anatomy.is_paged, plan.forward_tokens > 0
        return cls(
            rows=plan.batch_size,
            pages=plan.pool_pages,
            micro_batch_rows=plan.micro_batch_rows,
            prefill_tokens=plan.prefill_tokens,
            breaks_at=breaks_at,
            static=plan.static_batches,
            together=not (regroups and (shares_passes or packs)),
            keeps_ended=not regroups,
            host_tokens=plan.host.tokens if plan.host is not None else 0,
            evenly=plan.anatomy.encoder is not None,
            forward_tokens=plan.forward_tokens,
            entering_rows=plan.timing.entering_rows if plan.timing is not None else 1,
            whole=bool(plan.anatomy.whole_because),
            keeps_states=plan.anatomy.mixers is not None,
            scores_alone=not shares_passes or packs or plan.packs_scores,
            prefix_pages=plan.prefix_pages,
            staged_tokens=plan.host.seen_columns if plan.host is not None and plan.host.cpu_rows else 0,
            cpu_rows=plan.host.cpu_rows if plan.host is not None else 0,
            cpu_forwards=plan.host.cpu_forwards if plan.host is not None else 1,
            runs_ahead=plan.device == "cuda" and plan.timing is not None and plan.timing.binds in _ON_THE_GPU,
        )


@dataclass(slots=True, eq=False)
class Seat:
    """A live row: its `number` among the live ones, and how far it is."""

    row: Row
    number: int
    known: int
    """Tokens of the prompt and those generated, the one that the host has not read yet included."""
    computed: int = 0
    """Tokens whose keys and values are in the cache."""
    has_left: bool = False
    host_start: int | None = None
    """Where its keys and values begin in host memory, in tokens; None where they lie on the GPU."""
    ends: Container[int] = frozenset()
    """Tokens after which the row may have ended; after any other it goes on, unless it has all its tokens."""
    may_end_early: bool = False
    """Whether one of them may be chosen by the model."""
    prefix: tuple[PrefixPage, ...] = ()
    """The pages that its prompt begins with, which other rows may share."""
    total: int = field(init=False)
    """Tokens at the most."""
    is_plain: bool = field(init=False)
    """Each token is that of the highest score, and nothing but the token is told of it."""

    def __post_init__(self) -> None:
        self.total = _most_tokens(self.row)
        how = self.row.sampling
        self.is_plain = how.is_greedy and not how.alters_scores and how.logprobs is None

    @property
    def on_host(self) -> bool:
        return self.host_start is not None

    @property
    def due(self) -> int:
        """Tokens to be computed before the next one can be chosen."""
        return self.known - self.computed

    @property
    def prefix_tokens(self) -> int:
        """Tokens that lie in shared pages."""
        return PAGE_TOKENS * len(self.prefix)

    def begins_at(self, planned: Container[PrefixPage] = ()) -> int:
        """The position of its next tokens: behind those of shared pages that are computed, or `planned` to be
        before."""
        at = self.computed
        while at < self.prefix_tokens:
            page = self.prefix[at // PAGE_TOKENS]
            if not page.is_computed and page not in planned:
                break
            at = (at // PAGE_TOKENS + 1) * PAGE_TOKENS
        return at

    def pages_between(self, start: int, end: int) -> tuple[PrefixPage, ...]:
        """Shared pages that are complete with the tokens from `start` up to `end`."""
        return self.prefix[start // PAGE_TOKENS : end // PAGE_TOKENS]


class NextTokens(NamedTuple):
    """The next so many `tokens` of a row, behind the `start` that are in the cache before."""

    seat: Seat
    start: int
    tokens: int

    @property
    def pages(self) -> tuple[PrefixPage, ...]:
        """Shared pages that are complete with it."""
        return self.seat.pages_between(self.start, self.start + self.tokens)

    def needs(self, made: Container[PrefixPage]) -> bool:
        """Whether another part has `made` pages that it follows."""
        return any(page in made for page in self.seat.pages_between(0, self.start))

    def cut(self, count: int) -> tuple[NextTokens, NextTokens]:
        """Its first so many tokens, and the others."""
        return self._replace(tokens=count), NextTokens(self.seat, self.start + count, self.tokens - count)


@dataclass(frozen=True, slots=True)
class Group:
    """A micro-batch: of each seat the next so many tokens."""

    seats: tuple[Seat, ...]
    starts: tuple[int, ...]
    """Tokens of each row that are in the cache already."""
    counts: tuple[int, ...]
    chooses: tuple[bool, ...]
    """Rows of which the next token is chosen afterwards; of the others, there is more of the prompt."""
    is_packed: bool = False
    """Its tokens lie side by side; else rows are padded to one length."""

    @classmethod
    def packed(cls, seats: Sequence[Seat], starts: Sequence[int], counts: Sequence[int]) -> Group:
        """A group of each seat's next `counts` tokens behind those in the cache, side by side."""
        chooses = [seat.known == start + count for seat, start, count in zip(seats, starts, counts, strict=True)]
        return cls(tuple(seats), tuple(starts), tuple(counts), tuple(chooses), is_packed=True)

    @classmethod
    def of(cls, seats: Sequence[Seat], most: int | None = None) -> Group:
        """All that is due of each row, or `most` tokens of it."""
        due = [seat.known - seat.computed for seat in seats]
        counts = due if most is None else [min(each, most) for each in due]
        chooses = [count == each for count, each in zip(counts, due, strict=True)]
        return cls(tuple(seats), tuple([seat.computed for seat in seats]), tuple(counts), tuple(chooses))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row in the cache afterwards."""
        return tuple([start + count for start, count in zip(self.starts, self.counts, strict=True)])

    @property
    def on_host(self) -> bool:
        """Whether keys and values of all its rows rest in host memory."""
        return self.seats[0].on_host

    @property
    def width(self) -> int:
        """Tokens of the longest part, to which rows are padded where they do not lie side by side."""
        return max(self.counts)

    @property
    def columns(self) -> int:
        """Tokens that its forward computes, padding included."""
        return sum(self.counts) if self.is_packed else len(self.seats) * self.width

    @property
    def length(self) -> int:
        """Columns that are attended to: rows are padded to the longest."""
        return max(self.lengths)


@dataclass(slots=True)
class Counts:
    """Counters of the passes so far: columns that were computed, and how many of them were padding."""

    passes: int = 0
    prefill_columns: int = 0
    prefill_padding: int = 0
    shared_tokens: int = 0
    """Prompt tokens that were not computed: another row had done so."""
    decode_columns: int = 0
    """Columns that decode steps attended to."""
    decode_padding: int = 0
    reserved_pages: int = 0
    """Pages of live rows, summed over passes."""
    most_reserved_pages: int = 0
    full_steps: int = 0
    """Passes that had a token for every row that may be live, and no prompt, right after another such pass."""
    full_steps_s: float = 0.0
    """From the end of the pass before to the end of each of them."""

    def add(self, groups: Sequence[Group], pages: int) -> None:
        self.passes += 1
        self.reserved_pages += pages
        self.most_reserved_pages = max(self.most_reserved_pages, pages)
        for group in groups:
            rows = len(group.seats)
            if group.is_packed:
                steps = [start for start, count in zip(group.starts, group.counts, strict=True) if count == 1]
                self.prefill_columns += sum(group.counts) - len(steps)
                self.decode_columns += sum(steps) + len(steps)
                continue
            if not any(group.starts) and any(sources := [len(seat.row.source) for seat in group.seats]):
                self.prefill_columns += rows * max(sources)
                self.prefill_padding += rows * max(sources) - sum(sources)
            if group.width > 1:
                self.prefill_columns += rows * group.width
                self.prefill_padding += rows * group.width - sum(group.counts)
            else:
                self.decode_columns += rows * group.length
                self.decode_padding += rows * group.length - sum(group.lengths)


class Scheduler:
    """Admits rows and forms passes. `row_pages` tells the pages that a row of so many tokens reserves.

    A row gets its pages for all the tokens it can come to when it is admitted, or such a place in host memory, so none
    is ever sent away; it gives them back when it ends. Rows of one `add` are admitted before those of the next one, so
    none waits for ever.
    """

    def __init__(self, limits: Limits, row_pages: Callable[[int], int]) -> None:
        self.limits, self._row_pages = limits, row_pages
        self.counts = Counts()
        self.seats: list[Seat] = []
        self._waiting: deque[Row] = deque()
        self._free = list(range(limits.rows - 1, -1, -1))
        self._own_pages = 0
        self._prefixes = PrefixCache(limits.prefix_pages, limits.rows)
        self._host = RangeAllocator(limits.host_tokens)

    @property
    def wants_rows(self) -> bool:
        """Whether more rows could be admitted than wait."""
        return not self._waiting and bool(self._free) and (not self.seats or not self._is_static)

    @property
    def _is_static(self) -> bool:
        return self.limits.static or self.limits.together

    @property
    def free_rows(self) -> int:
        """The number of further rows that could be live."""
        return len(self._free)

    @property
    def reserved_pages(self) -> int:
        """Pages that live rows hold."""
        return self._own_pages + self._prefixes.pages - self._prefixes.idle_pages

    @property
    def kept_pages(self) -> int:
        """Pages that no live row holds, of prefixes that are kept until their room is needed."""
        return self._prefixes.idle_pages

    @property
    def _free_pages(self) -> int:
        return self.limits.pages - self._own_pages - self._prefixes.pages

    @property
    def wants_urgent(self) -> bool:
        """Whether rows that somebody waits for could enter, before those that wait already."""
        is_next = bool(self._waiting) and self._waiting[0].urgent
        return not is_next and bool(self._free) and (not self.seats or not self._is_static)

    def add(self, rows: Iterable[Row]) -> None:
        """Let rows wait, urgent ones before the others. Raises ValueError for one that the pool could never hold."""
        rows = sorted(rows, key=lambda row: -len(row.source or row.prompt))
        for row in rows:
            tokens = _most_tokens(row)
            needed = self._row_pages(tokens)
            if needed > self.limits.pages and tokens > self.limits.host_tokens:
                host = f", or room for {tokens} tokens of {self.limits.host_tokens}" if self.limits.host_tokens else ""
                raise ValueError(f"row {row.index} needs {needed} pages of a pool of {self.limits.pages}{host}")
        self._waiting.extend(self._prefixes.expect(rows))
        if any(row.urgent for row in rows):
            self._waiting = deque(sorted(self._waiting, key=lambda row: not row.urgent))

    def withdraw(self, row: Row) -> Seat | None:
        """Nobody wants more of `row`, which lives or waits: its place is free. Returns its seat, if it had one."""
        for seat in self.seats:
            if seat.row is row:
                self.release([seat])
                return seat
        self._waiting.remove(row)
        self._prefixes.leaves(row)
        return None

    def holds(self, row: Row) -> bool:
        """Whether `row` waits, or lives with tokens still to come."""
        lives = any(seat.row is row and not seat.has_left for seat in self.seats)
        return lives or any(waiting is row for waiting in self._waiting)

    def admit(self) -> list[Seat]:
        """Rows that enter now."""
        is_urgent = bool(self._waiting) and self._waiting[0].urgent
        if self.seats and (self._is_static or not (is_urgent or self._has_room_for_several())):
            return []
        most = self.limits.micro_batch_rows if self.limits.together else self.limits.rows
        admitted, passed_over = [], deque[Row]()
        while self._waiting and self._free and len(self.seats) < most:
            row = self._waiting.popleft()
            seat = Seat(row, self._free[-1], len(row.prompt) + len(row.generated))
            is_uneven = self.limits.evenly and self.seats and self.seats[0].known != seat.known
            if is_uneven or not self._find_place(seat):
                passed_over.append(row)
                continue
            self._free.pop()
            self._prefixes.enters(row)
            self.seats.append(seat)
            admitted.append(seat)
        self._waiting.extendleft(reversed(passed_over))
        return admitted

    def _has_room_for_several(self) -> bool:
        """Whether as many rows find room as had better enter together, or all that wait."""
        several = min(self.limits.entering_rows, len(self._waiting))
        if several < 2 or self.limits.host_tokens:
            return len(self._free) >= several
        if len(self._free) < several:
            return False
        needed, missing = 0, 0
        for row in islice(self._waiting, several):
            there, wanted = self._prefixes.wanted(row)
            needed += self._row_pages(_most_tokens(row) - PAGE_TOKENS * wanted)
            missing = max(missing, wanted - there)
        return needed + missing <= self._free_pages + self._prefixes.idle_pages

    def _find_place(self, seat: Seat) -> bool:
        """Whether there is room for the tokens of `seat`, which is then taken."""
        there, wanted = self._prefixes.wanted(seat.row)
        for pages in dict.fromkeys((wanted, there, 0)):
            if self._share(seat, pages):
                return True
        seat.host_start = self._host.take(seat.total) if self.limits.host_tokens else None
        return seat.on_host

    def _share(self, seat: Seat, pages: int) -> bool:
        """Whether there is room for `seat` with so many shared pages, which are then taken, and its own."""
        prefixes, own = self._prefixes, self._row_pages(seat.total - PAGE_TOKENS * pages)
        if own > self._free_pages + prefixes.idle_pages:
            return False
        made, spare = prefixes.room_for(seat.row, pages)
        excess = max(0, own + made - self._free_pages, prefixes.pages + made - self.limits.prefix_pages)
        if excess > spare:
            return False
        seat.prefix = prefixes.hold(seat.row, pages)
        prefixes.drop(excess)
        self._own_pages += own
        return True

    def _leave_place(self, seat: Seat) -> None:
        if seat.host_start is None:
            self._own_pages -= self._row_pages(seat.total - seat.prefix_tokens)
            self._prefixes.let_go(seat.prefix)
        else:
            self._host.give_back(seat.host_start, seat.total)

    def forget_prefix(self, seat: Seat) -> None:
        """`seat` ended with scores that are no numbers: later rows compute for themselves what it shares."""
        self._prefixes.forget(seat.prefix)

    def clear_prefixes(self) -> None:
        """Share nothing of what has been computed so far."""
        self._prefixes.clear()

    def take_dropped(self) -> list[PrefixPage]:
        """Shared pages that are free since the last call."""
        return self._prefixes.take_dropped()

    def has_more_than(self, groups: Sequence[Group]) -> bool:
        """Whether rows wait, or are live without being in `groups`."""
        return bool(self._waiting) or len(self.seats) > len({seat for group in groups for seat in group.seats})

    def release(self, seats: Sequence[Seat]) -> None:
        """`seats` have ended: their places are free."""
        for seat in seats:
            seat.has_left = True
            self._leave_place(seat)
        if seats and not self.limits.keeps_ended:
            self._vacate(seats)
        elif seats and all(other.has_left for other in self.seats):
            self._vacate(self.seats)

    def _vacate(self, seats: Sequence[Seat]) -> None:
        self._free += [seat.number for seat in seats]
        gone = set(seats)
        self.seats = [seat for seat in self.seats if seat not in gone]

    @property
    def has_prompts(self) -> bool:
        """Whether there is more of a prompt to compute."""
        return any(seat.due > 1 for seat in self.seats)

    def next_pass(self, *, prompts: bool = True) -> list[Group]:
        """The micro-batches of the next pass, with `prompts` or without; none when there is nothing for it."""
        limits, broken = self.limits, self.limits.breaks_at
        if broken is not None:
            for seat in self.seats:
                if seat.known > broken >= seat.computed:
                    seat.computed = 0
        if limits.together:
            groups = [Group.of(self.seats)] if self.seats else []
        elif limits.forward_tokens:
            groups = [group for parts in self._parts() for group in self._packed(parts)]
        else:
            groups = [*(self._prompts() if prompts else ()), *self._decodes()]
        if groups:
            self.counts.add(groups, self.reserved_pages)
        return groups

    def is_full_step(self, groups: Sequence[Group]) -> bool:
        """Whether a pass of `groups` is a token for each of as many rows as may be live."""
        return all(max(group.counts) == 1 for group in groups) and sum(len(g.seats) for g in groups) == self.limits.rows

    def advance(self, group: Group) -> list[Seat]:
        """`group` has been computed and its tokens chosen; returns the seats that ended, as they have all theirs."""
        ended = []
        of_each = zip(group.seats, group.starts, group.counts, group.chooses, strict=True)
        for seat, start, count, chooses in of_each:
            if start < seat.prefix_tokens:
                for page in seat.pages_between(start, start + count):
                    page.is_computed = True
            self.counts.shared_tokens += start - seat.computed
            seat.computed = start + count
            if chooses:
                seat.known += 1
                if seat.known == seat.total and not seat.has_left:
                    ended.append(seat)
        self.release(ended)
        return ended

    def can_halve(self, groups: Sequence[Group]) -> bool:
        """Whether passes can be smaller than that of `groups`."""
        return self._smaller(groups) != self.limits

    def _smaller(self, groups: Sequence[Group]) -> Limits:
        """Limits under which the largest forward of `groups`, taken for the one that ran out of memory, is half as
        large: it has fewer tokens where a prompt is in it that can be cut or left to the next one, and fewer rows
        where not. So a prompt that does not fit leaves steps of all rows in one forward."""
        limits, largest = self.limits, max(groups, key=attrgetter("columns", "width"))
        rows = max(len(group.seats) for group in groups)
        if limits.together and rows == 1:
            return limits
        if largest.width > 1 and not limits.together:
            whole = max(largest.counts) if limits.runs_whole else 1
            tokens = max(whole, -(-largest.columns // 2))
            if tokens < limits.forward_tokens:
                return replace(limits, forward_tokens=tokens)
            if not limits.forward_tokens and tokens < limits.prefill_tokens:
                return replace(limits, prefill_tokens=tokens)
        return replace(limits, micro_batch_rows=max(1, -(-rows // 2)))

    def halve(self, groups: Sequence[Group]) -> list[Seat]:
        """A pass of `groups` ran out of memory: forwards like its largest one are half as large from now on.

        What was left half done is computed again. Returns the seats that had to be given up; their rows wait again.
        """
        limits = self.limits = self._smaller(groups)
        if not limits.together:
            for seat in self.seats:
                if seat.due > 1:  # complete pages that are shared stay as they are
                    seat.computed = min(seat.computed, seat.prefix_tokens) // PAGE_TOKENS * PAGE_TOKENS
            return []
        given_up = [seat for seat in self.seats if not seat.has_left]
        self._waiting.extendleft(seat.row for seat in reversed(given_up))
        for seat in given_up:
            self._leave_place(seat)
        self._vacate(self.seats)
        return given_up

    def halve_scores(self, columns: int) -> None:
        """A forward ran out of memory that scored sequences in so many columns: later ones have half of them."""
        self.limits = replace(self.limits, score_tokens=-(-columns // 2))

    def compute_anew(self, groups: Sequence[Group]) -> None:
        """A pass of `groups` broke: rows whose states it may have changed begin again, with all their tokens."""
        for group in groups if self.limits.keeps_states else ():
            for seat in group.seats:
                seat.computed = 0

    def _parts(self) -> Iterator[list[NextTokens]]:
        """A step of every row that is through its prompt, and as much of the prompts as the pass may compute, in the
        order in which they were admitted, all together or, beyond a break and before it, or with keys on the GPU and in
        host memory, each by themselves. What rows share is computed by the first of them."""
        limits = self.limits
        parts = [NextTokens(seat, seat.computed, 1) for seat in self.seats if seat.known - seat.computed == 1]
        steps, left, is_whole = len(parts), limits.prefill_tokens, limits.runs_whole
        planned = set[PrefixPage]()
        for seat in (seat for seat in self.seats if seat.due > 1):
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
        sides = [(not own, *self._side(part.seat)) for own, part in zip(by_cpu, parts, strict=True)]
        for side in sorted(set(sides)):  # the CPU begins first
            yield [part for part, own in zip(parts, sides, strict=True) if own == side]

    def _packed(self, parts: Sequence[NextTokens]) -> Iterator[Group]:
        """`parts` in forwards of about as many tokens each, whose prompts may go on in the next one: each layer
        computes it later. Not those in host memory, from which the next one fetches before it has them all, and of
        which one forward has as many as there is staging for. Rows that share what another one computes have a later
        forward."""
        limits, tokens = self.limits, sum(part.tokens for part in parts)
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

    def _decodes(self) -> Iterator[Group]:
        """Rows of which one token is due, the like-long ones together."""
        due = sorted((seat for seat in self.seats if seat.known - seat.computed == 1), key=attrgetter("known"))
        has_sides = self.limits.host_tokens or self.limits.breaks_at is not None
        sides = groupby(sorted(due, key=self._side), self._side) if has_sides else [(None, due)]
        for _, side in sides if due else ():
            seats = list(side)
            parts = -(-len(seats) // self.limits.micro_batch_rows)
            edges = [len(seats) * part // parts for part in range(parts + 1)]
            yield from (Group.of(seats[start:end]) for start, end in pairwise(edges))

    def _prompts(self) -> Iterator[Group]:
        """Rows of which more is due, as many as the pass may compute, in the order in which they were admitted."""
        left, opened = self.limits.prefill_tokens, list[Seat]()
        most = None if self.limits.runs_whole else self.limits.prefill_tokens
        is_first = True
        for seat in (seat for seat in self.seats if seat.due > 1):
            joins = self._joins(seat, opened, most)
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

    def _joins(self, seat: Seat, opened: Sequence[Seat], most: int | None) -> bool:
        if not opened or len(opened) == self.limits.micro_batch_rows:
            return False
        first = opened[0]
        if self._side(first) != self._side(seat) or (first.computed == 0) != (seat.computed == 0):
            return False
        widths = sorted((_due(first, most), _due(seat, most)))
        return widths[1] - widths[0] <= max(_CHEAP_PADDING_TOKENS, widths[1] // 4)

    def _side(self, seat: Seat) -> tuple[bool, bool]:
        """Rows of one micro-batch agree in it: where they rest, and whether they are beyond a break."""
        return seat.on_host, self.limits.breaks_at is not None and seat.known > self.limits.breaks_at


def _most_tokens(row: Row) -> int:
    return len(row.prompt) + row.sampling.max_new_tokens


def _due(seat: Seat, most: int | None) -> int:
    return seat.due if most is None else min(seat.due, most)


def _columns(seats: Sequence[Seat], most: int | None) -> int:
    return len(seats) * max((_due(seat, most) for seat in seats), default=0)
