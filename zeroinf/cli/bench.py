"""`zeroinf bench`: engines side by side, each run in a process of its own."""

from __future__ import annotations

import math
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from zeroinf.cli.command import group
from zeroinf.cli.environment import option
from zeroinf.cli.params import AliasedChoice, FiniteFloat, LimitType, given, refuse_group_options
from zeroinf.errors import EnvironmentProblem, InterruptedRunError, OutputError, UsageError
from zeroinf.options.options import DTYPE_ALIASES
from zeroinf.signals import heeded_signals

if TYPE_CHECKING:
    from zeroinf.bench.matrix import BenchmarkSettings, Cell, Matrix
    from zeroinf.bench.results import CellResult, Results

_DTYPES = AliasedChoice(["auto", "bfloat16", "float16", "float32"], DTYPE_ALIASES)
_FORMATS = click.Choice(["human", "md", "csv", "json"])


class _ListType(click.ParamType):  # type: ignore[type-arg]
    """Values between commas, each made by `item`."""

    name = "list"

    def __init__(self, item: Callable[[str], Any]) -> None:
        self.item = item

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        """The values; a usage error for one that cannot be made, or none."""
        try:
            found = tuple(dict.fromkeys(self.item(part.strip()) for part in str(value).split(",") if part.strip()))
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if not found:
            self.fail("names nothing", param, ctx)
        return found


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise ValueError(f"{text!r} is no whole number above zero")
    return number


_WORDS, _NUMBERS = _ListType(str), _ListType(_positive)


@group(invoke_without_command=True, short_help="Measure engines side by side.")
@option(
    "--preset",
    type=click.Choice(["bloom-table", "pythia-hf-vs-ds", "mii"]),
    help="A well-known table: fills in what is left unsaid.",
)
@option("--engines", "--engine", type=_WORDS, help="stream, stream/partitioned, zero, ... [default: stream]")
@option("-m", "--models", "--model", type=_WORDS, help="As for `zeroinf run`.")
@option(
    "--models-dir", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Every model in this folder."
)
@option("--offload", "offloads", type=_WORDS, help="none, cpu, nvme. [default: cpu]")
@option("-b", "--batch-size", "batch_sizes", type=_NUMBERS, help="Rows of each stream. [default: 1]")
@option("--input-len", "input_lens", type=_NUMBERS, help="Prompt tokens. [default: 128]")
@option("--output-len", "--max-tokens", "output_lens", type=_NUMBERS, help="New tokens. [default: 32]")
@option("--num-gpus", type=_NUMBERS, help="Ranks. [default: 1]")
@option("-r", "--repetitions", type=click.IntRange(min=1), default=3, help="Measured, after a warm-up.")
@option("--prompt", help="This text for every row, instead of one of --input-len tokens.")
@option("--dtype", type=_DTYPES, default="auto")
@option("--random-weights", is_flag=True, help="Real shapes, random weights, no checkpoint.")
@option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the models.")
@option("--resident-blocks", default="0", help="Where weights are offloaded, layers that stay on the GPU; or `auto`.")
@option("--gpu-memory", type=LimitType(), help="The most a rank may take of its GPU, such as 24GiB or 90%.")
@option("--nvme-path", "nvme_paths", type=click.Path(path_type=Path), multiple=True, help="For offload nvme.")
@option("--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", help="cpu leaves GPUs alone.")
@option("--cell-limit-s", type=FiniteFloat(min=1), default=600.0, help="A cell that takes longer is ended.")
@option("--time-limit-s", type=FiniteFloat(min=0), help="Begin no cell after this; with -o the next call goes on.")
@option(
    "-o",
    "--output-file",
    "--log-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="JSON with every sample, report, machine and version, written after each cell. If it is there, what it lacks "
    "is run.",
)
@option("--overwrite", is_flag=True, help="Begin an existing -o again.")
@option("--format", "form", type=_FORMATS, default="human", help="Of what is printed.")
@option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw latency and throughput as a PNG.")
@option("--dark", is_flag=True, help="With --plot: draw on dark ground.")
@option("--dry-run", is_flag=True, help="Print the cells and how long they should take, and run none.")
@click.pass_context
def bench(
    ctx: click.Context,
    /,
    preset: str | None,
    models_dir: Path | None,
    output_file: Path | None,
    overwrite: bool,
    form: str,
    plot: Path | None,
    dark: bool,
    dry_run: bool,
    time_limit_s: float | None,
    **asked: Any,
) -> int | None:
    """Measure a matrix of engines, models, batch sizes, offload targets and lengths.

    Each cell is a `zeroinf run --benchmark` of its own; one that runs out of memory, fails or takes too long has that
    as its value. Figures are means over the repetitions ± their standard deviation.

    \b
      zeroinf bench -m opt-6.7b --random-weights \\
        --engines accelerate,zero,stream -b 1,8,64 -o opt.json
      zeroinf bench --preset bloom-table -m bloom-7b1 \\
        --random-weights --plot bloom.png
      zeroinf bench --preset mii --models-dir ./models \\
        --prompt "DeepSpeed is" --max-tokens 64 --log-file mii.json
      zeroinf bench compare before.json after.json
    """
    if ctx.invoked_subcommand is not None:
        refuse_group_options(ctx)
        return None
    _refuse_contradictions(output_file, plot, form, overwrite=overwrite, dry_run=dry_run, time_limit_s=time_limit_s)
    cells, settings = _matrix(preset, models_dir, asked).cells(), _settings(asked)
    _refuse_unused(ctx, cells)
    if dark and plot is None:
        raise UsageError("--dark has no effect without --plot", hint="add it, or drop --dark")
    if plot is not None:
        from zeroinf.bench.plot import check_plot, draw

        check_plot()
    from zeroinf.bench.results import alone
    from zeroinf.cli.bench_view import print_cells, shown

    if dry_run:
        print_cells(cells, settings, _so_far(settings, output_file, overwrite=overwrite), form)
        return 0
    with alone(output_file), _stops_in_order(output_file):
        results = _so_far(settings, output_file, overwrite=overwrite)
        results = _run(cells, settings, results, output_file, time_limit_s)
    click.echo(shown(results, preset, form), nl=False)
    if plot is not None:
        draw(results, plot, dark=dark)
    return 0 if any(outcome.status == "ok" for outcome in results.outcomes) else 1


@bench.command(short_help="Show the ratios of two benchmarks.")
@click.argument("first", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("second", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@option("--format", "form", type=click.Choice(["human", "md", "csv"]), default="human", help="Of what is printed.")
def compare(first: Path, second: Path, form: Any) -> None:
    """Tokens/s of SECOND over FIRST, for each cell that both have, with the spread of the ratio."""
    from zeroinf.bench.results import differing, read_results
    from zeroinf.bench.table import compared, render

    mine, theirs = read_results(first), read_results(second)
    rows = compared(mine, theirs)
    if len(rows) == 1:
        raise UsageError(f"{first} and {second} have no cell in common", hint="run the same matrix twice")
    click.echo(render(rows, form), nl=False)
    for one, name in ((mine, first), (theirs, second)):
        if alone := len(one.outcomes) - (len(rows) - 1):
            click.echo(f"{alone} cells are in {name} only", err=True)
    for what, names in differing(mine, theirs).items():
        click.echo(f"the {what} differ: {', '.join(names)}", err=True)


def _refuse_contradictions(
    output_file: Path | None,
    plot: Path | None,
    form: str,
    *,
    overwrite: bool,
    dry_run: bool,
    time_limit_s: float | None,
) -> None:
    for path in (output_file, plot):
        if path is not None and not path.parent.is_dir():
            raise OutputError(f"{path}: its folder does not exist", hint=f"mkdir -p {shlex.quote(str(path.parent))}")
    if overwrite and output_file is None:
        raise UsageError("--overwrite without --output-file", hint="add -o FILE, or drop --overwrite")
    if time_limit_s is not None and output_file is None:
        raise UsageError("--time-limit-s without --output-file", hint="add -o FILE: what is left runs the next time")
    if dry_run and form == "json":
        raise UsageError("--format json is for results, and --dry-run has none", hint="human, md or csv")


def _refuse_unused(ctx: click.Context, cells: list[Cell]) -> None:
    """Refuse what the user said and no cell has a use for."""
    from zeroinf.engines.registry import descriptor_of

    targets = {cell.offload for cell in cells}
    if given(ctx, "offloads") and (idle := sorted(set(ctx.params["offloads"]) - targets)):
        raise UsageError(f"--offload {idle[0]} has no effect: the engines keep all weights on the GPU", hint="drop it")
    if ctx.params["nvme_paths"] and "nvme" not in targets:
        raise UsageError("--nvme-path has no effect without --offload nvme", hint="add it, or drop the flag")
    places = any(descriptor_of(cell.engine_name).places_blocks and cell.offload != "none" for cell in cells)
    if given(ctx, "resident_blocks") and not places:
        raise UsageError("--resident-blocks has no effect: every cell keeps all layers on the GPU", hint="drop it")


def _matrix(preset: str | None, models_dir: Path | None, asked: dict[str, Any]) -> Matrix:
    from zeroinf.bench.matrix import with_preset

    names = ("engines", "models", "offloads", "batch_sizes", "input_lens", "output_lens", "num_gpus")
    lists = {name: asked.pop(name) for name in names}
    if models_dir is not None:
        found = tuple(sorted(str(path.parent) for path in models_dir.glob("*/config.json")))
        if not found:
            raise UsageError(f"--models-dir {models_dir} holds no folder with a config.json", hint="name another")
        lists["models"] = (*(lists["models"] or ()), *found)
    if asked["prompt"] is not None and lists["input_lens"]:
        raise UsageError("--prompt and --input-len contradict each other", hint="drop one of them")
    if asked["prompt"] is not None:
        lists["input_lens"] = (None,)
    if unknown := sorted(set(lists["offloads"] or ()) - {"none", "cpu", "nvme"}):
        raise UsageError(f"--offload: no target {unknown[0]!r}", hint="none, cpu, nvme")
    if "nvme" in (lists["offloads"] or ()) and not asked["nvme_paths"]:
        raise UsageError("--offload nvme needs --nvme-path", hint="name a folder on a fast local disk")
    return with_preset(preset, lists)


def _settings(asked: dict[str, Any]) -> BenchmarkSettings:
    from zeroinf.bench.matrix import BenchmarkSettings

    if not (asked["resident_blocks"] == "auto" or asked["resident_blocks"].isdecimal()):
        raise UsageError(f"--resident-blocks {asked['resident_blocks']}", hint="a whole number, or auto")
    return BenchmarkSettings(**asked)


def _so_far(settings: BenchmarkSettings, output_file: Path | None, *, overwrite: bool) -> Results:
    """The results that an earlier call has left in `output_file`, with the record of this machine."""
    from zeroinf.bench.results import machine_record, start_or_resume
    from zeroinf.hardware.profile import read_profile
    from zeroinf.hardware.snapshot import read_machine

    machine = read_machine(settings.nvme_paths)
    if settings.device == "cuda" and not machine.gpus:
        raise EnvironmentProblem("--device cuda, but this machine shows no GPU", hint="`zeroinf doctor` says why")
    record = machine_record(machine, read_profile(machine).known)
    return start_or_resume(output_file, settings, record, overwrite=overwrite)


@contextmanager
def _stops_in_order(output_file: Path | None) -> Iterator[None]:
    """A signal that stops runs ends the cell that runs, and the process with how to go on."""
    from zeroinf.runs.interrupts import interrupted

    def stop(number: int, frame: FrameType | None) -> None:
        raise interrupted(number)

    previous = {number: signal.signal(number, stop) for number in heeded_signals()}
    try:
        yield
    except InterruptedRunError as error:
        again = shlex.join(["zeroinf", *(word for word in sys.argv[1:] if word != "--overwrite")])
        error.hint = f"go on with: {again}" if output_file else "with -o FILE the same command would go on"
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _run(
    cells: list[Cell],
    settings: BenchmarkSettings,
    results: Results,
    output_file: Path | None,
    time_limit_s: float | None,
) -> Results:
    from dataclasses import replace

    from zeroinf.bench.runner import run_cells
    from zeroinf.bench.table import figure_text

    def begins(cell: Cell, number: int) -> None:
        words = f"{cell.model}, {cell.name}, {cell.batch_size} rows, {cell.num_gpus} ranks"
        click.echo(f"{number + 1}/{len(cells)} {words} ...", err=True)

    def done(outcome: CellResult, so_far: Results) -> None:
        rate = outcome.figures.get("tokens_per_second")
        click.echo(
            f"    {figure_text(rate)} tokens/s" if rate else f"    {outcome.status}: {outcome.message}", err=True
        )
        if output_file is not None:
            so_far.save(output_file)

    if output_file is not None:  # before the long work: it may fail, and with --overwrite an older file is there
        results.save(output_file)
    limit_s = math.inf if time_limit_s is None else time_limit_s
    finished = run_cells(cells, settings, results, done=done, begins=begins, time_limit_s=limit_s)
    asked = [finished.of(cell) for cell in cells]
    outcomes = tuple(outcome for outcome in asked if outcome is not None)
    if left := len(cells) - len(outcomes):
        click.echo(f"{left} of {len(cells)} cells are left: the same command goes on", err=True)
    return replace(finished, outcomes=outcomes)
