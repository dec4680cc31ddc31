"""Opening and closing a loaded model: whatever fails, and wherever, nothing is left behind and no rank waits."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from generating import CPU
from observers import Notes
from ranks import on_ranks
from serving import greedy, serving

import zeroinf
from zeroinf.distributed.control import Control, OtherRankFailedError
from zeroinf.distributed.world import World
from zeroinf.engines.stream.host_memory import HostMemory
from zeroinf.errors import DoesNotFitError, ZeroinfError
from zeroinf.generation.host_cache import HostCache
from zeroinf.generation.row import Sampling
from zeroinf.model.inspect import read_anatomy
from zeroinf.model.resolve import resolve_model
from zeroinf.options.options import RunOptions
from zeroinf.planner.workload import Lengths
from zeroinf.runs import session
from zeroinf.runs.session import Session
from zeroinf.service import loaded
from zeroinf.service.requests import Request


@pytest.fixture(scope="module")
def folder(small_checkpoint: Callable[[str], Path]) -> Path:
    return small_checkpoint("llama")


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> set[HostMemory]:
    """Host memory that is open, as if all of it were page-locked."""
    now: set[HostMemory] = set()
    begin, close = HostMemory.__init__, HostMemory.close

    def opened(self: HostMemory, *given: Any, **how: Any) -> None:
        begin(self, *given, **how)
        now.add(self)

    def closed(self: HostMemory) -> None:
        now.discard(self)
        close(self)

    monkeypatch.setattr(HostMemory, "__init__", opened)
    monkeypatch.setattr(HostMemory, "close", closed)
    return now


def fail(*given: Any, **how: Any) -> Any:
    os.environ["ZEROINF_TEST_LEFT"] = "set while it was opened"
    raise RuntimeError("the test fails here")


@pytest.mark.parametrize("where", ["PagePool", "HostCache", "BatchState", "Scheduler", "TextCodec", "Scorer"])
def test_a_failure_after_loading_gives_back_all_that_was_taken(
    where: str, folder: Path, held: set[HostMemory], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = dict(os.environ)
    monkeypatch.setattr(loaded, where, fail)
    with pytest.raises(RuntimeError, match="the test fails here"), serving(folder, on_host=True):
        pass
    assert not held
    assert dict(os.environ) == before


def test_staging_that_does_not_fit_leaves_no_memory_of_rows_locked(
    folder: Path, held: set[HostMemory], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*given: Any) -> None:
        raise torch.OutOfMemoryError("no memory, the test says")

    monkeypatch.setattr("zeroinf.generation.host_cache.Link", no_room)
    with pytest.raises(DoesNotFitError, match="out of GPU memory with 4 rows"), serving(folder, on_host=True):
        pass
    assert not held


def test_closing_goes_on_where_a_part_of_it_fails(
    folder: Path, held: set[HostMemory], monkeypatch: pytest.MonkeyPatch
) -> None:
    close = HostCache.close

    def broken(self: HostCache) -> None:
        close(self)
        raise RuntimeError("the cache does not close")

    monkeypatch.setattr(HostCache, "close", broken)
    with pytest.raises(RuntimeError, match="the cache does not close"), serving(folder, on_host=True):
        assert held
    assert not held


def open_session(folder: Path, world: World) -> Session:
    source = resolve_model(str(folder))
    options = RunOptions(model=str(folder), sampling=Sampling(max_new_tokens=4), dtype="float32", batch_size=2)
    anatomy = read_anatomy(source.config, dtype="float32")
    return Session(options, source, anatomy, Lengths(prompt_tokens=8, new_tokens=4), None, world, CPU, Notes())


def test_an_error_of_rank_0s_planning_ends_all_ranks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_plan(*given: Any) -> None:
        raise DoesNotFitError("nothing fits, the test says")

    monkeypatch.setattr(session, "plan_run", no_plan)
    found, codes = on_ranks(2, lambda control: open_session(folder, control.world), seconds=60)
    assert codes == [0, 0]
    assert isinstance(found[0], DoesNotFitError)
    assert isinstance(found[1], OtherRankFailedError)
    assert (found[1].exit_code, str(found[1])) == (3, "rank 0 failed: nothing fits, the test says")


def asked(index: int, prompt: str) -> Request:
    sampling = Sampling(max_new_tokens=4, ignore_eos=True)
    return Request(index=index, line=None, id=str(index), prompt=prompt, messages=None, sampling=sampling)


def test_all_ranks_of_a_session_get_what_all_of_them_have_run(folder: Path) -> None:
    prompts = [asked(index, f"word {index}") for index in range(12)]

    def body(control: Control) -> Any:
        with open_session(folder, control.world) as opened:
            first = sorted(opened.results(prompts), key=lambda result: result.index)
            try:
                list(opened.results([asked(0, "much too long a prompt")]))
            except ZeroinfError as error:
                return first, str(error), opened.model.scheduler.counts.passes
        return None

    found, codes = on_ranks(2, body, seconds=100)
    assert codes == [0, 0], found
    (first, refused, passes), (second, refused_too, passes_too) = found
    assert first == second
    assert [result.index for result in first] == list(range(12))
    assert "a prompt of" in refused
    assert refused in refused_too
    assert passes > 0 < passes_too


def test_ranks_of_a_launcher_that_call_python_alike_get_the_answers_of_one_alone(folder: Path) -> None:
    prompts = ["one", "two", "three", "four", "five"]

    def generated() -> list[str]:
        how: dict[str, Any] = {"max_new_tokens": 4, "dtype": "float32", "offload": "cpu", "progress": False}
        return [completion.text for completion in zeroinf.generate(str(folder), prompts, **how)]

    found, codes = on_ranks(2, lambda control: generated(), seconds=100)
    assert codes == [0, 0], found
    assert found == [generated()] * 2


def test_a_rank_that_fails_ends_what_others_wait_for(folder: Path) -> None:
    def body(control: Control) -> Any:
        with serving(folder, control) as service:
            if control.world.is_main:
                handles = [service.submit([5, 6], greedy(12, ignore_eos=True)) for _ in range(300)]
                for handle in handles:
                    handle.result(60)
            else:

                def spoil(*given: Any) -> None:
                    raise RuntimeError("the disk is on fire")

                service.model.engine.model.get_input_embeddings().register_forward_pre_hook(spoil)
                service.wait()

    found, _ = on_ranks(2, body, seconds=100)
    assert "another rank has failed" in str(found[0])
    assert "the disk is on fire" in str(found[1])
