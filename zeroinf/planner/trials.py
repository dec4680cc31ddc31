"""Tries settings: whether they fit into the memory that is there, and how fast they are.

Input: the facts of a search, the user's constraints and the budgets of memory in bytes. Output: a `Candidate` with its
memory terms and times, or a `Rejection` that says what is short.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial

from zeroinf.model.cache_layout import HostSize
from zeroinf.planner.choice import Choice, Fetch, Offload
from zeroinf.planner.constraints import Constraints
from zeroinf.planner.decision import Candidate, Rejection, Shortage
from zeroinf.planner.descriptor import descriptor_of
from zeroinf.planner.facts import Facts
from zeroinf.planner.graphs import graph_options, why_launched
from zeroinf.planner.memory import (
    COMPUTED,
    GAPS,
    MASKS,
    REQUESTS,
    SCORES,
    SMALL_PAGES,
    MemoryPlace,
    Term,
    mask_bytes,
    roughly,
    scores_bytes,
    total,
)
from zeroinf.planner.pass_shapes import PassShapes
from zeroinf.planner.routing import few_tokens
from zeroinf.planner.search_space import OFFLOADS
from zeroinf.planner.timing import Timing, launches_bind, time_plan
from zeroinf.planner.walks import device_bytes, with_pieces_on_disk
from zeroinf.planner.workload import Shape, Workload

# Where rows compute, an allocator loses less than so many bytes and such a part of what passes take: in 1,200 plans of
# Gemma-4-26B and GLM-4.5-Air a fifth, where that is much, and 22 MiB of 100.
_LOST_BYTES, _LOST_SHARE = 64 << 20, 0.25

Budgets = Mapping[MemoryPlace, int]
"""Bytes that a run may take of each place."""


class Trials:
    """Settings under some constraints, tried against one set of budgets."""

    def __init__(
        self,
        facts: Facts,
        constraints: Constraints,
        budgets: Budgets,
        shapes: PassShapes,
        *,
        exact: bool = False,
    ) -> None:
        """`exact`: no candidate is taken to fit before all that it takes is known, which takes several times as
        long."""
        self.exact = exact
        self._facts, self._anatomy = facts, facts.anatomy
        assert constraints.embeddings != "auto"
        self._embeddings = constraints.embeddings
        self._constraints, self._budgets, self._shapes = constraints, budgets, shapes
        self._engine, self._parts = descriptor_of(constraints.engine), constraints.expert_parts or 1
        asked = constraints.routed_tokens
        few = few_tokens(facts.anatomy, constraints.wire) if asked is None else asked
        self._routed_tokens = few if self._parts > 1 else 0
        self._held: dict[tuple[int, int], bool] = {}

    def choice(self, offload: Offload, fetch: Fetch, rows: int, residents: int) -> Choice:
        """The settings of `rows` rows and so many resident blocks, before the shape of their passes is known. What is
        left to NVMe is wholly there, unless the host can hold it."""
        constraints, on_disk = self._constraints, 0
        if offload == "nvme":
            fills_host = constraints.offload == "auto" and self._engine.mixes_tiers
            on_disk = 0 if fills_host and self._host_holds(rows, residents) else len(self._anatomy.blocks) - residents
        return self._choice(offload, fetch, rows, residents, on_disk)

    def _choice(self, offload: Offload, fetch: Fetch, rows: int, residents: int, on_disk: int) -> Choice:
        constraints = self._constraints
        return Choice(
            engine=constraints.engine,
            offload=offload,
            fetch=fetch,
            batch_size=rows,
            micro_batch_rows=rows,
            prefill_tokens=rows * self._facts.lengths.prompt_tokens,
            resident_blocks=residents,
            nvme_blocks=on_disk,
            wire=constraints.wire,
            host_rows=self._shapes.host_rows(rows),
            kv_dtype=constraints.kv_dtype,
            embeddings=self._embeddings,
            expert_parts=self._parts,
            routed_tokens=self._routed_tokens if residents < len(self._anatomy.blocks) else 0,
        )

    def fewest_residents(self, offload: Offload) -> int:
        """Blocks that must stay on the GPU, by the user's word or since the host cannot hold them."""
        blocks, asked = len(self._anatomy.blocks), self._constraints.resident_blocks
        if offload == "none":
            return blocks
        if asked is not None:
            return min(asked, blocks)
        if offload == "cpu" and self._facts.device == "cuda" and self._engine.mixes_tiers:
            return next((residents for residents in range(blocks - 1) if self._host_holds(1, residents)), blocks - 1)
        return 0

    def in_any_shape(self, choice: Choice) -> Candidate | Rejection:
        """The first shape of passes that fits, of those that take most memory and least time first."""
        rejected = self.too_many_rows(choice)
        for shape in self._shapes.of_rows(choice.batch_size) if rejected is None else ():
            outcome = self.in_shape(choice, shape)
            if isinstance(outcome, Candidate):
                return outcome
            rejected = outcome
        assert rejected is not None
        return rejected

    def in_shape(self, choice: Choice, shape: Shape) -> Candidate | Rejection:
        """`choice` in passes of `shape`, with the CUDA graphs of layers that make it fastest, or as many as fit."""
        outcome, *others = sorted(self.with_graphs(choice, shape), key=_speed, reverse=True)
        while isinstance(outcome, Rejection) and others:
            outcome, *others = others
        return outcome

    def with_graphs(self, choice: Choice, shape: Shape) -> Iterator[Candidate | Rejection]:
        """`choice` in passes of `shape`, with CUDA graphs for as many tokens as are worth comparing."""
        choice, workload = _in_passes(choice, shape), self._facts.simulate(shape)
        options: tuple[int, ...] = (0,)
        fits = False
        launched = why_launched(self._anatomy, choice.engine, self._facts.device, expert_parts=choice.expert_parts)
        if not launched and workload.packed is not None:
            binds = launches_bind(self._anatomy, choice, workload, self._facts.speeds)
            options = graph_options(self._anatomy, workload, binds)
        for tokens in options:
            if fits and not tokens and choice.offload == "none":
                return  # no layer could stay in their place
            outcome = self._tried(replace(choice, graph_tokens=tokens), workload)
            fits = fits or isinstance(outcome, Candidate)
            yield outcome

    def _tried(self, choice: Choice, workload: Workload) -> Candidate | Rejection:
        choice = self._filling_host(choice, workload)
        counted = cache(partial(self._terms, choice, workload))
        least = self._terms(choice, roughly(workload))
        if not self._surely_fits(least) and (shortages := self._shortages(choice, least, counted)):
            return Rejection.of(choice, *shortages)
        timing = self._timing(choice, workload)
        if choice.batch_size <= choice.routed_tokens and self._constraints.routed_tokens is None:
            all_experts = replace(choice, routed_tokens=0)
            other = self._timing(all_experts, workload)
            if other.tokens_per_second > timing.tokens_per_second:
                choice, timing = all_experts, other
        timing, host = self._with_turns(choice, workload, timing)
        return Candidate(
            choice=choice,
            pool=workload.pool,
            host=host,
            least_terms=least,
            counted=counted,
            timing=timing,
        )

    def _with_turns(self, choice: Choice, workload: Workload, timing: Timing) -> tuple[Timing, HostSize | None]:
        """The time, and the room in host memory: with two forwards of steps for which the CPU attends in turns, where
        one may be a layer ahead of the other and that is faster than one forward, which takes `timing`."""
        host = workload.host
        expands = choice.wire != "model" or workload.expansion is not None
        if host is None or host.cpu_rows < 2 or expands or choice.expert_parts > 1:
            return timing, host
        two = replace(host, cpu_forwards=2)
        other = self._timing(choice, replace(workload, host=two))
        return (other, two) if other.tokens_per_second > timing.tokens_per_second else (timing, host)

    def _timing(self, choice: Choice, workload: Workload) -> Timing:
        constraints = self._constraints
        return time_plan(
            self._anatomy,
            choice,
            workload,
            self._facts.speeds,
            constraints.streams,
            constraints.requests,
            static=constraints.static_batches,
        )

    def _filling_host(self, choice: Choice, workload: Workload) -> Choice:
        """`choice` with as much of what would rest on NVMe in host memory as there is room for beside all else."""
        if not choice.nvme_blocks or self._constraints.offload != "auto" or not self._engine.mixes_tiers:
            return choice

        def left_bytes(some: Choice) -> int:
            return self._budgets["host"] - self._host_bytes(some, workload)

        return with_pieces_on_disk(self._anatomy, choice, left_bytes)

    def fits(self, candidate: Candidate) -> bool:
        """Whether all that `candidate` takes is there."""
        return not self._missing(candidate.terms)

    def _surely_fits(self, least: Sequence[Term]) -> bool:
        return not self.exact and not self._missing(least, _most_lost(least))

    def _shortages(
        self, choice: Choice, least: Sequence[Term], counted: Callable[[], tuple[Term, ...]]
    ) -> tuple[Shortage, ...]:
        """What is short; of many rows, by the `least` terms alone where these do."""
        many = choice.batch_size not in (1, self._constraints.batch_size)
        return (many and self._missing(least, -_LOST_BYTES)) or self._missing(counted())

    def _missing(self, terms: Sequence[Term], more: float = 0.0) -> tuple[Shortage, ...]:
        """What is short for `terms`, and for so many bytes more where rows compute."""
        needed = {place: total(terms, place) for place in self._budgets}
        return tuple(
            Shortage(place=place, needed_bytes=needed[place], available_bytes=available)
            for place, available in self._budgets.items()
            if needed[place] + (more if place == self._facts.compute_place else 0) > available
        )

    def too_many_rows(self, choice: Choice) -> Rejection | None:
        """Reject more rows than one by the KV cache alone, which takes no simulation."""
        place = self._facts.compute_place
        rows, packed = (choice.batch_size, choice.host_rows), self._shapes.packs
        size = self._facts.lengths.pool(self._anatomy, *rows, packed=packed)
        pool, available = self._anatomy.pool_bytes(size), self._budgets[place]
        if self._constraints.batch_size is not None or choice.batch_size == 1 or pool <= available:
            return None
        return Rejection.of(choice, Shortage(place=place, needed_bytes=pool, available_bytes=available))

    def with_more_residents(self, candidate: Candidate, shape: Shape | None = None) -> list[Candidate]:
        """Give `candidate` as many resident blocks as fit beside its rows, if more do; in passes of its `shape` with
        its graphs, or in any."""
        choice = candidate.choice
        if self._constraints.resident_blocks is not None or choice.offload == "none" or not self._engine.places_blocks:
            return []
        for residents in self._more_residents(candidate):
            changed = self.choice(choice.offload, choice.fetch, choice.batch_size, residents)
            is_another_way = choice.offload == "nvme" and not changed.nvme_blocks  # nothing is left for the disk
            if is_another_way:
                continue
            if shape is None:
                outcome = self.in_any_shape(changed)
            else:
                changed = replace(_in_passes(changed, shape), graph_tokens=choice.graph_tokens)
                outcome = self._tried(changed, self._facts.simulate(shape))
            if isinstance(outcome, Candidate):
                return [outcome]
        return []

    def _more_residents(self, candidate: Candidate) -> list[int]:
        """Numbers of resident blocks beside which `candidate` still has room, the most first; few may not fit."""
        taken, now = device_bytes(self._anatomy, candidate.choice), candidate.choice.resident_blocks

        def fitting(terms: Sequence[Term], lost: float = 0.0) -> list[int]:
            place = self._facts.compute_place
            free = self._budgets[place] - total(terms, place) - lost
            return [more for more in range(len(taken) - 2, now, -1) if taken[more] - taken[now] <= free]

        found = fitting(candidate.least_terms)
        if self.exact or found[:1] != fitting(candidate.least_terms, _most_lost(candidate.least_terms))[:1]:
            return fitting(candidate.terms)
        return found

    def true_shortage(self, rejected: Rejection, fewest: int) -> Rejection:
        """Why a way does not fit: where blocks had to stay on the GPU for want of host memory, the least that the host
        lacks, with as many blocks on the GPU as there is room for."""
        if rejected.offload != "cpu" or self._constraints.resident_blocks is not None or not fewest:
            return rejected
        choice = self.choice("cpu", rejected.fetch, rejected.batch_size, 0)
        with_plenty = Trials(self._facts, self._constraints, {**self._budgets, "host": sys.maxsize}, self._shapes)
        outcome, streamed, least = with_plenty.in_any_shape(choice), len(self._anatomy.blocks), 0
        if isinstance(outcome, Candidate):
            (outcome,) = with_plenty.with_more_residents(outcome) or [outcome]
            streamed, least = streamed - outcome.choice.resident_blocks, total(outcome.terms, "host")
        needed = max(least, self._bytes_without_disk(1, len(self._anatomy.blocks) - streamed))
        short = Shortage(place="host", needed_bytes=needed, available_bytes=self._facts.host_bytes)
        return Rejection.of(choice, short, *(outcome.shortages if isinstance(outcome, Rejection) else ()))

    def merit(self, candidate: Candidate) -> tuple[float, int, int, int]:
        """More tokens/s; of equals, what needs fewer things to work, then more rows, then fewer blocks on the GPU.

        A CPU computes few rows as fast as many, and its memory belongs to others, too: there, fewer rows of equals.
        """
        choice, on_cpu = candidate.choice, self._facts.device == "cpu"
        speed = float(f"{candidate.timing.tokens_per_second:.{2 if on_cpu else 3}g}")
        rows = -choice.batch_size if on_cpu else choice.batch_size
        return (speed, -OFFLOADS.index(choice.offload), rows, -choice.resident_blocks)

    def _host_holds(self, rows: int, residents: int) -> bool:
        """Whether the host can hold all blocks but the resident ones beside everything else there."""
        found = self._held.get((rows, residents))
        if found is None:
            found = self._held[rows, residents] = self._bytes_without_disk(rows, residents) <= self._facts.host_bytes
        return found

    def _bytes_without_disk(self, rows: int, residents: int) -> int:
        """Bytes that the host holds where all blocks but the resident ones rest there, before any shape is known."""
        choice = self._choice("cpu", "replicated", rows, residents, 0)
        on_gpu = self._facts.device == "cuda"
        return self._host_bytes(choice, None if on_gpu else self._facts.simulate(next(self._shapes.of_rows(rows))))

    def _host_bytes(self, choice: Choice, workload: Workload | None) -> int:
        """Bytes that the host holds, with what `workload` has there; where rows compute there it must be given."""
        if self._facts.device == "cpu":
            assert workload is not None
            return total(self._terms(choice, workload), "host")
        terms = self._facts.engine_terms.elsewhere(choice, workload.host if workload is not None else None)
        return total((*terms, *self._request_terms(choice.batch_size)), "host")

    def _request_terms(self, rows: int) -> tuple[Term, ...]:
        """Host memory that the job's requests take, and the masks of those that run, on all ranks."""
        lengths, pinned = self._facts.lengths, self._facts.device == "cuda"
        held = {REQUESTS: lengths.request_bytes}
        if lengths.structured:
            held[MASKS] = self._constraints.world_size * mask_bytes(self._anatomy, rows, pinned=pinned)
        return tuple(Term("host", name, nbytes, "counted") for name, nbytes in held.items() if nbytes)

    def _terms(self, choice: Choice, workload: Workload) -> tuple[Term, ...]:
        own = self._facts.engine_terms
        terms = (*own.gpu(choice, workload), *own.elsewhere(choice, workload.host))
        terms = (*terms, *self._request_terms(choice.batch_size))
        if scored := scores_bytes(self._anatomy, self._facts.lengths.scored_tokens):
            terms = (*terms, Term("gpu", SCORES, scored, "counted"))
        if self._facts.device == "cpu":
            ranks = self._constraints.world_size
            terms = tuple(_on_host(term, ranks) for term in terms if term.name not in (SMALL_PAGES, GAPS))
        return terms


def _in_passes(choice: Choice, shape: Shape) -> Choice:
    """`choice` in passes of `shape`."""
    return replace(
        choice,
        micro_batch_rows=shape.micro_batch_rows,
        prefill_tokens=shape.prefill_tokens,
        forward_tokens=shape.forward_tokens,
    )


def _speed(outcome: Candidate | Rejection) -> float:
    return outcome.timing.tokens_per_second if isinstance(outcome, Candidate) else 0.0


def _most_lost(least: Sequence[Term]) -> float:
    """More bytes than an allocator ever lost beside the `least` terms."""
    return _LOST_BYTES + _LOST_SHARE * sum(term.nbytes for term in least if term.name == COMPUTED)


def _on_host(term: Term, world_size: int) -> Term:
    """Without a GPU each rank computes in host memory."""
    return replace(term, place="host", nbytes=term.nbytes * world_size) if term.place == "gpu" else term
