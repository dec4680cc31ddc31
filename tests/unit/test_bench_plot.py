"""The picture of a benchmark: units on its axes, a named line for each engine, whatever the cells came to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_bench import CELL, failed, ok, results

from zeroinf.bench.plot import draw, drawing
from zeroinf.bench.results import CellResult, read_results
from zeroinf.errors import OutputError

pytest.importorskip("matplotlib")

ONCE = {"repetitions": [{"generate_s": 1.0, "first_token_s": 0.4, "prefill_s": 0.4}]}


def lines(figure: Any) -> dict[str, list[float]]:
    """Where the points of each line of the first panel lie."""
    handles, names = figure.axes[0].get_legend_handles_labels()
    return {name: list(map(float, one.lines[0].get_xdata())) for one, name in zip(handles, names, strict=True)}


def ticks(figure: Any) -> tuple[Any, Any]:
    return figure.axes[0].get_xticks(), figure.axes[0].get_xticklabels()


def test_a_file_with_one_repetition_and_failed_cells_is_drawn(tmp_path: Path) -> None:
    some = [ok(replace(CELL, batch_size=rows), **ONCE) for rows in (8, 2)]
    others = [ok(replace(CELL, engine="zero"), **ONCE), failed(replace(CELL, engine="zero", batch_size=8))]
    none = failed(replace(CELL, engine="resident", offload="none"))
    results(*some, *others, none).save(tmp_path / "r.json")
    read = read_results(tmp_path / "r.json")
    figure = drawing(read)
    assert lines(figure) == {"stream (cpu)": [2.0, 8.0], "zero (cpu)": [2.0]}
    assert [axis.get_title("left") for axis in figure.axes] == ["milliseconds a token", "tokens/s"]
    assert {axis.get_xlabel() for axis in figure.axes} == {"sequences of a stream"}
    assert figure.get_suptitle() == "m on CPU"
    assert "prompt and" in figure.texts[-1].get_text()
    drawn = [bar.lines[0] for bar in figure.axes[0].containers]
    styles = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in drawn}
    assert [len(set(column)) for column in zip(*styles, strict=True)] == [2, 2, 2], "told apart without colour"
    assert "$" not in "".join(axis.yaxis.get_major_formatter()(20.0, 0) for axis in figure.axes)
    draw(read, tmp_path / "picture")
    assert (tmp_path / "picture").read_bytes().startswith(b"\x89PNG")


def test_models_lie_at_their_size_and_lines_say_what_tells_them_apart() -> None:
    def of(model: str, millions: int, rows: int) -> CellResult:
        return ok(replace(CELL, model=model, batch_size=rows), parameters=millions * 10**6)

    figure = drawing(results(of("x/c", 300, 2), of("x/a", 70, 2), of("b", 160, 2), of("x/a", 70, 8)))
    assert lines(figure) == {"stream (cpu), 2 rows": [70.0, 160.0, 300.0], "stream (cpu), 8 rows": [70.0]}
    assert figure.axes[0].get_xlabel() == "model, by its parameters"
    assert [(round(at), text.get_text()) for at, text in zip(*ticks(figure), strict=True)] == [
        (300, "c"),
        (70, "a"),
        (160, "b"),
    ]


def test_a_benchmark_without_figures_is_no_picture(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no cell has a figure"):
        draw(results(failed(CELL)), tmp_path / "r.png")
    with pytest.raises(OutputError, match="Is a directory"):
        draw(results(ok()), tmp_path)
