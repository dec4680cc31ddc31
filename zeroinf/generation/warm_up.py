"""Runs one pass that nobody asked for, so that kernels are compiled and libraries are there before the first request.

Triton compiles a kernel for each kind of use, for seconds: a part of a prompt, a step, a step over so many keys that
programs share them, each over pages and over what is fetched from host memory.
"""

from __future__ import annotations

import torch

from zeroinf.engines.base import Engine
from zeroinf.generation.micro_batch import BatchState, running
from zeroinf.generation.row import Row, Sampling
from zeroinf.generation.scheduler import Group, Seat

_PROMPT_TOKENS = 16
# A step over so many keys is shared among programs.
_LONG = 1024


def warm_up(engine: Engine, state: BatchState) -> None:
    """One pass of packed forwards over a row that has said nothing, in each place where rows may rest.

    Ranks in step must all call it.
    """
    tokens = state.pool.size.tokens
    places: list[int | None] = [None] if state.pool.size.pages else []
    places += [0] if state.host is not None and state.host.size.tokens >= tokens else []
    groups, seats = list[Group](), list[Seat]()
    for place in places:
        row = Row(index=0, prompt=[0] * (tokens - 1), sampling=Sampling(max_new_tokens=1), decode=str)
        seat = Seat(row, 0, tokens, host_start=place)
        seats.append(seat)
        prompt = min(_PROMPT_TOKENS, tokens - 1)
        if state.host is not None and place is not None:
            prompt = min(prompt, state.host.size.new_columns)
        starts, counts = (0, min(_LONG, tokens - 1), prompt), (prompt, 1, 1)
        groups += [Group.packed([seat], [start], [count]) for start, count in zip(starts, counts, strict=True)]
    state.pool.open({seat.number: tokens for seat in seats if not seat.on_host})
    batches = [state.batch(group) for group in groups]
    try:
        inputs = [batch.inputs() for batch in batches]
        state.begin(batches)
        with running(engine.model, packed=True):
            engine.forward(inputs)
    except torch.OutOfMemoryError:
        if not engine.recover():
            raise
    finally:
        state.close([seat for seat in seats if not seat.on_host])
