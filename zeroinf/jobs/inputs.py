"""Resolves the values of `-i`: paths, folders, patterns, standard input, and URLs that fsspec opens.

A folder stands for all files below it in the order of their names, except hidden ones (`.x`, `_SUCCESS`). No file is
read here.
"""

from __future__ import annotations

import glob
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from zeroinf.errors import InputError
from zeroinf.jobs.remote import is_url, open_filesystem

STDIN = "-"
_MAGIC = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file to read requests from. `name` is for messages, and its ending says what the file holds."""

    name: str
    open: Callable[[], AbstractContextManager[BinaryIO]]


def find_inputs(arguments: Sequence[str]) -> list[InputFile]:
    """The files that the values of `-i` name, in their order.

    Raises InputError for what is not there or is no file, EnvironmentProblem for a URL that nothing installed opens.
    """
    if arguments.count(STDIN) > 1:
        raise InputError("-i - is given twice, but there is one standard input", hint="drop one of them")
    return [file for argument in arguments for file in _files(argument)]


def local_paths(arguments: Sequence[str]) -> list[Path]:
    """The local files among `arguments`, for a look at them before anything is read. Raises InputError as
    `find_inputs` does."""
    local = [argument for argument in arguments if argument != STDIN and not is_url(argument)]
    return [path for argument in local for path in _local(argument)]


def _files(argument: str) -> Iterator[InputFile]:
    if argument == STDIN:
        yield InputFile("<stdin>", lambda: nullcontext(sys.stdin.buffer))
    elif is_url(argument):
        yield from _remote(argument)
    else:
        for path in _local(argument):
            yield InputFile(str(path), _opener(path))


def _opener(path: Path) -> Callable[[], AbstractContextManager[BinaryIO]]:
    return lambda: path.open("rb")


def _local(argument: str) -> list[Path]:
    path = Path(argument)
    try:
        if path.is_dir():
            found = sorted(
                file
                for file in path.rglob("*")
                if file.is_file() and not any(_is_hidden(part) for part in file.relative_to(path).parts)
            )
            if not found:
                raise InputError(f"-i {argument} is a folder without files", hint="name the files, or another folder")
            return found
        if not path.exists() and _MAGIC.search(argument):
            matches = sorted(map(Path, glob.glob(argument, recursive=True)))  # noqa: PTH207 - it takes absolute ones
            if not matches:
                raise InputError(
                    f"no input file matches {argument}",
                    hint="check it with `ls`; quote it so that the shell does not expand it",
                )
            return [path for match in matches for path in _local(str(match))]
        if not path.exists():
            raise InputError(f"no such input file: {argument}")
    except OSError as error:
        raise InputError(f"cannot read {argument}: {error.strerror}") from error
    if not path.is_file():
        raise InputError(f"-i {argument} is no regular file", hint="`-i -` reads from a pipe")
    return [path]


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "_"))


def _remote(url: str) -> Iterator[InputFile]:
    files, path = open_filesystem(url)
    try:
        found = _below(files, path) if not url.startswith(("http://", "https://")) else [path]
    except Exception as error:  # each kind of file system has errors of its own
        raise InputError(f"cannot read {url}: {error}") from error
    if not found:
        raise InputError(f"no such input file: {url}")
    for name in found:
        yield InputFile(str(files.unstrip_protocol(name)), _remote_opener(files, name))


def _below(files: Any, path: str) -> list[str]:
    if files.isdir(path):
        names = cast(list[str], files.find(path))
        return sorted(
            name for name in names if not any(map(_is_hidden, PurePosixPath(name.removeprefix(path).strip("/")).parts))
        )
    if files.exists(path):
        return [path]
    return sorted(files.glob(path)) if _MAGIC.search(path) else []


def _remote_opener(files: Any, name: str) -> Callable[[], AbstractContextManager[BinaryIO]]:
    return lambda: cast(AbstractContextManager[BinaryIO], files.open(name, "rb"))
