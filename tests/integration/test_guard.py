"""Whole jobs on a GPU that is only said to be there: neighbours that take memory, and plans that were wrong."""

from __future__ import annotations

import io
import json
import os
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_gpu import FakeGpu
from launching import journalled, read_jsonl, write_jsonl
from observers import Notes

from zeroinf.distributed.world import World
from zeroinf.engines.stream.engine import StreamEngine
from zeroinf.errors import DoesNotFitError, InterruptedRunError
from zeroinf.generation.row import Sampling
from zeroinf.options.options import RunOptions
from zeroinf.planner.memory import OUTSIDE_TORCH, UNFORESEEN
from zeroinf.planner.plan import Plan
from zeroinf.runs import runner
from zeroinf.runs.report import RunReport
from zeroinf.service import loaded

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
LENGTHS = (3, 9, 1, 6, 9, 2, 4, 9)
LINK_GBPS = 50.0


class Job:
    """Eight requests, four rows at a time, on a fake GPU whose engine computes on the CPU."""

    def __init__(self, model: Path, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.gpu, self.ear = FakeGpu(), Notes()
        self.forwards: list[int] = []
        self.while_loading: Callable[[Plan], None] = lambda plan: None
        self.after_pass: Callable[[int], None] = lambda rows: None
        self.out = folder / "out.jsonl"
        # Prompts of one length: then what shares a micro-batch does not change a row's scores.
        entries = [
            {"id": f"r-{i}", "prompt": f"word {i}", "max_new_tokens": length, "ignore_eos": True}
            for i, length in enumerate(LENGTHS)
        ]
        self._options = RunOptions(
            model=str(model),
            sampling=Sampling(max_new_tokens=9),
            input_files=(str(write_jsonl(folder / "in.jsonl", entries)),),
            output_file=self.out,
            overwrite=True,
            resume_command="zeroinf run --resume",
            offload="cpu",
            batch_size=4,
            resident_blocks=1,
        )
        self._put_the_cpu_in_its_place(patch)

    def run(self, **changed: Any) -> RunReport:
        outcome = runner.run_job(replace(self._options, **changed), World(), GPU, io.StringIO(), self.ear)
        assert outcome is not None
        assert outcome.report is not None
        return outcome.report

    def _put_the_cpu_in_its_place(self, patch: pytest.MonkeyPatch) -> None:
        self.gpu.install(patch)
        pool, batch_state = loaded.PagePool, loaded.BatchState
        patch.setattr(loaded, "load_engine", self._load)
        patch.setattr(loaded, "measure_own_link", lambda device: LINK_GBPS)
        patch.setattr(loaded, "PagePool", lambda *given: pool(*given[:-1], CPU))
        patch.setattr(
            loaded, "BatchState", lambda model, rules, pool, device, host: batch_state(model, rules, pool, CPU, host)
        )

    def _load(self, plan: Plan, source: Any, config: Any, control: Any, device: Any, told: Any) -> StreamEngine:
        self.while_loading(plan)
        job = self

        class Watched(StreamEngine):
            def forward(self, micro_batches: Sequence[Mapping[str, Any]]) -> list[Any]:
                rows = sum(len(inputs["input_ids"]) for inputs in micro_batches)
                job.forwards.append(rows)
                outputs = super().forward(micro_batches)
                job.after_pass(rows)
                return outputs

        return Watched(replace(plan, device="cpu"), source, control, CPU, told)


@pytest.fixture
def job(small_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    return Job(small_checkpoint("llama"), tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def expected(small_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What a run that goes by its plan writes."""
    with pytest.MonkeyPatch.context() as patch:
        undisturbed = Job(small_checkpoint("llama"), tmp_path_factory.mktemp("undisturbed"), patch)
        undisturbed.run()
        assert undisturbed.forwards[:9] == [4] * 9
        assert max(undisturbed.forwards) == 4
        assert undisturbed.ear.notes == []
    return read_jsonl(undisturbed.out)


def planned(plan: Plan, *names: str) -> int:
    return sum(term.nbytes for term in plan.terms if term.place == "gpu" and term.name in names)


def test_a_neighbour_that_comes_after_the_plan_ends_the_run_before_a_weight_is_loaded(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = runner.prepare

    def prepared(*given: Any) -> Any:
        found = prepare(*given)
        needed = sum(term.nbytes for term in found.plan.terms if term.place == "gpu")
        job.gpu.context = planned(found.plan, "CUDA context")
        left = needed - planned(found.plan, *OUTSIDE_TORCH, UNFORESEEN) - (1 << 20)
        job.gpu.neighbours = job.gpu.total - job.gpu.context - left
        return found

    def taken(*given: Any) -> None:
        raise AssertionError("memory is being taken")

    monkeypatch.setattr(runner, "prepare", prepared)
    monkeypatch.setattr(loaded, "measure_own_link", taken)
    job.while_loading = taken
    with pytest.raises(DoesNotFitError, match=r"GPU 0 lacks 0\.00 GiB of what the plan needs") as caught:
        job.run()
    assert caught.value.exit_code == 3
    assert job.ear.notes == []
    assert not job.out.with_name("out.jsonl.journal").exists(), "nothing to go on from"


def test_a_neighbour_that_comes_while_weights_are_loaded_costs_rows_and_no_result(
    job: Job, expected: list[dict[str, Any]]
) -> None:
    def taken(plan: Plan) -> None:
        growing = sum(term.nbytes for term in plan.terms if term.place == "gpu" and term.grows)
        needed = sum(term.nbytes for term in plan.terms if term.place == "gpu")
        left = needed - planned(plan, *OUTSIDE_TORCH, UNFORESEEN) - growing // 2
        job.gpu.neighbours = job.gpu.total - left

    job.while_loading = taken
    job.run()
    assert job.ear.notes == ["another process has taken GPU memory since the plan: batch 2 instead of 4"]
    assert max(job.forwards) == 2
    assert read_jsonl(job.out) == expected


def test_weights_that_do_not_fit_after_all_are_refused_in_words(job: Job) -> None:
    def fail(plan: Plan) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    job.while_loading = fail
    with pytest.raises(
        DoesNotFitError, match="out of GPU memory while weights were loaded: CUDA out of memory"
    ) as caught:
        job.run()
    assert caught.value.exit_code == 3
    assert "run it again" in (caught.value.hint or "")


@pytest.mark.parametrize("forward", [1, 2, 11])
def test_a_plan_that_was_wrong_costs_rows_and_is_reported_with_its_terms(
    forward: int, job: Job, expected: list[dict[str, Any]]
) -> None:
    def fail(rows: int) -> None:
        if len(job.forwards) == forward:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    job.after_pass = fail
    report = job.run()
    (note,) = job.ear.notes
    assert re.match(
        r"out of GPU memory, although the plan fits: the pass is repeated with forwards of at most \d sequence", note
    )
    terms = [term for term in report.plan.terms if term.place == "gpu"]
    assert {"KV cache", "slots", "activations, logits, states"} <= {term.name for term in terms}
    assert all(f"{term.name} {term.nbytes / 2**30:.2f} GiB" in note for term in terms)
    assert max(job.forwards) == 4
    assert read_jsonl(job.out) == expected
    assert report.requests == len(LENGTHS)


def test_a_single_row_that_does_not_fit_ends_the_run_with_what_was_finished_saved(
    job: Job, expected: list[dict[str, Any]]
) -> None:
    def fail(rows: int) -> None:
        if len(job.forwards) >= 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    job.after_pass = fail
    with pytest.raises(DoesNotFitError) as caught:
        job.run()
    assert caught.value.exit_code == 3
    assert caught.value.message == "out of GPU memory with 1 row: CUDA out of memory. Tried to allocate 2.00 GiB"
    assert "--max-new-tokens" in (caught.value.hint or "")
    assert set(job.forwards) == {4}
    journal = job.out.with_name("out.jsonl.journal")
    # Of the rows that begin, three have the most tokens.
    assert [line["id"] for line in journalled(journal)] == [expected[0]["id"]]
    assert job.ear.notes[-1].endswith(f"1 finished result is saved in {journal}; to go on: zeroinf run --resume")


@pytest.mark.parametrize("forward", [1, 7, 12])
def test_a_run_that_was_stopped_goes_on_in_other_batches_and_ends_with_the_same_bytes(
    forward: int, job: Job, expected: list[dict[str, Any]]
) -> None:
    def stop(rows: int) -> None:
        if len(job.forwards) == forward:
            os.kill(os.getpid(), signal.SIGINT)

    job.after_pass = stop
    with pytest.raises(InterruptedRunError) as caught:
        job.run()
    assert caught.value.exit_code == 130
    assert not job.out.exists()
    done = len(journalled(job.out.with_name("out.jsonl.journal")))
    report = job.run(overwrite=False, resume=True, batch_size=3)
    assert report.requests == len(LENGTHS) - done
    assert read_jsonl(job.out) == expected


def test_the_report_puts_every_place_beside_what_was_measured(job: Job) -> None:
    job.gpu.most_reserved = 3 << 30
    job.while_loading = lambda plan: setattr(job.gpu, "most_allocated", 2 << 30)
    report = job.run(gpu_memory=8 << 30)
    outside = planned(report.plan, *OUTSIDE_TORCH)
    assert job.gpu.limits == [pytest.approx(((8 << 30) - outside) / job.gpu.total), 1.0], "the limit is lifted again"
    data = json.loads(json.dumps(report.to_json()))
    assert data["resident_blocks"] == 1
    assert data["link_gbps"] == LINK_GBPS
    assert data["link_share"] == pytest.approx(data["streamed_gbps"] / LINK_GBPS)
    assert data["streamed_bytes"] == len(job.forwards) * data["ranks"][0]["slot_bytes"]
    compared = {one["name"]: one for one in data["compared"]}
    assert compared["slots"]["measured"] == data["ranks"][0]["slot_bytes"]
    assert compared["slots"]["ratio"] == pytest.approx(1, rel=0.03)
    assert compared["KV cache"]["measured"] > 0
    assert compared["allocated"]["measured"] == 2 << 30
    assert compared["reserved"]["measured"] == 3 << 30
    assert {"GPU memory in all", "host memory in all", "load", "speed"} <= compared.keys()
