"""The choice: where weights rest, what stays on the GPU, how ranks fetch and how many rows run, for most tokens/s."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Literal

from zeroinf.hardware.machine import Machine
from zeroinf.model.anatomy import Anatomy
from zeroinf.planner.choice import Choice, Fetch, Offload
from zeroinf.planner.decision import Candidate, Decision, Lack, Rejection, does_not_fit
from zeroinf.planner.kv import fetched_bytes
from zeroinf.planner.memory import (
    GAPS,
    LOADING_STAGES,
    SLOTS,
    SMALL_PAGES,
    Overhead,
    Place,
    Term,
    pieces,
    store_bytes,
    stream_gpu_terms,
    stream_host_terms,
    total,
)
from zeroinf.planner.timing import Speeds, time_plan
from zeroinf.planner.traits import TRAITS
from zeroinf.planner.ways import OFFLOADS, fetches_of, offloads_of
from zeroinf.planner.wish import Wish
from zeroinf.planner.workload import Lengths, Shape, Simulate, Workload

MOST_ROWS = 4096
"""More rows a GPU than this are never tried: long before, arithmetic binds."""

MOST_MICRO_BATCH_ROWS = 512
"""More rows in one forward hardly save time: resident weights are read seldom, and what attention gathers grows."""

# What is tried, one after the other, until a pass fits: parts of the most rows and of the most prompt tokens.
_PARTS = ((1, 1), (1, 4), (4, 1), (16, 4), (64, 16))
_PREFILL_TOKENS = (2048, 16384)
_SHORTEST_PART = 256
_PREFILL_SHARES = (0.75, 0.5, 0.375, 0.25, 0.125)
# The most rows are found to a part of so many, and those of what is chosen to a smaller one.
_CLOSE_ENOUGH = 32
_TO_THE_ROW = 256

# Of so many numbers of rows others are tried, too. Prompts that come one by one take longer than their plan says.
_PROMISING = 3
_OTHER_PARTS = (*product((1, 4, 16, 64), (1, 4)), (64, 16))

_HOST_SHARES = (0.0, 0.75, 1.0)
# Keys and values leave the GPU where that is expected to bring so much: they take host memory, and rates vary.
_WORTHWHILE = 1.03

EngineTerms = Callable[[Choice, Workload], tuple[Term, ...]]
"""Memory terms of a choice under another engine than the stream engine."""


class Planner:
    """Plans for one model on one machine. Pure: the same facts give the same decision."""

    def __init__(
        self,
        anatomy: Anatomy,
        machine: Machine,
        speeds: Speeds,
        overhead: Callable[[bool], Overhead],
        simulate: Simulate,
        *,
        device: Literal["cuda", "cpu"],
        lengths: Lengths,
        engine_terms: EngineTerms | None = None,
    ) -> None:
        self._anatomy = anatomy
        self._speeds = speeds
        self._overhead = overhead
        self._simulate = simulate
        self._device = device
        self._lengths = lengths
        self._engine_terms = engine_terms
        self._gpu_bytes = min((gpu.free_bytes for gpu in machine.gpus), default=0)
        self._host_bytes = machine.memory.available_bytes

    def choose(self, wish: Wish) -> Decision:
        """The best plan for `wish`. Raises DoesNotFitError when there is none, with the nearest misses."""
        if wish.host_share != "auto":
            outcome = self._choose(wish)
            if not isinstance(outcome, Decision):
                raise does_not_fit(outcome)
            return outcome
        best: Decision | None = None
        rejected: list[Rejection] = []
        for share in _HOST_SHARES if self._device == "cuda" else _HOST_SHARES[:1]:
            if best is not None and self._most_with_host(wish) <= _WORTHWHILE * best.tokens_per_second:
                break
            found = self._choose(replace(wish, host_share=share))
            if not isinstance(found, Decision):
                rejected += found
            elif best is None or found.tokens_per_second > _WORTHWHILE * best.tokens_per_second:
                best = found
        if best is None:
            nearest = {(one.offload, one.fetch): one for one in sorted(rejected, key=lambda one: -one.missing_bytes)}
            raise does_not_fit(list(nearest.values()))
        return best

    def _most_with_host(self, wish: Wish) -> float:
        """Tokens/s that no number of rows in host memory can exceed, however few weights stream beside them.

        With rows on the GPU as well, it is this or what those on the GPU reach alone, whichever is more.
        """
        prompt, new = self._lengths.mean_prompt_tokens, self._lengths.mean_new_tokens
        tokens = (prompt or self._lengths.prompt_tokens) + (new or self._lengths.new_tokens) / 2
        row = fetched_bytes(self._anatomy, wish.kv_dtype, tokens)
        return wish.world_size * self._speeds.link_gbps * 1e9 / row

    def _choose(self, wish: Wish) -> Decision | list[Rejection]:
        """The best plan for one share of rows in host memory, or why there is none."""
        budgets: dict[Place, int] = {"host": self._host_bytes}
        if self._device == "cuda":
            budgets["gpu"] = self._gpu_bytes
        if wish.nvme_space_bytes is not None:
            budgets["disk"] = wish.nvme_space_bytes
        found: list[Candidate] = []
        tried: dict[tuple[Offload, Fetch], list[Candidate]] = {}
        rejected: list[Rejection] = []
        for offload in offloads_of(wish):
            for fetch in fetches_of(wish, offload, has_encoder=self._anatomy.encoder is not None):
                outcome = list(self._candidates(wish, offload, fetch, budgets))
                fitting = [one for one in outcome if isinstance(one, Candidate)]
                tried[offload, fetch] = fitting
                found += [self._with_steady_prompts(wish, max(fitting, key=self._merit), budgets)] if fitting else []
                rejected += [one for one in outcome if isinstance(one, Rejection)][:1] if not fitting else []
        if not found:
            return rejected
        found.sort(key=self._merit, reverse=True)
        if not wish.batch_size and self._device == "cuda":
            found[0] = self._to_the_row(wish, found[0], budgets)
        way = tried[found[0].choice.offload, found[0].choice.fetch]
        return Decision(
            chosen=found[0],
            alternatives=tuple(found[1:]),
            tried=tuple(sorted(way, key=lambda one: one.choice.batch_size)),
            rejected=tuple(rejected),
            budgets=budgets,
        )

    def _candidates(
        self, wish: Wish, offload: Offload, fetch: Fetch, budgets: dict[Place, int]
    ) -> Iterator[Candidate | Rejection]:
        """All that is worth comparing of one way to run, or why it does not fit."""
        fewest = self._fewest_residents(wish, offload)
        if offload == "nvme" and not self._choice(wish, offload, fetch, wish.batch_size or 1, fewest).nvme_blocks:
            return  # the host can hold all that streams
        cap = min(MOST_ROWS, MOST_ROWS if wish.requests is None else -(-wish.requests // wish.streams))
        sizes = [wish.batch_size] if wish.batch_size else list(_doubling(cap))
        found: list[Candidate] = []
        for outcome in self._growing(wish, self._choice(wish, offload, fetch, 1, fewest), 0, sizes, budgets):
            if isinstance(outcome, Candidate):
                found += [outcome, *self._with_more_residents(wish, outcome, budgets)]
            elif not found:
                yield outcome
        if found and not wish.batch_size:
            found += self._beside(wish, found, budgets)
            best = max(found, key=self._merit).choice
            larger = [rows for rows in sizes if rows > best.batch_size]
            grown = self._growing(wish, best, best.batch_size, larger, budgets) if best.resident_blocks > fewest else ()
            found += [outcome for outcome in grown if isinstance(outcome, Candidate)]
            found += self._in_other_parts(wish, found, budgets)
            found += self._with_even_waves(wish, max(found, key=self._merit), budgets)
        elif found:
            found += self._in_other_parts(wish, found, budgets)
        yield from found

    def _beside(self, wish: Wish, found: Sequence[Candidate], budgets: dict[Place, int]) -> list[Candidate]:
        """More rows than the best has, and fewer than the next that was tried: that may fit in small parts only, and
        more of them beside fewer resident blocks."""
        best, tried = max(found, key=self._merit), list[Candidate]()
        fewest = self._fewest_residents(wish, best.choice.offload)
        slower = min((c.choice.batch_size for c in found if c.choice.batch_size > best.choice.batch_size), default=0)
        while slower - best.choice.batch_size > 1 + best.choice.batch_size // _CLOSE_ENOUGH:
            rows, choice = (best.choice.batch_size + slower) // 2, best.choice
            outcome = self._try(wish, self._with_rows(wish, choice, rows), budgets)
            if isinstance(outcome, Rejection) and choice.resident_blocks > fewest:
                outcome = self._try(wish, self._choice(wish, choice.offload, choice.fetch, rows, fewest), budgets)
            here = [outcome] if isinstance(outcome, Candidate) else []
            here += [more for one in here for more in self._with_more_residents(wish, one, budgets)]
            tried += here
            if here and self._merit(max(here, key=self._merit)) > self._merit(best):
                best = max(here, key=self._merit)
            else:
                slower = rows
        return tried

    def _in_other_parts(self, wish: Wish, found: Sequence[Candidate], budgets: dict[Place, int]) -> list[Candidate]:
        """The most promising of `found` with passes in smaller parts, and what that leaves room for in resident blocks.

        Parts that are as large as fit come first elsewhere; where weights and rows in host memory share a link, blocks
        that stay on the GPU may be worth more.
        """
        best = {one.choice.batch_size: one for one in sorted(found, key=self._merit)}
        tried: list[Candidate] = []
        for candidate in sorted(best.values(), key=self._merit)[-_PROMISING:]:
            rows, fewest = candidate.choice.batch_size, self._fewest_residents(wish, candidate.choice.offload)
            start = self._choice(wish, candidate.choice.offload, candidate.choice.fetch, rows, fewest)
            for shape in self._parts(wish, rows) if self._makes_parts(wish) else ():
                outcome = self._try_shape(wish, start, shape, budgets)
                if isinstance(outcome, Candidate):
                    tried += [outcome, *self._with_more_residents(wish, outcome, budgets, shape)]
        return tried

    def _with_even_waves(self, wish: Wish, candidate: Candidate, budgets: dict[Place, int]) -> list[Candidate]:
        """The same with so few rows that no more waves are needed, and the last one is as large as the others."""
        rows = candidate.choice.batch_size
        if wish.requests is None or rows * wish.streams >= wish.requests:
            return []
        requests = -(-wish.requests // wish.streams)
        fewer = self._try(wish, self._with_rows(wish, candidate.choice, -(-requests // -(-requests // rows))), budgets)
        if not isinstance(fewer, Candidate):
            return []
        return [
            fewer,
            *self._with_more_residents(wish, fewer, budgets),
            *self._in_other_parts(wish, [fewer], budgets),
        ]

    def _to_the_row(self, wish: Wish, candidate: Candidate, budgets: dict[Place, int]) -> Candidate:
        """The same in as many micro-batches, with all rows that fit of those that the search did not tell apart."""
        fits = candidate.choice.batch_size
        most = MOST_ROWS
        if wish.requests is not None:  # no more than make its waves even
            requests = -(-wish.requests // wish.streams)
            most = -(-requests // -(-requests // fits))
        together = max(candidate.choice.micro_batch_rows, wish.micro_batch_rows or MOST_MICRO_BATCH_ROWS)
        miss = min(fits + 1 + fits // _CLOSE_ENOUGH, most + 1)
        while miss - fits > 1 + fits // _TO_THE_ROW:
            choice = self._with_rows(wish, candidate.choice, (fits + miss) // 2)
            shape = self._more_rows(wish, candidate.choice, choice)
            outcome = self._try_shape(wish, choice, shape, budgets) if shape.micro_batch_rows <= together else None
            if isinstance(outcome, Candidate) and self._merit(outcome) >= self._merit(candidate):
                candidate, fits = outcome, choice.batch_size
            else:
                miss = choice.batch_size
        return candidate

    def _more_rows(self, wish: Wish, now: Choice, then: Choice) -> Shape:
        """Passes of the rows of `then` in as many micro-batches as those of `now`."""
        if not self._makes_parts(wish):
            return next(self._shapes(wish, then.batch_size))
        before = (now.batch_size - now.host_rows, now.host_rows)
        after = (then.batch_size - then.host_rows, then.host_rows)
        parts = [-(-side // now.micro_batch_rows) for side in before]
        together = max(-(-side // count) for side, count in zip(after, parts, strict=True) if count)
        return Shape(then.batch_size, together, now.prefill_tokens, then.host_rows, now.kv_dtype)

    def _growing(
        self, wish: Wish, start: Choice, fits: int, sizes: Sequence[int], budgets: dict[Place, int]
    ) -> Iterator[Candidate | Rejection]:
        """`start` with more rows: each of `sizes` until one does not fit, then what lies between, by bisection.

        `fits` rows are known to fit.
        """
        miss = None
        for rows in sizes:
            outcome = self._try(wish, self._with_rows(wish, start, rows), budgets)
            yield outcome
            if isinstance(outcome, Rejection):
                miss = rows
                break
            fits = rows
        while miss is not None and fits and miss - fits > 1 + fits // _CLOSE_ENOUGH:
            rows = (fits + miss) // 2
            outcome = self._try(wish, self._with_rows(wish, start, rows), budgets)
            yield outcome
            fits, miss = (rows, miss) if isinstance(outcome, Candidate) else (fits, rows)

    def _with_rows(self, wish: Wish, choice: Choice, rows: int) -> Choice:
        return self._choice(wish, choice.offload, choice.fetch, rows, choice.resident_blocks)

    def _with_more_residents(
        self, wish: Wish, candidate: Candidate, budgets: dict[Place, int], shape: Shape | None = None
    ) -> list[Candidate]:
        """The same with as many resident blocks as fit beside its rows, if more do; in passes of `shape`, or any."""
        choice, blocks = candidate.choice, len(self._anatomy.blocks)
        if wish.resident_blocks is not None or choice.offload == "none" or not TRAITS[wish.engine].places_blocks:
            return []
        place: Place = "gpu" if "gpu" in budgets else "host"
        free = budgets[place] - total(candidate.terms, place)
        room, slots = free // max(pieces(self._anatomy, choice.wire)), SLOTS[choice.fetch]
        for residents in range(blocks - 1, choice.resident_blocks, -1):
            # The last that stream pass through fewer slots: one more that stays takes nothing then.
            spared = min(slots, blocks - choice.resident_blocks) - min(slots, blocks - residents)
            if residents - choice.resident_blocks > room + spared:
                continue
            changed = self._choice(wish, choice.offload, choice.fetch, choice.batch_size, residents)
            is_another_way = choice.offload == "nvme" and not changed.nvme_blocks  # nothing is left for the disk
            if is_another_way:
                continue
            outcome = (
                self._try(wish, changed, budgets) if shape is None else self._try_shape(wish, changed, shape, budgets)
            )
            if isinstance(outcome, Candidate):
                return [outcome]
        return []

    def _with_steady_prompts(self, wish: Wish, candidate: Candidate, budgets: dict[Place, int]) -> Candidate:
        """The same with fewer prompt tokens a pass, if that is faster: prompts that come in a wave make the link wait,
        those that come a few at a time are computed while weights cross it."""
        choice, workload = candidate.choice, self._simulate(_shape(candidate.choice))
        if not workload.shares_passes:
            return candidate
        least = self._lengths.prompt_tokens if self._lengths.whole else _SHORTEST_PART
        fewer = {self._whole(max(least, int(share * choice.prefill_tokens))) for share in _PREFILL_SHARES}
        shapes = [_shape(replace(choice, prefill_tokens=tokens)) for tokens in fewer if tokens < choice.prefill_tokens]
        outcomes = [candidate, *(self._try_shape(wish, choice, shape, budgets) for shape in shapes)]
        return max(
            (one for one in outcomes if isinstance(one, Candidate)),
            key=lambda one: (*self._merit(one), one.choice.prefill_tokens),
        )

    def _choice(self, wish: Wish, offload: Offload, fetch: Fetch, rows: int, residents: int) -> Choice:
        blocks = len(self._anatomy.blocks)
        on_disk = 0
        if offload == "nvme":
            on_disk = blocks - residents
            if wish.offload == "auto" and wish.engine == "stream":
                on_disk -= min(on_disk, self._blocks_in_host(wish, rows))
        return Choice(
            engine=wish.engine,
            offload=offload,
            fetch=fetch,
            batch_size=rows,
            micro_batch_rows=rows,
            prefill_tokens=rows * self._lengths.prompt_tokens,
            resident_blocks=residents,
            nvme_blocks=on_disk,
            wire=wish.wire,
            host_rows=_host_rows(wish, rows),
            kv_dtype=wish.kv_dtype,
        )

    def _shapes(self, wish: Wish, rows: int) -> Iterator[Shape]:
        """Ways to make passes of `rows` rows, those that take most memory and least time first."""
        if self._makes_parts(wish):
            yield from dict.fromkeys(self._shape(wish, rows, *shares) for shares in _PARTS)
        else:
            prompts = rows * self._lengths.prompt_tokens
            yield Shape(rows, rows, prompts, _host_rows(wish, rows), wish.kv_dtype)

    def _parts(self, wish: Wish, rows: int) -> Iterable[Shape]:
        """Ways that differ in either, whatever they take."""
        return dict.fromkeys(self._shape(wish, rows, *shares) for shares in _OTHER_PARTS)

    def _makes_parts(self, wish: Wish) -> bool:
        """Whether rows of a pass may run in several micro-batches, and prompts in several passes."""
        return wish.engine == "stream" and self._anatomy.is_paged

    def _shape(self, wish: Wish, rows: int, rows_share: int, tokens_share: int) -> Shape:
        """`rows` rows in such parts of the most rows that run together, and of the most prompt tokens."""
        # With as many prompt tokens as are computed in the time that the weights take, the link waits for nothing.
        link_s = self._anatomy.block_bytes / self._speeds.link_gbps / 1e9
        worthwhile = link_s * self._speeds.tflops * 1e12 / (2 * self._anatomy.parameters)
        most = int(sorted((_PREFILL_TOKENS[0], worthwhile, _PREFILL_TOKENS[1]))[1])
        tokens = min(rows * self._lengths.prompt_tokens, most)
        part = min(tokens, max(tokens // tokens_share, _SHORTEST_PART))
        part = max(part, self._lengths.prompt_tokens) if self._lengths.whole else part
        on_host = _host_rows(wish, rows)
        together = wish.micro_batch_rows or MOST_MICRO_BATCH_ROWS // rows_share
        # No more than there are where all rows are live: fewer live rows would else run in larger micro-batches.
        together = max(-(-side // -(-side // together)) for side in (rows - on_host, on_host) if side)
        return Shape(rows, together, self._whole(part), on_host, wish.kv_dtype)

    def _whole(self, tokens: int) -> int:
        """As many prompt tokens as the longest prompts among `tokens` have, of which passes are simulated: shorter ones
        would use up what is left."""
        longest = self._lengths.prompt_tokens
        return tokens - tokens % longest if tokens > longest else tokens

    def _fewest_residents(self, wish: Wish, offload: Offload) -> int:
        """Blocks that must stay on the GPU, by the user's word or since the host cannot hold them."""
        blocks = len(self._anatomy.blocks)
        if offload == "none":
            return blocks
        if wish.resident_blocks is not None:
            return min(wish.resident_blocks, blocks)
        if offload == "cpu" and self._device == "cuda" and wish.engine == "stream":
            return max(0, min(blocks - 1, blocks - self._blocks_in_host(wish, 1)))
        return 0

    def _blocks_in_host(self, wish: Wish, rows: int) -> int:
        """How many blocks the host can hold beside everything else there, the stages of resident ones included."""
        blocks = len(self._anatomy.blocks)
        resident = min(LOADING_STAGES - 1, blocks) if self._device == "cuda" else 0
        nothing = Choice(
            engine="stream",
            offload="nvme",
            fetch="replicated",
            batch_size=rows,
            micro_batch_rows=rows,
            prefill_tokens=rows,
            resident_blocks=resident,
            nvme_blocks=blocks - resident,
            wire=wish.wire,
        )
        terms = stream_host_terms(self._anatomy, nothing, wish.world_size, self._overhead(False))
        if self._device == "cpu":  # what computes lies there, too
            terms = self._terms(wish, nothing, self._simulate(next(self._shapes(wish, rows))))
        free = self._host_bytes - total(terms, "host")
        return max(0, free // max(pieces(self._anatomy, wish.wire)))

    def _try(self, wish: Wish, choice: Choice, budgets: dict[Place, int]) -> Candidate | Rejection:
        rejected = self._too_many_rows(wish, choice, budgets)
        for shape in self._shapes(wish, choice.batch_size) if rejected is None else ():
            outcome = self._try_shape(wish, choice, shape, budgets)
            if isinstance(outcome, Candidate):
                return outcome
            rejected = outcome
        assert rejected is not None
        return rejected

    def _too_many_rows(self, wish: Wish, choice: Choice, budgets: dict[Place, int]) -> Rejection | None:
        """What the KV cache alone says of more rows than one, which takes no simulation."""
        place: Place = "gpu" if "gpu" in budgets else "host"
        pool = self._anatomy.pool_bytes(self._lengths.pool(self._anatomy, choice.batch_size, choice.host_rows))
        if wish.batch_size is not None or choice.batch_size == 1 or pool <= budgets[place]:
            return None
        lack = Lack(place=place, needed_bytes=pool, available_bytes=budgets[place])
        return Rejection.of(choice, lack)

    def _try_shape(self, wish: Wish, choice: Choice, shape: Shape, budgets: dict[Place, int]) -> Candidate | Rejection:
        choice = replace(choice, micro_batch_rows=shape.micro_batch_rows, prefill_tokens=shape.prefill_tokens)
        workload = self._simulate(shape)
        terms = self._terms(wish, choice, workload)
        needed = {place: total(terms, place) for place in budgets}
        lacks = tuple(
            Lack(place=place, needed_bytes=needed[place], available_bytes=available)
            for place, available in budgets.items()
            if needed[place] > available
        )
        if lacks:
            return Rejection.of(choice, *lacks)
        timing = time_plan(
            self._anatomy, choice, workload, self._speeds, wish.streams, wish.requests, static=wish.static_batches
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

    def _terms(self, wish: Wish, choice: Choice, workload: Workload) -> tuple[Term, ...]:
        if self._engine_terms is not None:
            terms = self._engine_terms(choice, workload)
        else:
            overhead = self._overhead(choice.fetch == "partitioned")
            gpu = stream_gpu_terms(self._anatomy, choice, workload, wish.world_size, overhead)
            host = stream_host_terms(self._anatomy, choice, wish.world_size, overhead, workload.host)
            terms = (*gpu, *host)
        if choice.offload == "nvme" and choice.nvme_blocks and wish.engine != "accelerate":  # it reads the checkpoint
            terms = (*terms, Term("disk", "store", store_bytes(self._anatomy, choice.wire), "counted"))
        if self._device == "cpu":
            terms = tuple(_on_host(term, wish.world_size) for term in terms if term.name not in (SMALL_PAGES, GAPS))
        return terms


def _on_host(term: Term, world_size: int) -> Term:
    """Without a GPU each rank computes in host memory."""
    return replace(term, place="host", nbytes=term.nbytes * world_size) if term.place == "gpu" else term


def _shape(choice: Choice) -> Shape:
    return Shape(choice.batch_size, choice.micro_batch_rows, choice.prefill_tokens, choice.host_rows, choice.kv_dtype)


def _host_rows(wish: Wish, rows: int) -> int:
    """Rows of which keys and values rest in host memory."""
    assert wish.host_share != "auto"
    return round(wish.host_share * rows)


def _doubling(cap: int) -> Iterator[int]:
    rows = 1
    while rows < cap:
        yield rows
        rows *= 2
    yield cap
