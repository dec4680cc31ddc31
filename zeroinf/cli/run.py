"""`zeroinf run`: generate text with a model whose weights do not live on the GPU."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar, cast

import click

from zeroinf.cli.command import command
from zeroinf.cli.environment import option
from zeroinf.cli.params import asked_of, loading_options, options_of
from zeroinf.cli.ranks import BY_HOSTFILE
from zeroinf.cli.waiting import importing
from zeroinf.errors import OutputError, RequestsFailedError, UsageError
from zeroinf.jobs.remote import name_of, upload, url_of
from zeroinf.options.contradictions import refuse_early, refuse_idle
from zeroinf.options.job_contradictions import check_output_of, refuse_idle_files, refuse_unreadable
from zeroinf.options.options import (
    AnswerOptions,
    JobOptions,
    LaunchOptions,
    MeasureOptions,
    ModelOptions,
    RandomWeightsOptions,
    RunOptions,
    SamplingOptions,
)
from zeroinf.sizes import count_text

if TYPE_CHECKING:
    from rich.console import Console

    from zeroinf.cli.console import ConsoleObserver
    from zeroinf.distributed.world import World
    from zeroinf.ray.limits import NodeLimits
    from zeroinf.ray.report import ClusterReport
    from zeroinf.runs.report import RunOutcome, RunReport

_Report = TypeVar("_Report", "RunReport", "ClusterReport")


@command(short_help="Generate text from many prompts.")
@options_of(ModelOptions)
@options_of(JobOptions)
@options_of(SamplingOptions)
@options_of(AnswerOptions)
@options_of(RandomWeightsOptions)
@loading_options
@option(
    "--kernel-inject",
    is_flag=True,
    section="engines and baselines",
    help="DeepSpeed's fused layers: refused, they need transformers 4.",
)
@options_of(LaunchOptions)
@options_of(MeasureOptions)
@option(
    "--report",
    "report_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write every figure of the run to this JSON file, replacing it.",
)
@option("-q", "--quiet", is_flag=True, help="No progress and no report; errors and notes stay.")
@click.pass_context
def run(
    ctx: click.Context,
    /,
    kernel_inject: bool,
    num_gpus: int | None,
    hostfile: Path | None,
    ray: str | None,
    ray_nodes: str | None,
    report_file: Path | None,
    quiet: bool,
    **asked: Any,
) -> int:
    """Generate text from many prompts with a model that need not fit the GPU.

    Weights are kept in host memory or on NVMe and stream through the GPU, one decoder layer after the other. What fits
    is planned before anything is allocated: `zeroinf plan` shows the same plan in detail.

    \b
      zeroinf run demo --prompt "The capital of France is"
      zeroinf run EleutherAI/pythia-160m -i prompts.jsonl -o out.jsonl \\
        --offload nvme --nvme-path /local
      zeroinf run MODEL --num-gpus 8
      zeroinf run MODEL --ray auto -i prompts.jsonl -o out.jsonl
      deepspeed --num_gpus 8 --module zeroinf run MODEL ...
    """
    if kernel_inject:
        raise _no_kernel_injection()
    options = _options(ctx, asked)
    refuse_idle(options)
    refuse_idle_files(options, on_nodes=hostfile is not None)
    from zeroinf.distributed.world import world_from_environment

    world = world_from_environment()
    beside = {"--num-gpus": num_gpus, "--hostfile": hostfile}
    limits = _node_limits(options, ray, ray_nodes, beside, world)
    if world.is_main:  # on the nodes of other ranks these need not be
        _check_files(options.input_files, options.output_file, report_file)
    arguments = sys.argv[1:]
    if not world.launched and _offers_to_resume(options):
        arguments, options = [*arguments, "--resume"], replace(options, resume=True)
    if world.launched:
        _refuse_another_world(num_gpus, hostfile, world)
    elif hostfile is not None or num_gpus is not None:
        check_output_of(options)
        code = _launch(arguments, num_gpus, hostfile)
        if code is not None:
            return code
    options = replace(options, resume_command=_resume_command(arguments))
    if ray is not None:
        return _run_on_ray(options, ray, limits, report_file=report_file, quiet=quiet)
    return _run_here(options, world, report_file=report_file, quiet=quiet)


def _options(ctx: click.Context, asked: dict[str, Any]) -> RunOptions:
    if asked["min_tokens"] > asked["max_new_tokens"]:
        raise UsageError("--min-tokens is above --max-new-tokens", hint="raise that, or lower this")
    if asked["zero_config"] is not None and not asked["zero_config"].is_file():
        raise UsageError(
            f"--zero-config {asked['zero_config']} is no regular file",
            hint="write it to a file: it is read twice",
        )
    to_stdout = asked["output_file"] == Path("-")
    if to_stdout:
        asked["output_file"] = None
    upload_to = url_of(asked["output_file"]) if asked["output_file"] is not None else None
    if upload_to is not None:
        asked["output_file"] = Path(name_of(upload_to))
    options = asked_of(ctx, RunOptions, asked, to_stdout=to_stdout, upload_to=upload_to)
    return replace(options, resume=options.resume or options.resume_anyway)


def _no_kernel_injection() -> UsageError:
    return UsageError(
        "--kernel-inject: DeepSpeed's fused layers do not run under transformers 5: BLOOM's and GPT-NeoX's cannot "
        "be made, others answer with tuples or leave the KV cache empty (docs/decisions/0012-baselines.md)",
        hint="drop it: --engine tensor-parallel splits the model without them",
    )


def _launch(arguments: Sequence[str], num_gpus: int | None, hostfile: Path | None) -> int | None:
    """Start the ranks, wait for them and return their exit code; None where this process is the only one."""
    from zeroinf.cli.launch import check_gpu_count, check_pdsh, launch_here, launch_on_nodes

    if hostfile is not None:
        check_pdsh()
        return launch_on_nodes(arguments, hostfile, num_gpus)
    assert num_gpus is not None
    check_gpu_count(num_gpus)
    return launch_here(arguments, num_gpus) if num_gpus > 1 else None


def _check_files(input_files: Sequence[str], output_file: Path | None, report_file: Path | None) -> None:
    from zeroinf.jobs.inputs import local_paths
    from zeroinf.jobs.output_files import errors_path, journal_path, partial_path

    written = [of(output_file) for of in (Path, journal_path, partial_path, errors_path) if output_file is not None]
    read = {path.resolve(): path for path in local_paths(input_files)}
    if output_file is not None and (lost := next((read[p] for p in map(Path.resolve, written) if p in read), None)):
        raise OutputError(f"-o {output_file} would replace the input, {lost}", hint="choose another name")
    if report_file is None:
        return
    if not os.access(report_file.parent, os.W_OK):
        raise OutputError(
            f"--report {report_file}: its folder does not exist or is not writable", hint="choose another"
        )
    if report_file.resolve() in {*read, *map(Path.resolve, written)}:
        raise OutputError(f"--report {report_file} would replace a file of the job", hint="choose another name")


def _refuse_another_world(num_gpus: int | None, hostfile: Path | None, world: World) -> None:
    """A launcher has started ranks. Those that `--num-gpus` or `--hostfile` had started have the flags as well."""
    if num_gpus not in (None, world.local_size):
        raise UsageError(
            f"--num-gpus {num_gpus} inside a launcher that started {world.local_size} ranks on this node",
            hint="drop --num-gpus",
        )
    if hostfile is not None and not os.environ.get(BY_HOSTFILE):
        raise UsageError("--hostfile inside a launcher", hint="drop --hostfile, or start zeroinf by itself")


def _node_limits(
    options: RunOptions, ray: str | None, ray_nodes: str | None, beside: Mapping[str, Any], world: World
) -> NodeLimits:
    """The number of cluster nodes that the job wants. Raises UsageError for what means nothing beside --ray."""
    from zeroinf.ray.limits import NodeLimits, check_address

    if ray is None:
        if ray_nodes is not None:
            raise UsageError("--ray-nodes has no effect without --ray", hint="add --ray auto, or drop it")
        return NodeLimits()
    if world.launched:
        raise UsageError("--ray inside a launcher, which has started ranks", hint="start zeroinf by itself")
    named = [flag for flag, value in beside.items() if value is not None]
    named += options.asked("benchmark", "repetitions", "static_batches")
    if named:
        raise UsageError(
            f"{', '.join(named)} with --ray: each node runs with all of its GPUs", hint=f"drop {named[0]}, or --ray"
        )
    check_address(ray)
    return NodeLimits() if ray_nodes is None else NodeLimits.parse(ray_nodes)


def _offers_to_resume(options: RunOptions) -> bool:
    """Whether there is something to go on with, the user has not said what to do about it, and now says yes."""
    path = options.output_file
    if path is None or options.resume or options.overwrite or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    from zeroinf.jobs.output_files import journal_path
    from zeroinf.jobs.status import read_status

    if not journal_path(path).is_file() or not (done := read_status(path).done):
        return False
    return click.confirm(
        f"{journal_path(path)} holds {count_text(done, 'result', 'results')}: go on with it?", default=True, err=True
    )


def _resume_command(arguments: Sequence[str]) -> str:
    """The command that resumes a run that was started with `arguments`, safe to paste into a shell."""
    dropped = ("--overwrite", "--resume", "--local_rank", "--local-rank")
    words = [word for word in arguments if word.partition("=")[0] not in dropped]
    return shlex.join(["zeroinf", *words, *(() if "--resume-anyway" in words else ("--resume",))])


def _write_report(file: Path, report: RunReport | ClusterReport) -> None:
    try:
        file.write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write --report {file}: {error.strerror}; the results are complete") from error


def _run_here(options: RunOptions, world: World, *, report_file: Path | None, quiet: bool) -> int:
    if world.is_main:  # it speaks for all ranks, and other nodes may lack its files
        refuse_unreadable(options)
        refuse_early(options)
    from rich.console import Console

    with importing(quiet=quiet or not world.is_main):
        from zeroinf.cli.console import ConsoleObserver, ResultsBesideDisplay, print_benchmark, print_report
        from zeroinf.runs.runner import run_job
        from zeroinf.service.device import pick_device

    console = Console(stderr=True, soft_wrap=True)
    observer = ConsoleObserver(console, quiet=quiet or not world.is_main)
    results = cast("TextIO", ResultsBesideDisplay(sys.stdout, observer))
    with redirect_stdout(sys.stderr), observer:  # what libraries print is no result
        outcome = run_job(options, world, pick_device(world), results, observer)
    if outcome is None:
        return 0
    report = outcome.report
    if options.benchmark and report is not None:
        print_benchmark(console, report)
    return _end(options, outcome, report, print_report, console, observer, report_file=report_file, quiet=quiet)


def _run_on_ray(options: RunOptions, address: str, limits: NodeLimits, *, report_file: Path | None, quiet: bool) -> int:
    refuse_unreadable(options)
    refuse_early(options)
    from rich.console import Console

    with importing(quiet=quiet):
        from zeroinf.cli.console import ConsoleObserver, ResultsBesideDisplay, print_cluster_report
        from zeroinf.ray.cluster import RayCluster
        from zeroinf.ray.run import run_on_cluster

    console = Console(stderr=True, soft_wrap=True)
    observer = ConsoleObserver(console, quiet=quiet)
    results = cast("TextIO", ResultsBesideDisplay(sys.stdout, observer))
    # Ray prints the death of each process to standard output.
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), observer:
        observer.doing("joining the Ray cluster")
        cluster = RayCluster(address, waits=limits.waits)
        try:
            outcome, report = run_on_cluster(options, cluster, cluster.device, limits, results, observer)
        finally:
            cluster.leave()
    return _end(options, outcome, report, print_cluster_report, console, observer, report_file=report_file, quiet=quiet)


def _end(
    options: RunOptions,
    outcome: RunOutcome,
    report: _Report | None,
    show: Callable[[Console, _Report], None],
    console: Console,
    observer: ConsoleObserver,
    *,
    report_file: Path | None,
    quiet: bool,
) -> int:
    """Write and show the report, and upload the output. Raises RequestsFailedError where a request came to nothing,
    OutputError where the upload fails."""
    if report is not None:
        if report_file is not None:
            _write_report(report_file, report)
        if not quiet:
            show(console, report)
    elif report_file is not None:
        observer.note(f"no report in {report_file}: nothing was run")
    if options.upload_to is not None:
        assert options.output_file is not None
        uploaded = upload(options.output_file, options.upload_to)
        observer.note(f"uploaded to {' and '.join(uploaded)}; {options.output_file} stays here")
    if outcome.refused or outcome.failed:
        raise _incomplete(outcome, options.output_file)
    return 0


def _incomplete(outcome: RunOutcome, output_file: Path | None) -> RequestsFailedError:
    from zeroinf.jobs.output_files import errors_path
    from zeroinf.service.requests import NOT_NUMBERS, NOT_NUMBERS_HINT

    refused, failed, count = outcome.refused, outcome.failed, outcome.requests + outcome.refused + outcome.failed
    if not outcome.requests:
        all_of_them = f"all {failed} requests that ran" if failed > 1 else "the request"
        if NOT_NUMBERS not in outcome.why_failed:
            return RequestsFailedError(f"{all_of_them} failed: {outcome.why_failed}")
        return RequestsFailedError(f"{all_of_them} failed: {NOT_NUMBERS}", hint=NOT_NUMBERS_HINT)
    where = f"see {errors_path(output_file)}" if output_file is not None else "their reasons stand above"
    if not refused:
        return RequestsFailedError(f"{failed} of {count} requests failed", hint=where)
    also = f", {failed} failed" if failed else ""
    return RequestsFailedError(f"{refused} of {count} requests were refused{also}", hint=where)
