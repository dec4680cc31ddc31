"""Names the files of an output, and refuses before the long work what could not be written or would be lost."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from zeroinf.errors import OutputError
from zeroinf.jobs.export import OutputFormat, check_format
from zeroinf.jobs.journal import read_records

OVERWRITE_HINT = "choose another name, or pass --overwrite to discard what is there"
RESUME_HINT = "pass --resume to go on with it, or --overwrite to discard it"


def journal_path(path: Path) -> Path:
    """The file where results are as soon as they come, and from which a job resumes."""
    return path.with_name(path.name + ".journal")


def began_before(path: Path) -> float | None:
    """When the job whose output is `path` began, as its journal says; None where there is no such job."""
    if not journal_path(path).is_file():
        return None
    _, first, _ = next(read_records(journal_path(path)), (0, None, 0))
    return None if first is None else first.get("began")


def partial_path(path: Path) -> Path:
    """The file that becomes the output once it is whole."""
    return path.with_name(path.name + ".partial")


def errors_path(path: Path) -> Path:
    """The file of a job's refusals."""
    return path.with_name(path.name + ".errors.jsonl")


def check_output(path: Path, *, overwrite: bool, resume: bool, output_format: OutputFormat = "auto") -> None:
    """To be called before the long work.

    Raises OutputError if `path` cannot be written, or if something that is there would be lost; EnvironmentProblem if
    this machine does not write such files.
    """
    check_format(path, output_format)
    try:
        _check_folder(path)
        for file in (path, partial_path(path), errors_path(path), journal_path(path)):
            _check_kind(file)
        if not overwrite:
            _check_nothing_is_lost(path, resume)
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise OutputError(f"cannot write {path}: {error.strerror}", hint="choose another name") from error


def _check_folder(path: Path) -> None:
    folder = path.parent
    if path.is_dir():
        raise OutputError(f"{path} is a folder", hint="name a file in it")
    if not folder.is_dir():
        raise OutputError(f"the folder of {path} does not exist", hint=f"mkdir -p {shlex.quote(str(folder))}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"the folder of {path} is not writable", hint="choose another folder")


def _check_kind(file: Path) -> None:
    # A link or a device (/dev/stdout is both) would itself be replaced by the finished file.
    if file.is_symlink() or (file.exists() and not file.is_file()):
        raise OutputError(f"{file} is not a regular file", hint="choose another name")


def _check_nothing_is_lost(path: Path, resume: bool) -> None:
    if not journal_path(path).exists():
        for file in (path, partial_path(path), errors_path(path)):
            if file.exists():
                raise OutputError(f"{file} exists already, without a journal", hint=OVERWRITE_HINT)
    elif path.exists() and not resume:
        raise OutputError(f"{path} exists already", hint=OVERWRITE_HINT)
