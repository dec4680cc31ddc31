"""Reads the records of an input file one after the other: prompts of text, JSON objects, rows of tables.

The format follows from `--input-format`, otherwise from the file name's ending, otherwise from the first bytes. An
unknown ending is refused by name, because reading a prompt a line would be a guess.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Literal, cast, get_args

from zeroinf.errors import EnvironmentProblem, InputError
from zeroinf.jobs.contents import ARROW_FILE, ARROW_STREAM, PARQUET, FileContents, lines_of, open_contents, seekable

FileFormat = Literal["text", "jsonl", "json", "csv", "tsv", "parquet", "arrow"]
InputFormat = Literal["auto", "text", "jsonl", "json", "csv", "tsv", "parquet", "arrow"]
FORMATS: tuple[str, ...] = get_args(InputFormat)

_ENDINGS: dict[str, FileFormat] = {
    ".txt": "text",
    ".text": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
}
_BINARY: dict[bytes, FileFormat] = {PARQUET: "parquet", ARROW_FILE: "arrow", ARROW_STREAM: "arrow"}
_ARRAY = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[\s*\{\s*[\"}]")
_ROWS = 1024
_CHUNK = 1 << 18
_SPACE = re.compile(r"[ \t\r\n\ufeff]*")


@dataclass(frozen=True, slots=True)
class InputRecord:
    """An entry of a file. `line` counts lines, rows of a table or elements of an array from 1. `value` is a prompt
    ("text"), a JSON text ("json"), a row of cells that are text ("cells"), or one of typed values ("row"); None where
    there is none, and `problem` says why."""

    line: int
    kind: Literal["text", "json", "cells", "row"]
    value: str | bytes | dict[str, Any] | None
    problem: str | None = None


def read_records(source: BinaryIO, name: str, input_format: InputFormat = "auto") -> Iterator[InputRecord]:
    """All records of `source`, read as they are asked for.

    Raises InputError for a file that is not what its ending or `input_format` says, EnvironmentProblem where reading it
    takes a package that is not there.
    """
    try:
        contents = open_contents(source, name)
        yield from _READERS[_format(contents, input_format)](contents)
    except (EOFError, UnicodeError, zlib.error) as error:
        raise InputError(f"cannot read {name}: {error}") from error
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror or error}") from error


def _format(contents: FileContents, asked: InputFormat) -> FileFormat:
    name, head = contents.name, contents.head
    binary = next((kind for magic, kind in _BINARY.items() if head.startswith(magic)), None)
    said = _ENDINGS.get(PurePosixPath(name.lower()).suffix) if asked == "auto" else asked
    if said is not None and head and (said in _BINARY.values() or binary is not None) and said != binary:
        by = "its ending" if asked == "auto" else f"--input-format {asked}"
        held = f"holds {binary}" if binary else f"holds no {said}"
        raise InputError(f"{name} {held}, but {by} says {said}", hint="rename it, or say what it holds")
    if binary is not None:
        return binary
    if said == "json" or (said in (None, "text") and asked == "auto"):
        return _json_format(contents, said)
    assert said is not None
    return said


def _json_format(contents: FileContents, said: FileFormat | None) -> FileFormat:
    """Text that may be JSON: an array, an object a line, or objects over several lines where the ending says JSON."""
    head = contents.head
    if _ARRAY.match(head) or (said == "json" and head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")):
        return "json"
    first = next((line for line in head.splitlines() if line.strip(b"\xef\xbb\xbf \t")), b"").strip(b"\xef\xbb\xbf")
    is_object = False
    with suppress(ValueError, RecursionError):
        is_object = isinstance(json.loads(first.decode()), dict)
    if is_object:
        return "jsonl"
    if said == "json":
        return "json" if first.lstrip().startswith(b"{") and b"\n" in head.strip() else "jsonl"
    ending = PurePosixPath(contents.name).suffix
    if said is None and ending:
        raise InputError(
            f"what {contents.name} holds does not follow from its ending, {ending}",
            hint=f"--input-format {'|'.join(FORMATS[1:])}",
        )
    return "text"


def _text(contents: FileContents) -> Iterator[InputRecord]:
    return (InputRecord(number, "text", line) for number, line in lines_of(contents))


def _jsonl(contents: FileContents) -> Iterator[InputRecord]:
    return (InputRecord(number, "json", line) for number, line in lines_of(contents))


def _json(contents: FileContents) -> Iterator[InputRecord]:
    """The elements of an array, or objects one after the other, each as its JSON text."""
    text = io.TextIOWrapper(contents.stream, "utf-8", errors="surrogateescape", newline="")
    window = _Window(text, contents.name)
    in_array = window.take("[")
    number = 0
    while not window.take("]" if in_array else ""):
        if in_array and number:
            window.expect(",")
        number += 1
        yield InputRecord(number, "json", window.value())
    if window.rest():
        raise window.error("more stands behind its end")


class _Window:
    """JSON text of any length, a part of it at a time."""

    def __init__(self, text: io.TextIOWrapper, name: str) -> None:
        self._text, self._name = text, name
        self._buffer, self._at, self._before = "", 0, 0
        self._ended = False
        self._decoder = json.JSONDecoder()

    def take(self, mark: str) -> bool:
        """Whether `mark` comes next, and is now behind; "" is the end."""
        found = self.rest()
        if not mark:
            return not found
        if not found:
            raise self.error("it ends within an array") if self._before + self._at else self.error("it is empty")
        if not self._buffer.startswith(mark, self._at):
            return False
        self._at += len(mark)
        return True

    def expect(self, mark: str) -> None:
        if not self.take(mark):
            raise self.error(f"expecting {mark!r}")

    def value(self) -> str:
        """The text of the next value. Raises InputError where there is none."""
        self.rest()
        while True:
            try:
                _, end = self._decoder.raw_decode(self._buffer, self._at)
                if end < len(self._buffer) or self._ended:
                    text, self._at = self._buffer[self._at : end], end
                    return text
            except json.JSONDecodeError as error:
                if self._ended:
                    self._at = error.pos
                    raise self.error(error.msg) from None
            except (ValueError, RecursionError) as error:
                raise self.error(str(error)) from None
            self._more(max(_CHUNK, len(self._buffer)))

    def rest(self) -> bool:
        """Whether anything but space is left."""
        while True:
            match = _SPACE.match(self._buffer, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._buffer) or self._ended:
                return self._at < len(self._buffer)
            self._more(_CHUNK)

    def _more(self, count: int) -> None:
        self._before += self._at
        data = self._text.read(count)
        self._buffer, self._at, self._ended = self._buffer[self._at :] + data, 0, not data

    def error(self, what: str) -> InputError:
        return InputError(
            f"{self._name} is no JSON: {what} at character {self._before + self._at + 1}",
            hint="correct it; a file with one object a line ends in `.jsonl`",
        )


def _csv(contents: FileContents, dialect: str = "excel") -> Iterator[InputRecord]:
    text = io.TextIOWrapper(contents.stream, "utf-8", errors="surrogateescape", newline="")
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader((line.removeprefix("\ufeff") for line in text), dialect, strict=True)
    try:
        header = next((cells for cells in reader if cells), None)
        if header is None:
            return
        _check_columns(header, contents.name)
        first = reader.line_num + 1
        for cells in reader:
            if len(cells) == len(header):
                yield InputRecord(first, "cells", dict(zip(header, cells, strict=True)))
            elif cells:
                problem = f"{len(cells)} cells, but the header has {len(header)}"
                yield InputRecord(first, "cells", None, problem)
            first = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"{contents.name}, line {reader.line_num}: {error}", hint="quotes in a quoted cell are doubled"
        ) from error


def _tsv(contents: FileContents) -> Iterator[InputRecord]:
    return _csv(contents, "excel-tab")


def _check_columns(names: Sequence[str], name: str) -> None:
    if twice := next((one for one in names if names.count(one) > 1), None):
        raise InputError(f"{name} has two columns {twice!r}", hint="name them differently")


def _parquet(contents: FileContents) -> Iterator[InputRecord]:
    parquet = _arrow_module("parquet", contents.name)
    return _rows(lambda stream: parquet.ParquetFile(stream).iter_batches(batch_size=_ROWS), contents)


def _arrow(contents: FileContents) -> Iterator[InputRecord]:
    ipc = _arrow_module("ipc", contents.name)
    if not contents.head.startswith(ARROW_FILE):
        return _rows(ipc.open_stream, contents)

    def batches(stream: BinaryIO) -> Iterator[Any]:
        reader = ipc.open_file(stream)
        return (reader.get_batch(number) for number in range(reader.num_record_batches))

    return _rows(batches, contents)


def _rows(batches: Callable[[BinaryIO], Any], contents: FileContents) -> Iterator[InputRecord]:
    import pyarrow

    number = 0
    try:
        for batch in batches(seekable(contents.stream)):
            _check_columns(batch.schema.names, contents.name)
            for start in range(0, batch.num_rows, _ROWS):
                for row in batch.slice(start, _ROWS).to_pylist():
                    number += 1
                    yield InputRecord(number, "row", cast(dict[str, Any], row))
    except pyarrow.ArrowException as error:
        raise InputError(f"cannot read {contents.name}: {str(error).splitlines()[0]}") from error


def _arrow_module(which: str, name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(f"pyarrow.{which}")
    except ImportError as error:
        raise EnvironmentProblem(f"-i {name} needs pyarrow", hint="pip install 'zeroinf[data]'") from error


_READERS: dict[FileFormat, Callable[[FileContents], Iterator[InputRecord]]] = {
    "text": _text,
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "tsv": _tsv,
    "parquet": _parquet,
    "arrow": _arrow,
}
