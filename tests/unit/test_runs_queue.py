"""One queue and one box for all ranks: nothing twice, nothing lost."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict
from threading import Barrier, Thread

import pytest
import torch.distributed as dist

from zeroinf.generation.pass_limits import Limits
from zeroinf.generation.row import Row, Sampling
from zeroinf.generation.scheduler import Scheduler
from zeroinf.jobs.work_list import WorkList
from zeroinf.runs.queue import ResultBox, TokenCount, WorkQueue, shortest_last
from zeroinf.service.requests import Result, Work


def on_threads(count: int, body: Callable[[int], None]) -> None:
    together = Barrier(count)

    def run(number: int) -> None:
        together.wait()
        body(number)

    threads = [Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def result(index: int) -> Result:
    return Result(
        index=index,
        id=f"id-{index}",
        prompt=None if index % 2 else "Grüße \U0001f642",
        completion=f"line\n\u2028{index}",
        finish_reason="stop",
        prompt_tokens=index,
        completion_tokens=1,
    )


def passes_of(work: Sequence[Work], rows: int) -> int:
    limits = Limits(rows=rows, pages=1 << 20, micro_batch_rows=rows, prefill_tokens=1 << 20)
    scheduler = Scheduler(limits, lambda tokens: 1)
    scheduler.add([Row(index=w.index, prompt=w.prompt, sampling=w.sampling, decode=str) for w in work])
    passes = 0
    while scheduler.admit() or scheduler.seats:
        for group in scheduler.next_pass():
            scheduler.advance(group)
        passes += 1
    return passes


@pytest.mark.parametrize("seed", range(5))
def test_the_last_rows_that_run_together_end_together_and_the_others_keep_their_order(seed: int) -> None:
    drawn, rows = random.Random(seed), 16
    work = WorkList.of(
        Work(
            index=i,
            line=None,
            id=f"{i}",
            text=None,
            prompt=(1,),
            sampling=Sampling(max_new_tokens=drawn.randint(4, 128)),
        )
        for i in range(400)
    )
    ordered = shortest_last(work, rows)
    assert sorted(item.index for item in ordered) == list(range(400))
    assert list(ordered[:300]) == list(work[:300])
    least = sum(item.sampling.max_new_tokens for item in work) / rows
    assert passes_of(ordered, rows) < 1.02 * least
    assert passes_of(work, rows) > 1.02 * least


def test_work_of_equal_lengths_or_of_no_more_than_fills_the_rows_is_run_in_its_order() -> None:
    def work(*lengths: int) -> WorkList:
        return WorkList.of(
            Work(index=i, line=None, id=f"{i}", text=None, prompt=(1,), sampling=Sampling(max_new_tokens=new))
            for i, new in enumerate(lengths)
        )

    assert list(shortest_last(work(*[7] * 9), 4)) == list(work(*[7] * 9))
    assert list(shortest_last(work(1, 7, 3), 3)) == list(work(1, 7, 3))


@pytest.mark.parametrize(("total", "rows", "ranks"), [(0, 4, 2), (1, 4, 3), (7, 8, 2), (8, 8, 2), (101, 3, 8)])
def test_each_position_is_drawn_exactly_once(total: int, rows: int, ranks: int) -> None:
    store = dist.HashStore()
    drawn: list[list[range]] = [[] for _ in range(ranks)]

    def drain(rank: int) -> None:
        queue = WorkQueue(store, total, rows)
        while positions := queue.draw():
            drawn[rank].append(positions)
        assert not queue.draw(), "empty stays empty"

    on_threads(ranks, drain)
    batches = sorted((batch for of_rank in drawn for batch in of_rank), key=lambda batch: batch.start)
    assert [position for batch in batches for position in batch] == list(range(total))
    assert all(len(batch) == rows for batch in batches[:-1]), "batches are the same whoever draws them"


def test_every_result_arrives_once_and_whole_while_others_are_put() -> None:
    store, count, ranks = dist.HashStore(), 50, 4
    found: list[Result] = []

    def rank(number: int) -> None:
        if number:
            box = ResultBox(store)
            for index in range(number - 1, count, ranks - 1):
                box.put(result(index))
            return
        box = ResultBox(store)
        while len(found) < count:
            found.extend(box.collect())
        assert list(box.collect()) == []

    on_threads(ranks, rank)
    assert sorted(found, key=lambda r: r.index) == [result(index) for index in range(count)]


def test_a_rank_that_died_before_its_result_was_there_does_not_hold_up_the_others() -> None:
    store = dist.HashStore()
    box = ResultBox(store)
    box.put(result(0))
    store.add("results", 1)  # a rank took a number, and died
    box.put(result(1))
    assert list(box.collect()) == [result(0), result(1)]
    store.set("result/2", json.dumps(asdict(result(2))))
    assert list(box.collect()) == [result(2)], "or it was only slow"


def test_a_result_that_is_collected_no_longer_takes_memory_in_the_store() -> None:
    store = dist.HashStore()
    box = ResultBox(store)
    box.put(result(0))
    keys = store.num_keys()
    assert len(list(box.collect())) == 1
    assert store.num_keys() == keys - 1


def test_tokens_of_all_ranks_are_counted_together() -> None:
    store = dist.HashStore()
    on_threads(4, lambda rank: [TokenCount(store).add(rank) for _ in range(10)] and None)
    assert TokenCount(store).add(0) == 60
