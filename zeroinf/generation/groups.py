"""The rows that run one forward together, and the next tokens of each: what a micro-batch is made of. No tensors."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from zeroinf.generation.prefixes import PrefixPage
from zeroinf.generation.seats import Seat


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
