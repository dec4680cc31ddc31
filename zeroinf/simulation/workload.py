"""Simulates micro-batches with the generation loop's own steps over the model on the meta device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from torch.nn import ModuleList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from zeroinf.compat.warnings import without_library_warnings
from zeroinf.generation.cache import PagePool
from zeroinf.generation.groups import Group
from zeroinf.generation.host_cache import HostCache
from zeroinf.generation.micro_batch import BatchState, TokenRules, breaks_at, running
from zeroinf.generation.row import Row, Sampling
from zeroinf.generation.seats import Seat
from zeroinf.generation.states import CallLimits, pieces_of
from zeroinf.model.alike import first_alike
from zeroinf.model.anatomy import Anatomy
from zeroinf.model.cache_layout import HostSize, KvDtype, PoolSize
from zeroinf.model.experts import ExpertsOnPaper
from zeroinf.model.inspect import build_meta, find_blocks, find_stacks
from zeroinf.model.kv import first_blocks
from zeroinf.model.quantized.expansion import ExpansionSlot, expanded_bytes, expansions
from zeroinf.planner.allocator import Allocator, Event, Events
from zeroinf.planner.graphs import REPLAYED_TOKENS
from zeroinf.planner.memory import layer_bytes
from zeroinf.planner.pass_shapes import MOST_MICRO_BATCH_ROWS, MOST_ROWS
from zeroinf.planner.workload import ExpansionCost, Kernels, Lengths, Packed, Pass, Shape, Step, Workload, same
from zeroinf.simulation.attention import GpuAttention
from zeroinf.simulation.kernels import simulate_kernels
from zeroinf.simulation.packed import ByTokens, OnPaper, attention_of, fullest, query_heads
from zeroinf.simulation.recorder import Recorder, storages_of
from zeroinf.simulation.repeats import told_alike, with_repeats
from zeroinf.simulation.rows import ByRows
from zeroinf.simulation.states import Call, MixingOnPaper, largest_calls
from zeroinf.structured.answer_format import AnswerFormat

_META = torch.device("meta")
# So many blocks of each kind are counted one by one: the gaps that one leaves behind for the next stop growing after a
# few (GPT-NeoX: five, most others: two).
_KEPT = 6
# Caches whose layers hold nothing but keys and values.
_PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
# Keys of what lasts lie apart from those of passes.
_CACHE_KEYS = 1 << 20


@dataclass(frozen=True, slots=True)
class Part:
    """The tokens of a row that one forward computes: `count` of them, after the `start` that are in the cache."""

    start: int
    count: int


class Simulator:
    """Workloads of one model for rows of `lengths`.

    `static`: all rows start together and end together, as one micro-batch. Of blocks that do the same a few are run,
    and counted for all of them. A new shape takes tenths of a second and no memory.
    """

    def __init__(
        self,
        config: Any,
        anatomy: Anatomy,
        lengths: Lengths,
        *,
        shares_passes: bool = True,
        trust_remote_code: bool = False,
        expansion: ExpansionCost | None = None,
        expert_parts: int = 1,
        own_kernels: bool = False,
        like: Simulator | None = None,
    ) -> None:
        """`expansion`: how weights become whole where the engine makes codes of them. `expert_parts`: in how many parts
        the experts of a layer compute; shapes with other numbers are simulated apart. `own_kernels`: experts and norms
        compute by the stream engine's kernels. `like`: a simulator of another checkpoint of the model, or of other
        parts of experts, whose layers are of the same kinds in the same order."""
        self._in_parts = partial(
            Simulator,
            config,
            anatomy,
            lengths,
            shares_passes=shares_passes,
            trust_remote_code=trust_remote_code,
            expansion=expansion,
            own_kernels=own_kernels,
            like=self,
        )
        self._of_parts: dict[int, Simulator] = {expert_parts: self}
        self._anatomy, self._lengths = anatomy, lengths
        self._config, self._whole = config, breaks_at(config) is not None or bool(anatomy.whole_because)
        self._shares_passes = shares_passes and anatomy.is_paged
        self._model = build_meta(config, anatomy.dtype, trust_remote_code)
        self._own_kernels = own_kernels
        if own_kernels:
            simulate_kernels(self._model)
        self._path, _ = find_blocks(self._model)
        self._blocks = ModuleList(block for _, stack in find_stacks(self._model) for block in stack)
        self._all_blocks, self._repeats = self._blocks, 0
        self._times = [1.0] * len(self._blocks)
        firsts = [*range(len(self._blocks))]
        if anatomy.is_paged:
            firsts = first_alike(self._model.config.get_text_config(decoder=True), list(self._blocks))
        modules = dict(self._model.named_modules())
        self._split = [
            ExpertsOnPaper(modules[experts.module], experts, expert_parts)
            for experts in (anatomy.experts if expert_parts > 1 else ())
        ]
        self._expansion = (
            _expand(self._model, self._blocks, firsts, self._split) if anatomy.quantized is not None else expansion
        )
        self._held = storages_of(self._model)
        self._seen: dict[Shape, Workload] = {}
        self._caches: dict[PoolSize, Events] = {}
        self._steps: dict[tuple[int, int, bool, KvDtype | None, int], ByRows] = {}
        self._mixed_steps: dict[Step, Step] = {}
        self._lives: dict[KvDtype | None, ByRows] = {}
        self._packed_forwards: dict[KvDtype | None, ByTokens] = {}
        self._mixing_steps: dict[int, ByRows] = {}
        self._kinds: list[Any] = []
        if anatomy.is_paged:
            self._kinds = self._find_kinds(firsts) if like is None or not like._kinds else like._kinds
            self._keep_kinds(self._kinds)
        if like is not None and self._does_as(like):
            self._steps, self._packed_forwards, self._mixing_steps = (
                like._steps,
                like._packed_forwards,
                like._mixing_steps,
            )

    def _does_as(self, other: Simulator) -> bool:
        """Whether micro-batches of `other` are this one's: expanded weights compute as those of another checkpoint."""
        how, others = ((one._anatomy.cache, one._repeats, len(one._split)) for one in (self, other))
        if not self._kinds or self._split or how != others:
            return False
        return all(same(*steps) for steps in zip(self._samples, other._samples, strict=True))

    @cached_property
    def _samples(self) -> tuple[Step, ...]:
        """A step with prompts and one after them, as they are recorded."""
        longest = self._lengths.prompt_tokens
        return tuple(self._recorded(2, *part)[0] for part in ((0, longest), (longest, 1)))

    def __call__(self, shape: Shape) -> Workload:
        if shape.expert_parts not in self._of_parts:
            self._of_parts[shape.expert_parts] = self._in_parts(expert_parts=shape.expert_parts)
        if (other := self._of_parts[shape.expert_parts]) is not self:
            return other(shape)
        if shape not in self._seen:
            self._seen[shape] = self._run(shape)
        return self._seen[shape]

    def _keep_kinds(self, kinds: Sequence[Any]) -> None:
        """Leave the first blocks in the model, up to one of each kind behind the first block, and one more: models tell
        a block what it is by its place. Steps have some of them repeated on paper.

        Where caches grow by themselves, every block counts instead.
        """
        firsts = {kind: index for index, kind in reversed(list(enumerate(kinds))) if index}
        kept = max(firsts.values(), default=0) + 2
        between = kinds[1 : kept - 1]
        missing = [
            _KEPT - kept,
            *(len(between) for kind in firsts if kinds[:kept].count(kind) < min(2, kinds.count(kind))),
        ]
        self._repeats = max(0, *(-(-count // len(between)) for count in missing)) if between else 0
        if between and kept + self._repeats * len(between) <= len(kinds):
            self._keep(kinds, kept)
            step, starts = self._recorded(2, self._lengths.prompt_tokens, 1)
            if with_repeats(step, starts, self._repeats) is not None:
                return
        self._repeats = 0
        self._keep(kinds, max(index for index, kind in enumerate(kinds) if kinds[:index].count(kind) < _KEPT) + 1)

    def _keep(self, kinds: Sequence[Any], kept: int) -> None:
        self._times = [kinds.count(kind) / kinds[:kept].count(kind) for kind in kinds[:kept]]
        self._blocks = self._all_blocks[:kept]
        self._model.set_submodule(self._path, self._blocks)

    def _find_kinds(self, firsts: Sequence[int]) -> list[Any]:
        """For each block what it does, with prompts and in the last step of a long row. `firsts`: the number of the
        first block that is like it; what the second of a kind does, all others behind it do."""
        longest, new = self._lengths.prompt_tokens, self._lengths.new_tokens
        seconds = {first: index for index, first in reversed(list(enumerate(firsts))) if index != first}
        like = [index if index == first else seconds[first] for index, first in enumerate(firsts)]
        with first_blocks(self._model, self._path, self._all_blocks, max(like) + 1) as self._blocks:
            steps = [self._recorded(2, *part)[0] for part in ((0, longest), (longest + max(1, new - 1), 1))]
        self._blocks = self._all_blocks
        groups = zip(*(step.kernels[1:] for step in steps), strict=True)
        kinds = [tuple(group.kernels for group in block) for block in groups]
        return [kinds[index] for index in like]

    def _recorded(self, rows: int, start: int, count: int) -> tuple[Step, Sequence[int]]:
        """A step as it is recorded, in which recurrent modules take one token, and the sections with which its blocks
        begin."""
        parts, one = (Part(start, count),) * rows, Call(1, 1)
        recorder = Recorder(self._held, self._blocks, self._split)
        with torch.no_grad(), recorder:
            batch_state = self._batch_state(self._lengths.pool(self._anatomy, rows))
            if self._anatomy.mixers is not None:
                batch_state.mixing = partial(MixingOnPaper, recorder, [one], Counter({one: 1}))
            recorder.cut()
            return self._record(batch_state, parts, recorder), recorder.block_starts

    def _run(self, shape: Shape) -> Workload:
        if shape.forward_tokens:
            return self._packed(shape)
        return self._together(shape) if not self._shares_passes else self._coming_and_going(shape)

    def _packed(self, shape: Shape) -> Workload:
        """Passes of packed forwards: what they allocate follows from their tokens."""
        lengths = self._lengths
        mean, tokens = lengths.mean_prompt_tokens or lengths.prompt_tokens, shape.prefill_tokens
        whole, kinds, computed = self._whole, (None, shape.kv_dtype), lengths.computed_tokens
        rows = shape.rows - shape.host_rows, shape.host_rows
        sides = [(self._forwards(kv), count) for kv, count in zip(kinds, rows, strict=True) if count]
        attention = partial(attention_of, self._anatomy, self._model)
        new = lengths.new_tokens > 1
        return self._workload(
            shape,
            prompts=(),
            prompts_rows=tokens / computed,
            prompts_a_pass=lengths.prompts_a_pass(tokens) if whole else tokens / computed,
            first_decode=(),
            last_decode=(),
            packed=Packed(
                forwards=sides[0][0].forwards,
                prompts=attention(tokens / computed, mean - computed, computed),
                decode=attention(shape.rows - shape.cpu_rows, lengths.mean_context, 1) if new else (),
                fullest=fullest(sides, shape),
                replayed=tuple(
                    (tokens, layer_bytes(sides[0][0].step(tokens, 1)))
                    for tokens in sorted({min(tokens, shape.forward_tokens) for tokens in REPLAYED_TOKENS})
                ),
                mixing=self._mixing(tokens, mean, shape.rows),
            ),
        )

    def _forwards(self, kv: KvDtype | None) -> ByTokens:
        """Packed forwards of rows that rest in host memory as `kv`, or on the GPU."""
        if kv not in self._packed_forwards:
            limits = self._call_limits(MOST_ROWS)
            most = None if limits is None or limits.rows == MOST_ROWS else limits.rows
            self._packed_forwards[kv] = ByTokens(partial(self._simulate_packed, kv), most)
        return self._packed_forwards[kv]

    def _call_limits(self, rows: int) -> CallLimits | None:
        """Those of the recurrent modules' calls where so many rows are live; None without such modules."""
        return None if self._anatomy.mixers is None else CallLimits.of(self._anatomy, rows)

    def _mixing(self, tokens: float, prompt: float, rows: int) -> tuple[tuple[Kernels, ...], tuple[Kernels, ...]]:
        """Kernels of the recurrent modules: for so many tokens of prompts, and for a step of so many rows."""
        limits = self._call_limits(rows)
        if limits is None:
            return (), ()
        length = max(1, round(prompt))
        (count, alike), found = (limits.rows_of(length), 1) if not self._lengths.padded else (1, 1), list[Kernels]()
        for piece in pieces_of([at * length for at in range(count)], [length] * count, limits):
            share = tokens / (length * count)
            found += self._of_call(Call(len(piece.rows), piece.count), share * alike)
        steps = self._of_call(Call(limits.rows, 1), rows / limits.rows)
        return tuple(found), steps

    def _of_call(self, call: Call, times: float) -> tuple[Kernels, ...]:
        """Kernels of a call of each recurrent module, that many times."""
        if call.tokens not in self._mixing_steps:
            self._mixing_steps[call.tokens] = ByRows(lambda rows: (self._simulate_call(Call(rows, call.tokens)),))
        (step,) = self._mixing_steps[call.tokens](call.rows)
        return tuple(replace(each, times=each.times * times) for each in step.kernels)

    def _simulate_call(self, call: Call) -> Step:
        """The kernels of a call of each recurrent module, and nothing else."""
        with torch.no_grad(), Recorder(self._held, self._blocks, self._split) as recorder:
            batch_state = self._batch_state(self._lengths.pool(self._anatomy, 1))
            batch_state.mixing = partial(MixingOnPaper, recorder, [call], Counter({call: 1}))
            with recorder.memory_alone():
                step = self._record(batch_state, [Part(0, 1)], recorder)
        return replace(told_alike(step), inputs=(), sections=(), end=(), choice=())

    def _simulate_packed(self, kv: KvDtype | None, tokens: int, choices: int, together: int) -> Step:
        """A forward with a step of all rows but one, and the end of its prompt. Recurrent modules take a step of so
        many rows `together`, and have no kernels: they are counted by themselves."""
        parts = [*[Part(1, 1)] * (choices - 1), Part(1, tokens - choices + 1)]
        recorder = Recorder(self._held, self._blocks, self._split)
        with torch.no_grad(), recorder:
            batch_state = self._batch_state(self._lengths.pool(self._anatomy, choices, packed=kv is None), kv, parts)
            if (limits := self._call_limits(MOST_ROWS)) is not None:
                calls = [Call(together, 1), *largest_calls(limits, self._lengths.prompt_tokens)]
                batch_state.mixing = partial(MixingOnPaper, recorder, calls, Counter())
            recorder.cut()
            seats = _group(parts, self._lengths, (), on_host=kv is not None).seats
            group = Group.packed(seats, [part.start for part in parts], [part.count for part in parts])
            for seat in seats:  # penalties read all that a row may have, however little of it a forward computes
                seat.known = self._lengths.prompt_tokens + self._lengths.new_tokens
            return self._alone(record_step(self._model, batch_state, group, recorder, self._times), recorder)

    def _alone(self, step: Step, recorder: Recorder) -> Step:
        """A step that `recorder` recorded in a place of its own, with blocks repeated that the model lacks."""
        return told_alike(with_repeats(step, recorder.block_starts, self._repeats) or step)

    def _coming_and_going(self, shape: Shape) -> Workload:
        """Each micro-batch by itself, from memory of the right size: passes are put together on paper."""
        longest, new = self._lengths.prompt_tokens, self._lengths.new_tokens
        mean, tokens = self._lengths.mean_prompt_tokens or longest, shape.prefill_tokens
        whole = longest <= shape.prefill_tokens or self._whole
        rows = max(1, min(shape.rows, shape.prefill_tokens // longest)) if whole else 1
        start = 0 if whole else longest - shape.prefill_tokens
        sizes = [min(shape.micro_batch_rows, rows - at) for at in range(0, rows, shape.micro_batch_rows)]
        kv = shape.kv_dtype if shape.host_rows else None
        mixes = rows < shape.rows or self._lengths.padded  # then rows of a micro-batch are not equally far

        def prompts(kv: KvDtype | None) -> Pass:
            return tuple(self._step(size, start, longest - start, kv) for size in sizes)

        def decode(known: int, live: int, kv: KvDtype | None) -> Pass:
            count = -(-live // shape.micro_batch_rows)
            edges = [live * part // count for part in range(count + 1)] if live else []
            return tuple(self._step(end - at, known - 1, 1, kv, padded=mixes) for at, end in pairwise(edges))

        def decodes(known: int) -> Pass:
            return (*decode(known, shape.rows - shape.host_rows, None), *decode(known, shape.host_rows, kv))

        first, last = round(mean) + 1, longest + new - 1
        first_decode = decodes(first) if new > 1 else ()
        attended = self._lengths.attended_tokens(max(1, len(first_decode)))
        return self._workload(
            shape,
            prompts=prompts(kv),
            paged_prompts=prompts(None) if 0 < shape.host_rows < shape.rows else (),
            prompts_rows=(rows if whole else tokens / longest) * longest / mean,
            prompts_a_pass=self._lengths.prompts_a_pass(max(longest, tokens) if whole else tokens),
            first_decode=first_decode,
            last_decode=decodes(last) if new > 1 else (),
            decode_at=min(1.0, max(0.0, (attended - first) / (last - first))) if last > first else 0.0,
        )

    def _workload(self, shape: Shape, **steps: Any) -> Workload:
        packed = shape.forward_tokens > 0
        size = self._lengths.pool(self._anatomy, shape.rows, shape.host_rows, packed=packed)
        longest, new = self._lengths.prompt_tokens, self._lengths.new_tokens
        whole = longest + new if self._whole else 0
        host = self._lengths.host(shape, whole=whole if self._shares_passes else shape.rows * longest)
        if host is not None and host.cpu_rows:
            host = replace(host, query_heads=query_heads(self._config))
        return Workload(
            shape=shape,
            pool=size,
            host=host,
            prompt_tokens=self._lengths.mean_prompt_tokens or self._lengths.prompt_tokens,
            new_tokens=self._lengths.mean_new_tokens or self._lengths.new_tokens,
            most_new_tokens=self._lengths.new_tokens,
            expansion=self._expansion,
            multiplies_codes=self._own_kernels,
            cache=self._cache(size),
            shares_passes=self._shares_passes or shape.forward_tokens > 0,
            **steps,
        )

    def _cache(self, size: PoolSize) -> Events:
        """The memory that lasts for a job: the pool and the rows' tokens."""
        if size not in self._caches:
            with torch.no_grad(), Recorder(self._held, ()) as recorder:
                batch_state = self._batch_state(size)
                (made,) = recorder.cut()
                del batch_state
            self._caches[size] = tuple(Event(-_CACHE_KEYS - event.key, event.nbytes) for event in made)
        return self._caches[size]

    def _batch_state(self, size: PoolSize, kv: KvDtype | None = None, parts: Sequence[Part] = ()) -> BatchState:
        """A batch state for rows on the GPU, or for `parts` of some that rest in host memory as `kv`."""
        pool = PagePool(self._model, self._anatomy, size, _META)
        host = None
        if kv is not None:
            new, seen = max(part.count for part in parts), max(part.start + part.count for part in parts)
            room = HostSize(tokens=0, seen_columns=len(parts) * seen, new_columns=len(parts) * new, dtype=kv)
            host = HostCache(self._model, self._anatomy, room, _META, None, pin=False)
        return BatchState(self._model, TokenRules(self._model, None, ()), pool, _META, host)

    def _step(
        self, rows: int, start: int, count: int, kv: KvDtype | None = None, *, padded: bool | None = None
    ) -> Step:
        """One micro-batch in whose place there was nothing before: the next `count` tokens of rows behind `start`. Its
        rows rest in host memory as `kv`, or on the GPU."""
        most = self._most_alike(rows, count)
        key = start, count, self._lengths.padded if padded is None else padded, kv, most
        if key not in self._steps:
            self._steps[key] = ByRows(lambda rows: (self._simulate(_parts(rows, *key[:3]), kv),), most)
        step = self._steps[key](rows)[0]
        if self._anatomy.mixers is None:
            return step
        if step not in self._mixed_steps:
            self._mixed_steps[step] = self._with_mixing(step, _parts(rows, *key[:3]))
        return self._mixed_steps[step]

    def _with_mixing(self, step: Step, parts: Sequence[Part]) -> Step:
        """`step` with the kernels of its recurrent modules, whose calls are many where rows are."""
        limits = CallLimits.of(self._anatomy, len(parts))
        counts = [part.count for part in parts]
        firsts = [*accumulate(counts, initial=0)][:-1]
        calls = Counter(Call(len(piece.rows), piece.count) for piece in pieces_of(firsts, counts, limits))
        mixing = chain.from_iterable(self._of_call(call, times) for call, times in calls.items())
        return replace(step, kernels=(*step.kernels, *mixing))

    def _most_alike(self, rows: int, count: int) -> int:
        """The most rows with which recurrent modules have the calls that they have with so many, with more rows in
        those that are not full."""
        limits = self._call_limits(MOST_ROWS)
        calls = [] if limits is None else _largest_calls(limits, count)
        return min((call.rows for call in calls if rows <= call.rows), default=MOST_MICRO_BATCH_ROWS)

    def _simulate(self, parts: Sequence[Part], kv: KvDtype | None) -> Step:
        """A step without the kernels of recurrent modules."""
        recorder = Recorder(self._held, self._blocks, self._split)
        with torch.no_grad(), recorder:
            batch_state = self._batch_state(self._lengths.pool(self._anatomy, len(parts)), kv, parts)
            if (limits := self._call_limits(len(parts))) is not None:
                calls = _largest_calls(limits, max(part.count for part in parts))
                batch_state.mixing = partial(MixingOnPaper, recorder, calls, Counter())
            recorder.cut()
            return self._alone(self._record(batch_state, parts, recorder), recorder)

    def _together(self, shape: Shape) -> Workload:
        """All rows in one micro-batch from the first step to the last, with the states that it keeps."""
        kv = shape.kv_dtype if shape.host_rows else None
        if kv not in self._lives:
            self._lives[kv] = ByRows(partial(self._life, kv))
        prompts, *decode = self._lives[kv](shape.rows)
        return self._workload(
            shape,
            prompts=(prompts,),
            prompts_rows=shape.rows,
            prompts_a_pass=shape.rows,
            first_decode=tuple(decode[:1]),
            last_decode=tuple(decode[1:]),
        )

    def _life(self, kv: KvDtype | None, rows: int) -> Pass:
        """The steps of rows that start and end together: their prompts, the first and the last new token, as far as
        there are any."""
        longest, new = self._lengths.prompt_tokens, self._lengths.new_tokens
        shorter = 1 if self._lengths.padded else longest
        given = (longest, *(shorter,) * (rows - 1))
        sources = given if self._anatomy.encoder is not None else ()
        prompts = [Part(0, 1 if sources else tokens) for tokens in given]
        recorder = Recorder(self._held, self._blocks, self._split)
        with torch.no_grad(), recorder:
            longer = [Part(part.count + new, longest) for part in prompts]
            batch_state = self._batch_state(self._lengths.pool(self._anatomy, rows), kv, longer)
            recorder.cut()
            found = [self._record(batch_state, prompts, recorder, sources)]
            if new > 1:
                found.append(self._record(batch_state, [Part(part.count, 1) for part in prompts], recorder))
            if new > 2:
                skipped = self._skip(batch_state, prompts, recorder)
                last = self._record(batch_state, [Part(part.count + new - 2, 1) for part in prompts], recorder)
                found.append(replace(last, inputs=(*skipped, *last.inputs)))
        return tuple(found)

    def _skip(self, batch_state: BatchState, prompts: Sequence[Part], recorder: Recorder) -> Events:
        """Let states stand where they would be before the last step, two steps in; returns what that leaves allocated.

        Where they are more than keys and values, one forward computes all steps that are left out.
        """
        left = self._lengths.new_tokens - 3
        layers = batch_state.cache(anew=False).layers if left else []
        growing = [layer for layer in layers if isinstance(layer, DynamicLayer) and layer.keys is not None]
        if all(type(layer) in _PLAIN_LAYERS for layer in growing):  # recurrent states and pages do not grow
            for layer in growing:
                layer.update(*(_more(states, left) for states in (layer.keys, layer.values)))
            return recorder.cut()[0]
        step = self._record(batch_state, [Part(part.count + 1, left) for part in prompts], recorder)
        events = [event for part in (step.inputs, *step.sections, step.end, step.choice) for event in part]
        times = Counter(event.key for event in events)
        return tuple(event for event in events if times[event.key] == 1)

    def _record(
        self, batch_state: BatchState, parts: Sequence[Part], recorder: Recorder, sources: Sequence[int] = ()
    ) -> Step:
        """The loop's own steps for a micro-batch, whose encoder reads so many tokens: `recorder` is told of each."""
        group = _group(parts, self._lengths, sources, on_host=batch_state.host is not None)
        return record_step(self._model, batch_state, group, recorder, self._times)


def record_step(model: Any, batch_state: BatchState, group: Group, recorder: Recorder, times: Sequence[float]) -> Step:
    """Record what `group` does in one pass of the loop; block i of those that `recorder` watches stands for
    `times[i]`."""
    recorder.cut_kernels(times)
    batch_state.kernel = OnPaper(recorder)
    batch = batch_state.batch(group)
    inputs = batch.inputs()
    batch_state.begin([batch])
    (making,) = recorder.cut()
    with ExitStack() as stack:
        stack.enter_context(_META)
        stack.enter_context(without_library_warnings())
        stack.enter_context(GpuAttention(recorder))
        stack.enter_context(running(model, batch_state.mixers, packed=batch.group.is_packed))
        output = model(**inputs)
    sections = recorder.cut()
    del inputs
    (end,) = recorder.cut()
    batch.choose(output)
    del output, batch
    (choice,) = recorder.cut()
    kernels = recorder.cut_kernels(times)
    return Step(inputs=making, sections=sections, end=end, choice=choice, kernels=kernels)


def _largest_calls(limits: CallLimits, tokens: int) -> list[Call]:
    """Those of a padded forward whose rows have up to so many tokens each."""
    return largest_calls(limits, tokens) or [Call(limits.rows, 1)]


def _expand(model: Any, blocks: ModuleList, firsts: Sequence[int], split: Sequence[ExpertsOnPaper]) -> ExpansionCost:
    """Expand `blocks` one after the other, those of one kind once, and then, for good, all of them: passes find them
    so, and no other does. `firsts`: for each block the number of the first that is like it. Experts that are `split`
    are expanded part by part."""
    most, found, repeats = 0, list[Kernels](), Counter(firsts)
    for index in repeats:
        block = blocks[index]
        own = [parts for parts in split if parts.module in set(block.modules())]
        opened = expansions(block)
        with torch.no_grad():
            nbytes = expanded_bytes(opened)
        with torch.no_grad(), Recorder(storages_of(model), ()) as recorder:
            slot = None if split or not opened else ExpansionSlot(nbytes, torch.device("meta"))
            for expansion in opened:
                expansion.open(slot)
            events = [event for section in recorder.cut() for event in section]
            for parts in own:
                for part in range(len(parts.ranges)):
                    parts.enter(part)
                    if parts.expansion is not None:
                        parts.expansion.open()
                        parts.expansion.close()
                    parts.leave(part)
                events += [event for section in recorder.cut() for event in section]
            allocator = Allocator()
            allocator.replay(events)
            most = max(most, allocator.usage.allocated)
            found += (replace(each, times=each.times * repeats[index]) for each in recorder.cut_kernels(()))
            for expansion in opened:
                expansion.close()
    for expansion in (*expansions(blocks), *(parts.expansion for parts in split if parts.expansion is not None)):
        expansion.open()
    for parts in split:
        parts.hold()
    return ExpansionCost(nbytes=most, kernels=tuple(found))


_SAMPLED: dict[str, Any] = {"temperature": 0.5, "top_k": 50, "top_p": 0.9, "min_p": 0.1}
_PENALIZED: dict[str, Any] = {"presence_penalty": 1.0, "frequency_penalty": 1.0, "repetition_penalty": 1.1}
_STRUCTURED = AnswerFormat("regex", ".")
"""Settings of rows that take as much memory as any."""


def _parts(rows: int, start: int, count: int, padded: bool) -> tuple[Part, ...]:
    """`rows` rows of which the first is longest, the others one token shorter where they are padded."""
    if not padded or start + count == 1:
        return (Part(start, count),) * rows
    other = Part(start, count - 1) if count > 1 else Part(start - 1, count)
    return (Part(start, count), *(other,) * (rows - 1))


def _group(parts: Sequence[Part], lengths: Lengths, sources: Sequence[int], *, on_host: bool) -> Group:
    sampling = Sampling(
        max_new_tokens=lengths.new_tokens,
        ignore_eos=not lengths.structured,
        logprobs=lengths.logprobs,
        answer_format=_STRUCTURED if lengths.structured else None,
        **(_SAMPLED if lengths.sampled else {}),
        **(_PENALIZED if lengths.penalized else {}),
    )
    seats = [
        Seat(
            Row(index=i, prompt=(), source=[0] * tokens, sampling=sampling, decode=str),
            i,
            known=part.start + part.count,
        )
        for i, (part, tokens) in enumerate(zip(parts, sources or [0] * len(parts), strict=True))
    ]
    for seat, part in zip(seats, parts, strict=True):
        seat.computed, seat.host_start = part.start, 0 if on_host else None
    return Group.of(seats)


def _more(states: torch.Tensor, tokens: int) -> torch.Tensor:
    rows, heads, _, width = states.shape
    return states.new_empty(rows, heads, tokens, width)
