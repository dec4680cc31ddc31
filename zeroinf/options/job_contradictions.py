"""Refuses contradictions among the options for a job's input and output."""

from __future__ import annotations

import stat
from itertools import takewhile

from zeroinf.errors import InputError, UsageError
from zeroinf.jobs.inputs import STDIN, find_inputs, local_paths
from zeroinf.jobs.output_files import check_output
from zeroinf.jobs.remote import check_upload, is_url, open_filesystem
from zeroinf.options.options import RunOptions
from zeroinf.service.requests import Refusal

_SMALL_BYTES = 1 << 20


def refuse_idle_files(options: RunOptions, *, on_nodes: bool) -> None:
    """Raise UsageError for what contradicts itself, or would have no effect, and InputError where there is no input.

    `on_nodes`: ranks are started through a launcher that writes to standard output.
    """
    if options.repetitions > 1 and not options.benchmark:
        raise UsageError("--repetitions has no effect without --benchmark", hint="add --benchmark, or drop it")
    if options.to_stdout:
        _refuse_beside_stdout(options, on_nodes=on_nodes)
    elif options.output_file is None:
        _refuse_without_output(options, on_nodes=on_nodes)
    elif options.overwrite and (resuming := options.asked("resume_anyway", "resume")):
        raise UsageError(f"{resuming[0]} and --overwrite contradict each other", hint="drop one of them")
    count = options.shape.samples or 1
    if count > 1 and not options.input_files and options.sampling.is_greedy:
        raise UsageError(
            f"-n {count} asks for {count} samples of each prompt, which would all be equal: decoding is greedy",
            hint="add --temperature 1; for tokens of a completion: --max-new-tokens",
        )
    if not options.input_files and options.is_asked("input_format"):
        raise UsageError("--input-format without --input-file", hint="add -i FILE, or drop it")
    if not options.prompts and not options.input_files:
        raise InputError("no input", hint="give --prompt TEXT, -i FILE, or -i - for stdin")


def refuse_unreadable(options: RunOptions) -> None:
    """Raise InputError for input files that the job would refuse as a whole, before anything is loaded for it.

    Small files are read for that, and once more when the job begins. Large ones, standard input, pipes and URLs are
    read then alone; the packages that URLs need are looked for here.
    """
    urls = [argument for argument in options.input_files if is_url(argument)]
    for url in urls:
        open_filesystem(url)
    local = local_paths(options.input_files)
    if not local or urls or STDIN in options.input_files:
        return
    found = [path.stat() for path in local]
    if sum(one.st_size for one in found) > _SMALL_BYTES or not all(stat.S_ISREG(one.st_mode) for one in found):
        return
    from zeroinf.jobs.readers import none_can_run, read_inputs

    files = find_inputs(options.input_files)
    defaults = options.settings()
    read = read_inputs(options.prompts, files, defaults, input_format=options.input_format, shape=options.shape)
    if options.output_file is None:
        refusals = [
            entry for entry in takewhile(lambda entry: isinstance(entry, Refusal), read) if isinstance(entry, Refusal)
        ]
        if len(refusals) == len(read):
            raise InputError(none_can_run(refusals))


def check_output_of(options: RunOptions) -> None:
    """Raise OutputError for an output file that cannot be written, or whose place is taken; EnvironmentProblem where
    this machine does not write such files."""
    if options.output_file is not None:
        check_output(
            options.output_file,
            overwrite=options.overwrite,
            resume=options.resume,
            output_format=options.output_format,
        )
    if options.upload_to is not None:
        check_upload(options.upload_to, overwrite=options.overwrite, resume=options.resume)


def _refuse_beside_stdout(options: RunOptions, *, on_nodes: bool) -> None:
    if kept := options.asked("overwrite", "resume_anyway", "resume"):
        raise UsageError(f"{kept[0]} with -o -: nothing of it is kept", hint="name a file")
    if on_nodes:
        raise UsageError("--hostfile with -o -", hint="add -o FILE: launchers write to standard output")
    if options.output_format in ("parquet", "csv"):
        raise UsageError(f"--output-format {options.output_format} with -o -", hint="name a file, or drop it")


def _refuse_without_output(options: RunOptions, *, on_nodes: bool) -> None:
    if options.overwrite:
        raise UsageError("--overwrite without --output-file", hint="add -o FILE, or drop --overwrite")
    if resuming := options.asked("resume_anyway", "resume"):
        raise UsageError(f"{resuming[0]} without --output-file", hint="add -o FILE, whose journal shall go on")
    if on_nodes:
        raise UsageError("--hostfile without --output-file", hint="add -o FILE: launchers write to standard output")
    if options.is_asked("output_format"):
        raise UsageError("--output-format without --output-file", hint="add -o FILE, or -o - for standard output")
    if options.shape.keep:
        raise UsageError("--keep-columns without --output-file", hint="add -o FILE, or drop it")
