"""Prompts of a job in memory: 4 bytes a token, once a node, and counted in the plan."""

from __future__ import annotations

import tracemalloc
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import on_ranks

from zeroinf.distributed.control import Control
from zeroinf.distributed.world import World
from zeroinf.generation.row import Sampling
from zeroinf.jobs import sharing
from zeroinf.jobs.sharing import request_bytes, share_work
from zeroinf.model.resolve import resolve_model
from zeroinf.options.options import RunOptions
from zeroinf.planner.memory import REQUESTS
from zeroinf.runs.prepare import prepare, read_job
from zeroinf.service.requests import Work


def work_of(*prompts: list[int]) -> tuple[Work, ...]:
    sampling = Sampling(max_new_tokens=2)
    return tuple(
        Work(index=i, line=i, id=f"r{i}", text=None, prompt=array("i", tokens), sampling=sampling)
        for i, tokens in enumerate(prompts)
    )


def shared_maps() -> dict[str, int]:
    """The node's shared memories that this process maps (memfds, by inode), and how many bytes of each."""
    found: dict[str, int] = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "memfd:" in line:
            span, _, _, _, inode, *_ = line.split()
            start, end = span.split("-")
            found[inode] = found.get(inode, 0) + int(end, 16) - int(start, 16)
    return found


def test_ranks_read_the_tokens_of_rank_0_from_one_memory() -> None:
    prompts = [[5, 6, 7], [8], list(range(100_000)), [9, 10]]

    def body(control: Control) -> Any:
        own = work_of(*prompts) if control.world.is_main else None
        shared = share_work(control, own)
        left = sum(len(item.prompt) for item in own or ())
        return [(item.id, list(item.prompt)) for item in shared], left, sum(shared_maps().values())

    found, _ = on_ranks(3, body)
    for told, left, nbytes in found:
        assert told == [(f"r{i}", tokens) for i, tokens in enumerate(prompts)]
        assert left == 0, "rank 0 keeps no copy of its own"
        assert nbytes >= 4 * sum(map(len, prompts))


@pytest.mark.parametrize("local_size", [1, 2])
def test_every_node_gets_the_tokens_once(local_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "_CHUNK_BYTES", 4000)  # so that they travel in several parts, the last one shorter
    prompts = [[5, 6, 7], [8], list(range(2500)), [9, 10]]

    def body(control: Control) -> Any:
        shared = share_work(control, work_of(*prompts) if control.world.is_main else None)
        return [(item.id, list(item.prompt)) for item in shared], list(shared_maps())

    found, _ = on_ranks(2 * local_size, body, local_size=local_size)
    assert not [answer for answer in found if isinstance(answer, Exception) or answer is None], found
    assert all(told == [(f"r{i}", tokens) for i, tokens in enumerate(prompts)] for told, _ in found)
    memories = [inode for _, inodes in found for inode in inodes]
    if local_size > 1:
        assert memories[0] == memories[1] != memories[2] == memories[3], "one memory for each node"


def test_a_job_without_work_shares_nothing() -> None:
    found, _ = on_ranks(2, lambda control: share_work(control, () if control.world.is_main else None))
    assert found == [(), ()]


@pytest.fixture
def asked(small_checkpoint: Callable[[str], Path], tmp_path: Path) -> RunOptions:
    words = "word " * 40
    (tmp_path / "in.txt").write_text("".join(f"{words}{number}\n" for number in range(2000)))
    return RunOptions(
        model=str(small_checkpoint("llama")),
        sampling=Sampling(max_new_tokens=4),
        input_files=(str(tmp_path / "in.txt"),),
        output_file=tmp_path / "out.jsonl",
        batch_size=2,
    )


def test_a_job_that_was_read_holds_little_more_than_its_tokens(asked: RunOptions) -> None:
    source = resolve_model(asked.model)
    read_job(asked, source, "cpu")  # what is imported and made once
    tracemalloc.start()
    try:
        work = read_job(asked, source, "cpu").job.work
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    counts = [len(item.prompt) for item in work]
    assert sum(counts) > 200 * len(work)
    assert held <= 4 * sum(counts) + 1000 * len(work)


def test_a_plan_has_a_term_for_requests(asked: RunOptions) -> None:
    source = resolve_model(asked.model)
    reading = read_job(asked, source, "cpu")
    plan = prepare(asked, source, reading, reading.job.work, World(), "cpu").plan
    (term,) = [term for term in plan.terms if term.name == REQUESTS]
    assert term.nbytes == request_bytes([len(item.prompt) for item in reading.job.work], 1)
    assert term.place == "host"
