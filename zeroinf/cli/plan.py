"""Implements `zeroinf plan`: memory, speed and advice for a model on a machine, before anything is downloaded or
allocated.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zeroinf.cli.command import command
from zeroinf.cli.environment import option
from zeroinf.cli.params import asked_of, options_of
from zeroinf.cli.waiting import importing, waiting
from zeroinf.errors import OutputError, UsageError
from zeroinf.hardware.disk import read_disk
from zeroinf.hardware.process import uncollected
from zeroinf.model.resolve import check_name
from zeroinf.options.contradictions import check_folders, refuse_idle
from zeroinf.options.options import (
    EngineOptions,
    InputOptions,
    MachineOptions,
    PlannedModelOptions,
    PlanOptions,
    RandomWeightsOptions,
    RestOptions,
    TransferOptions,
)

if TYPE_CHECKING:
    from zeroinf.options.lists import Listed


@command(short_help="Say what fits, how fast it would be, and why.")
@options_of(PlannedModelOptions)
@options_of(RandomWeightsOptions)
@options_of(EngineOptions)
@options_of(RestOptions)
@options_of(TransferOptions)
@options_of(MachineOptions)
@options_of(InputOptions)
@option("--json", "as_json", is_flag=True, help="Print the plan as one JSON object.")
@option("--explain", is_flag=True, help="Print every term of memory with its origin, and every rate used.")
@option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw memory and tokens/s as a PNG.")
@option("--dark", is_flag=True, help="With --plot: draw on dark ground.")
@option("--html", "page", type=click.Path(path_type=Path, dir_okay=False), help="Write the plan as one HTML page.")
@option("--advice/--no-advice", default=True, help="Plan what other settings, checkpoints or hardware would give.")
@option("--emit-zero-config", is_flag=True, help="Print the plan as DeepSpeed's JSON. With --engine zero.")
@click.pass_context
def plan(
    ctx: click.Context,
    /,
    as_json: bool,
    explain: bool,
    plot: Path | None,
    dark: bool,
    page: Path | None,
    advice: bool,
    emit_zero_config: bool,
    **asked: Any,
) -> None:
    """Say what fits, how fast it would be, and why: no weights, no GPU, seconds.

    \b
      zeroinf plan --model llama-2-70b --gpu-memory 24GiB --host-memory 256GiB
      zeroinf plan --model bloom-176b --machine 8xA100-80GB-512GiB --num-gpus 8
      zeroinf plan --model opt-30b --offload nvme --nvme-path /local --json
      zeroinf plan --model qwen3-30b-a3b --html plan.html \\
        --machine 1xRTX4090-24GB-64GiB
      zeroinf plan --model llama-3-70b --host-memory 128GiB -i prompts.jsonl
      zeroinf plan --models all --machine 1xRTX4090-24GB-64GiB
      zeroinf plan --model llama-3-70b --host-memory 128GiB --gpus all
    """
    options = asked_of(ctx, PlanOptions, asked)
    refuse_idle(options)
    _refuse_idle_output(options.engine, emit_zero_config=emit_zero_config, as_json=as_json, explain=explain, plot=plot)
    _check_files(plot, page, dark=dark)
    from zeroinf.options.lists import listed

    varied, _ = listed(options)
    if varied is not None:
        idle = {"--explain": explain, "--plot": plot, "--html": page, "-i": options.input_files}
        _refuse_beside_table(varied, [flag for flag, given in idle.items() if given])
        _print_table(options, varied, as_json=as_json, advice=advice)
        return
    _refuse_early(options)
    with importing():
        from zeroinf.cli.plan_view import print_plan, to_json
        from zeroinf.options.plan_input import input_of_best_gpus
        from zeroinf.simulation.make_plan import make_plan

    with uncollected(), waiting("planning"):
        plan_input = input_of_best_gpus(options)
        found = make_plan(plan_input, advise=advice and not emit_zero_config, remedy=advice)
    if plot is not None:  # before anything is printed: it may fail
        from zeroinf.cli.plan_plot import draw_plan

        draw_plan(options.model, plan_input, found, plot, dark=dark)
    if page is not None:
        from zeroinf.cli.plan_page import write_page

        write_page(options.model, plan_input, found, page)
    if emit_zero_config:
        from zeroinf.engines.zero.config import build_zero_config

        click.echo(json.dumps(build_zero_config(found.plan), indent=2))
    elif as_json:
        click.echo(json.dumps(to_json(plan_input, found, advised=advice), indent=2))
    else:
        print_plan(plan_input, found, explain=explain)


def _check_files(plot: Path | None, page: Path | None, *, dark: bool) -> None:
    """What is to be written, before anything is planned."""
    if dark and plot is None:
        raise UsageError("--dark has no effect without --plot", hint="add it, or drop --dark")
    for flag, file in (("--plot", plot), ("--html", page)):
        if file is not None and not file.parent.is_dir():
            raise OutputError(f"{flag} {file}: its folder does not exist", hint="choose another")


def _refuse_beside_table(varied: Listed, idle: list[str]) -> None:
    if idle:
        raise UsageError(f"{', '.join(idle)} has no effect with a table", hint=f"drop it, or name one --{varied}")


def _print_table(options: PlanOptions, varied: Listed, *, as_json: bool, advice: bool) -> None:
    """Print which of a list of models or GPUs fit."""
    with importing():
        from zeroinf.cli.plan_table import plan_all, print_table, table_json

    rows = plan_all(options, advise=advice, show=sys.stderr.isatty())
    if as_json:
        click.echo(json.dumps(table_json(options, rows, varied), indent=2))
    else:
        print_table(options, rows, varied)


def _refuse_early(options: PlanOptions) -> None:
    """Names and folders that are not there, before torch is imported."""
    if options.machine is not None:
        from zeroinf.hardware.presets import load_machine

        load_machine(options.machine)
    else:
        check_folders([read_disk(path) for path in options.nvme_paths])
    check_name(options.model, options.revision, random_weights=options.revision is None)


def _refuse_idle_output(
    engine: str, *, emit_zero_config: bool, as_json: bool, explain: bool, plot: Path | None
) -> None:
    """Refuse options whose output would not be printed or drawn."""
    if emit_zero_config and engine != "zero":
        raise UsageError("--emit-zero-config prints DeepSpeed's settings", hint="add --engine zero")
    if emit_zero_config and (as_json or explain):
        raise UsageError("--emit-zero-config prints nothing but that JSON", hint="drop --json and --explain")
    if as_json and explain:
        raise UsageError("--explain has no effect with --json, which holds every term", hint="drop one of them")
    if plot is not None and engine == "tensor-parallel":
        raise UsageError("--plot draws tokens/s, which the planner does not know of this engine", hint="drop it")
