"""What takes seconds says so: with a spinner on a terminal, in a line now and then elsewhere."""

from __future__ import annotations

import io
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import cast

import pytest
from rich.console import Console

from zeroinf.cli import console as module
from zeroinf.cli.console import ConsoleObserver, ResultsBesideDisplay
from zeroinf.cli.streams import Display
from zeroinf.cli.waiting import waiting
from zeroinf.planner.plan import Plan
from zeroinf.service.observer import Progress

LONGEST = Progress(
    rows_done=99_999,
    rows=100_000,
    tokens=123_456,
    tokens_left=1e9,
    elapsed_s=10.0,
    streamed_bytes=543 * 10**9,
)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "quiet", "shown"),
    [(_Terminal(), False, True), (_Terminal(), True, False), (io.StringIO(), False, False)],
)
def test_words_are_for_terminals(
    stream: io.StringIO, quiet: bool, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", stream)
    with waiting("planning", quiet=quiet):
        pass
    assert ("planning" in stream.getvalue()) is shown
    assert shown or not stream.getvalue()


@pytest.fixture
def terminal() -> _Terminal:
    return _Terminal()


@pytest.fixture
def observer(terminal: _Terminal) -> Iterator[ConsoleObserver]:
    shown = Console(file=terminal, force_terminal=True, width=80, soft_wrap=True, _environ={"TERM": "xterm"})
    with ConsoleObserver(shown, quiet=False) as observer:
        yield observer


def screen(written: str) -> list[str]:
    """The lines that a terminal shows after what was `written`: text, and erased lines, which the cursor goes up to."""
    lines = [""]
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", written):
        if part == "\n":
            lines.append("")
        elif part == "\x1b[2K":
            lines[-1] = ""
        elif part == "\x1b[1A":
            lines.pop()
        elif not part.startswith(("\x1b", "\r")):
            lines[-1] += part
    return [line.rstrip() for line in lines if line.strip()]


def until(happens: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_terminal_shows_each_step_and_keeps_nothing_of_it(terminal: _Terminal, observer: ConsoleObserver) -> None:
    observer.doing("reading the model")
    observer.note("of the model")
    assert screen(terminal.getvalue())[0] == "note: of the model"
    assert screen(terminal.getvalue())[1].endswith("reading the model")
    observer.doing("loading weights")
    observer.filled(1 << 30, 4 << 30)
    until(lambda: screen(terminal.getvalue())[-1].endswith("loading weights, 1.00 GiB of 4.00 GiB"))
    observer.fetching("org/model")
    observer.doing("planning")
    observer.ended()
    assert screen(terminal.getvalue()) == ["note: of the model", "downloading org/model ..."]


def test_results_are_not_glued_to_what_a_terminal_shows(terminal: _Terminal, observer: ConsoleObserver) -> None:
    results = ResultsBesideDisplay(terminal, observer)
    observer.doing("first pass over the layers")
    results.write("out=a\n")
    observer.progress(Progress(rows_done=1, rows=2, tokens=1, tokens_left=1, elapsed_s=1, streamed_bytes=0))
    results.write("out=b\n")
    assert screen(terminal.getvalue()) == ["out=a", "out=b"]


def test_what_a_library_logs_is_not_glued_to_the_progress_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its handler holds the stream that there was when it was made, which is not what rich has put in its place."""
    terminal = _Terminal()
    monkeypatch.setattr("sys.stderr", Display(terminal))
    handler = logging.StreamHandler()
    shown = Console(stderr=True, force_terminal=True, width=80, soft_wrap=True, _environ={"TERM": "xterm"})
    with ConsoleObserver(shown, quiet=False) as observer:
        for step in (observer.doing, lambda words: observer.progress(LONGEST)):
            step("planning")
            handler.stream.write("a warning\n")
            print("a line", file=sys.stderr)
            assert screen(terminal.getvalue())[:-1] == ["a warning", "a line"] * (1 + (step != observer.doing))
    handler.stream.write("the end\n")
    assert screen(terminal.getvalue()) == ["a warning", "a line", "a warning", "a line", "the end"]


def test_the_longest_progress_line_fits_80_columns(terminal: _Terminal, observer: ConsoleObserver) -> None:
    observer.progress(LONGEST)
    until(lambda: "left" in terminal.getvalue())
    (line,) = screen(terminal.getvalue())
    assert len(line) <= 80
    assert line.endswith("99999/100000 12,345.6 tokens/s, 54.3 GB/s of weights, 22:30:01 left")


def test_a_plan_is_broken_between_words_on_a_terminal_and_not_in_a_log(
    terminal: _Terminal, observer: ConsoleObserver, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "word " * 30 + "--host-memory"
    monkeypatch.setattr(module, "plan_lines", lambda plan: iter([said, "short"]))
    observer.loading(cast(Plan, None))
    observer.ended()
    lines = screen(terminal.getvalue())
    assert (len(lines), lines[-1]) == (4, "      short")
    assert max(map(len, lines)) <= 80
    assert "".join(line.strip() + " " for line in lines[:-1]).split() == ["plan:", *said.split()]
    log = io.StringIO()
    with ConsoleObserver(Console(file=log, width=80, soft_wrap=True), quiet=False) as other:
        other.loading(cast(Plan, None))
    assert f"plan: {said}\n" in log.getvalue()


def test_a_log_has_a_line_of_a_step_that_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PLAIN_LINE_EVERY_S", 0.01)
    log = io.StringIO()
    with ConsoleObserver(Console(file=log), quiet=False) as observer:
        observer.doing("planning")
        until(lambda: "\n" in log.getvalue())
        observer.doing("loading weights")
    assert re.match(r"planning for 0:00, this process holds [\d.]+ [GM]iB\n", log.getvalue())


def test_a_quiet_run_shows_no_step(terminal: _Terminal) -> None:
    with ConsoleObserver(Console(file=terminal, force_terminal=True), quiet=True) as observer:
        observer.doing("planning")
    assert not terminal.getvalue()
