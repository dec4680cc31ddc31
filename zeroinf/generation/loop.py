"""The decode loop: take rows, run forwards, hand finished rows back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from zeroinf.distributed.control import Control
from zeroinf.engines.base import Engine
from zeroinf.generation.micro_batch import MicroBatch, TokenRules
from zeroinf.generation.row import Row


def generate(
    engine: Engine,
    rules: TokenRules,
    control: Control,
    device: torch.device,
    *,
    take: Callable[[], Sequence[Row]],
    done: Callable[[Row], None],
    grew: Callable[[int], None] = lambda rows: None,
    stop_requested: Callable[[], int] = lambda: 0,
) -> int:
    """Run rows until `take` has none left on any rank, or a stop is requested on one of them.

    `take` returns the rows of the next micro-batch (none: the queue is empty); `done` receives each row as it ends;
    `grew` is told after each forward how many rows gained a token. Where an engine's ranks must step together, a rank
    without rows keeps the others company with forwards of one token.

    Returns 0, or what `stop_requested` said when it ended the loop with rows unfinished.
    """
    batch: MicroBatch | None = None
    while True:
        if batch is None and (rows := take()):
            batch = MicroBatch(engine.model, rows, rules, device)
        busy, stop = int(batch is not None), stop_requested()
        if engine.in_step:
            busy, stop = control.most(busy, stop)
        if stop or not busy:
            return stop
        if batch is None:
            engine.forward([_company(device)])
            continue
        grew(_advance(engine, batch, done))
        if batch.finished:
            batch = None


def _advance(engine: Engine, batch: MicroBatch, done: Callable[[Row], None]) -> int:
    before = [row.finished for row in batch.rows]
    (output,) = engine.forward([batch.inputs()])
    grown = batch.accept(output)
    for row, was_finished in zip(batch.rows, before, strict=True):
        if row.finished and not was_finished:
            done(row)
    return grown


def _company(device: torch.device) -> dict[str, object]:
    return {"input_ids": torch.zeros(1, 1, dtype=torch.int64, device=device), "use_cache": False}
