"""Results in the form that the user asked for: one JSON line each, or Parquet where the name ends so."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from zeroinf.errors import EnvironmentProblem
from zeroinf.jobs.files import write_lines
from zeroinf.service.requests import Extra, Result

_PARQUET_ROWS = 10_000
"""Rows of one row group: what is in memory at once."""


def check_format(path: Path) -> None:
    """Raises EnvironmentProblem where what `path` asks for cannot be written here."""
    if path.suffix != ".parquet":
        return
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise EnvironmentProblem(f"-o {path} needs pyarrow", hint="pip install 'zeroinf[data]'") from error


def column_types(extras: Iterable[Extra]) -> dict[str, type]:
    """The columns that some results have beside their own, and of what all values are: numbers or truth values, else
    text."""
    found: dict[str, set[type]] = {}
    for one in extras:
        if one.choice is not None:
            found.setdefault("choice", set()).add(int)
        for name, value in (one.columns or {}).items():
            found.setdefault(name, set()).update(() if value is None else (type(value),))
    return {name: _common(types) for name, types in found.items()}


def _common(types: set[type]) -> type:
    if types == {int, float}:
        return float
    return next(iter(types)) if len(types) == 1 and types <= {bool, int, float} else str


def writer_for(path: Path, results: Iterator[Result], columns: Mapping[str, type]) -> Callable[[int], None]:
    """A writer for `write_new` in the format that `path` asks for; `columns` are those that some results keep."""
    if path.suffix == ".parquet":
        return lambda descriptor: _write_parquet(descriptor, results, columns)
    return write_lines(result.to_line() for result in results)


def _write_parquet(descriptor: int, results: Iterator[Result], columns: Mapping[str, type]) -> None:
    import pyarrow
    from pyarrow import parquet

    text, number = pyarrow.string(), pyarrow.int64()
    kinds = {bool: pyarrow.bool_(), int: number, float: pyarrow.float64()}
    schema = pyarrow.schema(
        [
            ("id", text),
            ("completion", text),
            ("finish_reason", text),
            ("prompt_tokens", number),
            ("completion_tokens", number),
            ("logprobs", text),
            *((name, kinds.get(kind, text)) for name, kind in columns.items()),
        ]
    )
    with io.BufferedWriter(_Raw(descriptor)) as file, parquet.ParquetWriter(file, schema) as writer:
        while rows := [_whole(result.to_fields(), columns) for result in islice(results, _PARQUET_ROWS)]:
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))


def _whole(fields: dict[str, Any], columns: Mapping[str, type]) -> dict[str, Any]:
    """Parquet's text is UTF-8, which half a surrogate pair has none of; what is nested, or of several kinds in one
    column, becomes JSON."""
    flat = {
        name: json.dumps(value, ensure_ascii=False)
        if isinstance(value, list | dict)
        or (columns.get(name) is str and value is not None and not isinstance(value, str))
        else value
        for name, value in fields.items()
    }
    return {
        name: value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
        for name, value in flat.items()
    }


class _Raw(io.RawIOBase):
    """A descriptor that somebody else closes."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return os.write(self._descriptor, data)
