"""`zeroinf plan`: what fits, how fast it would be, and why, before anything is downloaded or allocated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from zeroinf.cli.params import (
    SizeType,
    engine_options,
    flags,
    given,
    model_options,
    offload_options,
    refuse_unused_offload_options,
)
from zeroinf.errors import OutputError, UsageError

if TYPE_CHECKING:
    from zeroinf.hardware.machine import Machine
    from zeroinf.hardware.rates import Rates
    from zeroinf.model.anatomy import Anatomy
    from zeroinf.simulation.planning import Question


@click.command(short_help="Say what fits, how fast it would be, and why.")
@model_options
@engine_options
@lambda command: offload_options(command, auto=True)
@click.option("--input-len", type=click.IntRange(min=1), default=512, help="Tokens of the longest prompt.")
@click.option(
    "--output-len", "--max-new-tokens", type=click.IntRange(min=1), default=128, help="Most tokens generated a row."
)
@click.option("--requests", type=click.IntRange(min=1), help="Requests in all. [default: plenty]")
@click.option("--num-gpus", type=click.IntRange(min=1), help="Ranks, one on each GPU. [default: all GPUs]")
@click.option(
    "--machine", "machine_name", help="A machine that is not here: a name in configs/machines, or doctor's JSON."
)
@click.option("--gpu-memory", type=SizeType(), help="Plan with at most this much of each GPU, such as 24GiB.")
@click.option("--host-memory", type=SizeType(), help="Plan with this much host memory.")
@click.option("--nvme-space", type=SizeType(), help="Plan with this much room on the disk.")
@click.option("--link-gbps", type=click.FloatRange(min=0, min_open=True), help="Rate of each GPU's link, GB/s.")
@click.option("--nvme-gbps", type=click.FloatRange(min=0, min_open=True), help="Rate of the disk, GB/s.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as one JSON object.")
@click.option("--explain", is_flag=True, help="Print every term of memory with its origin, and every rate used.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw memory and tokens/s as a PNG.")
@click.option("--emit-zero-config", is_flag=True, help="Print the plan as DeepSpeed's JSON. With --engine zero.")
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
    _refuse_contradictions(ctx, asked, emit_zero_config=emit_zero_config, as_json=as_json, explain=explain)
    from zeroinf.cli.plan_view import print_plan, to_json
    from zeroinf.simulation.planning import answer

    if plot is not None and not plot.parent.is_dir():
        raise OutputError(f"--plot {plot}: its folder does not exist", hint="choose another")
    question = _question(**asked)
    found = answer(question)
    if plot is not None:  # before anything is printed: it may fail
        from zeroinf.cli.plan_plot import draw_plan

        draw_plan(question, found, plot)
    if emit_zero_config:
        from zeroinf.engines.zero.config import build_zero_config

        click.echo(json.dumps(build_zero_config(found.plan), indent=2))
    elif as_json:
        click.echo(json.dumps(to_json(question, found), indent=2))
    else:
        print_plan(question, found, explain=explain)


def _refuse_contradictions(
    ctx: click.Context, asked: dict[str, Any], *, emit_zero_config: bool, as_json: bool, explain: bool
) -> None:
    refuse_unused_offload_options(ctx)
    if emit_zero_config and asked["engine"] != "zero":
        raise UsageError("--emit-zero-config prints DeepSpeed's settings", hint="add --engine zero")
    if emit_zero_config and (as_json or explain):
        raise UsageError("--emit-zero-config prints nothing but that JSON", hint="drop --json and --explain")
    if as_json and explain:
        raise UsageError("--explain has no effect with --json, which holds every term", hint="drop one of them")
    if asked["engine"] == "zero" and (named := given(ctx, "fetch", "resident_blocks", "wire")):
        raise UsageError(f"{flags(ctx, named)} has no effect with --engine zero", hint="drop it")
    if asked["engine"] != "zero" and not asked["pin_memory"]:
        raise UsageError(
            "--no-pin-memory cannot be planned: link rates are those of page-locked memory", hint="drop it"
        )
    offload = asked["offload"]
    if offload == "none" and asked["resident_blocks"] is not None:
        raise UsageError("--resident-blocks has no effect with --offload none: all are", hint="drop one of them")
    without_disk = ("nvme_space", "nvme_gbps") if offload in ("none", "cpu") else ()
    without_link = ("fetch", "link_gbps") if offload == "none" else ()
    if named := given(ctx, *without_disk, *without_link):
        raise UsageError(f"{flags(ctx, named)} has no effect with --offload {offload}", hint="drop it")


def _refuse_impossible(asked: dict[str, Any], machine: Machine, anatomy: Anatomy) -> None:
    """What only the machine and the model show to be without effect, or to be impossible."""
    from zeroinf.planner.search import check_micro_batch_rows

    if asked["offload"] == "nvme" and not machine.disks:
        raise UsageError("--offload nvme: the machine has no disk", hint="add --nvme-space")
    if asked["fetch"] != "auto" and len(machine.gpus) < 2:
        raise UsageError(f"--fetch {asked['fetch']} has no effect with one GPU", hint="drop it, or add --num-gpus")
    if asked["micro_batch_rows"] is not None:
        check_micro_batch_rows("zero" if asked["engine"] == "zero" else "stream", anatomy.is_paged)
    blocks, resident = len(anatomy.blocks), asked["resident_blocks"] or 0
    if resident > blocks:
        raise UsageError(f"--resident-blocks {resident}: the model has {blocks} blocks", hint=f"at most {blocks}")
    if resident == blocks and (asked["offload"] != "auto" or asked["fetch"] != "auto"):
        raise UsageError(
            f"with --resident-blocks {blocks} all blocks stay, and --offload and --fetch have no effect",
            hint="--offload none says the same",
        )
    tokens = asked["input_len"] + asked["output_len"]
    if anatomy.context_limit is not None and tokens > anatomy.context_limit:
        raise UsageError(
            f"--input-len and --output-len make {tokens} tokens, the model's context is {anatomy.context_limit}",
            hint="shorten one of them",
        )


def _question(*, model: str, revision: str | None, dtype: str, trust_remote_code: bool, **asked: Any) -> Question:
    from zeroinf.model.inspect import read_anatomy
    from zeroinf.model.source import pick_dtype, resolve_model
    from zeroinf.planner.plan import AioSettings
    from zeroinf.planner.search import Wish
    from zeroinf.planner.workload import Lengths
    from zeroinf.simulation.planning import Question

    machine, rates = _machine(**{name: asked.pop(name) for name in _MACHINE_OPTIONS}, asked=asked)
    # Only shapes are wanted, so the catalog's will do; it knows no revisions.
    source = resolve_model(
        model, revision=revision, trust_remote_code=trust_remote_code, random_weights=revision is None
    )
    device: Literal["cuda", "cpu"] = "cuda" if machine.gpus else "cpu"
    anatomy = read_anatomy(source.config, dtype=pick_dtype(dtype, source, device), trust_remote_code=trust_remote_code)
    _refuse_impossible(asked, machine, anatomy)
    wish = Wish(
        engine="zero" if asked["engine"] == "zero" else "stream",
        world_size=max(1, len(machine.gpus)),
        offload=asked["offload"],
        fetch=asked["fetch"],
        batch_size=asked["batch_size"],
        micro_batch_rows=asked["micro_batch_rows"],
        resident_blocks=asked["resident_blocks"],
        wire=asked["wire"],
        requests=asked["requests"],
        nvme_space_bytes=sum(disk.free_bytes for disk in machine.disks) if machine.disks else None,
    )
    return Question(
        config=source.config,
        anatomy=anatomy,
        machine=machine,
        rates=rates,
        wish=wish,
        lengths=Lengths(prompt_tokens=asked["input_len"], new_tokens=asked["output_len"]),
        device=device,
        nvme_paths=asked["nvme_paths"] or tuple(disk.path for disk in machine.disks),
        pin_memory=asked["pin_memory"],
        aio=AioSettings(
            block_size_bytes=asked["aio_block_size"],
            queue_depth=asked["aio_queue_depth"],
            threads=asked["aio_threads"],
        ),
        trust_remote_code=trust_remote_code,
    )


_MACHINE_OPTIONS = (
    "machine_name", "gpu_memory", "host_memory", "nvme_space", "num_gpus", "link_gbps", "nvme_gbps",
)  # fmt: skip


def _machine(
    *,
    machine_name: str | None,
    gpu_memory: int | None,
    host_memory: int | None,
    nvme_space: int | None,
    num_gpus: int | None,
    link_gbps: float | None,
    nvme_gbps: float | None,
    asked: dict[str, Any],
) -> tuple[Machine, Rates]:
    """The machine to plan for: this one or the one named, with what the flags say instead."""
    from zeroinf.hardware.override import override
    from zeroinf.hardware.presets import load_machine
    from zeroinf.hardware.profile import read_profile
    from zeroinf.hardware.snapshot import read_machine

    if machine_name is None:
        machine = read_machine(asked["nvme_paths"])
        rates = read_profile(machine)
    else:
        if asked["nvme_paths"]:
            raise UsageError("--nvme-path names a folder of this machine, --machine another one", hint="drop one")
        file = load_machine(machine_name)
        machine, rates = file.machine, file.rates
    missing = next((disk for disk in machine.disks if not disk.exists), None)
    if machine_name is None and missing is not None:
        raise UsageError(f"--nvme-path {missing.path} is not a folder", hint=f"mkdir -p {missing.path}")
    return override(
        machine,
        rates,
        gpu_memory_bytes=gpu_memory,
        host_memory_bytes=host_memory,
        nvme_space_bytes=nvme_space,
        num_gpus=num_gpus,
        link_gbps=link_gbps,
        nvme_gbps=nvme_gbps,
    )
