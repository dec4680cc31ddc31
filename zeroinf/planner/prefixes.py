"""Finds what prompts begin with in common, in whole pages of the KV cache.

Input: the tokens of prompts. Output: how long a beginning each of them shares with another one, and the order in which
those that share most follow each other. Nothing here knows of rows, passes or memory.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from zeroinf.model.anatomy import Anatomy
from zeroinf.model.cache_layout import PAGE_TOKENS

PAGE_BYTES = PAGE_TOKENS * array("i").itemsize


def shareable_pages(tokens: int) -> int:
    """Pages that a prompt of so many tokens can share: its last token is computed in any case."""
    return max(0, tokens - 1) // PAGE_TOKENS


def common_pages(one: bytes, other: bytes) -> int:
    """Pages with which both begin, which are the tokens of prompts, 4 bytes each."""
    if one[:PAGE_BYTES] != other[:PAGE_BYTES]:
        return 0
    most = min(len(one), len(other)) // PAGE_BYTES
    return bisect_left(
        range(1, most + 1), True, key=lambda pages: one[: pages * PAGE_BYTES] != other[: pages * PAGE_BYTES]
    )


def _common_to_all(prompts: Sequence[bytes], group: Sequence[int], known: int) -> int:
    """Pages with which all prompts of a group begin; at least so many are `known`."""
    first, found = prompts[group[0]], len(prompts[group[0]]) // PAGE_BYTES
    for number in group[1:]:
        found = min(found, common_pages(first, prompts[number]))
        if found <= known:
            return known
    return found


def _parts(prompts: Sequence[bytes], group: Sequence[int], pages: int) -> list[Sequence[int]]:
    """A group whose prompts begin with so many pages in common, in parts that go on alike, in the order of their first
    prompts. A prompt that ends there is a part by itself."""
    import numpy as np

    start, end = pages * PAGE_BYTES, (pages + 1) * PAGE_BYTES
    keys = array("q")
    for number in group:
        page = prompts[number][start:end]
        keys.append(hash(page) if len(page) == PAGE_BYTES else hash((number,)))
    values = np.frombuffer(keys, dtype=np.int64)
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.r_[True, values[order[1:]] != values[order[:-1]]])
    if len(starts) == 1:  # unlike pages have one hash
        return [group[at : at + 1] for at in range(len(group))]
    numbers = np.asarray(group)[order]
    by_first = np.argsort(order[starts])
    ends = np.r_[starts[1:], len(order)]
    return [numbers[starts[at] : ends[at]].tolist() for at in by_first]


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
    """Prompts in groups that begin alike: those that share a first page follow each other, those that share more next
    to each other. Groups are in the order of their first prompts, and so are the prompts of each."""

    def __init__(self, prompts: Sequence[bytes]) -> None:
        """The tokens of each prompt, 4 bytes each. A prompt is read twice, and twice more each time that it goes on
        like some of those with which it begins alike, and unlike others."""
        self._ordered, self._common = array("q"), array("i")
        """Numbers of the prompts, and pages that each has in common with the one before."""
        waiting: list[tuple[Sequence[int], int, int]] = [(range(len(prompts)), 0, 0)] if prompts else []
        while waiting:
            group, known, common = waiting.pop()
            if len(group) == 1:
                self._ordered.append(group[0])
                self._common.append(common)
                continue
            pages = _common_to_all(prompts, group, known)
            parts = _parts(prompts, group, pages)
            waiting += reversed([(part, pages + 1, pages if at else common) for at, part in enumerate(parts)])

    @property
    def order(self) -> Sequence[int]:
        """The prompts by their numbers: groups one after the other."""
        return self._ordered

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
