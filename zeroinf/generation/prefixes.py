"""Keeps count of the pages of the KV cache that several rows share, since their prompts begin alike.

A prefix is a whole number of pages. Its pages hang in a tree, by their tokens: a page's keys and values follow from its
tokens and from those of all pages before it. Rows hold the pages that they use; those that nobody uses are kept until
their room is needed, and go then, the least recently used first. Nothing here knows of tensors.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from zeroinf.generation.row import Row
from zeroinf.planner.prefixes import PAGE_BYTES, PrefixGroups, common_pages, shareable_pages

_REMEMBERED = 64
"""Prompts of rows that have entered, with which later ones are compared, at least."""


@dataclass(slots=True, eq=False)
class PrefixPage:
    """A page of a prefix, and the pages that follow it."""

    tokens: bytes
    before: PrefixPage | None
    following: dict[bytes, PrefixPage] = field(default_factory=dict)
    users: int = 0
    """Live rows that hold it."""
    is_computed: bool = False
    is_forgotten: bool = False
    """No further row finds it."""


class PrefixCache:
    """The prefixes of one rank: `most_pages` of them at the most, 0 for none at all.

    A prefix is worth pages where a row that waits or has come lately begins with it, too.
    """

    def __init__(self, most_pages: int, rows: int) -> None:
        """`rows` may be live at once."""
        self.most_pages = most_pages
        self.pages = 0
        """Those there are."""
        self._first: dict[bytes, PrefixPage] = {}
        self._idle: dict[PrefixPage, None] = {}
        """Pages that no row holds, the least recently used first; what follows a page comes before it."""
        self._dropped: list[PrefixPage] = []
        self._prompts: dict[Row, bytes] = {}
        """Of rows that wait."""
        self._sorted: list[bytes] = []
        """Prompts of rows that wait, and of the last ones that entered."""
        self._entered: deque[bytes] = deque()
        self._remembered = max(rows, _REMEMBERED)
        self._wanted: dict[Row, tuple[int, int]] = {}
        """What `wanted` has found of rows that wait, until anything changes."""

    @property
    def idle_pages(self) -> int:
        """Pages that could be dropped."""
        return len(self._idle)

    def expect(self, rows: Sequence[Row]) -> list[Row]:
        """`rows` wait now; returns them so that those that begin alike follow each other."""
        if not self.most_pages:
            return list(rows)
        prompts = [array("i", row.prompt).tobytes() for row in rows]
        self._wanted.clear()
        for row, prompt in zip(rows, prompts, strict=True):
            self._prompts[row] = prompt
            insort(self._sorted, prompt)
        return [rows[number] for number in PrefixGroups(prompts).order]

    def enters(self, row: Row) -> None:
        """`row` waits no longer."""
        if self.most_pages:
            self._entered.append(self._prompts.pop(row))
            if len(self._entered) > self._remembered:
                self._forget_prompt(self._entered.popleft())

    def leaves(self, row: Row) -> None:
        """`row` will not come."""
        if self.most_pages:
            self._forget_prompt(self._prompts.pop(row))

    def _forget_prompt(self, prompt: bytes) -> None:
        self._wanted.clear()
        del self._sorted[bisect_left(self._sorted, prompt)]

    def wanted(self, row: Row) -> tuple[int, int]:
        """Pages of the prompt of `row`, which waits, that are there, and pages that would be worth having."""
        if not self.most_pages:
            return 0, 0
        if row not in self._wanted:
            self._wanted[row] = self._look_up(row)
        return self._wanted[row]

    def _look_up(self, row: Row) -> tuple[int, int]:
        prompt, most = self._prompts[row], shareable_pages(len(row.prompt))
        there = min(most, len(self._find(prompt)))
        at = bisect_left(self._sorted, prompt)
        beside = self._sorted[max(0, at - 1) : at] + self._sorted[at + 1 : at + 2]  # at `at` is its own, or its equal
        worth = max((common_pages(prompt, other) for other in beside), default=0)
        return there, max(there, min(most, worth))

    def _find(self, prompt: bytes) -> list[PrefixPage]:
        found, following = list[PrefixPage](), self._first
        for start in range(0, len(prompt), PAGE_BYTES):
            page = following.get(prompt[start : start + PAGE_BYTES])
            if page is None:
                break
            found.append(page)
            following = page.following
        return found

    def room_for(self, row: Row, pages: int) -> tuple[int, int]:
        """If `row`, which waits, held so many pages: how many would be made, and how many could be dropped for them."""
        there = self._find(self._prompts[row])[:pages] if pages else []
        return pages - len(there), len(self._idle) - sum(not page.users for page in there)

    def hold(self, row: Row, pages: int) -> tuple[PrefixPage, ...]:
        """The first so many pages of the prompt of `row`, which waits, are in use; those that are missing are made."""
        prompt, following = self._prompts.get(row, b""), self._first
        held: list[PrefixPage] = []
        for start in range(0, pages * PAGE_BYTES, PAGE_BYTES):
            tokens = prompt[start : start + PAGE_BYTES]
            if tokens not in following:
                self._wanted.clear()
                following[tokens] = PrefixPage(tokens, held[-1] if held else None)
                self.pages += 1
            held.append(following[tokens])
            held[-1].users += 1
            self._idle.pop(held[-1], None)
            following = held[-1].following
        return tuple(held)

    def let_go(self, pages: Sequence[PrefixPage]) -> None:
        """A row holds `pages` no longer."""
        for page in reversed(pages):
            page.users -= 1
            if page.users:
                continue
            if page.is_forgotten:
                self._drop(page)
            else:
                self._idle[page] = None

    def drop(self, count: int) -> None:
        """Drop so many pages that nobody holds, the least recently used first."""
        for _ in range(count):
            page = next(iter(self._idle))
            del self._idle[page]
            del (self._first if page.before is None else page.before.following)[page.tokens]
            self._drop(page)

    def _drop(self, page: PrefixPage) -> None:
        self._wanted.clear()
        self.pages -= 1
        self._dropped.append(page)

    def forget(self, pages: Sequence[PrefixPage]) -> None:
        """Let no further row find the first of `pages`, nor what follows it: they may hold what is no number. They go
        when nobody holds them any more."""
        if not pages or self._first.get(pages[0].tokens) is not pages[0]:
            return
        self._wanted.clear()
        left = [self._first.pop(pages[0].tokens)]
        while left:
            page = left.pop()
            page.is_forgotten = True
            left += page.following.values()
            if page in self._idle:
                del self._idle[page]
                self._drop(page)

    def clear(self) -> None:
        """Forget all prefixes, and the prompts of rows that have entered."""
        for page in tuple(self._first.values()):
            self.forget([page])
        for prompt in self._entered:
            self._forget_prompt(prompt)
        self._entered.clear()

    def take_dropped(self) -> list[PrefixPage]:
        """Pages that were dropped since the last call."""
        dropped, self._dropped = self._dropped, []
        return dropped
