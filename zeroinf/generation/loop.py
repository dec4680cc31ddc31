"""The decode loop: take rows, run forwards, hand finished rows back."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch

from zeroinf.distributed.control import Control
from zeroinf.engines.base import Engine
from zeroinf.generation.cache import CachePool
from zeroinf.generation.micro_batch import MicroBatch, TokenRules
from zeroinf.generation.row import Row


def generate(
    engine: Engine,
    rules: TokenRules,
    control: Control,
    pool: CachePool,
    device: torch.device,
    *,
    take: Callable[[], Sequence[Row]],
    done: Callable[[Row], None],
    grew: Callable[[int], None] = lambda rows: None,
    stop_requested: Callable[[], int] = lambda: 0,
    shrank: Callable[[int], None] = lambda rows: None,
) -> int:
    """Run rows until `take` has none left on any rank, or a stop is requested on one of them.

    `take` returns the rows of the next micro-batch (none: the queue is empty), which find room in `pool`; `done`
    receives each row as it ends; `grew` is told after each forward how many rows gained a token. Where an engine's
    ranks must step together, a rank without rows keeps the others company with forwards of one token.

    A micro-batch that runs out of GPU memory is run again in halves, and those that follow are as small: `shrank` is
    told the rows of each. Raises torch.OutOfMemoryError when a single row does not fit, or the engine cannot go on.

    Returns 0, or what `stop_requested` said when it ended the loop with rows unfinished.
    """
    batch: MicroBatch | None = None
    supply = _Supply(take, pool, lambda rows: MicroBatch(engine.model, rows, rules, pool, device), shrank)
    ranks = _Agreement(control) if engine.in_step else None
    while True:
        if batch is None:
            batch = supply.next()
        busy, stop = batch is not None, stop_requested()
        if ranks is not None:
            busy, stop = ranks.agree(busy, stop)
        if stop or not busy:
            if batch is not None:
                grew(batch.accept(done))
            return stop
        if ranks is not None:
            ranks.foretell(batch is not None and batch.likely_goes_on(), stop_requested())
        if batch is None:
            engine.forward([_company(device)])
            continue
        failed: list[Row] = []
        try:
            grew(_advance(engine, batch, done))
        except torch.OutOfMemoryError:
            if pool.rows == 1 or not engine.recover():
                raise
            failed = batch.rows
        if failed or batch.finished:
            batch = None
        if failed:
            supply.halve(failed)


class _Supply:
    """Micro-batches that find room in the pool."""

    def __init__(
        self,
        take: Callable[[], Sequence[Row]],
        pool: CachePool,
        make: Callable[[Sequence[Row]], MicroBatch],
        shrank: Callable[[int], None],
    ) -> None:
        self._take, self._pool, self._make, self._shrank = take, pool, make, shrank
        self._waiting: deque[Row] = deque()

    def next(self) -> MicroBatch | None:
        """The next micro-batch; None when the queue is empty."""
        while rows := self._rows():
            try:
                return self._make(rows)
            except torch.OutOfMemoryError:
                if self._pool.rows == 1:
                    raise
            self.halve(rows)
        return None

    def _rows(self) -> list[Row]:
        if not self._waiting:
            self._waiting.extend(self._take())
        return [self._waiting.popleft() for _ in range(min(self._pool.rows, len(self._waiting)))]

    def halve(self, rows: Sequence[Row]) -> None:
        """Let those of `rows` that are not finished be run again, in micro-batches of half as many rows.

        Not to be called while the error is handled: it keeps alive what the failed forward had made.
        """
        unfinished = [row for row in rows if not row.finished]
        for row in unfinished:
            row.restart()
        self._waiting.extendleft(reversed(unfinished))
        self._pool.shrink(-(-len(rows) // 2))
        self._shrank(self._pool.rows)


class _Agreement:
    """Ranks in step agree before each forward whether there is one more.

    Asking makes the host wait for the slowest rank and the network. So each rank says one forward ahead what it
    expects, and the answer is there in time; only where nobody expects to go on are ranks asked for certain. An
    expectation that fails costs one forward of company, at the end of the work; a stop comes one forward later.
    """

    def __init__(self, control: Control) -> None:
        self._control = control
        self._expected: Callable[[], tuple[int, ...]] = lambda: (0, 0)

    def foretell(self, busy: bool, stop: int) -> None:
        """Say what this rank expects of the forward after the next. Every rank must call it after `agree`."""
        self._expected = self._control.ask_most(busy, stop)

    def agree(self, busy: bool, stop: int) -> tuple[bool, int]:
        """Whether any rank has work, and a stop if one was requested on any: the same on every rank."""
        any_busy, any_stop = self._expected()
        if not any_busy and not any_stop:
            any_busy, any_stop = self._control.most(busy, stop)
        return bool(any_busy), any_stop


def _advance(engine: Engine, batch: MicroBatch, done: Callable[[Row], None]) -> int:
    (output,) = engine.forward([batch.inputs()])
    grown = batch.accept(done)
    batch.choose(output)
    # A forward started before the tokens are known would be wasted if they ended all rows.
    return grown if batch.surely_goes_on else grown + batch.accept(done)


def _company(device: torch.device) -> dict[str, object]:
    return {"input_ids": torch.zeros(1, 1, dtype=torch.int64, device=device), "use_cache": False}
