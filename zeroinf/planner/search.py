"""Searches for the settings with the highest tokens/s that fit: offload, resident layers, fetch mode and batch sizes.

Input: an anatomy, a machine, the user's constraints and a function that simulates workloads. Output: a `Decision`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Literal

from zeroinf.hardware.machine import Machine
from zeroinf.model.anatomy import Anatomy
from zeroinf.model.dtypes import DTYPE_BYTES
from zeroinf.planner.bounds import most_tokens_per_second
from zeroinf.planner.choice import Choice, Fetch, Offload
from zeroinf.planner.constraints import Constraints
from zeroinf.planner.decision import Candidate, Decision, NothingFitsError, Rejection
from zeroinf.planner.descriptor import EngineTerms, descriptor_of, why_padded
from zeroinf.planner.facts import Facts
from zeroinf.planner.hill_climbing import climb
from zeroinf.planner.kv import fetched_bytes
from zeroinf.planner.memory import SLOTS, MemoryPlace, largest_units, pieces, table_pieces, total, with_layers
from zeroinf.planner.pass_shapes import PassShapes, SearchPoint
from zeroinf.planner.routing import few_tokens
from zeroinf.planner.search_space import fetches_of, offloads_of
from zeroinf.planner.timing import Speeds
from zeroinf.planner.trials import Trials
from zeroinf.planner.workload import Lengths, Simulate

# So many of the best numbers of rows are tried with passes in other parts, and climbed from.
_PROMISING = 3
# The most rows that fit are found to a part of so many.
_CLOSE_ENOUGH, _CLOSE_AT_FIRST = 32, 8
# Ways to run that are slower than so large a part of the best, at first sight, are left at that.
_NEAR = 0.8

_HOST_SHARES = (0.0, 0.75, 1.0)
# Where the CPU attends to the best of them, shares beside it are compared, in such steps.
_HOST_STEP = 1 / 16
# Keys and values leave the GPU where that is expected to bring so much: they take host memory, and rates vary.
_WORTHWHILE = 1.03
# So does what tokens read by row, if it takes so large a part of the GPU.
_WORTHWHILE_SHARE = 1 / 32
# Host memory of which a plan takes so large a part is short.
_FULL_SHARE = 0.95
# Experts may come in parts where layers in use take more than this part of the GPU; parts take less than that one.
_FILLING_SHARE, _PARTS_SHARE = 1 / 2, 1 / 3
# Of smaller layers, experts come in so many parts where only those are brought that a few rows are routed to: each part
# of a layer that stays on the GPU takes launches.
_FEW_PARTS = 2
# Where the host cannot hold all layers, parts whose slots take no more than this part of the GPU: buffers for reads and
# for loading are as large as slots, and what they leave holds weights.
_SLIGHT_SHARE = 1 / 16


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
        self._facts = Facts(
            anatomy=anatomy,
            speeds=speeds,
            simulate=simulate,
            engine_terms=engine_terms,
            lengths=lengths,
            device=device,
            gpu_bytes=min((gpu.free_bytes for gpu in machine.gpus), default=0),
            host_bytes=machine.memory.available_bytes,
            thorough=thorough,
        )

    def choose(self, constraints: Constraints) -> Decision:
        """The best plan for `constraints`. Raises NothingFitsError when there is none, with the nearest misses."""
        errors: list[NothingFitsError] = []
        best: Decision | None = None
        for parts in self._numbers_of_parts(constraints):
            if best is not None and best.chosen.choice.expert_parts > 1:
                break  # smaller parts would only take longer
            enough = _WORTHWHILE * best.tokens_per_second if best is not None else 0.0
            try:
                found = self._choose_embeddings(replace(constraints, expert_parts=parts), enough)
            except NothingFitsError as error:
                errors.append(error)
                continue
            if found is not None and found.tokens_per_second > enough:
                best = found
        if best is None:
            raise min(errors, key=lambda one: one.nearest.price)
        return best

    def _numbers_of_parts(self, constraints: Constraints) -> Sequence[int]:
        """Parts that experts of a layer may come in: one, and where layers fill the GPU, some smaller ones."""
        facts, most = self._facts, max((one.count for one in self._facts.anatomy.experts), default=1)
        if constraints.expert_parts is not None:
            return (constraints.expert_parts,)
        able = "expert_parts" in descriptor_of(constraints.engine).options
        asked = bool(constraints.routed_tokens)
        if asked and facts.device != "cuda":
            return (min(_FEW_PARTS, most),)
        if most == 1 or not able or facts.device != "cuda" or constraints.offload == "none":
            return (1,)
        layers = with_layers(facts.anatomy, "cpu")
        in_use = {parts: self._bytes_in_use(layers, constraints, parts) for parts in _parts_up_to(most)}
        if in_use[1] <= facts.gpu_bytes * _FILLING_SHARE:
            slight = next((parts for parts in in_use if in_use[parts] <= facts.gpu_bytes * _SLIGHT_SHARE), max(in_use))
            if slight > 1 and self._is_host_short(constraints):
                most_streams = sum(pieces(layers, constraints.wire)) > 2 * facts.gpu_bytes
                # Kernels that multiply by a checkpoint's codes may take whole layers alone.
                return (slight,) if most_streams and layers.quantized is None else (1, slight)
            few = (min(_FEW_PARTS, most),)
            return few if asked else (1, *few) if self._are_few(constraints) else (1,)
        small = [parts for parts in in_use if in_use[parts] <= facts.gpu_bytes * _PARTS_SHARE and parts > 1]
        whole = (1,) if in_use[1] < facts.gpu_bytes and not asked else ()
        return (*whole, *(small or [max(in_use)])[:2])

    def _is_host_short(self, constraints: Constraints) -> bool:
        """Whether the host cannot hold all layers in whole pieces, so that some have to rest elsewhere."""
        whole = replace(next(self._ways(constraints)), embeddings="gpu", expert_parts=1, resident_blocks=None)
        return constraints.offload != "nvme" and _Search(self._facts, whole).fewest_residents > 0

    def _are_few(self, constraints: Constraints) -> bool:
        """Whether so few rows are live that steps bring only the experts that they are routed to."""
        few = few_tokens(self._facts.anatomy, constraints.wire) if constraints.routed_tokens is None else 0
        requests = None if constraints.requests is None else -(-constraints.requests // constraints.streams)
        given = [rows for rows in (constraints.batch_size, requests) if rows is not None]
        return bool(given) and min(given) <= few

    def _bytes_in_use(self, layers: Anatomy, constraints: Constraints, parts: int) -> int:
        """Bytes of slots, and of weights in full, if others cross the link."""
        largest = largest_units(layers, constraints.wire, parts)
        full = largest_units(layers, "model", parts) if constraints.wire != "model" else ()
        if (quantized := layers.quantized) is not None:
            ratio = quantized.parameters * DTYPE_BYTES[layers.dtype] / layers.weight_bytes
            full = tuple(round(size * ratio) for size in largest)
        return SLOTS["replicated"] * sum(largest) + sum(full)

    def _choose_embeddings(self, constraints: Constraints, enough: float) -> Decision | None:
        """The best plan with either place for embeddings; None, or any, where none is faster than `enough`."""
        if constraints.embeddings != "auto":
            return self._choose(constraints, enough)
        may_stay = self._may_stay_in_files(constraints)
        try:
            best = self._choose_off_disk(constraints, enough)
        except NothingFitsError as error:
            if not may_stay:
                raise
            try:
                return self._choose(replace(constraints, embeddings="disk"), enough)
            except NothingFitsError:
                raise error from None  # with what it lacks it would be as fast as it can be
        if not may_stay or (best is not None and not self._is_filling_host(best)):
            return best
        return self._faster(best, replace(constraints, embeddings="disk"), enough)

    def _faster(self, best: Decision | None, other: Constraints, enough: float) -> Decision | None:
        """`best`, or the best plan for `other` constraints where that is worth while."""
        enough = max(enough, _WORTHWHILE * best.tokens_per_second if best is not None else 0.0)
        try:
            other_way = self._choose(other, enough)
        except NothingFitsError:
            return best
        return other_way if other_way is not None and other_way.tokens_per_second > enough else best

    def _choose_off_disk(self, constraints: Constraints, enough: float) -> Decision | None:
        """The best plan with tables on the GPU or in host memory."""
        may_leave = self._may_leave(constraints)
        if may_leave and (constraints.expert_parts or 1) > 1:  # layers fill the GPU
            return self._choose(replace(constraints, embeddings="cpu"), enough)
        try:
            best = self._choose(replace(constraints, embeddings="gpu"), enough)
        except NothingFitsError as error:
            if not may_leave:
                raise
            try:
                return self._choose(replace(constraints, embeddings="cpu"), enough)
            except NothingFitsError as other:
                raise min(error, other, key=lambda one: one.nearest.price) from None
        if not may_leave or (best is not None and best.chosen.choice.offload == "none"):
            return best
        return self._faster(best, replace(constraints, embeddings="cpu"), enough)

    def _may_leave(self, constraints: Constraints) -> bool:
        """Whether tables may leave the GPU, and are large enough for a plan to be another one without them there."""
        facts, offload = self._facts, constraints.offload
        if facts.device != "cuda" or offload == "none" or "embeddings" not in descriptor_of(constraints.engine).options:
            return False
        return sum(table_pieces(facts.anatomy, "cpu")) > facts.gpu_bytes * _WORTHWHILE_SHARE

    def _may_stay_in_files(self, constraints: Constraints) -> bool:
        """Whether rows of tables may be read from the checkpoint's files, and take much of the host in its memory."""
        facts = self._facts
        able = "embeddings" in descriptor_of(constraints.engine).options and not facts.anatomy.unreadable_rows
        if not able or (facts.device == "cuda" and constraints.offload == "none"):
            return False
        return sum(table_pieces(facts.anatomy, "cpu")) > facts.host_bytes * _WORTHWHILE_SHARE

    def _is_filling_host(self, decision: Decision) -> bool:
        """Whether more layers would rest in host memory than there is room for."""
        choice = decision.chosen.choice
        return choice.nvme_blocks > 0 or (
            choice.offload == "cpu" and total(decision.chosen.terms, "host") > _FULL_SHARE * self._facts.host_bytes
        )

    def _choose(self, constraints: Constraints, enough: float) -> Decision | None:
        """The best plan with embeddings in one place; None, or any, where none is faster than `enough`."""
        ways = list(self._ways(constraints))
        most = [most_tokens_per_second(self._facts, way) for way in ways]
        found, rejected, left_out = dict[int, Decision](), list[Rejection](), False
        for index in sorted(range(len(ways)), key=lambda index: -most[index]):
            if self._cannot_win(ways, most, index, found, enough):
                left_out = True
                continue
            outcome = _Search(self._facts, ways[index]).best(max(map(_speed, found.values()), default=0.0))
            if isinstance(outcome, Decision):
                found[index] = outcome
            else:
                rejected += outcome
        if not found:
            if left_out:
                return None
            nearest = {(one.offload, one.fetch): one for one in sorted(rejected, key=lambda one: -one.price)}
            raise NothingFitsError(rejected if len(ways) == 1 else list(nearest.values()))
        index = _first_of_the_best(found)
        best, way = found[index], ways[index]
        may_balance = self._facts.thorough and constraints.host_share == "auto" and way.kv_attention == "cpu"
        return self._balanced(best, way) if may_balance and way.host_share else best

    def _cannot_win(
        self,
        ways: Sequence[Constraints],
        most: Sequence[float],
        index: int,
        found: Mapping[int, Decision],
        enough: float,
    ) -> bool:
        """Whether `most` says that a way is no faster than `enough`, or than others that were `found`: those before it
        have to be exceeded by what makes it worth while, those behind it exceed it by more than that."""
        limit = most[index]
        if index and not ways[0].host_share:  # rows in host memory add to those on the GPU, or are worth more than they
            alone = found[0].tokens_per_second if 0 in found else most[0]
            limit = min(limit, max(alone, self._most_with_host(ways[index])))
        before = {at: one for at, one in found.items() if at < index}
        if before:
            enough = max(enough, _WORTHWHILE * before[_first_of_the_best(before)].tokens_per_second)
        if enough and limit <= enough:  # where nothing was found yet, the way is needed to say what is short
            return True
        return any(one.tokens_per_second > _WORTHWHILE**2 * limit for at, one in found.items() if at > index)

    def _balanced(self, best: Decision, way: Constraints) -> Decision:
        """`best`, or a faster plan with another share of rows in host memory than `way`, where the CPU attends: fewer
        while it is waited for, more while the link is, over which more layers come the more rows are on the GPU."""
        direction = {"host memory": -1, "link": 1}.get(best.chosen.timing.binds, 0)
        share = way.host_share
        while direction and share != "auto" and 0 < (share := share + direction * _HOST_STEP) <= 1:
            found = _Search(self._facts, replace(way, host_share=share)).best(best.tokens_per_second)
            if not isinstance(found, Decision) or found.tokens_per_second <= best.tokens_per_second:
                break
            best = found
        return best

    def _ways(self, constraints: Constraints) -> Iterator[Constraints]:
        """The shares of rows in host memory that are to be compared, and who attends to those."""
        facts, asked = self._facts, constraints.host_share
        shares = [asked] if asked != "auto" else list(_HOST_SHARES if facts.device == "cuda" else _HOST_SHARES[:1])
        attention = [constraints.kv_attention]
        if attention == ["auto"]:
            able = facts.speeds.reads_host and cpu_may_attend(facts.anatomy, constraints, facts.lengths, facts.device)
            attention = ["gpu", "cpu"] if able and any(shares) else ["gpu"]
        for by in attention:
            for share in shares:
                if share or by == attention[0]:
                    yield replace(constraints, host_share=share, kv_attention=by)

    def _most_with_host(self, constraints: Constraints) -> float:
        """Tokens/s that no number of rows in host memory can exceed, however few weights stream beside them.

        With rows on the GPU as well, it is this or what those on the GPU reach alone, whichever is more.
        """
        lengths = self._facts.lengths
        prompt, new = lengths.mean_prompt_tokens, lengths.mean_new_tokens
        tokens = (prompt or lengths.prompt_tokens) + (new or lengths.new_tokens) / 2
        row = fetched_bytes(self._facts.anatomy, constraints.kv_dtype, tokens)
        speeds = self._facts.speeds
        gbps = speeds.host_read_gbps if constraints.kv_attention == "cpu" else speeds.link_gbps
        return constraints.world_size * gbps * 1e9 / row


def cpu_may_attend(anatomy: Anatomy, constraints: Constraints, lengths: Lengths, device: str) -> bool:
    """Whether the CPU may attend to keys and values in host memory, however fast it is."""
    if (
        device != "cuda"
        or constraints.no_host_kernel
        or constraints.kv_attention == "gpu"
        or not constraints.host_share
    ):
        return False
    return not why_padded(anatomy, constraints.engine, scored=lengths.scored_tokens > 0)


class _Search:
    """The search for one share of rows whose KV cache rests in host memory."""

    def __init__(self, facts: Facts, constraints: Constraints, *, exact: bool = False) -> None:
        """`exact` as for `Trials`; what is found is held against all that it takes in any case."""
        self._facts, self._constraints = facts, constraints
        self._budgets: dict[MemoryPlace, int] = {"host": facts.host_bytes}
        if facts.device == "cuda":
            self._budgets["gpu"] = facts.gpu_bytes
        if constraints.nvme_space_bytes is not None:
            self._budgets["disk"] = constraints.nvme_space_bytes
        self._shapes = PassShapes(facts, constraints)
        self._trials = Trials(facts, constraints, self._budgets, self._shapes, exact=exact)

    @property
    def fewest_residents(self) -> int:
        """Blocks that must stay on the GPU where none rest on NVMe."""
        return self._trials.fewest_residents("cpu")

    def best(self, speed: float = 0.0) -> Decision | list[Rejection]:
        """The best plan, or why there is none. `speed` can be had elsewhere, in tokens/s."""
        tried: dict[tuple[Offload, Fetch], list[Candidate]] = {}
        rejected: list[Rejection] = []
        merit, has_encoder = self._trials.merit, self._facts.anatomy.encoder is not None
        for offload in offloads_of(self._constraints):
            for fetch in fetches_of(self._constraints, offload, has_encoder=has_encoder):
                outcome = list(self._candidates(offload, fetch))
                fitting = [one for one in outcome if isinstance(one, Candidate)]
                tried[offload, fetch] = fitting
                rejected += [one for one in outcome if isinstance(one, Rejection)][:1] if not fitting else []
        if not any(tried.values()):
            return rejected
        best = {way: max(fitting, key=merit) for way, fitting in tried.items() if fitting}
        near = _NEAR * max(speed, *(one.timing.tokens_per_second for one in best.values()))
        found = [
            self._climbed(tried[way]) if self._facts.thorough and one.timing.tokens_per_second >= near else one
            for way, one in best.items()
        ]
        found.sort(key=merit, reverse=True)
        if not self._trials.exact and not all(map(self._trials.fits, found)):
            return _Search(self._facts, self._constraints, exact=True).best(speed)
        way = tried[found[0].choice.offload, found[0].choice.fetch]
        return Decision(
            chosen=found[0],
            alternatives=tuple(found[1:]),
            tried=tuple(sorted(way, key=lambda one: one.choice.batch_size)),
            rejected=tuple(rejected),
            budgets=self._budgets,
        )

    def _candidates(self, offload: Offload, fetch: Fetch) -> Iterator[Candidate | Rejection]:
        """All that is worth comparing of one way to run, or why it does not fit."""
        trials, asked = self._trials, self._constraints.batch_size
        fewest = trials.fewest_residents(offload)
        if offload == "nvme" and not trials.choice(offload, fetch, asked or 1, fewest).nvme_blocks:
            return  # the host can hold all that streams
        sizes = [asked] if asked else list(_doubling(self._shapes.most_rows))
        found: list[Candidate] = []
        for outcome in self._growing(trials.choice(offload, fetch, 1, fewest), sizes):
            if isinstance(outcome, Candidate):
                found += [outcome, *trials.with_more_residents(outcome)]
            elif not found:
                yield trials.true_shortage(outcome, fewest)
        if self._facts.thorough:
            found += self._in_other_parts(found)
        yield from found

    def _growing(self, start: Choice, sizes: Sequence[int]) -> Iterator[Candidate | Rejection]:
        """`start` with more rows: each of `sizes` until one does not fit, then what lies between, by bisection."""
        fits, miss = 0, None
        for rows in sizes:
            outcome = self._trials.in_any_shape(self._with_rows(start, rows))
            yield outcome
            if isinstance(outcome, Rejection):
                miss = rows
                break
            fits = rows
        close = _CLOSE_ENOUGH if self._facts.thorough else _CLOSE_AT_FIRST
        while miss is not None and fits and miss - fits > 1 + fits // close:
            rows = (fits + miss) // 2
            outcome = self._trials.in_any_shape(self._with_rows(start, rows))
            yield outcome
            fits, miss = (rows, miss) if isinstance(outcome, Candidate) else (fits, rows)

    def _with_rows(self, choice: Choice, rows: int) -> Choice:
        return self._trials.choice(choice.offload, choice.fetch, rows, choice.resident_blocks)

    def _in_other_parts(self, found: Sequence[Candidate]) -> list[Candidate]:
        """The most promising of `found` with passes in smaller parts, and what that leaves room for in resident blocks.

        Parts that are as large as fit come first elsewhere; where weights and rows in host memory share a link, blocks
        that stay on the GPU may be worth more.
        """
        trials, merit = self._trials, self._trials.merit
        best = {one.choice.batch_size: one for one in sorted(found, key=merit)}
        tried: list[Candidate] = []
        for candidate in sorted(best.values(), key=merit)[-_PROMISING:]:
            choice, rows = candidate.choice, candidate.choice.batch_size
            start = trials.choice(choice.offload, choice.fetch, rows, trials.fewest_residents(choice.offload))
            for shape in self._shapes.of_rows(rows) if self._shapes.makes_parts else ():
                outcome = trials.in_shape(start, shape)
                if isinstance(outcome, Candidate):
                    tried += [outcome, *trials.with_more_residents(outcome, shape)]
        return tried

    def _climbed(self, found: Sequence[Candidate]) -> Candidate:
        """The best that can be reached from the most promising of `found`, step by step."""
        way, trials, shapes = found[0].choice, self._trials, self._shapes
        fewest = trials.fewest_residents(way.offload)

        @cache
        def best_at(point: SearchPoint) -> Candidate | None:
            shape = shapes.at(point)
            choice = trials.choice(way.offload, way.fetch, point.rows, fewest)
            if shape is None or trials.too_many_rows(choice):
                return None
            fitting = [one for one in trials.with_graphs(choice, shape) if isinstance(one, Candidate)]
            more = [other for one in fitting for other in trials.with_more_residents(one, shape)]
            return max((*fitting, *more), key=trials.merit, default=None)

        def merit(point: SearchPoint) -> tuple[float, ...]:
            there = best_at(point)
            return trials.merit(there) if there else ()

        ranked = sorted(found, key=trials.merit, reverse=True)
        starts = list(dict.fromkeys(SearchPoint.of(one.choice) for one in ranked))[:_PROMISING]
        tops = [best_at(climb(point, shapes.beside, merit)) for point in starts]
        return max((ranked[0], *filter(None, tops)), key=trials.merit)


def _speed(decision: Decision) -> float:
    return decision.tokens_per_second


def _first_of_the_best(found: Mapping[int, Decision]) -> int:
    """The number of the decision that is taken where, in order, another one has to be worth while."""
    best, *others = sorted(found)
    for index in others:
        if found[index].tokens_per_second > _WORTHWHILE * found[best].tokens_per_second:
            best = index
    return best


def _parts_up_to(most: int) -> Iterator[int]:
    parts = 1
    while parts <= most:
        yield parts
        parts *= 2


def _doubling(cap: int) -> Iterator[int]:
    rows = 1
    while rows < cap:
        yield rows
        rows *= 2
    yield cap
