"""Searches for the settings with the highest tokens/s that fit: offload, resident layers, fetch mode and batch sizes.

Input: an anatomy, a machine, the user's constraints and a function that simulates workloads. Output: a `Decision`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Literal

from zeroinf.hardware.machine import Machine
from zeroinf.model.anatomy import Anatomy
from zeroinf.planner.choice import Choice, Fetch, Offload
from zeroinf.planner.constraints import Constraints
from zeroinf.planner.decision import Candidate, Decision, NothingFitsError, Rejection, Shortage
from zeroinf.planner.descriptor import EngineTerms, descriptor_of, why_padded
from zeroinf.planner.hill_climbing import climb
from zeroinf.planner.kv import fetched_bytes
from zeroinf.planner.memory import (
    GAPS,
    LOADING_STAGES,
    REQUESTS,
    SCORES,
    SLOTS,
    SMALL_PAGES,
    MemoryPlace,
    Term,
    pieces,
    scores_bytes,
    total,
)
from zeroinf.planner.search_space import OFFLOADS, fetches_of, offloads_of
from zeroinf.planner.timing import Speeds, time_plan
from zeroinf.planner.workload import Lengths, Shape, Simulate, Workload

MOST_ROWS = 4096
"""More rows a GPU than this are never tried: long before, arithmetic binds."""

MOST_MICRO_BATCH_ROWS = 512
"""More rows in one forward hardly save time: resident weights are read seldom, and what attention gathers grows."""

# What is tried, one after the other, until a pass fits, and all of it with the most promising numbers of rows: parts of
# the most rows and of the most prompt tokens.
_PARTS = ((1, 1), (1, 4), (4, 1), (16, 4), (64, 16))
_PREFILL_TOKENS = (2048, 16384)
_SHORTEST_PART = 256
_PROMISING = 3
# The most rows that fit are found to a part of so many.
_CLOSE_ENOUGH, _CLOSE_AT_FIRST = 32, 8
# Ways to run that are slower than so large a part of the best, at first sight, are left at that.
_NEAR = 0.8

_HOST_SHARES = (0.0, 0.75, 1.0)
# Keys and values leave the GPU where that is expected to bring so much: they take host memory, and rates vary.
_WORTHWHILE = 1.03


@dataclass(frozen=True, slots=True)
class _SearchPoint:
    """What a climb varies."""

    rows: int
    micro_batches: int
    prefill_tokens: int

    @classmethod
    def of(cls, choice: Choice) -> _SearchPoint:
        if choice.forward_tokens:
            tokens = choice.batch_size + choice.prefill_tokens
            return cls(choice.batch_size, -(-tokens // choice.forward_tokens), choice.prefill_tokens)
        longest = max(choice.batch_size - choice.host_rows, choice.host_rows)
        return cls(choice.batch_size, -(-longest // choice.micro_batch_rows), choice.prefill_tokens)


class Planner:
    """Plans for one model on one machine. Pure: the same facts give the same decision."""

    def __init__(
        self,
        anatomy: Anatomy,
        machine: Machine,
        speeds: Speeds,
        engine_terms: EngineTerms,
        simulate: Simulate,
        *,
        device: Literal["cuda", "cpu"],
        lengths: Lengths,
        thorough: bool = True,
    ) -> None:
        """`thorough` False tries fewer candidates, for a plan that is at most as fast, in a fraction of the time."""
        self._anatomy = anatomy
        self._speeds = speeds
        self._simulate = simulate
        self._device = device
        self._lengths = lengths
        self._engine_terms = engine_terms
        self._thorough = thorough
        self._gpu_bytes = min((gpu.free_bytes for gpu in machine.gpus), default=0)
        self._host_bytes = machine.memory.available_bytes

    def choose(self, constraints: Constraints) -> Decision:
        """The best plan for `constraints`. Raises DoesNotFitError when there is none, with the nearest misses."""
        if constraints.host_share != "auto":
            outcome = self._choose(constraints)
            if not isinstance(outcome, Decision):
                raise NothingFitsError(outcome)
            return outcome
        best: Decision | None = None
        rejected: list[Rejection] = []
        for share in _HOST_SHARES if self._device == "cuda" else _HOST_SHARES[:1]:
            if best is not None and self._most_with_host(constraints) <= _WORTHWHILE * best.tokens_per_second:
                break
            found = self._choose(replace(constraints, host_share=share), best.tokens_per_second if best else 0.0)
            if not isinstance(found, Decision):
                rejected += found
            elif best is None or found.tokens_per_second > _WORTHWHILE * best.tokens_per_second:
                best = found
        if best is None:
            nearest = {(one.offload, one.fetch): one for one in sorted(rejected, key=lambda one: -one.price)}
            raise NothingFitsError(list(nearest.values()))
        return best

    def _most_with_host(self, constraints: Constraints) -> float:
        """Tokens/s that no number of rows in host memory can exceed, however few weights stream beside them.

        With rows on the GPU as well, it is this or what those on the GPU reach alone, whichever is more.
        """
        prompt, new = self._lengths.mean_prompt_tokens, self._lengths.mean_new_tokens
        tokens = (prompt or self._lengths.prompt_tokens) + (new or self._lengths.new_tokens) / 2
        row = fetched_bytes(self._anatomy, constraints.kv_dtype, tokens)
        return constraints.world_size * self._speeds.link_gbps * 1e9 / row

    def _choose(self, constraints: Constraints, speed: float = 0.0) -> Decision | list[Rejection]:
        """The best plan for one share of rows in host memory, or why there is none. `speed` can be had elsewhere."""
        budgets: dict[MemoryPlace, int] = {"host": self._host_bytes}
        if self._device == "cuda":
            budgets["gpu"] = self._gpu_bytes
        if constraints.nvme_space_bytes is not None:
            budgets["disk"] = constraints.nvme_space_bytes
        tried: dict[tuple[Offload, Fetch], list[Candidate]] = {}
        rejected: list[Rejection] = []
        for offload in offloads_of(constraints):
            for fetch in fetches_of(constraints, offload, has_encoder=self._anatomy.encoder is not None):
                outcome = list(self._candidates(constraints, offload, fetch, budgets))
                fitting = [one for one in outcome if isinstance(one, Candidate)]
                tried[offload, fetch] = fitting
                rejected += [one for one in outcome if isinstance(one, Rejection)][:1] if not fitting else []
        if not any(tried.values()):
            return rejected
        best = {way: max(fitting, key=self._merit) for way, fitting in tried.items() if fitting}
        near = _NEAR * max(speed, *(one.timing.tokens_per_second for one in best.values()))
        found = [
            self._climbed(constraints, tried[way], budgets)
            if self._thorough and one.timing.tokens_per_second >= near
            else one
            for way, one in best.items()
        ]
        found.sort(key=self._merit, reverse=True)
        way = tried[found[0].choice.offload, found[0].choice.fetch]
        return Decision(
            chosen=found[0],
            alternatives=tuple(found[1:]),
            tried=tuple(sorted(way, key=lambda one: one.choice.batch_size)),
            rejected=tuple(rejected),
            budgets=budgets,
        )

    def _candidates(
        self, constraints: Constraints, offload: Offload, fetch: Fetch, budgets: dict[MemoryPlace, int]
    ) -> Iterator[Candidate | Rejection]:
        """All that is worth comparing of one way to run, or why it does not fit."""
        fewest = self._fewest_residents(constraints, offload)
        if (
            offload == "nvme"
            and not self._choice(constraints, offload, fetch, constraints.batch_size or 1, fewest).nvme_blocks
        ):
            return  # the host can hold all that streams
        sizes = [constraints.batch_size] if constraints.batch_size else list(_doubling(_most_rows(constraints)))
        found: list[Candidate] = []
        for outcome in self._growing(constraints, self._choice(constraints, offload, fetch, 1, fewest), sizes, budgets):
            if isinstance(outcome, Candidate):
                found += [outcome, *self._with_more_residents(constraints, outcome, budgets)]
            elif not found:
                yield self._true_shortage(constraints, outcome, fewest, budgets)
        if self._thorough:
            found += self._in_other_parts(constraints, found, budgets)
        yield from found

    def _true_shortage(
        self, constraints: Constraints, rejected: Rejection, fewest: int, budgets: dict[MemoryPlace, int]
    ) -> Rejection:
        """Why a way does not fit: what the host lacks, where blocks had to stay on the GPU for want of host memory."""
        if rejected.offload != "cpu" or constraints.resident_blocks is not None or not fewest:
            return rejected
        blocks, rows = len(self._anatomy.blocks), rejected.batch_size
        choice = self._choice(constraints, "cpu", rejected.fetch, rows, 0)
        outcome = self._try(constraints, choice, {**budgets, "host": sys.maxsize})
        needed = self._host_bytes_beside_blocks(constraints, 1) + blocks * max(pieces(self._anatomy, constraints.wire))
        if isinstance(outcome, Candidate):
            needed = max(needed, total(outcome.terms, "host"))
        short = Shortage(place="host", needed_bytes=needed, available_bytes=self._host_bytes)
        return Rejection.of(choice, short, *(outcome.shortages if isinstance(outcome, Rejection) else ()))

    def _in_other_parts(
        self, constraints: Constraints, found: Sequence[Candidate], budgets: dict[MemoryPlace, int]
    ) -> list[Candidate]:
        """The most promising of `found` with passes in smaller parts, and what that leaves room for in resident blocks.

        Parts that are as large as fit come first elsewhere; where weights and rows in host memory share a link, blocks
        that stay on the GPU may be worth more.
        """
        best = {one.choice.batch_size: one for one in sorted(found, key=self._merit)}
        tried: list[Candidate] = []
        for candidate in sorted(best.values(), key=self._merit)[-_PROMISING:]:
            rows, fewest = candidate.choice.batch_size, self._fewest_residents(constraints, candidate.choice.offload)
            start = self._choice(constraints, candidate.choice.offload, candidate.choice.fetch, rows, fewest)
            for shape in self._shapes(constraints, rows) if self._makes_parts(constraints) else ():
                outcome = self._try_shape(constraints, start, shape, budgets)
                if isinstance(outcome, Candidate):
                    tried += [outcome, *self._with_more_residents(constraints, outcome, budgets, shape)]
        return tried

    def _climbed(
        self, constraints: Constraints, found: Sequence[Candidate], budgets: dict[MemoryPlace, int]
    ) -> Candidate:
        """The best that can be reached from the most promising of `found`, step by step."""
        way = found[0].choice

        @cache
        def best_at(point: _SearchPoint) -> Candidate | None:
            shape = self._shape_at(constraints, point)
            fewest = self._fewest_residents(constraints, way.offload)
            choice = self._choice(constraints, way.offload, way.fetch, point.rows, fewest)
            if shape is None or self._too_many_rows(constraints, choice, budgets):
                return None
            outcome = self._try_shape(constraints, choice, shape, budgets)
            if not isinstance(outcome, Candidate):
                return None
            return max([outcome, *self._with_more_residents(constraints, outcome, budgets, shape)], key=self._merit)

        def merit(point: _SearchPoint) -> tuple[float, ...]:
            there = best_at(point)
            return self._merit(there) if there else ()

        ranked = sorted(found, key=self._merit, reverse=True)
        starts = list(dict.fromkeys(_SearchPoint.of(one.choice) for one in ranked))[:_PROMISING]
        tops = [best_at(climb(point, partial(self._beside, constraints), merit)) for point in starts]
        return max((ranked[0], *filter(None, tops)), key=self._merit)

    def _beside(self, constraints: Constraints, point: _SearchPoint, factor: float) -> Iterator[_SearchPoint]:
        """Other rows, micro-batches and prompt tokens, one of them so many times as many, or one more or fewer."""
        for times in (factor, 1 / factor):
            rows = point.rows if constraints.batch_size else _other(point.rows, times)
            yield replace(point, rows=rows)
            if not self._makes_parts(constraints):
                continue
            yield replace(point, prefill_tokens=self._other_tokens(constraints, point.prefill_tokens, times))
            # What the one takes of memory, the other leaves.
            yield replace(
                point, rows=rows, prefill_tokens=self._other_tokens(constraints, point.prefill_tokens, 1 / times)
            )
            if not constraints.micro_batch_rows:
                yield replace(point, micro_batches=_other(point.micro_batches, times))
        if constraints.requests is not None and not constraints.batch_size:  # waves of one size
            requests = -(-constraints.requests // constraints.streams)
            waves = -(-requests // point.rows)
            yield replace(point, rows=-(-requests // waves))

    def _shape_at(self, constraints: Constraints, point: _SearchPoint) -> Shape | None:
        """Passes like these, if there are any."""
        if not (1 <= point.rows <= _most_rows(constraints) and 1 <= point.micro_batches <= point.rows):
            return None
        on_host = _host_rows(constraints, point.rows)
        sides = (point.rows - on_host, on_host)
        if not self._makes_parts(constraints):
            shape = next(self._shapes(constraints, point.rows))
        else:
            together = max(-(-side // point.micro_batches) for side in sides)
            if constraints.micro_batch_rows:
                together = max(-(-side // -(-side // constraints.micro_batch_rows)) for side in sides if side)
            most = self._whole(constraints, min(point.rows * self._lengths.prompt_tokens, _PREFILL_TOKENS[1]))
            least = self._lengths.prompt_tokens if self._lengths.whole else min(_SHORTEST_PART, most)
            tokens = max(least, min(point.prefill_tokens, most))
            if self._packs(constraints):
                return self._packed(constraints, point.rows, point.micro_batches, tokens)
            shape = Shape(point.rows, together, tokens, on_host, constraints.kv_dtype)
        return shape if shape.micro_batch_rows <= (constraints.micro_batch_rows or MOST_MICRO_BATCH_ROWS) else None

    def _growing(
        self, constraints: Constraints, start: Choice, sizes: Sequence[int], budgets: dict[MemoryPlace, int]
    ) -> Iterator[Candidate | Rejection]:
        """`start` with more rows: each of `sizes` until one does not fit, then what lies between, by bisection."""
        fits, miss = 0, None
        for rows in sizes:
            outcome = self._try(constraints, self._with_rows(constraints, start, rows), budgets)
            yield outcome
            if isinstance(outcome, Rejection):
                miss = rows
                break
            fits = rows
        close = _CLOSE_ENOUGH if self._thorough else _CLOSE_AT_FIRST
        while miss is not None and fits and miss - fits > 1 + fits // close:
            rows = (fits + miss) // 2
            outcome = self._try(constraints, self._with_rows(constraints, start, rows), budgets)
            yield outcome
            fits, miss = (rows, miss) if isinstance(outcome, Candidate) else (fits, rows)

    def _with_rows(self, constraints: Constraints, choice: Choice, rows: int) -> Choice:
        return self._choice(constraints, choice.offload, choice.fetch, rows, choice.resident_blocks)

    def _with_more_residents(
        self,
        constraints: Constraints,
        candidate: Candidate,
        budgets: dict[MemoryPlace, int],
        shape: Shape | None = None,
    ) -> list[Candidate]:
        """The same with as many resident blocks as fit beside its rows, if more do; in passes of `shape`, or any."""
        choice, blocks = candidate.choice, len(self._anatomy.blocks)
        if (
            constraints.resident_blocks is not None
            or choice.offload == "none"
            or not descriptor_of(constraints.engine).places_blocks
        ):
            return []
        place: MemoryPlace = "gpu" if "gpu" in budgets else "host"
        free = budgets[place] - total(candidate.terms, place)
        room, slots = free // max(pieces(self._anatomy, choice.wire)), SLOTS[choice.fetch]
        for residents in range(blocks - 1, choice.resident_blocks, -1):
            # The last that stream pass through fewer slots: one more that stays takes nothing then.
            spared = min(slots, blocks - choice.resident_blocks) - min(slots, blocks - residents)
            if residents - choice.resident_blocks > room + spared:
                continue
            changed = self._choice(constraints, choice.offload, choice.fetch, choice.batch_size, residents)
            is_another_way = choice.offload == "nvme" and not changed.nvme_blocks  # nothing is left for the disk
            if is_another_way:
                continue
            outcome = (
                self._try(constraints, changed, budgets)
                if shape is None
                else self._try_shape(constraints, changed, shape, budgets)
            )
            if isinstance(outcome, Candidate):
                return [outcome]
        return []

    def _choice(self, constraints: Constraints, offload: Offload, fetch: Fetch, rows: int, residents: int) -> Choice:
        blocks = len(self._anatomy.blocks)
        on_disk = 0
        if offload == "nvme":
            on_disk = blocks - residents
            if constraints.offload == "auto" and descriptor_of(constraints.engine).mixes_tiers:
                on_disk -= min(on_disk, self._blocks_in_host(constraints, rows))
        return Choice(
            engine=constraints.engine,
            offload=offload,
            fetch=fetch,
            batch_size=rows,
            micro_batch_rows=rows,
            prefill_tokens=rows * self._lengths.prompt_tokens,
            resident_blocks=residents,
            nvme_blocks=on_disk,
            wire=constraints.wire,
            host_rows=_host_rows(constraints, rows),
            kv_dtype=constraints.kv_dtype,
        )

    def _shapes(self, constraints: Constraints, rows: int) -> Iterator[Shape]:
        """Ways to make passes of `rows` rows, those that take most memory and least time first."""
        if self._makes_parts(constraints):
            yield from dict.fromkeys(self._shape(constraints, rows, *shares) for shares in _PARTS)
        else:
            prompts = rows * self._lengths.prompt_tokens
            yield Shape(rows, rows, prompts, _host_rows(constraints, rows), constraints.kv_dtype)

    def _makes_parts(self, constraints: Constraints) -> bool:
        """Whether rows of a pass may run in several micro-batches, and prompts in several passes."""
        return self._packs(constraints) or (descriptor_of(constraints.engine).shares_passes and self._anatomy.is_paged)

    def _packs(self, constraints: Constraints) -> bool:
        """Whether rows of a forward lie side by side."""
        on_host, scored = _host_rows(constraints, MOST_ROWS) > 0, self._lengths.scored_tokens > 0
        return not why_padded(self._anatomy, constraints.engine, on_host=on_host, scored=scored)

    def _packed(self, constraints: Constraints, rows: int, forwards: int, tokens: int) -> Shape:
        """Passes of `rows` rows and so many prompt tokens in about as many forwards."""
        on_host = _host_rows(constraints, rows)
        # What is fetched for a forward takes room by its rows; nothing else of a forward does.
        most = max(-(-side // forwards) for side in (rows - on_host, on_host)) if on_host else rows
        together = min(most, constraints.micro_batch_rows or most)
        least = self._lengths.prompt_tokens if self._lengths.whole else 1
        size = max(least, -(-(rows + tokens) // max(forwards, -(-rows // together))))
        return Shape(rows, together, tokens, on_host, constraints.kv_dtype, size)

    def _shape(self, constraints: Constraints, rows: int, rows_share: int, tokens_share: int) -> Shape:
        """`rows` rows in such parts of the most rows that run together, and of the most prompt tokens."""
        # With as many prompt tokens as are computed in the time that the weights take, the link waits for nothing.
        link_s = self._anatomy.block_bytes / self._speeds.link_gbps / 1e9
        worthwhile = link_s * self._speeds.tflops * 1e12 / (2 * self._anatomy.parameters)
        most = int(sorted((_PREFILL_TOKENS[0], worthwhile, _PREFILL_TOKENS[1]))[1])
        tokens = min(rows * self._lengths.prompt_tokens, most)
        part = min(tokens, max(tokens // tokens_share, _SHORTEST_PART))
        part = max(part, self._lengths.prompt_tokens) if self._lengths.whole else part
        if self._packs(constraints):
            return self._packed(constraints, rows, rows_share, part)
        on_host = _host_rows(constraints, rows)
        together = constraints.micro_batch_rows or MOST_MICRO_BATCH_ROWS // rows_share
        # No more than there are where all rows are live: fewer live rows would else run in larger micro-batches.
        together = max(-(-side // -(-side // together)) for side in (rows - on_host, on_host) if side)
        return Shape(rows, together, self._whole(constraints, part), on_host, constraints.kv_dtype)

    def _whole(self, constraints: Constraints, tokens: int) -> int:
        """As many prompt tokens as the longest prompts among `tokens` have, of which padded passes are simulated:
        shorter ones would use up what is left."""
        longest = self._lengths.prompt_tokens
        return tokens - tokens % longest if tokens > longest and not self._packs(constraints) else tokens

    def _other_tokens(self, constraints: Constraints, tokens: int, times: float) -> int:
        """So many times as many prompt tokens, in whole prompts, and another number in any case."""
        other, prompt = self._whole(constraints, int(tokens * times)), self._lengths.prompt_tokens
        return other if other != tokens else tokens + (prompt if times > 1 else -prompt)

    def _fewest_residents(self, constraints: Constraints, offload: Offload) -> int:
        """Blocks that must stay on the GPU, by the user's word or since the host cannot hold them."""
        blocks = len(self._anatomy.blocks)
        if offload == "none":
            return blocks
        if constraints.resident_blocks is not None:
            return min(constraints.resident_blocks, blocks)
        if offload == "cpu" and self._device == "cuda" and descriptor_of(constraints.engine).mixes_tiers:
            return max(0, min(blocks - 1, blocks - self._blocks_in_host(constraints, 1)))
        return 0

    def _blocks_in_host(self, constraints: Constraints, rows: int) -> int:
        """How many blocks the host can hold beside everything else there."""
        free = self._host_bytes - self._host_bytes_beside_blocks(constraints, rows)
        return max(0, free // max(pieces(self._anatomy, constraints.wire)))

    def _host_bytes_beside_blocks(self, constraints: Constraints, rows: int) -> int:
        """What the host holds beside blocks, the stages of resident ones included."""
        blocks = len(self._anatomy.blocks)
        resident = min(LOADING_STAGES - 1, blocks) if self._device == "cuda" else 0
        nothing = Choice(
            engine=constraints.engine,
            offload="nvme",
            fetch="replicated",
            batch_size=rows,
            micro_batch_rows=rows,
            prefill_tokens=rows,
            resident_blocks=resident,
            nvme_blocks=blocks - resident,
            wire=constraints.wire,
        )
        terms = (
            *self._engine_terms.elsewhere(nothing, None),
            *self._request_terms(),
        )
        if self._device == "cpu":  # what computes lies there, too
            terms = self._terms(constraints, nothing, self._simulate(next(self._shapes(constraints, rows))))
        return total(terms, "host")

    def _try(self, constraints: Constraints, choice: Choice, budgets: dict[MemoryPlace, int]) -> Candidate | Rejection:
        rejected = self._too_many_rows(constraints, choice, budgets)
        for shape in self._shapes(constraints, choice.batch_size) if rejected is None else ():
            outcome = self._try_shape(constraints, choice, shape, budgets)
            if isinstance(outcome, Candidate):
                return outcome
            rejected = outcome
        assert rejected is not None
        return rejected

    def _too_many_rows(
        self, constraints: Constraints, choice: Choice, budgets: dict[MemoryPlace, int]
    ) -> Rejection | None:
        """What the KV cache alone says of more rows than one, which takes no simulation."""
        place: MemoryPlace = "gpu" if "gpu" in budgets else "host"
        pool = self._anatomy.pool_bytes(self._lengths.pool(self._anatomy, choice.batch_size, choice.host_rows))
        if constraints.batch_size is not None or choice.batch_size == 1 or pool <= budgets[place]:
            return None
        shortage = Shortage(place=place, needed_bytes=pool, available_bytes=budgets[place])
        return Rejection.of(choice, shortage)

    def _try_shape(
        self, constraints: Constraints, choice: Choice, shape: Shape, budgets: dict[MemoryPlace, int]
    ) -> Candidate | Rejection:
        choice = replace(
            choice,
            micro_batch_rows=shape.micro_batch_rows,
            prefill_tokens=shape.prefill_tokens,
            forward_tokens=shape.forward_tokens,
        )
        workload = self._simulate(shape)
        terms = self._terms(constraints, choice, workload)
        needed = {place: total(terms, place) for place in budgets}
        shortages = tuple(
            Shortage(place=place, needed_bytes=needed[place], available_bytes=available)
            for place, available in budgets.items()
            if needed[place] > available
        )
        if shortages:
            return Rejection.of(choice, *shortages)
        timing = time_plan(
            self._anatomy,
            choice,
            workload,
            self._speeds,
            constraints.streams,
            constraints.requests,
            static=constraints.static_batches,
        )
        return Candidate(choice=choice, pool=workload.pool, host=workload.host, terms=terms, timing=timing)

    def _merit(self, candidate: Candidate) -> tuple[float, int, int, int]:
        """More tokens/s; of equals, what needs fewer things to work, then more rows, then fewer blocks on the GPU.

        A CPU computes few rows as fast as many, and its memory belongs to others, too: there, fewer rows of equals.
        """
        choice, on_cpu = candidate.choice, self._device == "cpu"
        speed = float(f"{candidate.timing.tokens_per_second:.{2 if on_cpu else 3}g}")
        rows = -choice.batch_size if on_cpu else choice.batch_size
        return (speed, -OFFLOADS.index(choice.offload), rows, -choice.resident_blocks)

    def _request_terms(self) -> tuple[Term, ...]:
        """What the job's requests take of host memory."""
        held = self._lengths.request_bytes
        return (Term("host", REQUESTS, held, "counted"),) if held else ()

    def _terms(self, constraints: Constraints, choice: Choice, workload: Workload) -> tuple[Term, ...]:
        own = self._engine_terms
        terms = (*own.gpu(choice, workload), *own.elsewhere(choice, workload.host), *self._request_terms())
        if scored := scores_bytes(self._anatomy, self._lengths.scored_tokens):
            terms = (*terms, Term("gpu", SCORES, scored, "counted"))
        if self._device == "cpu":
            terms = tuple(
                _on_host(term, constraints.world_size) for term in terms if term.name not in (SMALL_PAGES, GAPS)
            )
        return terms


def _on_host(term: Term, world_size: int) -> Term:
    """Without a GPU each rank computes in host memory."""
    return replace(term, place="host", nbytes=term.nbytes * world_size) if term.place == "gpu" else term


def _other(number: int, times: float) -> int:
    """So many times as many, and another number in any case."""
    other = round(number * times)
    return other if other != number else number + (1 if times > 1 else -1)


def _host_rows(constraints: Constraints, rows: int) -> int:
    """Rows of which keys and values rest in host memory."""
    assert constraints.host_share != "auto"
    return round(constraints.host_share * rows)


def _most_rows(constraints: Constraints) -> int:
    """As many as a stream has requests, within reason."""
    return (
        MOST_ROWS if constraints.requests is None else min(MOST_ROWS, -(-constraints.requests // constraints.streams))
    )


def _doubling(cap: int) -> Iterator[int]:
    rows = 1
    while rows < cap:
        yield rows
        rows *= 2
    yield cap
