"""Requests of a job on disk, once a node, and what of them is in memory and in the plan."""

from __future__ import annotations

import errno
import os
import re
import tracemalloc
from array import array
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ranks import on_ranks

from zeroinf.distributed.control import Control
from zeroinf.distributed.world import World
from zeroinf.errors import OutputError
from zeroinf.generation.row import Sampling
from zeroinf.jobs import spool, work_list
from zeroinf.jobs.journal_output import JournalOutput
from zeroinf.jobs.work_list import WorkList, request_bytes
from zeroinf.model.resolve import resolve_model
from zeroinf.options.options import RunOptions
from zeroinf.planner.memory import REQUESTS
from zeroinf.runs.prepare import prepare, read_job
from zeroinf.service.requests import Extra, Work

PROMPTS = [[5, 6, 7], [8], list(range(2500)), [9, 10]]


def work_of(*prompts: list[int]) -> tuple[Work, ...]:
    sampling = Sampling(max_new_tokens=2)
    return tuple(
        Work(index=i, line=i, id=f"r{i}", text=None, prompt=array("i", tokens), sampling=sampling)
        for i, tokens in enumerate(prompts)
    )


def told(work: WorkList) -> list[tuple[str, list[int]]]:
    return [(item.id, list(item.prompt)) for item in work]


def files_held() -> list[tuple[int, int]]:
    """Files without a name that this process has open."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # that of this loop
            if "(deleted)" in (name := str(link.readlink())) and "memfd" not in name:
                found.append((link.stat().st_dev, link.stat().st_ino))
    return sorted(found)


def test_a_list_gives_back_what_was_put_in_by_number_and_by_index() -> None:
    sampling = Sampling(max_new_tokens=2, stop=("\ud800", "."))
    given = [replace(item, index=2 * item.index, sampling=sampling, text="Gr\ud800") for item in work_of(*PROMPTS)]
    extra = Extra(columns={"label": [1, None]})
    work = WorkList.of(given, {4: extra})
    assert (list(work), work.at(4), work.extra(4), work.extra(2)) == (given, given[2], extra, None)
    assert list(work[1:3]) == given[1:3]
    back = work.selected([3, 0])
    assert list(back) == [given[3], given[0]]
    assert (list(back.indices), list(back.lengths)) == ([6, 0], [(2, 2), (3, 2)])
    assert [list(array("i", prompt)) for prompt in back.prompts] == [PROMPTS[3], PROMPTS[0]]
    with pytest.raises(KeyError):
        work.at(3)


def test_settings_of_which_each_request_has_its_own_are_kept_all_the_same() -> None:
    samplings = [Sampling(max_new_tokens=2, seed=seed, temperature=1.0) for seed in range(3000)]
    work = WorkList.of(replace(work_of([1])[0], index=at, sampling=one) for at, one in enumerate(samplings))
    assert [item.sampling for item in work] == samplings


@pytest.mark.parametrize(("ranks", "local_size"), [(3, 3), (2, 1), (4, 2)])
@pytest.mark.parametrize("in_memory", [0, 1 << 20])
def test_ranks_read_requests_of_rank_0_from_one_file_a_node(
    ranks: int, local_size: int, in_memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "_IN_MEMORY_BYTES", in_memory)
    monkeypatch.setattr(work_list, "_CHUNK_BYTES", 4000)  # so that they travel in several parts, the last one shorter

    def body(control: Control) -> Any:
        before = files_held()
        own = WorkList.of(work_of(*PROMPTS)).selected([1, 0, 2, 3]) if control.world.is_main else WorkList()
        shared = own.shared(control)
        return told(shared), [file for file in files_held() if file not in before]

    found, _ = on_ranks(ranks, body, local_size=local_size)
    assert not [answer for answer in found if isinstance(answer, Exception) or answer is None], found
    wanted = [(f"r{i}", PROMPTS[i]) for i in (1, 0, 2, 3)]
    assert all(answer == wanted for answer, _ in found)
    files = [set(held) for _, held in found]
    assert all(len(held) == (0 if in_memory else 1) for held in files)
    for start in range(0, ranks, local_size):
        assert all(held == files[start] for held in files[start : start + local_size]), "one file for each node"


def test_a_job_without_work_shares_nothing() -> None:
    found, _ = on_ranks(2, lambda control: told(WorkList().shared(control)))
    assert found == [[], []]


def test_a_disk_without_room_for_the_requests_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(spool, "_IN_MEMORY_BYTES", 0)

    def full(*given: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match=re.escape(f"cannot keep the requests of the job in {tmp_path}: No space")):
        WorkList(tmp_path).append(work_of([1])[0])


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


def test_a_job_that_was_read_holds_some_bytes_of_each_request_and_no_token(
    asked: RunOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "_IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(spool, "_WRITE_BYTES", 4096)
    source = resolve_model(asked.model)
    read_job(asked, source, "cpu")  # what is imported and made once
    tracemalloc.start()
    try:
        job = read_job(asked, source, "cpu").job
        assert asked.output_file is not None
        output = JournalOutput(asked.output_file, job, overwrite=False, resume=False, resume_anyway=False)
        held, _ = tracemalloc.get_traced_memory()
        output.abandon("")
    finally:
        tracemalloc.stop()
    assert sum(prompt for prompt, _ in job.work.lengths) > 200 * len(job.work)
    assert held <= 65536 + request_bytes(len(job.work), 1)


def test_a_plan_has_a_term_for_requests(asked: RunOptions) -> None:
    source = resolve_model(asked.model)
    reading = read_job(asked, source, "cpu")
    plan = prepare(asked, source, reading, reading.job.work, World(), "cpu").plan
    (term,) = [term for term in plan.terms if term.name == REQUESTS]
    assert term.nbytes == request_bytes(2000, 1)
    assert term.place == "host"
