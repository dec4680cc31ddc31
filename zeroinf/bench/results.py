"""Holds benchmark results: figures with their samples, the machine, and the JSON file that stores them.

Input: reports of runs. Output: `Results`, which are saved after each cell so that a stopped benchmark can be resumed.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from zeroinf.bench.matrix import BenchmarkSettings, Cell
from zeroinf.errors import InputError, OutputError, UsageError
from zeroinf.jobs.files import LineFile, rename, write_lines, write_new

SCHEMA = 1
_IDENTITY = ("hostname", "versions", "gpu_names", "driver")
_LIMIT = "cell_limit_s"

FIGURES = {
    "ms_per_token": "ms/token",
    "tokens_per_second": "tokens/s",
    "prefill_tokens_per_second": "prefill tokens/s",
    "decode_tokens_per_second": "decode tokens/s",
    "first_token_s": "first token s",
    "ready_s": "ready s",
    "peak_gpu_gib": "GPU GiB",
    "peak_host_gib": "host GiB",
    "streamed_gbps": "wire GB/s",
    "link_share": "of the link",
}


@dataclass(frozen=True, slots=True)
class Figure:
    """Samples of one quantity."""

    samples: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.samples)

    @property
    def std(self) -> float:
        """The samples' standard deviation; 0 for a single one."""
        return statistics.stdev(self.samples) if len(self.samples) > 1 else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class CellResult:
    """One cell and what it came to: figures, or why there are none."""

    cell: Cell
    status: str
    """`ok`, `out of memory`, `does not fit`, `timeout`, `refused` or `failed`."""
    message: str = ""
    figures: Mapping[str, Figure] = field(default_factory=dict)
    report: Mapping[str, Any] | None = None
    """The run's own, whole."""

    def to_json(self) -> dict[str, Any]:
        figures = {
            name: {"mean": figure.mean, "std": figure.std, "samples": figure.samples}
            for name, figure in self.figures.items()
        }
        own = {"status": self.status, "message": self.message, "figures": figures, "report": self.report}
        return {"cell": asdict(self.cell), **own}


def cell_result_of(cell: Cell, report: Mapping[str, Any]) -> CellResult:
    """The figures of a run's report: one sample a repetition where it says so much, one otherwise."""
    times = report["repetitions"]
    tokens, rows, prompt_tokens = (report[name] for name in ("completion_tokens", "requests", "prompt_tokens"))
    samples = {
        "ms_per_token": [1e3 * (report["tokenize_s"] + t["generate_s"]) / tokens for t in times],
        "tokens_per_second": [tokens / t["generate_s"] for t in times],
        "prefill_tokens_per_second": [prompt_tokens / t["prefill_s"] for t in times if t["prefill_s"]],
        "decode_tokens_per_second": [
            (tokens - rows) / (t["generate_s"] - t["prefill_s"])
            for t in times
            if tokens > rows and t["generate_s"] > t["prefill_s"]
        ],
        "first_token_s": [t["first_token_s"] for t in times],
        "ready_s": [report["start_to_ready_s"]],
        "peak_gpu_gib": [report["peak_gpu_bytes"] / 2**30] if report["peak_gpu_bytes"] else [],
        "peak_host_gib": [report["peak_host_bytes"] / 2**30],
    }
    if report["streamed_bytes"]:
        samples["streamed_gbps"] = [report["streamed_bytes"] / t["generate_s"] / 1e9 for t in times]
        if report["link_gbps"]:
            samples["link_share"] = [gbps / report["link_gbps"] for gbps in samples["streamed_gbps"]]
    figures = {name: Figure(tuple(values)) for name, values in samples.items() if values}
    return CellResult(cell=cell, status="ok", figures=figures, report=report)


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """A benchmark: the machine, the settings, and an outcome for each cell that has run."""

    machine: Mapping[str, Any]
    settings: Mapping[str, Any]
    outcomes: tuple[CellResult, ...] = ()

    def of(self, cell: Cell) -> CellResult | None:
        return next((outcome for outcome in self.outcomes if outcome.cell.key == cell.key), None)

    def with_outcome(self, outcome: CellResult) -> Results:
        """These results with `outcome` in the place of an earlier one of its cell."""
        others = (other for other in self.outcomes if other.cell.key != outcome.cell.key)
        return replace(self, outcomes=(*others, outcome))

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "machine": self.machine,
            "settings": self.settings,
            "cells": [outcome.to_json() for outcome in self.outcomes],
        }

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all, whatever happens meanwhile. Raises OutputError."""
        partial = path.with_name(f"{path.name}.partial")
        try:
            write_new(partial, write_lines([json.dumps(self.to_json(), indent=1)]))
            rename(partial, path)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}", hint="choose another name") from error


def read_results(path: Path) -> Results:
    """The results in the file `path`. Raises InputError for any other file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA:
            raise InputError(f"{path} has schema {data['schema']}, this release reads {SCHEMA}", hint="run it again")
        return Results(machine=data["machine"], settings=data["settings"], outcomes=tuple(map(_outcome, data["cells"])))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} holds no results of `zeroinf bench`: {error!r}") from error


def _outcome(data: Mapping[str, Any]) -> CellResult:
    figures = {name: Figure(tuple(figure["samples"])) for name, figure in data["figures"].items()}
    words = {name: data[name] for name in ("status", "message", "report")}
    return CellResult(cell=Cell(**data["cell"]), figures=figures, **words)


def start_or_resume(
    path: Path | None, settings: BenchmarkSettings, machine: Mapping[str, Any], *, overwrite: bool
) -> Results:
    """Results so far: those in `path`, if it is there and was made with the same settings on the same machine.

    Where cells may take longer than before, those that took too long are to run again. Raises UsageError for a file of
    other settings or another machine.
    """
    fresh = Results(machine=machine, settings=settings.to_json())
    if path is None or overwrite or not path.exists():
        return fresh
    found = read_results(path)
    for name, differ in differing(found, fresh).items():
        raise UsageError(
            f"{path} was made with other {name}: {', '.join(differ)}",
            hint="choose another -o, or pass --overwrite to begin again",
        )
    longer = settings.cell_limit_s > found.settings[_LIMIT]
    kept = tuple(outcome for outcome in found.outcomes if outcome.status != "timeout" or not longer)
    return replace(found, settings=fresh.settings, outcomes=kept)


@contextmanager
def alone(path: Path | None) -> Iterator[None]:
    """Keeps others from making results in the file `path` meanwhile. Raises OutputError where somebody does already."""
    if path is None:
        yield
        return
    try:
        lock = LineFile(path.with_name(f"{path.name}.lock"))
    except BlockingIOError as error:
        raise OutputError(f"another benchmark writes {path}", hint="wait for its end, or choose another -o") from error
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}", hint="choose another name") from error
    try:
        yield
    finally:
        lock.remove()
        lock.close()


def differing(mine: Results, theirs: Results) -> dict[str, list[str]]:
    """Names of the settings and machine facts in which two benchmarks differ."""
    pairs = {
        "settings": (mine.settings, theirs.settings),
        "machines": tuple({n: one.machine.get(n) for n in _IDENTITY} for one in (mine, theirs)),
    }
    found = {what: sorted(n for n in {*a, *b} - {_LIMIT} if a.get(n) != b.get(n)) for what, (a, b) in pairs.items()}
    return {what: names for what, names in found.items() if names}


def machine_record(machine: Any, rates: Mapping[str, Any]) -> dict[str, Any]:
    """The machine and its versions, as numbers, with the rates that were measured on it."""
    return {
        **json.loads(json.dumps(asdict(machine), default=str)),
        "gpu_names": [gpu.name for gpu in machine.gpus],
        "rates": json.loads(json.dumps(rates, default=str)),
    }


def ratio(mine: Figure, theirs: Figure) -> tuple[float, float]:
    """`mine` over `theirs` and the spread of that, from the spread of both."""
    value = mine.mean / theirs.mean if theirs.mean else 0.0
    parts: Sequence[float] = [figure.std / figure.mean for figure in (mine, theirs) if figure.mean]
    return value, value * sum(part * part for part in parts) ** 0.5
