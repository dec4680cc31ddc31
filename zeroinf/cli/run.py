"""`zeroinf run`: generate text with a model whose weights do not live on the GPU."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zeroinf.cli.environment import option
from zeroinf.cli.params import (
    AIO_OPTIONS,
    FiniteFloat,
    JsonObjectType,
    SizeType,
    aio_of,
    engine_options,
    flags,
    given,
    model_options,
    offload_options,
    refuse_unused_offload_options,
    tensor_parallel_of,
    tensor_parallel_options,
)
from zeroinf.cli.ranks import BY_HOSTFILE
from zeroinf.cli.waiting import waiting
from zeroinf.errors import InputError, OutputError, RequestsFailedError, UsageError
from zeroinf.jobs.export import OUTPUT_FORMATS
from zeroinf.jobs.formats import FORMATS
from zeroinf.sizes import DEFAULT_NEW_TOKENS

if TYPE_CHECKING:
    from zeroinf.distributed.world import World
    from zeroinf.jobs.shape import Shape
    from zeroinf.runs.report import RunOutcome, RunReport

_SAMPLING_ONLY = ("top_p", "top_k", "min_p", "seed")


@click.command(short_help="Generate text from many prompts.")
@model_options
@option("--random-weights", is_flag=True, help="Real shapes, random weights, no checkpoint: for benchmarks.")
@engine_options
@lambda command: offload_options(command, auto=True)
@tensor_parallel_options
@option(
    "--gpu-memory",
    "gpu_memory_bytes",
    type=SizeType(),
    help="The most that each rank may take of its GPU, such as 24GiB; enforced. [default: what is free]",
)
@option(
    "--host-memory",
    "host_memory_bytes",
    type=SizeType(),
    help="The most host memory that all ranks together may take. [default: what is free]",
)
@option(
    "--zero-config",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Your own DeepSpeed JSON (ZeRO stage 3) instead of the one that follows from the model.",
)
@option("--prompt", "prompts", multiple=True, help="A prompt; may be given many times.")
@option(
    "-i",
    "--input-file",
    "input_files",
    multiple=True,
    help="Prompts: text (one a line), JSONL (`prompt` or `messages`), OpenAI batch lines, a JSON array, CSV, TSV, "
    "Parquet or Arrow, also packed by gzip or zstd; a file, folder, pattern or URL; - is stdin; may be given often.",
)
@option(
    "-o",
    "--output-file",
    type=click.Path(path_type=Path),
    help="Results, in input order: JSONL, Parquet or CSV by its ending; - is JSONL to stdout. Without it, in=/out= "
    "pairs go there.",
)
@option(
    "--output-format",
    type=click.Choice(OUTPUT_FORMATS),
    default="auto",
    help="What -o holds; auto goes by its ending, and answers OpenAI batches as OpenAI does.",
)
@option(
    "--input-format",
    type=click.Choice(FORMATS),
    default="auto",
    help="What -i holds; auto goes by each file's ending and its first bytes.",
)
@option("--prompt-column", help="The column (or key) that holds the prompt. [default: prompt]")
@option("--messages-column", help="The column that holds chat messages. [default: messages]")
@option("--id-column", help="The column that holds the id. [default: id]")
@option(
    "--template",
    help="Make the prompt of an entry's columns, in Jinja2: 'Translate: {{ text }}', or @FILE; none may be missing.",
)
@option("--chat", is_flag=True, help="Prompts are user messages, and go through the model's chat template.")
@option("--system", help="The system message of chats that begin with none, or @FILE.")
@option(
    "--chat-template-kwargs",
    type=JsonObjectType(),
    help="Variables of the model's chat template as JSON, such as '{\"enable_thinking\": false}'.",
)
@option("--keep-columns", help="Columns of the input that the output has as well: NAME,NAME or all.")
@option("--limit", type=click.IntRange(min=1), help="Read so many entries only.")
@option("--overwrite", is_flag=True, help="Start anew: replace an existing output file and its journal.")
@option("--resume", is_flag=True, help="Go on with a job that was stopped or killed; start it if there is none.")
@option(
    "--resume-anyway",
    is_flag=True,
    help="Go on although model, settings or input have changed: requests whose id and prompt are as before keep their "
    "results, the others run.",
)
@option(
    "--max-error-rate",
    type=FiniteFloat(min=0, max=1),
    default=1.0,
    help="Run nothing if a larger share of the requests than this is refused.",
)
@option(
    "--max-new-tokens",
    "--max-tokens",
    type=click.IntRange(min=1),
    default=DEFAULT_NEW_TOKENS,
    help="Most tokens of a completion.",
)
@option("--temperature", type=FiniteFloat(min=0), default=0.0, help="0 is greedy.")
@option("--top-p", type=FiniteFloat(min=0, max=1, min_open=True), default=1.0, help="1 does not filter.")
@option("--top-k", type=click.IntRange(min=0), default=0, help="0 does not filter.")
@option("--min-p", type=FiniteFloat(min=0, max=1), default=0.0, help="Least likelihood, as a share of the highest.")
@option("--seed", type=int, default=0, help="A row's sample depends on the seed and its place in the input only.")
@option("--stop", multiple=True, help="End a row at this text, which is left out; may be given many times.")
@option("--ignore-eos", is_flag=True, help="Go on past the end-of-sequence token.")
@option(
    "--presence-penalty",
    type=FiniteFloat(-2, 2),
    default=0.0,
    help="Taken off scores of tokens generated before.",
)
@option("--frequency-penalty", type=FiniteFloat(-2, 2), default=0.0, help="The same, for each time.")
@option(
    "--repetition-penalty",
    type=FiniteFloat(0, 100, min_open=True),
    default=1.0,
    help="Divides scores of tokens of prompt and completion; 1 does nothing.",
)
@option("--min-tokens", type=click.IntRange(min=0), default=0, help="No end of a sequence, nor a stop, before so many.")
@option(
    "-n", "--samples", type=click.IntRange(1, 128), default=1, help="Completions of each prompt. With --temperature."
)
@option(
    "--logprobs",
    type=click.IntRange(min=0, max=20),
    help="Tell each token's log-probability, and those of so many of the likeliest tokens. With -o.",
)
@option(
    "--num-gpus",
    type=click.IntRange(min=1),
    help="Start this many ranks, an independent stream on each GPU. [default: one]",
)
@option(
    "--static-batches", is_flag=True, hidden=True, help="Admit sequences only when no other runs, to measure the gain."
)
@option(
    "--hostfile",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Start ranks on all nodes that it names, in DeepSpeed's form: `host slots=8` a line. Needs ssh and pdsh.",
)
@option("--benchmark", is_flag=True, help="Warm up once and print the four figures of the BLOOM scripts.")
@option(
    "-r",
    "--repetitions",
    type=click.IntRange(min=1),
    default=1,
    help="Run the same requests so often once weights are loaded, each time measured. With --benchmark.",
)
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
    num_gpus: int | None,
    hostfile: Path | None,
    report_file: Path | None,
    quiet: bool,
    **asked: Any,
) -> int:
    """Generate text from many prompts with a model that need not fit the GPU.

    Weights rest in host memory or on NVMe and stream through the GPU, one decoder layer after the other. What fits is
    planned before anything is allocated: `zeroinf plan` shows the same plan in detail.

    \b
      zeroinf run --model demo --prompt "The capital of France is"
      zeroinf run --model EleutherAI/pythia-160m --offload nvme --nvme-path /local -i prompts.jsonl -o out.jsonl
      zeroinf run --model ... --num-gpus 8
      deepspeed --num_gpus 8 --module zeroinf run --model ...
    """
    asked["to_stdout"] = asked["output_file"] == Path("-")
    _refuse_contradictions(ctx, asked)
    if asked["to_stdout"]:
        asked["output_file"] = None
    if asked["zero_config"] is not None and not asked["zero_config"].is_file():
        raise UsageError(
            f"--zero-config {asked['zero_config']} is no regular file",
            hint="write it to a file: it is read twice",
        )
    asked["tensor_parallel"] = tensor_parallel_of(asked)
    from zeroinf.distributed.world import world_from_environment

    world = world_from_environment()
    if world.is_main:  # on the nodes of other ranks these need not be
        _check_files(asked["input_files"], asked["output_file"], report_file)
    asked["resume"] |= asked["resume_anyway"]
    arguments = sys.argv[1:]
    if not world.launched and _offers_to_resume(asked):
        arguments, asked["resume"] = [*arguments, "--resume"], True
    if world.launched:
        _refuse_another_world(num_gpus, hostfile, world)
    elif hostfile is not None:
        from zeroinf.cli.launch import check_pdsh, launch_on_nodes

        _check_output(asked)
        check_pdsh()
        return launch_on_nodes(arguments, hostfile, num_gpus)
    elif num_gpus is not None:
        from zeroinf.cli.launch import check_gpu_count, launch_here

        _check_output(asked)
        check_gpu_count(num_gpus)
        if num_gpus > 1:
            return launch_here(arguments, num_gpus)
    asked["resume_command"] = _resume_command(arguments)
    return _run_here(ctx, world, report_file=report_file, quiet=quiet, **asked)


def _refuse_contradictions(ctx: click.Context, asked: dict[str, Any]) -> None:
    if asked["zero_config"] is None:
        refuse_unused_offload_options(ctx)
        if not asked["nvme_paths"] and (unused := given(ctx, *AIO_OPTIONS)):
            raise UsageError(f"{flags(ctx, unused)} has no effect without --nvme-path", hint="add it, or drop the flag")
    elif named := given(ctx, "offload", "nvme_paths", "pin_memory", *AIO_OPTIONS):
        raise UsageError(f"{flags(ctx, named)} and --zero-config contradict each other", hint="set it in the JSON")
    if asked["repetitions"] > 1 and not asked["benchmark"]:
        raise UsageError("--repetitions has no effect without --benchmark", hint="add --benchmark, or drop it")
    if asked["overwrite"] and asked["output_file"] is None:
        raise UsageError("--overwrite without --output-file", hint="add -o FILE, or drop --overwrite")
    for flag in ("resume", "resume_anyway"):
        name = f"--{flag.replace('_', '-')}"
        if asked[flag] and asked["output_file"] is None:
            raise UsageError(f"{name} without --output-file", hint="add -o FILE, whose journal shall go on")
        if asked[flag] and asked["overwrite"]:
            raise UsageError(f"{name} and --overwrite contradict each other", hint="drop one of them")
    if ctx.params["hostfile"] is not None and asked["output_file"] is None:
        raise UsageError("--hostfile without --output-file", hint="add -o FILE: launchers write to standard output")
    if given(ctx, "output_format") and asked["output_file"] is None:
        raise UsageError("--output-format without --output-file", hint="add -o FILE, or -o - for standard output")
    if asked["to_stdout"]:
        if kept := next((name for name in ("overwrite", "resume", "resume_anyway") if asked[name]), None):
            raise UsageError(f"--{kept.replace('_', '-')} with -o -: nothing of it is kept", hint="name a file")
        if ctx.params["hostfile"] is not None:
            raise UsageError("--hostfile with -o -", hint="add -o FILE: launchers write to standard output")
        if asked["output_format"] in ("parquet", "csv"):
            raise UsageError(f"--output-format {asked['output_format']} with -o -", hint="name a file, or drop it")
    if asked["keep_columns"] is not None and asked["output_file"] is None:
        raise UsageError("--keep-columns without --output-file", hint="add -o FILE, or drop it")
    if asked["min_tokens"] > asked["max_new_tokens"]:
        raise UsageError("--min-tokens is above --max-new-tokens", hint="raise that, or lower this")
    if not asked["input_files"] and given(ctx, "input_format"):
        raise UsageError("--input-format without --input-file", hint="add -i FILE, or drop it")
    if not asked["prompts"] and not asked["input_files"]:
        raise InputError("no input", hint="give --prompt TEXT, -i FILE, or -i - for stdin")


def _check_files(input_files: Sequence[str], output_file: Path | None, report_file: Path | None) -> None:
    from zeroinf.jobs.inputs import local_paths
    from zeroinf.jobs.output import errors_path, journal_path, partial_path

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


def _check_output(asked: dict[str, Any]) -> None:
    from zeroinf.jobs.output import check_output

    if asked["output_file"] is not None:
        check_output(
            asked["output_file"],
            overwrite=asked["overwrite"],
            resume=asked["resume"],
            output_format=asked["output_format"],
        )


def _offers_to_resume(asked: dict[str, Any]) -> bool:
    """Whether there is something to go on with, the user has not said what to do about it, and now says yes."""
    path = asked["output_file"]
    if path is None or asked["resume"] or asked["overwrite"] or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    from zeroinf.jobs.output import journal_path
    from zeroinf.jobs.status import read_status

    if not journal_path(path).is_file() or not (done := read_status(path).done):
        return False
    return click.confirm(f"{journal_path(path)} holds {done} results: go on with it?", default=True, err=True)


def _resume_command(arguments: Sequence[str]) -> str:
    """What goes on with a run that was started with `arguments`, safe to paste into a shell."""
    dropped = ("--overwrite", "--resume", "--local_rank", "--local-rank")
    words = [word for word in arguments if word.partition("=")[0] not in dropped]
    return shlex.join(["zeroinf", *words, *(() if "--resume-anyway" in words else ("--resume",))])


def _write_report(file: Path, report: RunReport) -> None:
    try:
        file.write_text(json.dumps(report.to_json(), indent=2) + "\n")
    except OSError as error:
        raise OutputError(f"cannot write --report {file}: {error.strerror}; the results are complete") from error


def _run_here(ctx: click.Context, world: World, *, report_file: Path | None, quiet: bool, **asked: Any) -> int:
    from zeroinf.generation.row import Sampling
    from zeroinf.options.contradictions import refuse_early
    from zeroinf.options.options import RunOptions

    keys = (
        *("max_new_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "ignore_eos"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty", "logprobs"),
    )
    try:
        sampling = Sampling(**{key: asked.pop(key) for key in keys})
    except ValueError as error:
        raise UsageError(str(error)) from error
    options = RunOptions(
        shape=_shape_of(asked),
        sampling=sampling,
        sampling_only=tuple(given(ctx, *_SAMPLING_ONLY)),
        aio=aio_of(asked),
        **asked,
    )
    if world.is_main:  # it speaks for all ranks, and other nodes may lack its files
        refuse_early(options)
    from rich.console import Console

    with waiting("starting: importing torch and transformers", quiet=quiet or not world.is_main):
        from zeroinf.cli.console import ConsoleObserver, print_benchmark, print_report
        from zeroinf.runs.runner import run_job
        from zeroinf.service.device import pick_device

    console, results = Console(stderr=True, soft_wrap=True), sys.stdout
    observer = ConsoleObserver(console, quiet=quiet or not world.is_main)
    with redirect_stdout(sys.stderr):  # what libraries print is no result
        outcome = run_job(options, world, pick_device(world), results, observer)
    if outcome is None:
        return 0
    if (report := outcome.report) is not None:
        if report_file is not None:
            _write_report(report_file, report)
        if options.benchmark:
            print_benchmark(console, report)
        if not quiet:
            print_report(console, report)
    elif report_file is not None:
        observer.note(f"no report in {report_file}: nothing was run")
    if outcome.refused or outcome.failed:
        raise _incomplete(outcome, options.output_file)
    return 0


def _shape_of(asked: dict[str, Any]) -> Shape:
    """Take what makes prompts of entries out of `asked`. Raises UsageError for a variable that is not to be set."""
    from zeroinf.jobs.shape import Shape
    from zeroinf.service.requests import ChatOptions

    names = ("prompt_column", "messages_column", "id_column", "template", "chat", "system", "limit", "samples")
    keep = asked.pop("keep_columns") or ""
    try:
        options = ChatOptions().with_variables(asked.pop("chat_template_kwargs") or {})
    except ValueError as error:
        raise UsageError(f"--chat-template-kwargs: {error}", hint="zeroinf sets it") from error
    return Shape(
        **{name: asked.pop(name) for name in names},
        keep=tuple(name.strip() for name in keep.split(",") if name.strip()),
        chat_options=options,
    )


def _incomplete(outcome: RunOutcome, output_file: Path | None) -> RequestsFailedError:
    from zeroinf.jobs.output import errors_path
    from zeroinf.service.requests import NOT_NUMBERS, NOT_NUMBERS_HINT

    refused, failed, count = outcome.refused, outcome.failed, outcome.requests + outcome.refused + outcome.failed
    if not outcome.requests:
        all_of_them = f"all {failed} requests that ran" if failed > 1 else "the request"
        return RequestsFailedError(f"{all_of_them} failed: {NOT_NUMBERS}", hint=NOT_NUMBERS_HINT)
    where = f"see {errors_path(output_file)}" if output_file is not None else "their reasons stand above"
    if not refused:
        return RequestsFailedError(f"{failed} of {count} requests failed", hint=where)
    also = f", {failed} failed" if failed else ""
    return RequestsFailedError(f"{refused} of {count} requests were refused{also}", hint=where)
