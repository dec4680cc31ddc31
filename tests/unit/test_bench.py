"""A benchmark's matrix, its figures, its tables and the file that it goes on from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from zeroinf.bench import results as bench_results
from zeroinf.bench import runner
from zeroinf.bench.matrix import PRESETS, PYTHIA, BenchmarkSettings, Cell, Matrix, with_preset
from zeroinf.bench.results import (
    CellResult,
    Figure,
    Results,
    alone,
    cell_result_of,
    ratio,
    read_results,
    start_or_resume,
)
from zeroinf.bench.runner import arguments, run_cells
from zeroinf.bench.table import compared, latencies, pivot, render, table
from zeroinf.errors import InputError, OutputError, UsageError

CELL = Cell(engine="stream", model="m", offload="cpu", batch_size=2, input_len=8, output_len=4, num_gpus=1)
REPORT: dict[str, Any] = {
    "requests": 2,
    "prompt_tokens": 16,
    "completion_tokens": 8,
    "tokenize_s": 0.1,
    "start_to_ready_s": 9.0,
    "peak_gpu_bytes": 3 << 30,
    "peak_host_bytes": 2 << 30,
    "streamed_bytes": 4 * 10**9,
    "link_gbps": 8.0,
    "parameters": 10**6,
    "dtype": "float32",
    "repetitions": [
        {"generate_s": 1.0, "first_token_s": 0.4, "prefill_s": 0.4},
        {"generate_s": 2.0, "first_token_s": 0.8, "prefill_s": 0.8},
    ],
}
MACHINE = {"hostname": "here", "versions": {"torch": "2"}, "gpu_names": [], "driver": None}


def results(*outcomes: CellResult) -> Results:
    return Results(machine=MACHINE, settings=BenchmarkSettings().to_json(), outcomes=outcomes)


def ok(cell: Cell = CELL, **changed: Any) -> CellResult:
    return cell_result_of(cell, {**REPORT, **changed})


def failed(cell: Cell) -> CellResult:
    return CellResult(cell=cell, status="out of memory", message="out of GPU memory with 2 rows")


# The matrix


def test_engines_that_leave_nothing_elsewhere_have_one_cell_whatever_the_targets() -> None:
    matrix = Matrix(engines=("resident", "tensor-parallel", "zero"), models=("m",), offloads=("cpu", "nvme"))
    assert [(cell.engine, cell.offload) for cell in matrix.cells()] == [
        ("resident", "none"),
        ("tensor-parallel", "none"),
        ("zero", "cpu"),
        ("zero", "nvme"),
    ]


def test_a_fetch_is_only_tried_where_there_are_several_gpus() -> None:
    cells = Matrix(engines=("stream/replicated", "stream"), models=("m",), num_gpus=(1, 2)).cells()
    assert [(cell.engine, cell.num_gpus) for cell in cells] == [
        ("stream", 1),
        ("stream/replicated", 2),
        ("stream", 2),
    ]


@pytest.mark.parametrize("engine", ["fast", "zero/replicated", "stream/sideways"])
def test_an_engine_that_is_not_there_is_refused(engine: str) -> None:
    with pytest.raises(UsageError, match=f"no engine '{engine}'"):
        Matrix(engines=(engine,), models=("m",))


def test_a_preset_is_what_is_left_unsaid() -> None:
    matrix = with_preset("bloom-table", {"models": ("m",), "batch_sizes": (4,), "engines": None})
    assert (matrix.batch_sizes, matrix.engines) == ((4,), PRESETS["bloom-table"].matrix["engines"])
    assert with_preset("pythia-hf-vs-ds", {}).models == PYTHIA
    assert (matrix.input_lens, matrix.output_lens) == ((10,), (100,))


def test_a_cells_run_gets_every_setting_that_it_has_a_use_for() -> None:
    settings = BenchmarkSettings(repetitions=5, random_weights=True, nvme_paths=(Path("/a"), Path("/b")), gpu_memory=7)

    def words(**changed: Any) -> str:
        return " ".join(arguments(replace(CELL, **changed), settings, Path("/f")))

    assert "-r 5" in words()
    assert "--random-weights" in words()
    assert "--gpu-memory 7B" in words()
    assert "--resident-blocks 0" in words()
    assert "--resident-blocks" not in words(engine="zero")
    assert "--resident-blocks" not in words(offload="none")
    assert "--nvme-path" not in words()
    assert "--nvme-path /a --nvme-path /b" in words(offload="nvme")
    assert "/b" not in words(offload="nvme", engine="zero")
    assert "--engine stream --offload cpu" in words(engine="stream/replicated", num_gpus=2)
    assert words(engine="stream/replicated", num_gpus=2).endswith(
        "--no-share-prefixes --fetch replicated --num-gpus 2 --random-weights --gpu-memory 7B"
    )
    assert "--no-share-prefixes" not in words(engine="zero"), "all prompts of a cell are the same"


# Figures


def test_figures_are_those_of_each_repetition() -> None:
    figures = ok().figures
    assert figures["tokens_per_second"].samples == (8.0, 4.0)
    assert figures["ms_per_token"].samples == pytest.approx((137.5, 262.5))
    assert figures["prefill_tokens_per_second"].samples == (40.0, 20.0)
    assert figures["decode_tokens_per_second"].samples == pytest.approx((10.0, 5.0))
    assert figures["streamed_gbps"].samples == (4.0, 2.0)
    assert figures["link_share"].samples == (0.5, 0.25)
    assert (figures["peak_gpu_gib"].mean, figures["peak_host_gib"].mean) == (3.0, 2.0)
    assert (figures["first_token_s"].mean, figures["ready_s"].mean) == (pytest.approx(0.6), 9.0)


def test_what_a_run_did_not_measure_is_no_figure() -> None:
    figures = ok(peak_gpu_bytes=None, streamed_bytes=0, completion_tokens=2).figures
    assert not figures.keys() & {"peak_gpu_gib", "streamed_gbps", "link_share", "decode_tokens_per_second"}


def test_the_spread_of_a_ratio_comes_from_both() -> None:
    value, spread = ratio(Figure((3.0, 5.0)), Figure((1.0, 3.0)))
    assert value == 2.0
    assert spread == pytest.approx(2.0 * ((2**0.5 / 4) ** 2 + (2**0.5 / 2) ** 2) ** 0.5)


# Tables


def test_a_cell_that_failed_stands_in_the_table_with_its_failure() -> None:
    rows = table(results(ok(), failed(replace(CELL, batch_size=64))))
    assert rows[0][-1] == "status"
    assert [row[-1] for row in rows[1:]] == ["ok", "out of memory: out of GPU memory with 2 rows"]
    assert len({len(row) for row in rows}) == 1


def test_the_bloom_table_has_engines_down_and_batch_sizes_across() -> None:
    other = replace(CELL, engine="zero")
    layout = PRESETS["bloom-table"].layout
    assert layout is not None
    found = pivot(results(ok(), failed(replace(CELL, batch_size=64)), ok(other)), layout)
    assert found == [
        ["ms/token by batch", "2", "64"],
        ["stream (cpu)", "200.0 ± 88.4", "out of memory"],
        ["zero (cpu)", "200.0 ± 88.4", ""],
    ]


def test_what_else_differs_between_cells_stands_with_the_rows_of_a_table() -> None:
    layout = PRESETS["pythia-hf-vs-ds"].layout
    assert layout is not None
    found = pivot(results(ok(), ok(replace(CELL, engine="resident", offload="none", batch_size=8))), layout)
    assert found == [
        ["ms/token by engine", "stream (cpu)", "resident"],
        ["m, 2 rows", "200.0 ± 88.4", ""],
        ["m, 8 rows", "", "200.0 ± 88.4"],
    ]


def test_latencies_are_those_of_whole_repetitions() -> None:
    assert latencies(results(ok(), failed(replace(CELL, engine="resident", offload="none")))) == [
        ["model", "engine", "dtype", "tokens/s", "mean s", "std s", "min s", "max s"],
        ["m", "stream (cpu)", "float32", "6.00 ± 2.83", "1.500", "0.707", "1.000", "2.000"],
        ["m", "resident", "", "out of memory", "", "", "", ""],
    ]


def test_two_benchmarks_are_compared_where_they_have_the_same_cell() -> None:
    mine = results(ok(), failed(replace(CELL, batch_size=64)), ok(replace(CELL, engine="zero")))
    faster = {"repetitions": [{"generate_s": 0.5, "first_token_s": 0.1, "prefill_s": 0.1}]}
    theirs = results(ok(**faster), ok(replace(CELL, batch_size=64)))
    rows = compared(mine, theirs)
    assert [row[-1] for row in rows] == ["B / A", "2.667", ""]  # one sample has no spread
    assert compared(mine, mine)[1][-1] == "1.000 ± 0.667"


@pytest.mark.parametrize(
    ("form", "text"),
    [("human", "a  bc\n1  2\n"), ("md", "| a | bc |\n| - | -- |\n| 1 | 2  |\n"), ("csv", "a,bc\n1,2\n")],
)
def test_a_table_is_printed_as_asked(form: Any, text: str) -> None:
    assert render([["a", "bc"], ["1", "2"]], form) == text


# The file


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    whole = results(ok(), failed(replace(CELL, batch_size=64)))
    whole.save(tmp_path / "r.json")
    assert read_results(tmp_path / "r.json") == whole
    assert json.loads((tmp_path / "r.json").read_text())["cells"][0]["figures"]["tokens_per_second"]["samples"] == [
        8,
        4,
    ]


def test_results_that_cannot_be_replaced_stay_as_they_were(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    results(ok()).save(tmp_path / "r.json")

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    for step in ("write_new", "rename"):
        with monkeypatch.context() as patched, pytest.raises(OutputError, match="No space left"):
            patched.setattr(bench_results, step, full)
            results(ok(), failed(replace(CELL, batch_size=64))).save(tmp_path / "r.json")
        assert read_results(tmp_path / "r.json") == results(ok())


@pytest.mark.parametrize("text", ["{}", "[]", "no json", '{"schema": 99}'])
def test_any_other_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(InputError, match=r"r\.json"):
        read_results(tmp_path / "r.json")


def test_a_file_of_other_settings_or_another_machine_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    results(ok()).save(path)
    assert start_or_resume(path, BenchmarkSettings(), MACHINE, overwrite=False).outcomes
    assert not start_or_resume(path, BenchmarkSettings(), MACHINE, overwrite=True).outcomes
    with pytest.raises(UsageError, match="other settings: repetitions"):
        start_or_resume(path, BenchmarkSettings(repetitions=9), MACHINE, overwrite=False)
    with pytest.raises(UsageError, match="other machines: hostname"):
        start_or_resume(path, BenchmarkSettings(), {**MACHINE, "hostname": "there"}, overwrite=False)


def test_two_benchmarks_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    with alone(path), pytest.raises(OutputError, match=r"another benchmark writes .*r\.json"), alone(path):
        pytest.fail("both of them write")
    with alone(path):
        results(ok()).save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["r.json"]


def test_cells_that_took_too_long_run_again_once_they_may_take_longer(tmp_path: Path) -> None:
    slow = CellResult(cell=replace(CELL, batch_size=64), status="timeout", message="more than 600 s")
    results(ok(), slow).save(tmp_path / "r.json")
    for limit_s, kept in ((300.0, (ok(), slow)), (600.0, (ok(), slow)), (900.0, (ok(),))):
        found = start_or_resume(tmp_path / "r.json", BenchmarkSettings(cell_limit_s=limit_s), MACHINE, overwrite=False)
        assert found.outcomes == kept
        assert found.settings["cell_limit_s"] == limit_s


def test_cells_that_have_run_are_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Cell] = []
    monkeypatch.setattr(runner, "run_cell", lambda cell, settings, prompt: ran.append(cell) or ok(cell))
    cells = Matrix(models=("m",), batch_sizes=(2, 4, 8), input_lens=(None,)).cells()
    earlier = results(failed(cells[1]))
    kept: list[int] = []
    found = run_cells(
        cells,
        BenchmarkSettings(prompt="x"),
        earlier,
        done=lambda outcome, so_far: kept.append(len(so_far.outcomes)),
        begins=lambda cell, number: None,
    )
    assert ran == [cells[0], cells[2]]
    assert kept == [2, 3]
    assert {outcome.status for outcome in found.outcomes} == {"ok", "out of memory"}


def test_no_cell_begins_after_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "run_cell", lambda cell, settings, prompt: ok(cell))
    limited = run_cells(
        [replace(CELL, input_len=None)],
        BenchmarkSettings(prompt="x"),
        results(),
        done=lambda outcome, so_far: None,
        begins=lambda cell, number: None,
        time_limit_s=-1.0,
    )
    assert limited.outcomes == ()
