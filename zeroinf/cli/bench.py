"""`zeroinf bench`: engines side by side, each run in a process of its own."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zeroinf.cli.params import SizeType
from zeroinf.errors import OutputError, UsageError

if TYPE_CHECKING:
    from zeroinf.bench.matrix import Cell, Matrix, Settings
    from zeroinf.bench.results import Outcome, Results

_FORMATS = click.Choice(["human", "md", "csv", "json"])


class _ListType(click.ParamType):  # type: ignore[type-arg]
    """Values between commas, each made by `item`."""

    name = "list"

    def __init__(self, item: Callable[[str], Any]) -> None:
        self.item = item

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        """The values; a usage error for one that cannot be made, or none."""
        try:
            found = tuple(self.item(part.strip()) for part in str(value).split(",") if part.strip())
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


@click.group(invoke_without_command=True, short_help="Measure engines side by side.")
@click.option("--preset", type=click.Choice(["bloom-table", "pythia-hf-vs-ds", "mii"]), help="A well-known table.")
@click.option("--engines", "--engine", type=_WORDS, help="stream, stream/partitioned, zero, ... [default: stream]")
@click.option("-m", "--models", "--model", type=_WORDS, help="As for `zeroinf run`.")
@click.option(
    "--models-dir", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Every model in this folder."
)
@click.option("--offload", "offloads", type=_WORDS, help="none, cpu, nvme. [default: cpu]")
@click.option("-b", "--batch-size", "batch_sizes", type=_NUMBERS, help="Rows of each stream. [default: 1]")
@click.option("--input-len", "input_lens", type=_NUMBERS, help="Prompt tokens. [default: 128]")
@click.option("--output-len", "--max-tokens", "output_lens", type=_NUMBERS, help="New tokens. [default: 32]")
@click.option("--num-gpus", type=_NUMBERS, help="Ranks. [default: 1]")
@click.option("-r", "--repetitions", type=click.IntRange(min=1), default=3, help="Measured, after a warm-up.")
@click.option("--prompt", help="This text for every row, instead of one of --input-len tokens.")
@click.option("--dtype", type=click.Choice(["auto", "bfloat16", "float16", "float32"]), default="auto")
@click.option("--random-weights", is_flag=True, help="Real shapes, random weights, no checkpoint.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the models.")
@click.option("--resident-blocks", default="0", help="Where weights are offloaded, blocks that stay; or `auto`.")
@click.option("--gpu-memory", "gpu_memory_bytes", type=SizeType(), help="The most a rank may take of its GPU.")
@click.option("--nvme-path", "nvme_paths", type=click.Path(path_type=Path), multiple=True, help="For offload nvme.")
@click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", help="cpu leaves GPUs alone.")
@click.option("--cell-limit-s", type=click.FloatRange(min=1), default=600.0, help="A cell that takes longer is ended.")
@click.option(
    "--time-limit-s", type=click.FloatRange(min=0), help="Begin no cell after this; with -o the next call goes on."
)
@click.option(
    "-o",
    "--output-file",
    "--log-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="JSON with every sample, report, machine and version, written after each cell. If it is there, what it lacks "
    "is run.",
)
@click.option("--overwrite", is_flag=True, help="Begin an existing -o again.")
@click.option("--format", "form", type=_FORMATS, default="human", help="Of what is printed.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw latency and throughput as a PNG.")
@click.option("--dry-run", is_flag=True, help="Print the cells and how long they should take, and run none.")
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
    dry_run: bool,
    time_limit_s: float | None,
    **asked: Any,
) -> int | None:
    """Measure a matrix of engines, models, batch sizes, offload targets and lengths.

    Each cell is a `zeroinf run --benchmark` of its own; one that runs out of memory, fails or takes too long has that
    as its value. Figures are means over the repetitions ± their standard deviation.

    \b
      zeroinf bench --engines accelerate,zero,stream --model opt-6.7b --random-weights -b 1,8,64 -o opt.json
      zeroinf bench --preset bloom-table --model bloom-7b1 --random-weights --plot bloom.png
      zeroinf bench --preset mii --models-dir ./models --prompt "DeepSpeed is" --max-tokens 64 --log-file mii.json
      zeroinf bench compare before.json after.json
    """
    if ctx.invoked_subcommand is not None:
        if asked["models"] or preset:
            raise UsageError("compare takes two files and no matrix", hint="drop the options before it")
        return None
    for path in (output_file, plot):
        if path is not None and not path.parent.is_dir():
            raise OutputError(f"{path}: its folder does not exist", hint=f"mkdir -p {path.parent}")
    if overwrite and output_file is None:
        raise UsageError("--overwrite without --output-file", hint="add -o FILE, or drop --overwrite")
    matrix, settings = _matrix(preset, models_dir, asked), _settings(asked)
    if time_limit_s is not None and output_file is None:
        raise UsageError("--time-limit-s without --output-file", hint="add -o FILE: what is left runs the next time")
    if dry_run:
        _dry_run(matrix.cells(), settings)
        return 0
    from zeroinf.bench.plot import check_plot, draw

    if plot is not None:
        check_plot()
    results = _run(matrix.cells(), settings, output_file, overwrite=overwrite, time_limit_s=time_limit_s)
    click.echo(_shown(results, preset, form), nl=False)
    if plot is not None:
        draw(results, plot)
    return 0 if any(outcome.status == "ok" for outcome in results.outcomes) else 1


@bench.command(short_help="Show the ratios of two benchmarks.")
@click.argument("first", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("second", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--format", "form", type=click.Choice(["human", "md", "csv"]), default="human", help="Of what is printed."
)
def compare(first: Path, second: Path, form: Any) -> None:
    """Tokens/s of SECOND over FIRST, for each cell that both have, with the spread of the ratio."""
    from zeroinf.bench.results import read_results
    from zeroinf.bench.table import compared, render

    rows = compared(read_results(first), read_results(second))
    if len(rows) == 1:
        raise UsageError(f"{first} and {second} have no cell in common", hint="run the same matrix twice")
    click.echo(render(rows, form), nl=False)


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
    if unknown := sorted(set(lists["offloads"] or ()) - {"none", "cpu", "nvme"}):
        raise UsageError(f"--offload: no target {unknown[0]!r}", hint="none, cpu, nvme")
    if "nvme" in (lists["offloads"] or ()) and not asked["nvme_paths"]:
        raise UsageError("--offload nvme needs --nvme-path", hint="name a folder on a fast local disk")
    return with_preset(preset, lists)


def _settings(asked: dict[str, Any]) -> Settings:
    from zeroinf.bench.matrix import Settings

    if not (asked["resident_blocks"] == "auto" or asked["resident_blocks"].isdecimal()):
        raise UsageError(f"--resident-blocks {asked['resident_blocks']}", hint="a whole number, or auto")
    return Settings(**asked)


def _run(
    cells: list[Cell], settings: Settings, output_file: Path | None, *, overwrite: bool, time_limit_s: float | None
) -> Results:
    from dataclasses import replace

    from zeroinf.bench.results import machine_record, start_or_resume
    from zeroinf.bench.runner import run_cells
    from zeroinf.bench.table import figure_text
    from zeroinf.hardware.profile import read_profile
    from zeroinf.hardware.snapshot import read_machine

    machine = read_machine(settings.nvme_paths)
    record = machine_record(machine, read_profile(machine).known)
    results = start_or_resume(output_file, settings, record, overwrite=overwrite)

    def begins(cell: Cell, number: int) -> None:
        words = f"{cell.model}, {cell.name}, {cell.batch_size} rows, {cell.num_gpus} ranks"
        click.echo(f"{number + 1}/{len(cells)} {words} ...", err=True)

    def done(outcome: Outcome, so_far: Results) -> None:
        rate = outcome.figures.get("tokens_per_second")
        click.echo(
            f"    {figure_text(rate)} tokens/s" if rate else f"    {outcome.status}: {outcome.message}", err=True
        )
        if output_file is not None:
            so_far.save(output_file)

    finished = run_cells(
        cells,
        settings,
        results,
        done=done,
        begins=begins,
        time_limit_s=math.inf if time_limit_s is None else time_limit_s,
    )
    asked = [finished.of(cell) for cell in cells]
    return replace(finished, outcomes=tuple(outcome for outcome in asked if outcome is not None))


def _shown(results: Results, preset: str | None, form: str) -> str:
    from zeroinf.bench.matrix import PRESETS
    from zeroinf.bench.table import latencies, pivot, render, table

    if form == "json":
        return json.dumps(results.to_json(), indent=1) + "\n"
    shape: Any = form
    layout = PRESETS[preset].layout if preset else None
    if layout is not None and len({outcome.cell.num_gpus for outcome in results.outcomes}) == 1:
        heading = f"{layout.title}\n" if form == "human" else ""
        return heading + render(pivot(results, layout), shape)
    return render(latencies(results) if preset == "mii" else table(results), shape)


def _dry_run(cells: list[Cell], settings: Settings) -> None:
    from zeroinf.bench.predict import predict
    from zeroinf.bench.table import render

    rows = [["model", "engine", "GPUs", "batch", "prompt", "new", "seconds", "tokens/s", "projected"]]
    total, unknown = 0.0, 0
    for cell in cells:
        found = predict(cell, settings)
        total, unknown = total + (found.seconds or 0.0), unknown + (found.seconds is None)
        own = (cell.model, cell.name, cell.num_gpus, cell.batch_size, cell.input_len, cell.output_len)
        figures = [f"{v:.1f}" if v is not None else "?" for v in (found.seconds, found.tokens_per_second)]
        rows.append([*map(str, own), *figures, found.words])
    sys.stdout.write(render(rows, "human"))
    more = f", and {unknown} cells that nobody can time" if unknown else ""
    click.echo(f"{len(cells)} cells, {total / 60:.0f} min projected{more}", err=True)
