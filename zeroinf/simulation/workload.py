"""Runs a micro-batch on paper: the decode loop's own steps over the model on the meta device."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from zeroinf.generation.cache import PagePool
from zeroinf.generation.micro_batch import Desk, MicroBatch, TokenRules
from zeroinf.generation.row import Row, Sampling
from zeroinf.generation.scheduler import Group, Seat
from zeroinf.model.anatomy import Anatomy, PoolSize
from zeroinf.model.inspect import build_meta, find_blocks
from zeroinf.planner.workload import Step, Workload
from zeroinf.simulation.attention import GpuAttention
from zeroinf.simulation.recorder import Recorder

_META = torch.device("meta")
# So many blocks of each kind are run: the gaps that one leaves behind for the next stop growing after a few (GPT-NeoX:
# five, most others: two).
_KEPT = 6


class Simulator:
    """Workloads of one model: prompts of up to `prompt_tokens` tokens, to which `new_tokens` are added.

    `padded`: prompts differ in length. Of blocks that do the same a few are run, and counted for all of them.
    Calling it with a number of rows takes tenths of a second and no memory.
    """

    def __init__(
        self,
        config: Any,
        anatomy: Anatomy,
        *,
        prompt_tokens: int,
        new_tokens: int,
        padded: bool,
        trust_remote_code: bool = False,
    ) -> None:
        self._anatomy = anatomy
        self._prompt_tokens, self._new_tokens, self._padded = prompt_tokens, new_tokens, padded
        self._model = build_meta(config, anatomy.dtype, trust_remote_code)
        self._path, self._blocks = find_blocks(self._model)
        self._times = [1.0] * len(self._blocks)
        self._seen: dict[int, Workload] = {}
        if anatomy.is_paged:
            self._keep_kinds()

    def __call__(self, rows: int) -> Workload:
        if rows not in self._seen:
            self._seen[rows] = self._run(rows)
        return self._seen[rows]

    def _keep_kinds(self) -> None:
        """Leave the first blocks in the model, a few of each kind: models tell a block what it is by its place.

        Where caches grow by themselves, every block counts instead.
        """
        ran = self._run(2)  # two rows, of which one is padded
        steps = (ran.prefill, ran.first_decode, ran.last_decode)
        groups = zip(*(step.kernels[1:] for step in steps), strict=True)
        kinds = [tuple(group.kernels for group in block) for block in groups]
        kept = max(index for index, kind in enumerate(kinds) if kinds[:index].count(kind) < _KEPT) + 1
        self._times = [kinds.count(kind) / kinds[:kept].count(kind) for kind in kinds[:kept]]
        self._blocks = self._blocks[:kept]
        self._model.set_submodule(self._path, self._blocks)

    def _run(self, rows: int) -> Workload:
        model, tokens = self._model, self._prompt_tokens + self._new_tokens
        recorder = Recorder(model, self._blocks)
        size = PoolSize(rows=rows, tokens=tokens, pages=rows * self._anatomy.row_pages(tokens))
        with torch.no_grad(), recorder:
            desk = Desk(model, TokenRules(model, None, ()), PagePool(model, self._anatomy, size, _META), _META)
            seats = self._seats(rows)
            desk.open(seats)
            cache = recorder.cut(self._times)
            prefill = first = last = self._step(desk, seats, recorder)
            if self._new_tokens > 1:
                first = last = self._step(desk, seats, recorder)
            if self._new_tokens > 2:
                _skip(desk, seats, self._new_tokens - 3)
                if self._anatomy.is_paged:
                    recorder.cut(self._times)  # what is written in place leaves nothing behind
                last = self._step(desk, seats, recorder)
        return Workload(
            rows=rows,
            prompt_tokens=self._prompt_tokens,
            new_tokens=self._new_tokens,
            cache=cache.events,
            prefill=prefill,
            first_decode=first,
            last_decode=last,
        )

    def _seats(self, count: int) -> list[Seat]:
        """Rows that never end early; the first is the longest."""
        sampling = Sampling(max_new_tokens=self._new_tokens, ignore_eos=True)
        longest, shorter = [0] * self._prompt_tokens, [0] * (1 if self._padded else self._prompt_tokens)
        prompts = [longest, *[shorter] * (count - 1)]
        rows = (Row(index=i, prompt=prompt, sampling=sampling, decode=str) for i, prompt in enumerate(prompts))
        return [Seat(row, number, len(row.prompt)) for number, row in enumerate(rows)]

    def _step(self, desk: Desk, seats: Sequence[Seat], recorder: Recorder) -> Step:
        batch = MicroBatch(desk, Group.of(seats))
        with ExitStack() as stack:
            stack.enter_context(_META)
            stack.enter_context(GpuAttention(recorder))
            output = self._model(**batch.inputs())
        batch.choose(output)
        del output
        for seat in seats:
            seat.computed, seat.known = seat.known, seat.known + 1
        return recorder.cut(self._times)


def _skip(desk: Desk, seats: Sequence[Seat], tokens: int) -> None:
    """Let rows stand where they would after `tokens` more steps."""
    for seat in seats:
        seat.computed, seat.known = seat.computed + tokens, seat.known + tokens
    for layer in desk.cache(anew=False).layers if tokens else ():
        if isinstance(layer, DynamicLayer) and layer.keys is not None:  # recurrent states and pages do not grow
            layer.update(*(_more(states, tokens) for states in (layer.keys, layer.values)))


def _more(states: torch.Tensor, tokens: int) -> torch.Tensor:
    rows, heads, _, width = states.shape
    return states.new_empty(rows, heads, tokens, width)
