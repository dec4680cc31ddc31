"""Decides which rows run in the next pass and in which micro-batches. It knows tokens and pages, and no tensors."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import islice
from operator import attrgetter

from zeroinf.generation.groups import Group
from zeroinf.generation.next_pass import micro_batches
from zeroinf.generation.pass_counts import Counts
from zeroinf.generation.pass_limits import Limits
from zeroinf.generation.prefixes import PrefixCache, PrefixPage
from zeroinf.generation.range_allocator import RangeAllocator
from zeroinf.generation.row import Row
from zeroinf.generation.seats import Seat, most_tokens
from zeroinf.model.cache_layout import PAGE_TOKENS


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
            tokens = most_tokens(row)
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
            needed += self._row_pages(most_tokens(row) - PAGE_TOKENS * wanted)
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
        groups = micro_batches(self.seats, limits, prompts=prompts)
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
