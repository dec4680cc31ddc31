"""Measure the CPU time of each test, in seconds, and read what was measured before.

`pytest --durations-file FILE` writes JSON: for each test file `cpu_s`, the sum over its tests, and `tests`, those that
take `LISTED_S` or more by themselves. Figures that FILE has of tests that did not run stay. CPU time is user and system
time of the pytest process that ran the test and of all processes below it, so that figures of a busy machine and of an
idle one are nearly the same. What a fixture of the session takes counts for the first test that asks for it.

`tests/durations.json` holds figures of the whole suite (`scripts/test --all --durations-file tests/durations.json`).
They decide which file runs first, and how much time `scripts/test` says is left for `--all`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

MEASURED = Path(__file__).with_name("durations.json")
LISTED_S = 0.5
UNLISTED_S = 0.05
"""What is assumed of a test that is not listed by itself."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--durations-file", type=Path, help="write the CPU seconds of each test to this JSON file")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--durations-file"):
        config.pluginmanager.register(_Meter(), "cpu-durations")


def measured_tests() -> dict[str, float]:
    """CPU seconds of each test that is listed in `tests/durations.json`, by node id."""
    if not MEASURED.is_file():
        return {}
    files: dict[str, Any] = json.loads(MEASURED.read_text(encoding="utf-8"))
    return {f"{path}::{name}": seconds for path, file in files.items() for name, seconds in file["tests"].items()}


def cpu_seconds(node_ids: Iterable[str]) -> float:
    """About how long these tests take, by what was measured before."""
    measured = measured_tests()
    return sum(measured.get(node_id, UNLISTED_S) for node_id in node_ids)


class _Meter:
    """Measures in each process that runs tests; the process that started them collects and writes."""

    def __init__(self) -> None:
        self._measured_s: dict[str, dict[str, float]] = {}
        self._since_s = 0.0

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self) -> None:
        self._since_s = _cpu_seconds_so_far()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        now_s = _cpu_seconds_so_far()
        report.cpu_s = max(0.0, now_s - self._since_s)  # pytest-xdist hands a report's attributes on
        self._since_s = now_s
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        path, _, name = report.nodeid.partition("::")
        tests = self._measured_s.setdefault(path, {})
        tests[name] = tests.get(name, 0.0) + getattr(report, "cpu_s", 0.0)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not hasattr(session.config, "workerinput"):
            file: Path = session.config.getoption("--durations-file")
            before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            text = json.dumps(_by_file(_with_those_before(self._measured_s, before)), indent=1, ensure_ascii=False)
            file.write_text(f"{text}\n", encoding="utf-8")


def _with_those_before(
    measured_s: Mapping[str, Mapping[str, float]], before: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """All that was measured now, and what is listed in `before` of other tests whose files are still there."""
    there = {path: file["tests"] for path, file in before.items() if Path(path).is_file()}
    return {path: {**there.get(path, {}), **measured_s.get(path, {})} for path in {**there, **measured_s}}


def _by_file(measured_s: Mapping[str, Mapping[str, float]]) -> dict[str, object]:
    return {
        path: {
            "cpu_s": round(sum(tests.values()), 1),
            "tests": {name: round(seconds, 1) for name, seconds in sorted(tests.items()) if seconds >= LISTED_S},
        }
        for path, tests in sorted(measured_s.items())
    }


def _cpu_seconds_so_far() -> float:
    """CPU seconds of this process, of those below it, and of those that they waited for."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                fields = Path(entry.path, "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            except OSError:
                continue  # it has ended meanwhile
            pid = int(entry.name)
            parents[pid] = int(fields[1])
            ticks[pid] = sum(map(int, fields[11:15]))
    below = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= more
    return sum(ticks[pid] for pid in below) / os.sysconf("SC_CLK_TCK")
