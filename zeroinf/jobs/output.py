"""Results on their way out, in input order whatever the order in which they arrive."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TextIO

from zeroinf.errors import OutputError
from zeroinf.jobs.requests import Refusal, Result

_OVERWRITE_HINT = "choose another name, or pass --overwrite to discard what is there"
_DASHES = "-" * 60  # as DeepSpeed's and the BLOOM inference scripts print


class Saved(NamedTuple):
    """What an abandoned output keeps: the number of results, and the file that holds them, if it is a file."""

    path: Path | None
    results: int


def partial_path(path: Path) -> Path:
    """Where results wait until the job is done."""
    return path.with_name(path.name + ".partial")


def errors_path(path: Path) -> Path:
    """Where the refusals of a job go."""
    return path.with_name(path.name + ".errors.jsonl")


def check_output(path: Path, overwrite: bool) -> None:
    """To be called before the long work.

    Raises OutputError if `path` cannot be written, or if something an earlier run left there would be lost.
    """
    try:
        _check_folder(path)
        for file in (path, partial_path(path), errors_path(path)):
            _check_file(file, overwrite)
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise OutputError(f"cannot write {path}: {error.strerror}", hint="choose another name") from error


def _check_folder(path: Path) -> None:
    folder = path.parent
    if path.is_dir():
        raise OutputError(f"{path} is a folder", hint="name a file in it")
    if not folder.is_dir():
        raise OutputError(f"the folder of {path} does not exist", hint=f"mkdir -p {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"the folder of {path} is not writable", hint="choose another folder")


def _check_file(file: Path, overwrite: bool) -> None:
    # A link or a device (/dev/stdout is both) would itself be replaced by the finished file.
    if file.is_symlink() or (file.exists() and not file.is_file()):
        raise OutputError(f"{file} is not a regular file", hint="choose another name")
    if file.exists() and not overwrite:
        raise OutputError(f"{file} exists already", hint=_OVERWRITE_HINT)


class OrderedWriter(ABC):
    """Takes results and refusals in any order and writes them in input order.

    Every index of the input, from 0 on, is added once. An item is written as soon as all before it are there. After the
    last one comes `finish`; if the job fails or is interrupted, `abandon`. Each of the three raises OutputError, saying
    what is saved, when the output cannot be written.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, Result | Refusal] = {}
        self._next_index = 0
        self._results_written = 0
        self._write_failed = False

    def add(self, item: Result | Refusal) -> None:
        """Write `item` and all that waited for it, or keep it until its turn comes.

        After an OutputError nothing is lost yet: the next call tries again.
        """
        if item.index < self._next_index or item.index in self._waiting:
            raise ValueError(f"index {item.index} was added twice")
        self._waiting[item.index] = item
        while self._next_index in self._waiting:
            self._write_waiting(self._next_index)

    def finish(self) -> None:
        """Publish the output. Raises ValueError if an index below an added one was not added, or not written."""
        if self._waiting:
            raise ValueError(f"index {self._next_index} is not written")
        try:
            self._publish()
        except OSError as error:
            raise self._unwritable(error) from error

    def abandon(self) -> Saved:
        """Write what still waits, in input order, and leave the output unpublished.

        Does not write again where the last write failed: that error has been raised once.
        """
        for index in sorted(self._waiting) if not self._write_failed else ():
            self._write_waiting(index)
        try:
            return Saved(self._close(), self._results_written)
        except OSError as error:
            raise self._unwritable(error) from error

    def _write_waiting(self, index: int) -> None:
        # An item leaves `_waiting` after it is written: a Ctrl-C between the two can repeat a line, but not lose one.
        item = self._waiting[index]
        try:
            self._write(item)
        except OSError as error:
            self._write_failed = True
            raise self._unwritable(error) from error
        self._write_failed = False
        self._results_written += isinstance(item, Result)
        self._next_index = index + 1
        del self._waiting[index]

    @abstractmethod
    def _write(self, item: Result | Refusal) -> None: ...

    @abstractmethod
    def _publish(self) -> None: ...

    @abstractmethod
    def _close(self) -> Path | None:
        """Make what is written durable; the path of the file that holds it."""

    @abstractmethod
    def _unwritable(self, error: OSError) -> OutputError: ...


class JsonlOutput(OrderedWriter):
    """One JSON line a result in `path`, one a refusal in `<path>.errors.jsonl`.

    Until `finish`, the results are in `<path>.partial`, each flushed as it is written: `path` is complete or not there
    at all. With `overwrite`, what an earlier run left under the three names goes, `path` itself only at `finish`.

    Raises OutputError as `check_output` does, and if the file cannot be made.
    """

    def __init__(self, path: Path, overwrite: bool) -> None:
        super().__init__()
        check_output(path, overwrite)
        self._path = path
        self._overwrite = overwrite
        try:
            self._results = _LineFile(partial_path(path), overwrite)
        except OSError as error:
            raise OutputError(f"cannot write {partial_path(path)}: {error.strerror}") from error
        self._errors: _LineFile | None = None

    def _write(self, item: Result | Refusal) -> None:
        if isinstance(item, Result):
            self._results.append(item.to_line())
            return
        if self._errors is None:
            self._errors = _LineFile(errors_path(self._path), self._overwrite)
        self._errors.append(item.to_line())

    def _publish(self) -> None:
        self._close()
        if not self._overwrite and self._path.exists():
            raise OutputError(
                f"{self._path} was made by another program during the run",
                hint=f"the {self._results_written} results are in {self._results.path}",
            )
        if self._errors is None:
            errors_path(self._path).unlink(missing_ok=True)  # of an earlier run, with `overwrite`
        self._results.path.replace(self._path)
        _sync_folder(self._path.parent)

    def _close(self) -> Path:
        self._results.close()
        if self._errors is not None:
            self._errors.close()
        _sync_folder(self._path.parent)
        return self._results.path

    def _unwritable(self, error: OSError) -> OutputError:
        return OutputError(
            f"cannot write {self._path}: {error.strerror}; "
            f"{self._results_written} results are saved in {self._results.path}",
            hint="free some space there, or choose another disk",
        )


class PairsOutput(OrderedWriter):
    """Prompt and completion for people, `in=` and `out=` and a line of dashes.

    A request of messages whose result carries no prompt shows its id instead. Refusals only keep their place in the
    order here: the caller reports them.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._encoding = stream.encoding or "utf-8"

    def _write(self, item: Result | Refusal) -> None:
        if isinstance(item, Refusal):
            return
        text = f"in={item.id if item.prompt is None else item.prompt}\nout={item.completion}\n{_DASHES}\n"
        # A terminal that is not UTF-8 shall show an escape, not end the run.
        self._stream.write(text.encode(self._encoding, "backslashreplace").decode(self._encoding))
        self._stream.flush()

    def _publish(self) -> None:
        self._close()

    def _close(self) -> None:
        self._stream.flush()

    def _unwritable(self, error: OSError) -> OutputError:
        return OutputError(
            f"cannot write to standard output: {error.strerror}; {self._results_written} results were printed",
            hint="pass --output-file to keep results in a file",
        )


class _LineFile:
    """A file that grows by whole lines: one for which there is no room is cut off again."""

    def __init__(self, path: Path, overwrite: bool) -> None:
        self.path = path
        self._file = path.open("wb" if overwrite else "xb", buffering=0)
        self._size_bytes = 0

    def append(self, line: str) -> None:
        # Half a surrogate pair has no UTF-8; backslashreplace writes it as \udXXX, which is JSON's own escape for it.
        left = (line + "\n").encode("utf-8", "backslashreplace")
        size_bytes = self._size_bytes + len(left)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            with suppress(OSError):
                self._file.seek(self._size_bytes)
                self._file.truncate()
            raise
        self._size_bytes = size_bytes

    def close(self) -> None:
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()


def _sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable, not only the contents behind them."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
