"""Finds what prompts begin with in common, in whole pages of the KV cache.

Input: the tokens of prompts. Output: how long a beginning each of them shares with another one, and the order in which
those that share most follow each other. Nothing here knows of rows, passes or memory.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import cast

from zeroinf.model.anatomy import PAGE_TOKENS, Anatomy


def shareable_pages(tokens: int) -> int:
    """Pages that a prompt of so many tokens can share: its last token is computed in any case."""
    return max(0, tokens - 1) // PAGE_TOKENS


def common_pages(one: Sequence[int], other: Sequence[int], page: int = PAGE_TOKENS) -> int:
    """Pages, of `page` elements each, with which both begin."""
    if one[:page] != other[:page]:
        return 0
    most = min(len(one), len(other)) // page
    return bisect_left(range(1, most + 1), True, key=lambda pages: one[: pages * page] != other[: pages * page])


@dataclass(frozen=True, slots=True)
class SharedPrefixes:
    """The prefixes that prompts share, for a plan."""

    saved_tokens: float
    """Tokens of a prompt that need not be computed, on average, where each prefix is computed once."""
    mean_pages: float
    """Pages of the KV cache for each live row: its own, and its part of those that it shares."""
    prefix_pages: float
    """Of these, pages that are shared."""
    longest_pages: int
    """Pages of the longest prefix."""
    saved_share: float = 0.0
    """Part of all prompt tokens that is saved."""

    @classmethod
    def unknown(cls, anatomy: Anatomy, prompt_tokens: int, new_tokens: int) -> SharedPrefixes:
        """The prefixes of prompts of up to so many tokens that nobody has seen: one long prefix finds room."""
        pages = anatomy.row_pages(anatomy.row_tokens(prompt_tokens, new_tokens))
        return cls(0.0, float(pages), 0.0, shareable_pages(prompt_tokens))


class PrefixGroups:
    """Prompts in groups that begin alike."""

    def __init__(self, prompts: Sequence[array[int]] | Sequence[bytes], page: int = PAGE_TOKENS) -> None:
        """Prompts, all of one kind, have `page` elements for each page."""
        self._ordered = sorted(range(len(prompts)), key=lambda number: cast("bytes", prompts[number]))
        self._common = [0] * len(prompts)
        """Pages that each of these has in common with the one before."""
        for place in range(1, len(prompts)):
            one, other = (prompts[self._ordered[at]] for at in (place - 1, place))
            self._common[place] = common_pages(one, other, page)

    @property
    def order(self) -> list[int]:
        """Numbers of the prompts: those that share a first page follow each other, those that share more next to each
        other. Groups are in the order of their first prompts."""
        groups: dict[int, list[int]] = {}
        for group in self._groups():
            groups[min(group)] = group
        return [number for first in sorted(groups) for number in groups[first]]

    def _groups(self) -> Iterator[list[int]]:
        group: list[int] = []
        for number, common in zip(self._ordered, self._common, strict=True):
            if group and not common:
                yield group
                group = []
            group.append(number)
        if group:
            yield group

    def shared(self, anatomy: Anatomy, rows: Sequence[tuple[int, int]]) -> SharedPrefixes:
        """The prefixes that the prompts share, as rows with so many prompt tokens and new ones at the most."""
        saved, prefix, own, longest = 0, 0, list[int](), 0
        following = [*self._common[1:], 0]
        for number, before, after in zip(self._ordered, self._common, following, strict=True):
            prompt, new = rows[number]
            most = shareable_pages(prompt)
            held = min(most, max(before, after))
            saved += PAGE_TOKENS * min(most, before)
            prefix += max(0, held - before)
            own.append(anatomy.row_pages(anatomy.row_tokens(prompt, new) - PAGE_TOKENS * held))
            longest = max(longest, held)
        lives = [rows[number][1] for number in self._ordered]
        each = prefix / len(rows)
        share = saved / max(1, sum(prompt for prompt, _ in rows))
        return SharedPrefixes(saved / len(rows), fmean(own, lives) + each, each, longest, share)
