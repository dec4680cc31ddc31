"""Implements `zeroinf plan`: memory, speed and advice for a model on a machine, before anything is downloaded or
allocated.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from zeroinf.cli.environment import option
from zeroinf.cli.params import (
    FiniteFloat,
    SizeType,
    aio_of,
    engine_options,
    flags,
    given,
    model_options,
    offload_options,
    refuse_unused_offload_options,
)
from zeroinf.cli.waiting import waiting
from zeroinf.errors import OutputError, UsageError


@click.command(short_help="Say what fits, how fast it would be, and why.")
@model_options
@engine_options
@lambda command: offload_options(command, auto=True)
@option("--input-len", type=click.IntRange(min=1), default=512, help="Tokens of the longest prompt.")
@option(
    "--output-len",
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=128,
    help="Most tokens of a completion.",
)
@option("--requests", type=click.IntRange(min=1), help="Requests in all. [default: plenty]")
@option("--num-gpus", type=click.IntRange(min=1), help="Ranks, one on each GPU. [default: all GPUs]")
@option(
    "-tp",
    "--tensor-parallel-size",
    type=click.IntRange(min=1),
    help="Ranks that hold one model together. With --engine tensor-parallel. [default: all]",
)
@option("--machine", "machine_name", help="A machine that is not here: a name in configs/machines, or doctor's JSON.")
@option("--gpu-memory", type=SizeType(), help="Plan with at most this much of each GPU, such as 24GiB.")
@option("--host-memory", type=SizeType(), help="Plan with this much host memory.")
@option("--nvme-space", type=SizeType(), help="Plan with this much room on the disk.")
@option("--link-gbps", type=FiniteFloat(min=0, min_open=True), help="Rate of each GPU's link, GB/s.")
@option("--nvme-gbps", type=FiniteFloat(min=0, min_open=True), help="Rate of the disk, GB/s.")
@option("--json", "as_json", is_flag=True, help="Print the plan as one JSON object.")
@option("--explain", is_flag=True, help="Print every term of memory with its origin, and every rate used.")
@option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw memory and tokens/s as a PNG.")
@option("--emit-zero-config", is_flag=True, help="Print the plan as DeepSpeed's JSON. With --engine zero.")
@click.pass_context
def plan(
    ctx: click.Context,
    /,
    as_json: bool,
    explain: bool,
    plot: Path | None,
    emit_zero_config: bool,
    **asked: Any,
) -> None:
    """Say what fits, how fast it would be, and why: no weights, no GPU, seconds.

    \b
      zeroinf plan --model llama-2-70b --gpu-memory 24GiB --host-memory 256GiB
      zeroinf plan --model bloom-176b --machine 8xA100-80GB-512GiB --num-gpus 8
      zeroinf plan --model EleutherAI/pythia-160m --offload nvme --nvme-path /local --json
    """
    _refuse_contradictions(ctx, asked, emit_zero_config=emit_zero_config, as_json=as_json, explain=explain, plot=plot)
    _refuse_early(asked)
    with waiting("starting: importing torch and transformers"):
        from zeroinf.cli.plan_view import print_plan, to_json
        from zeroinf.options.plan_input import PlanOptions, plan_input_of
        from zeroinf.simulation.planning import make_plan

    if plot is not None and not plot.parent.is_dir():
        raise OutputError(f"--plot {plot}: its folder does not exist", hint="choose another")
    with waiting("planning"):
        plan_input = plan_input_of(PlanOptions(aio=aio_of(asked), **asked))
        found = make_plan(plan_input, advise=not (as_json or emit_zero_config))
    if plot is not None:  # before anything is printed: it may fail
        from zeroinf.cli.plan_plot import draw_plan

        draw_plan(plan_input, found, plot)
    if emit_zero_config:
        from zeroinf.engines.zero.config import build_zero_config

        click.echo(json.dumps(build_zero_config(found.plan), indent=2))
    elif as_json:
        click.echo(json.dumps(to_json(plan_input, found), indent=2))
    else:
        print_plan(plan_input, found, explain=explain)


def _refuse_early(asked: dict[str, Any]) -> None:
    """Names and folders that are not there, before torch is imported."""
    from zeroinf.hardware.disk import read_disk
    from zeroinf.hardware.presets import load_machine
    from zeroinf.model.source import check_name
    from zeroinf.options.contradictions import check_folders

    if asked["machine_name"] is not None:
        load_machine(asked["machine_name"])
    else:
        check_folders([read_disk(path) for path in asked["nvme_paths"]])
    check_name(asked["model"], asked["revision"], random_weights=asked["revision"] is None)


def _refuse_contradictions(
    ctx: click.Context,
    asked: dict[str, Any],
    *,
    emit_zero_config: bool,
    as_json: bool,
    explain: bool,
    plot: Path | None,
) -> None:
    refuse_unused_offload_options(ctx)
    if emit_zero_config and asked["engine"] != "zero":
        raise UsageError("--emit-zero-config prints DeepSpeed's settings", hint="add --engine zero")
    if emit_zero_config and (as_json or explain):
        raise UsageError("--emit-zero-config prints nothing but that JSON", hint="drop --json and --explain")
    if as_json and explain:
        raise UsageError("--explain has no effect with --json, which holds every term", hint="drop one of them")
    if plot is not None and asked["engine"] == "tensor-parallel":
        raise UsageError("--plot draws tokens/s, which the planner does not know of this engine", hint="drop it")
    if asked["engine"] != "zero" and not asked["pin_memory"]:
        raise UsageError(
            "--no-pin-memory cannot be planned: link rates are those of page-locked memory", hint="drop it"
        )
    offload = asked["offload"]
    without_disk = ("nvme_space", "nvme_gbps") if offload in ("none", "cpu") else ()
    without_link = ("fetch", "link_gbps") if offload == "none" else ()
    if named := given(ctx, *without_disk, *without_link):
        raise UsageError(f"{flags(ctx, named)} has no effect with --offload {offload}", hint="drop it")
