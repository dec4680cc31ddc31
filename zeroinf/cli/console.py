"""Shows a run on the terminal: progress while it runs and the report at its end.

Everything here is written to stderr, since stdout is reserved for results.
"""

from __future__ import annotations

import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Literal, TextIO, cast

from rich.console import Console
from rich.file_proxy import FileProxy
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.status import Status

from zeroinf.cli.streams import Display
from zeroinf.hardware.process import resident
from zeroinf.planner.plan import Plan
from zeroinf.planner.summary import plan_lines
from zeroinf.ray.report import ClusterReport, NodeReport
from zeroinf.runs.compare import Compared
from zeroinf.runs.report import RunReport
from zeroinf.service.observer import Progress
from zeroinf.service.requests import Refusal
from zeroinf.sizes import clock, gib, rate_text

_PLAIN_LINE_EVERY_S = 10.0
_REFUSALS_SHOWN = 5


class ConsoleObserver:
    """Shows a run on a terminal as a redrawn bar, elsewhere as plain lines now and then.

    A display gives standard output back as it found it, so the observer's block ends before one that redirects it.
    """

    def __init__(self, console: Console, *, quiet: bool) -> None:
        self._console = console
        self._quiet = quiet
        self._bar: Bar | None = None
        self._spinner: Status | None = None
        self._last_line = 0.0
        self._words = ""
        self._filled = ""
        self._step_over = threading.Event()
        self._beside: Display | None = None
        self._lines: FileProxy | None = None

    def __enter__(self) -> ConsoleObserver:
        return self

    def __exit__(self, *ignored: object) -> None:
        self.ended()

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _say_wrapped(self, text: str, indent: str) -> None:
        """Break it between words where a terminal is narrower; in logs it stays one line."""
        width = self._console.width if self._console.is_terminal else len(text)
        for line in textwrap.wrap(text, max(width, 40), subsequent_indent=indent, break_on_hyphens=False):
            self._say(line)

    def note(self, text: str) -> None:
        self._say(f"note: {text}")

    def failed(self, text: str) -> None:
        self._say(f"error: {text}")

    def left_out(self, how: Literal["refused", "failed"], refusals: Sequence[Refusal]) -> None:
        for refusal in refusals[:_REFUSALS_SHOWN]:
            where = f"line {refusal.line}" if refusal.line is not None else f"request {refusal.id or refusal.index}"
            where = f"{refusal.file}, {where}" if refusal.file is not None else where
            self._say(f"{how}: {where}: {refusal.reason}")
        if len(refusals) > _REFUSALS_SHOWN:
            self._say(f"{how}: {len(refusals) - _REFUSALS_SHOWN} more")

    def doing(self, step: str) -> None:
        """Show `step` with a spinner on a terminal, and as a line every ten seconds elsewhere."""
        self.ended()
        if self._quiet:
            return
        self._words, self._filled = step, ""
        if self._console.is_terminal:
            self._spinner = self._console.status(step)
            self._start(self._spinner)
            return
        self._step_over = threading.Event()
        threading.Thread(target=self._tell, args=(step, self._step_over), name="step", daemon=True).start()

    def _tell(self, step: str, over: threading.Event) -> None:
        started = time.monotonic()
        while not over.wait(_PLAIN_LINE_EVERY_S):
            elapsed = clock(time.monotonic() - started)
            self._say(f"{step} for {elapsed}{self._filled}, this process holds {gib(resident().total_bytes)}")

    def loading(self, plan: Plan) -> None:
        if self._quiet:
            return
        self.ended()
        for index, line in enumerate(plan_lines(plan)):
            self._say_wrapped(f"{'' if index else 'plan:':<6}{line}", " " * 8)
        if not self._console.is_terminal:
            self._say("loading weights ...")
        self.doing("loading weights")

    def fetching(self, name: str) -> None:
        """The hub's own bars show how much has come."""
        self.ended()
        if not self._quiet:
            self._say(f"downloading {name} ...")

    def filled(self, done_bytes: int, total_bytes: int) -> None:
        self._filled = f", {gib(done_bytes)} of {gib(total_bytes)}"
        if (spinner := self._spinner) is not None:
            spinner.update(f"{self._words}{self._filled}")

    def loaded(self, seconds: float) -> None:
        self.ended()
        if not self._quiet:
            self._say(f"loaded in {seconds:.1f} s")

    def progress(self, progress: Progress) -> None:
        if self._quiet:
            return
        if self._console.is_terminal:
            self._redraw(progress)
            return
        self._step_over.set()
        if time.monotonic() - self._last_line >= _PLAIN_LINE_EVERY_S:
            self._last_line = time.monotonic()
            self._say(f"{progress.rows_done}/{progress.rows} sequences, {progress.tokens:,} tokens, {progress.rates}")

    def _redraw(self, progress: Progress) -> None:
        if self._bar is None:
            self.ended()
            self._bar = Bar(
                TextColumn("sequences"), BarColumn(None), TextColumn("{task.fields[rows]}"),
                TextColumn("{task.fields[rates]}"),
                console=self._console, transient=True, expand=True,
            )  # fmt: skip
            self._bar.add_task("rows", rows="", rates="")
            self._start(self._bar)
        self._bar.update(
            self._bar.task_ids[0],
            total=progress.tokens + progress.tokens_left,
            completed=progress.tokens,
            rows=f"{progress.rows_done}/{progress.rows}",
            rates=progress.rates,
        )

    def _start(self, shown: Bar | Status) -> None:
        """Redraw `shown` below what others write, loggers among them."""
        if isinstance(sys.stderr, Display):
            self._beside = sys.stderr
            self._console.file = cast(TextIO, self._beside.below())
            self._lines = FileProxy(self._console, cast(TextIO, self._beside))
            self._beside.above = self._lines.write
        shown.start()

    def ended(self) -> None:
        self._step_over.set()
        for shown in (self._spinner, self._bar):
            if shown is not None:
                shown.stop()
        self._spinner = self._bar = None
        if self._beside is not None and self._lines is not None:
            self._beside.above = None
            self._lines.flush()
            self._beside = self._lines = None


class ResultsBesideDisplay:
    """Standard output beside a display on the same terminal, which is taken away before results are written: they
    would be glued to it otherwise. The next progress shows it again."""

    def __init__(self, stream: TextIO, observer: ConsoleObserver) -> None:
        self._stream, self._observer = stream, observer
        self.encoding = stream.encoding

    def write(self, text: str) -> int:
        if self._stream.isatty():
            self._observer.ended()
        return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()


def print_report(console: Console, report: RunReport) -> None:
    """The short report that ends every run."""
    _print_rows(console, list(_summary(report)))
    _print_compared(console, report.compared())


def _counts(report: RunReport | ClusterReport) -> Iterator[tuple[str, str]]:
    counts = {"done": report.requests, "refused": report.refused, "failed": report.failed}
    counts |= {"cut at their length": report.cut, "cut before their format was complete": report.cut_answers}
    yield "requests", ", ".join(f"{count} {what}" for what, count in counts.items() if count or what == "done")
    yield "tokens", f"{report.prompt_tokens:,} prompt, {report.completion_tokens:,} generated"
    yield "generate", f"{report.generate_s:.1f} s, {rate_text(report.tokens_per_second)} tokens/s"


def _summary(report: RunReport) -> Iterator[tuple[str, str]]:
    yield from _counts(report)
    if report.shared_prompt_tokens:
        yield "shared prefixes", f"{report.shared_prompt_tokens:,} prompt tokens not computed again"
    yield "load", f"{report.load_s:.1f} s"
    if report.plan.wire != "model":
        yield "weights", f"{report.plan.wire}: lossy"
    if (quantized := report.plan.anatomy.quantized) is not None:
        yield "weights", f"quantized with {quantized.method}, as the checkpoint has them"
    if report.plan.host is not None:
        lossy = f" as {report.plan.host.dtype}: lossy" if report.plan.host.dtype != "model" else ""
        on_gpu, on_host = report.plan.batch_size - report.plan.host_rows, report.plan.host_rows
        yield "KV cache", f"{on_gpu} rows on the GPU, {on_host} in host memory{lossy}"
    if report.streamed_bytes or report.kv_gbps:
        also = f", {report.kv_gbps:.1f} GB/s of KV cache" if report.kv_gbps else ""
        share = f", {100 * report.link_share:.0f} % of the {report.link_gbps:.1f} measured" if report.link_share else ""
        share += f", in {100 * report.link_busy:.0f} % of the time" if report.link_busy else ""
        yield "weights moved", f"{report.streamed_bytes / 1e9:.1f} GB, {report.streamed_gbps:.1f} GB/s{also}{share}"
    if routed := sum(rank.routed_passes for rank in report.ranks):
        spared, passes = sum(rank.spared_bytes for rank in report.ranks), sum(rank.passes for rank in report.ranks)
        yield "routed experts only", f"in {routed:,} of {passes:,} passes, {spared / 1e9:.1f} GB less"
    if rows := sum(rank.rows_read for rank in report.ranks):
        seconds = sum(rank.rows_read_s for rank in report.ranks) / len(report.ranks)
        yield "rows read from the checkpoint", f"{rows:,}, in {seconds:.1f} s"
    if waits := _stalls(report):
        yield "time", waits
    ranks = f" over {len(report.ranks)} ranks" if len(report.ranks) > 1 else ""
    yield "peak host memory", gib(report.peak_host_bytes) + ranks
    if report.output is not None:
        yield "output", str(report.output)
    if report.errors is not None and report.refused + report.failed:
        yield "errors", str(report.errors)


def print_cluster_report(console: Console, report: ClusterReport) -> None:
    """The short report that ends a run on a cluster."""
    _print_rows(console, [*_counts(report), *map(_node, report.nodes)])


def _node(node: NodeReport) -> tuple[str, str]:
    words = f"{node.requests} requests, {node.tokens:,} tokens"
    if node.load_s is not None:
        words += f", ready after {node.load_s:.1f} s"
    if node.left_out is not None:
        words += f"; left out: {node.left_out}"
    return node.name, words + ("; left the cluster" if node.has_left else "")


def _print_compared(console: Console, compared: Sequence[Compared]) -> None:
    """The plan beside what happened."""
    if not compared:
        return
    figures = ((one.name, _figure(one.predicted, one.unit), _figure(one.measured, one.unit)) for one in compared)
    _print_rows(console, [("", "planned", "measured"), *figures])


def _print_rows(console: Console, rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns; however narrow the terminal, nothing is cut off."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        console.print(line.rstrip(), highlight=False, markup=False, soft_wrap=True)


def _figure(value: float, unit: str) -> str:
    if unit == "bytes":
        return gib(round(value))
    return f"{value:.3f} s" if unit == "s" and value < 1 else f"{value:,.1f} {unit}"


def _stalls(report: RunReport) -> str:
    """The shares of the ranks' time by what they waited for, on average."""
    words = {
        "compute_s": "computing layers",
        "host_s": "waiting for the host",
        "between_s": "between passes",
        "link_s": "waiting for PCIe",
        "disk_s": "waiting for disk",
    }
    seconds = {word: sum(getattr(rank.stalls, name) for rank in report.ranks) for name, word in words.items()}
    whole = len(report.ranks) * report.generate_s
    seconds["of that for attention on the CPU"] = sum(rank.attention_wait_s for rank in report.ranks)
    return ", ".join(f"{word}: {100 * spent / whole:.0f} %" for word, spent in seconds.items() if spent and whole)


def print_benchmark(console: Console, report: RunReport) -> None:
    """The four figures of the BLOOM inference scripts, each with what it covers."""
    figures = (
        (
            "Throughput per token including tokenize",
            f"{report.ms_per_token:.2f} msecs",
            f"tokenize + generate, over {report.completion_tokens:,} tokens really generated by all ranks",
        ),
        ("Start to ready to generate", f"{report.start_to_ready_s:.3f} secs", "process start to weights loaded"),
        (
            f"Tokenize and generate {report.completion_tokens:,} tokens (bs={report.plan.batch_size})",
            f"{report.tokenize_s + report.generate_s:.3f} secs",
            f"{report.requests} requests on {report.plan.world_size} ranks, one warm-up left out",
        ),
        ("Start to finish", f"{report.start_to_finish_s:.3f} secs", "process start to last result, warm-up included"),
    )
    lines = ["*** Performance stats", *(f"{name}: {value}\n    ({covers})" for name, value, covers in figures)]
    console.print("\n".join(lines), highlight=False, markup=False)
