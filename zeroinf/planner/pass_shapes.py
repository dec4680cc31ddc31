"""Enumerates the shapes of passes for a number of rows: rows that run one forward, and prompt tokens of a pass.

Input: the facts of a search and the user's constraints. Output: `Shape`s, and the points that hill climbing visits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from zeroinf.planner.choice import Choice
from zeroinf.planner.constraints import Constraints
from zeroinf.planner.descriptor import descriptor_of, why_padded
from zeroinf.planner.facts import Facts
from zeroinf.planner.workload import Shape

MOST_ROWS = 4096
"""More rows a GPU than this are never tried: long before, arithmetic binds."""

MOST_MICRO_BATCH_ROWS = 512
"""More rows in one forward hardly save time: resident weights are read seldom, and what attention gathers grows."""

# What is tried, one after the other, until a pass fits, and all of it with the most promising numbers of rows: parts of
# the most rows and of the most prompt tokens.
_PARTS = ((1, 1), (1, 4), (4, 1), (16, 4), (64, 16))
_PREFILL_TOKENS = (2048, 16384)
_SHORTEST_PART = 256


@dataclass(frozen=True, slots=True)
class SearchPoint:
    """The settings of a pass that hill climbing varies."""

    rows: int
    micro_batches: int
    prefill_tokens: int

    @classmethod
    def of(cls, choice: Choice) -> SearchPoint:
        """The point at which `choice` lies."""
        if choice.forward_tokens:
            tokens = choice.batch_size + choice.prefill_tokens
            return cls(choice.batch_size, -(-tokens // choice.forward_tokens), choice.prefill_tokens)
        longest = max(choice.batch_size - choice.host_rows, choice.host_rows)
        return cls(choice.batch_size, -(-longest // choice.micro_batch_rows), choice.prefill_tokens)


class PassShapes:
    """The shapes that passes of one model may have under some constraints."""

    def __init__(self, facts: Facts, constraints: Constraints) -> None:
        self._facts, self._lengths = facts, facts.lengths
        self._constraints = constraints
        self._whole_prompts = facts.lengths.whole or bool(facts.anatomy.whole_because)
        self._expert_parts = constraints.expert_parts or 1
        scored = facts.lengths.scored_tokens > 0
        on_host = self.host_rows(MOST_ROWS) > 0
        self._attends_on_cpu = on_host and constraints.kv_attention == "cpu"
        on_host = on_host and not self._attends_on_cpu
        self.packs = not why_padded(facts.anatomy, constraints.engine, on_host=on_host, scored=scored)
        """Whether rows of a forward lie side by side."""
        # Prompt tokens that are computed in the time that weights take to arrive: then the link waits for nothing.
        link_s = facts.anatomy.block_bytes / facts.speeds.link_gbps / 1e9
        self._hidden_tokens = link_s * facts.speeds.tflops * 1e12 / (2 * facts.anatomy.parameters)

    @property
    def makes_parts(self) -> bool:
        """Whether rows of a pass may run in several micro-batches, and prompts in several passes."""
        shares = descriptor_of(self._constraints.engine).shares_passes and self._facts.anatomy.is_paged
        return self.packs or shares

    def host_rows(self, rows: int) -> int:
        """The number of rows, of `rows`, that keep their KV cache in host memory."""
        assert self._constraints.host_share != "auto"
        return round(self._constraints.host_share * rows)

    @property
    def most_rows(self) -> int:
        """The most rows that are tried: as many as a stream has requests, within reason."""
        requests = self._constraints.requests
        return MOST_ROWS if requests is None else min(MOST_ROWS, -(-requests // self._constraints.streams))

    def of_rows(self, rows: int) -> Iterator[Shape]:
        """Shapes of passes of `rows` rows, those that take most memory and least time first."""
        if self.makes_parts:
            yield from dict.fromkeys(self._in_parts(rows, *shares) for shares in _PARTS)
        else:
            yield self._padded(rows, rows, rows * self._lengths.prompt_tokens)

    def at(self, point: SearchPoint) -> Shape | None:
        """The shape at `point`; None where passes cannot be so."""
        if not (1 <= point.rows <= self.most_rows and 1 <= point.micro_batches <= point.rows):
            return None
        if not self.makes_parts:
            shape = next(self.of_rows(point.rows))
        else:
            most = self._in_whole_prompts(min(point.rows * self._lengths.prompt_tokens, _PREFILL_TOKENS[1]))
            least = self._lengths.prompt_tokens if self._whole_prompts else min(_SHORTEST_PART, most)
            tokens = max(least, min(point.prefill_tokens, most))
            if self.packs:
                return self._packed(point.rows, point.micro_batches, tokens)
            shape = self._padded(point.rows, self._rows_together(point), tokens)
        return (
            shape if shape.micro_batch_rows <= (self._constraints.micro_batch_rows or MOST_MICRO_BATCH_ROWS) else None
        )

    def beside(self, point: SearchPoint, factor: float) -> Iterator[SearchPoint]:
        """Other rows, micro-batches and prompt tokens, one of them so many times as many, or one more or fewer."""
        fixed = self._constraints
        for times in (factor, 1 / factor):
            rows = point.rows if fixed.batch_size else _other(point.rows, times)
            yield replace(point, rows=rows)
            if not self.makes_parts:
                continue
            yield replace(point, prefill_tokens=self._other_tokens(point.prefill_tokens, times))
            # What the one takes of memory, the other leaves.
            yield replace(point, rows=rows, prefill_tokens=self._other_tokens(point.prefill_tokens, 1 / times))
            if not fixed.micro_batch_rows:
                yield replace(point, micro_batches=_other(point.micro_batches, times))
        if fixed.requests is not None and not fixed.batch_size:  # waves of one size
            requests = -(-fixed.requests // fixed.streams)
            waves = -(-requests // point.rows)
            yield replace(point, rows=-(-requests // waves))

    def _sides(self, rows: int) -> tuple[int, int]:
        """The numbers of rows, of `rows`, with their KV cache on the GPU and in host memory."""
        on_host = self.host_rows(rows)
        return rows - on_host, on_host

    def _rows_together(self, point: SearchPoint) -> int:
        """Rows of one forward, so that there are about as many micro-batches, or as many rows as the user asked for."""
        sides, asked = self._sides(point.rows), self._constraints.micro_batch_rows
        if asked:
            return max(-(-side // -(-side // asked)) for side in sides if side)
        return max(-(-side // point.micro_batches) for side in sides)

    def _padded(self, rows: int, together: int, tokens: int) -> Shape:
        return Shape(
            rows, together, tokens, self.host_rows(rows), self._constraints.kv_dtype, expert_parts=self._expert_parts
        )

    def _packed(self, rows: int, forwards: int, tokens: int) -> Shape:
        """Passes of `rows` rows and so many prompt tokens in about as many forwards."""
        on_host = self.host_rows(rows)
        # What is fetched for a forward takes room by its rows; nothing else of a forward does.
        fetches = on_host and not self._attends_on_cpu
        most = max(-(-side // forwards) for side in (rows - on_host, on_host)) if fetches else rows
        together = min(most, self._constraints.micro_batch_rows or most)
        least = self._lengths.prompt_tokens if self._whole_prompts else 1
        size = max(least, -(-(rows + tokens) // max(forwards, -(-rows // together))))
        kv_dtype, on_cpu = self._constraints.kv_dtype, self._attends_on_cpu
        return Shape(rows, together, tokens, on_host, kv_dtype, size, self._expert_parts, on_cpu)

    def _in_parts(self, rows: int, rows_share: int, tokens_share: int) -> Shape:
        """`rows` rows in such parts of the most rows that run together, and of the most prompt tokens."""
        prompt, (fewest, most) = self._lengths.prompt_tokens, _PREFILL_TOKENS
        tokens = min(rows * prompt, int(sorted((fewest, self._hidden_tokens, most))[1]))
        part = min(tokens, max(tokens // tokens_share, _SHORTEST_PART))
        part = max(part, prompt) if self._whole_prompts else part
        if self.packs:
            return self._packed(rows, rows_share, part)
        together = self._constraints.micro_batch_rows or MOST_MICRO_BATCH_ROWS // rows_share
        # No more than there are where all rows are live: fewer live rows would else run in larger micro-batches.
        together = max(-(-side // -(-side // together)) for side in self._sides(rows) if side)
        return self._padded(rows, together, self._in_whole_prompts(part))

    def _in_whole_prompts(self, tokens: int) -> int:
        """Round `tokens` down to whole prompts of the longest length, of which padded passes are simulated:
        shorter ones would use up what is left."""
        longest = self._lengths.prompt_tokens
        return tokens - tokens % longest if tokens > longest and not self.packs else tokens

    def _other_tokens(self, tokens: int, times: float) -> int:
        """Multiply `tokens`, in whole prompts; the result is another number in any case."""
        other, prompt = self._in_whole_prompts(int(tokens * times)), self._lengths.prompt_tokens
        return other if other != tokens else tokens + (prompt if times > 1 else -prompt)


def _other(number: int, times: float) -> int:
    """Multiply `number`; the result is another number in any case."""
    other = round(number * times)
    return other if other != number else number + (1 if times > 1 else -1)
