"""Estimates, from the lengths of rows that have ended, how likely a row ends with its next token.

Input: how many tokens each ended row had, and whether its last one ended it or there was no more room. Output: a chance
between 0 and 1. It knows nothing of tokens, passes or devices.
"""

from __future__ import annotations

from bisect import bisect_left, insort

_MOST = 4096
"""Rows that are remembered: of more than these, every other one is forgotten."""


class Lifetimes:
    """How many tokens rows have had when they ended."""

    def __init__(self) -> None:
        self._ended: list[tuple[int, bool]] = []
        """In order: tokens, and whether the row could have had more but for its most tokens."""

    def note(self, tokens: int, *, was_cut: bool) -> None:
        """A row has ended with so many tokens; `was_cut`: because it may have no more."""
        insort(self._ended, (tokens, was_cut))
        if len(self._ended) > _MOST:
            del self._ended[::2]

    def chance(self, tokens: int) -> float:
        """The share of rows with so many tokens or more that ended with exactly so many: one half where none has had so
        many yet, and nearer to what was seen the more rows there were (Laplace's rule of succession)."""
        first = bisect_left(self._ended, (tokens, False))
        ended = bisect_left(self._ended, (tokens, True)) - first
        return (ended + 1) / (len(self._ended) - first + 2)

    def all_end(self, tokens: list[int], least: float) -> bool:
        """Whether rows that now have so many tokens have all ended with these, with a chance of `least` or more, if
        none knows of the others."""
        chance = 1.0
        for each in tokens:
            chance *= self.chance(each)
            if chance < least:
                return False
        return True
