"""Counts what passes computed, and how much of it was padding, for the report of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zeroinf.generation.groups import Group


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
