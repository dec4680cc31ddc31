"""The work queue that all ranks share, and the transport of results to rank 0."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from math import ceil
from typing import TYPE_CHECKING

from zeroinf.jobs.tokenizing import groups_of
from zeroinf.jobs.work_list import WorkList
from zeroinf.planner.plan import Plan
from zeroinf.planner.prefixes import PrefixGroups
from zeroinf.service.requests import Result

if TYPE_CHECKING:
    import torch.distributed as dist


def in_running_order(work: WorkList, plan: Plan, groups: PrefixGroups | None = None) -> WorkList:
    """`work` in the order in which rows of `plan` run it best: prompts that begin alike follow each other, where rows
    share what they begin with, and no long completion runs on alone at the end. `groups` are its prompts', if they are
    known."""
    if plan.prefix_pages:
        work = work.selected((groups or groups_of(work)).order)
    return work if plan.static_batches else shortest_last(work, plan.batch_size * plan.streams)


def shortest_last(work: WorkList, rows: int) -> WorkList:
    """`work` in its order, but for the end of it, where the longest completions begin first, so that the last of `rows`
    rows that are live together end together and none runs on alone."""
    if len(work) <= rows:
        return work
    new = work.new_tokens
    start = max(0, len(work) - ceil(rows * max(new) * len(work) / sum(new)))
    return work.selected(chain(range(start), sorted(range(start, len(work)), key=lambda number: -new[number])))


class WorkQueue:
    """Positions 0 .. total-1, drawn by whichever rank is free: none waits for another's longer list."""

    def __init__(self, store: dist.Store, total: int, rows_per_draw: int) -> None:
        self._store = store
        self._total = total
        self._rows = rows_per_draw
        self._dry = False

    def draw(self) -> range:
        """The next positions, each given to exactly one caller over all ranks; empty once all are gone."""
        if self._dry:  # a rank that keeps others company asks before every forward, and the store is on another rank
            return range(0)
        end = self._store.add("drawn", self._rows)
        self._dry = end >= self._total
        return range(min(end - self._rows, self._total), min(end, self._total))


class ResultBox:
    """Results on their way from any rank to rank 0."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store
        self._numbers = 0
        self._awaited: list[int] = []

    def put(self, result: Result) -> None:
        number = self._store.add("results", 1)
        self._store.set(f"result/{number}", json.dumps(asdict(result)))

    def collect(self) -> Iterator[Result]:
        """Results that have arrived since the last call. Only rank 0 calls it."""
        numbers = self._store.add("results", 0)
        self._awaited.extend(range(self._numbers + 1, numbers + 1))
        self._numbers = numbers
        for number in tuple(self._awaited):
            key = f"result/{number}"
            # A rank that dies between number and result never sends it: waiting for it would block the store for all.
            if self._store.check([key]):
                self._awaited.remove(number)
                yield Result(**json.loads(self._store.get(key)))
                self._store.delete_key(key)


class TokenCount:
    """Tokens generated so far, over all ranks."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store

    def add(self, tokens: int) -> int:
        """Count `tokens` more; returns the total."""
        return int(self._store.add("tokens", tokens))
