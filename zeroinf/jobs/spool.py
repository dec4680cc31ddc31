"""Keeps many small records outside of the process's memory: in a file without a name, once they are more than a few
megabytes.

Memory holds where each record begins, 8 bytes each. The file is gone with the last process that has it open, however
that one ends.
"""

from __future__ import annotations

import os
import pickle
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

from zeroinf.errors import OutputError

_IN_MEMORY_BYTES = 8 << 20
_WRITE_BYTES = 1 << 20
_MOST_TABLED = 1024

_T = TypeVar("_T")


class ByteStore:
    """Bytes that are appended, and, once all are there, read from any thread."""

    def __init__(self, folder: Path | None = None) -> None:
        """A file that is needed lies in `folder`; None: in the user's folder for temporary files."""
        self.folder = folder
        self._start = 0
        """Bytes that are in the file."""
        self._waiting = bytearray()
        self._file = -1

    @property
    def size(self) -> int:
        return self._start + len(self._waiting)

    @property
    def descriptor(self) -> int | None:
        """That of the file, which has all bytes then; None where they are few and in memory."""
        if self._file < 0:
            return None
        self._flush()
        return self._file

    def append(self, data: bytes) -> None:
        """Raises OutputError where the disk has no room."""
        self._waiting += data
        if len(self._waiting) >= (_WRITE_BYTES if self._file >= 0 else _IN_MEMORY_BYTES):
            self._flush()

    def _flush(self) -> None:
        try:
            if self._file < 0:
                with tempfile.TemporaryFile(dir=self.folder) as file:
                    self._file = os.dup(file.fileno())
            left = memoryview(self._waiting)
            while left:
                done = os.pwrite(self._file, left, self._start)
                self._start, left = self._start + done, left[done:]
        except OSError as error:
            folder = self.folder or tempfile.gettempdir()
            raise OutputError(
                f"cannot keep the requests of the job in {folder}: {error.strerror}",
                hint="free space there" + ("" if self.folder else ", or let TMPDIR name another folder"),
            ) from error
        self._waiting = bytearray()

    def read(self, start: int, end: int) -> bytes:
        """The bytes from `start` up to `end`, which were appended together."""
        if start >= self._start:
            return bytes(self._waiting[start - self._start : end - self._start])
        data = os.pread(self._file, end - start, start)
        while len(data) < end - start and (more := os.pread(self._file, end - start - len(data), start + len(data))):
            data += more  # one call reads 2 GiB at the most
        return data

    @classmethod
    def of_file(cls, descriptor: int) -> ByteStore:
        """The bytes of a file that another store has made, which is this store's from now on."""
        store = cls()
        store._file, store._start = descriptor, os.fstat(descriptor).st_size
        return store

    def __del__(self) -> None:
        if self._file >= 0:
            os.close(self._file)


class Spool(Sequence[_T], Generic[_T]):
    """A list of values, pickled. Values are appended, not changed."""

    def __init__(self, folder: Path | None = None) -> None:
        self._bytes = ByteStore(folder)
        self._ends = array("q", [0])

    def append(self, value: _T) -> None:
        """Raises OutputError where the disk has no room."""
        self._bytes.append(pickle.dumps(value, pickle.HIGHEST_PROTOCOL))
        self._ends.append(self._bytes.size)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, at: int) -> _T: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[_T]: ...
    def __getitem__(self, at: int | slice) -> _T | Sequence[_T]:
        if isinstance(at, slice):
            return [self[number] for number in range(*at.indices(len(self)))]
        at = range(len(self))[at]
        value: _T = pickle.loads(self._bytes.read(self._ends[at], self._ends[at + 1]))
        return value

    def __iter__(self) -> Iterator[_T]:
        return (self[number] for number in range(len(self)))


class ValueTable(Generic[_T]):
    """Values that many records have in common, each once: a record holds a number in its place, or the value itself
    where there are too many of them."""

    def __init__(self, values: Sequence[_T] = ()) -> None:
        self.values = list(values)
        self._numbers = {value: number for number, value in enumerate(self.values)}

    def put(self, value: _T) -> Any:
        """What a record holds for `value`."""
        number = self._numbers.get(value)
        if number is not None:
            return number
        if len(self.values) >= _MOST_TABLED:
            return (value,)
        self._numbers[value] = len(self.values)
        self.values.append(value)
        return self._numbers[value]

    def get(self, held: Any) -> _T:
        """The value for which a record holds `held`."""
        value: _T = self.values[held] if isinstance(held, int) else held[0]
        return value


def first_of_equals(hashes: array[int], are_equal: Callable[[int, int], bool]) -> dict[int, int]:
    """Of elements with these hashes, those that equal an earlier one, and which is the first of these."""
    if len(hashes) < 2:
        return {}
    import numpy as np

    values = np.frombuffer(hashes, dtype=np.int64)
    order = np.argsort(values, kind="stable")
    suspects = np.flatnonzero(values[order[1:]] == values[order[:-1]])
    firsts: dict[int, int] = {}
    for at in suspects.tolist():
        place, later = at, int(order[at + 1])
        while place >= 0 and values[order[place]] == values[later]:
            if are_equal(earlier := int(order[place]), later):
                firsts[later] = firsts.get(earlier, earlier)
                break
            place -= 1
    return firsts
