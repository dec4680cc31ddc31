"""The report of a run: every term of the plan beside what was measured, and every figure as JSON."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import asdict, replace
from typing import Any

import pytest
from rich.console import Console
from small_models import small_config

from zeroinf.cli.console import print_report
from zeroinf.engines.base import Stalls
from zeroinf.generation.pass_counts import Counts
from zeroinf.hardware.process import Resident
from zeroinf.model.inspect import read_anatomy
from zeroinf.planner.memory import Term, total
from zeroinf.planner.plan import Plan
from zeroinf.planner.timing import Timing
from zeroinf.runs.compare import Compared, compare_gpu, compare_host, compare_time
from zeroinf.runs.report import Phases, RankReport, RunReport
from zeroinf.service.gpu_memory import GpuUse

GIB = 1 << 30
GPU_TERMS = {
    "embeddings, head, norms": "weights that stay",
    "resident layers": "weights that stay",
    "live weights": "live weights, activations, workspaces",
    "gaps between live weights": "reserved",
    "staging buffers (load only)": "weights that stay",
    "slots": "slots",
    "KV cache": "KV cache",
    "activations, logits, states": "live weights, activations, workspaces",
    "matrix product workspaces": "live weights, activations, workspaces",
    "CUDA graphs of layers": "live weights, activations, workspaces",
    "pages of small tensors": "reserved",
    "allocator's pages and gaps": "reserved",
    "CUDA context": "CUDA context, collectives",
    "collectives' buffers": "CUDA context, collectives",
    "unforeseen": "GPU memory in all",
}
"""The finest line that each term is part of."""
HOST_TERMS = {
    "weights, page-locked": "host memory, page-locked",
    "NVMe read ring, page-locked": "host memory, page-locked",
    "processes with their libraries": "host memory in all",
}
TIMING = Timing(
    load_s=8.0,
    prefill_s=0.5,
    decode_s=0.25,
    tokens_per_second=300.0,
    streamed_bytes=10**9,
    fetched_bytes=0,
    binds="link",
)
USE = GpuUse(
    loaded=10 * GIB, slots=3 * GIB, cache=4 * GIB, allocated=20 * GIB, reserved=23 * GIB, process=24 * GIB
)  # fmt: skip


def plan_of(**changed: Any) -> Plan:
    terms = [Term("gpu", name, (1 + index) * GIB, "counted") for index, name in enumerate(GPU_TERMS)]
    terms += [Term("host", name, (1 + index) * GIB, "counted") for index, name in enumerate(HOST_TERMS)]
    terms += [Term("host", "margin for the system", GIB, "assumed"), Term("disk", "store", GIB, "counted")]
    return Plan(
        anatomy=read_anatomy(small_config("llama")),
        engine="stream",
        dtype="float32",
        device="cuda",
        world_size=2,
        batch_size=4,
        **{"offload": "cpu", "resident_blocks": 1, "terms": tuple(terms), "timing": TIMING, **changed},
    )


def lines(compared: Any) -> dict[str, Compared]:
    found = {one.name: one for one in compared}
    assert found
    return found


def with_more(plan: Plan, name: str) -> Plan:
    grown = (replace(term, nbytes=term.nbytes + GIB) if term.name == name else term for term in plan.terms)
    return replace(plan, terms=tuple(grown))


@pytest.mark.parametrize(("term", "line"), GPU_TERMS.items())
def test_every_term_of_gpu_memory_is_predicted_in_a_line_of_its_own_kind_and_in_the_whole(term: str, line: str) -> None:
    plan = plan_of()
    before, after = (lines(compare_gpu(one, [USE])) for one in (plan, with_more(plan, term)))
    grown = {name for name in before if after[name].predicted == before[name].predicted + GIB}
    assert grown >= {line, "GPU memory in all"}
    parts = {
        "weights that stay",
        "slots",
        "KV cache",
        "live weights, activations, workspaces",
        "CUDA context, collectives",
    }
    assert grown & parts == {line} & parts
    assert all(after[name].predicted == before[name].predicted for name in before.keys() - grown)


@pytest.mark.parametrize(("term", "line"), HOST_TERMS.items())
def test_every_term_of_host_memory_is_predicted_in_a_line(term: str, line: str) -> None:
    plan = plan_of()
    before, after = (lines(compare_host(one, GIB, GIB)) for one in (plan, with_more(plan, term)))
    assert {name for name in before if after[name].predicted != before[name].predicted} == {line, "host memory in all"}


def test_what_is_left_to_the_system_is_no_prediction_of_what_the_run_takes() -> None:
    plan = plan_of()
    assert lines(compare_host(plan, GIB, GIB)) == lines(
        compare_host(with_more(plan, "margin for the system"), GIB, GIB)
    )


def test_lines_of_gpu_memory_add_up() -> None:
    found = lines(compare_gpu(plan_of(), [USE]))
    predicted = {name: one.predicted for name, one in found.items()}
    measured = {name: one.measured for name, one in found.items()}
    for values in (predicted, measured):
        parts = ("weights that stay", "slots", "KV cache", "live weights, activations, workspaces")
        assert sum(values[name] for name in parts) == values["allocated"]
    assert predicted["GPU memory in all"] == total(plan_of().terms, "gpu")
    assert measured["reserved"] + measured["CUDA context, collectives"] == measured["GPU memory in all"]


def test_measured_is_what_the_rank_took_that_took_most() -> None:
    other = GpuUse(
        loaded=9 * GIB, slots=3 * GIB, cache=5 * GIB, allocated=19 * GIB, reserved=25 * GIB, process=26 * GIB
    )
    found = {name: one.measured / GIB for name, one in lines(compare_gpu(plan_of(), [USE, other])).items()}
    assert found == {
        "weights that stay": 7,
        "slots": 3,
        "KV cache": 5,
        "live weights, activations, workspaces": 6,
        "allocated": 20,
        "reserved": 25,
        "CUDA context, collectives": 1,
        "GPU memory in all": 26,
    }


def test_without_nvml_only_what_it_would_tell_is_missing() -> None:
    whole, less = (lines(compare_gpu(plan_of(), [use])) for use in (USE, replace(USE, process=None)))
    assert whole.keys() - less.keys() == {"CUDA context, collectives", "GPU memory in all"}
    assert all(less[name] == whole[name] for name in less)


def test_without_a_gpu_there_is_nothing_to_compare_of_one() -> None:
    assert list(compare_gpu(plan_of(), [])) == []


def test_memory_that_nobody_locked_is_not_compared() -> None:
    assert "host memory, page-locked" not in lines(compare_host(plan_of(), 0, GIB))


def test_load_and_speed_stand_beside_what_was_expected() -> None:
    load, speed = Compared("load", "s", 8.0, 10.0), Compared("speed", "tokens/s", 300.0, 200.0)
    assert list(compare_time(plan_of(), 10.0, None, 200.0)) == [load, speed]
    assert list(compare_time(plan_of(), 10.0, 0.2, 200.0)) == [load, Compared("step", "s", 0.25, 0.2), speed]


@pytest.mark.parametrize(("predicted", "measured", "ratio"), [(3.0, 2.0, 1.5), (0.0, 2.0, 0.0), (3.0, 0.0, 0.0)])
def test_the_ratio_is_predicted_over_measured_where_something_was(
    predicted: float, measured: float, ratio: float
) -> None:
    assert Compared("x", "s", predicted, measured).ratio == ratio


COUNTS = Counts(
    passes=8, prefill_columns=50, prefill_padding=5, decode_columns=400, decode_padding=100,
    reserved_pages=120, most_reserved_pages=18,
)  # fmt: skip


def rank(**changed: Any) -> RankReport:
    fields: dict[str, Any] = {
        "host_loading": Resident(2 * GIB, 5 * GIB),
        "host": Resident(3 * GIB, 6 * GIB),
        "gpu": USE,
        "link_gbps": 50.0,
        "passes": 8,
        "streamed_bytes": 800,
        "routed_passes": 0,
        "spared_bytes": 0,
        "rows_read": 0,
        "rows_read_s": 0.0,
        "counts": COUNTS,
        "kv_fetched_bytes": 0,
        "kv_sent_bytes": 0,
        "pool_pages": 20,
        "slot_bytes": 3 * GIB,
        "pinned_host_bytes": 5 * GIB,
        "link_busy_s": 3.0,
        "stalls": Stalls(link_s=1.0, compute_s=2.0),
        "repetitions": (Phases(generate_s=4.0, first_token_s=1.0, prefill_s=2.0),),
        "mask_wait_s": 0.0,
        "attention_s": 0.0,
        "attention_wait_s": 0.0,
    }
    return RankReport(**{**fields, **changed})


def report(**changed: Any) -> RunReport:
    fields: dict[str, Any] = {
        "plan": plan_of(),
        "requests": 8,
        "refused": 0,
        "failed": 0,
        "cut": 0,
        "cut_answers": 0,
        "prompt_tokens": 80,
        "completion_tokens": 800,
        "start_to_ready_s": 12.0,
        "load_s": 10.0,
        "tokenize_s": 0.5,
        "generate_s": 4.0,
        "start_to_finish_s": 17.0,
        "streamed_bytes": 320 * 10**9,
        "shared_host_bytes": 4 * GIB,
        "ranks": (rank(), rank(link_gbps=40.0)),
        "output": None,
        "errors": None,
    }
    return RunReport(**{**fields, **changed})


def test_the_share_of_the_links_is_what_was_moved_by_what_they_were_measured_to_move_together() -> None:
    found = report()
    assert (found.streamed_gbps, found.link_gbps) == (80.0, 90.0)
    assert found.link_share == pytest.approx(80 / 90)


def test_no_share_is_claimed_of_links_that_nobody_measured() -> None:
    found = report(ranks=(rank(link_gbps=None),))
    assert (found.link_gbps, found.link_share, found.link_busy) == (None, None, None)


def test_a_link_that_is_slowed_is_told_from_one_that_waits(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(ranks=(rank(link_busy_s=3.8), rank(link_gbps=40.0, link_busy_s=4.0)))
    assert found.link_busy == pytest.approx(0.975)
    print_report(Console(), found)
    assert "89 % of the 90.0 measured, in 98 % of the time" in " ".join(capsys.readouterr().out.split())


def test_what_ranks_share_counts_once() -> None:
    found = report()
    assert found.peak_host_bytes == 2 * 9 * GIB - 4 * GIB
    assert found.peak_host_loading_bytes == 2 * 7 * GIB - 4 * GIB
    assert found.pinned_host_bytes == 2 * 5 * GIB - 4 * GIB


def test_the_json_holds_every_line_of_the_comparison_with_its_ratio() -> None:
    found = report()
    compared = json.loads(json.dumps(found.to_json()))["compared"]
    assert compared == [{**asdict(one), "ratio": one.ratio} for one in found.compared()]
    assert {one["name"] for one in compared} >= {*GPU_TERMS.values(), *HOST_TERMS.values(), "load", "speed"}
    (speed,) = (one for one in compared if one["name"] == "speed")
    assert speed == {"name": "speed", "unit": "tokens/s", "predicted": 300.0, "measured": 200.0, "ratio": 1.5}


def test_the_json_holds_what_was_planned_what_was_moved_and_where_the_time_went() -> None:
    data = json.loads(json.dumps(report().to_json()))
    assert data["schema"] == 1
    assert (data["resident_blocks"], data["batch_size"], data["offload"], data["fetch"]) == (1, 4, "cpu", "replicated")
    assert (data["link_share"], data["link_busy"]) == pytest.approx((80 / 90, 3 / 4))
    assert data["tokens_per_second"] == 200.0
    assert data["ranks"][0]["stalls"] == {
        "link_s": 1.0, "disk_s": 0.0, "compute_s": 2.0, "host_s": 0.0, "between_s": 0.0,
    }  # fmt: skip
    assert data["ranks"][0]["gpu"] == asdict(USE)
    assert data["padding"] == {"prefill": 0.1, "decode": 0.25}
    assert data["kv_pool"] == {"mean": 0.75, "peak": 0.9}


def test_the_age_of_a_process_counts_from_its_start() -> None:
    code = "import time; from zeroinf.hardware.process import process_age_s; print(time.time() - process_age_s())"
    before = time.time()
    started = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert before - 0.1 < started < time.time()  # a clock tick, and what clocks are apart


def test_the_report_says_how_many_passes_brought_few_experts(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(Console(), report())
    assert "routed experts" not in capsys.readouterr().out
    print_report(Console(), report(ranks=(rank(routed_passes=6, spared_bytes=5 * 10**9), rank())))
    assert "in 6 of 16 passes, 5.0 GB less" in capsys.readouterr().out


def test_the_report_says_how_many_rows_were_read_from_the_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(
        Console(), report(ranks=(rank(rows_read=9000, rows_read_s=1.0), rank(rows_read=1000, rows_read_s=2.0)))
    )
    assert re.search(r"rows read from the checkpoint\s.*10,000, in 1\.5 s", capsys.readouterr().out)
