"""Writes results in the requested format: JSON lines, OpenAI's batches, Parquet or CSV, chosen by the file name's
ending.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

from zeroinf.errors import EnvironmentProblem, OutputError
from zeroinf.jobs.envelope import Envelope
from zeroinf.jobs.files import write_lines
from zeroinf.service.requests import Extra, Result

ResultFormat = Literal["jsonl", "openai", "parquet", "csv"]
OutputFormat = Literal["auto", "jsonl", "openai", "parquet", "csv"]
OUTPUT_FORMATS: tuple[str, ...] = get_args(OutputFormat)
_ENDINGS: dict[str, ResultFormat] = {
    "": "jsonl",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".csv": "csv",
}
_COLUMNS: dict[str, type] = {
    "id": str,
    "completion": str,
    "finish_reason": str,
    "prompt_tokens": int,
    "completion_tokens": int,
    "logprobs": str,
}
_PARQUET_ROWS = 10_000
"""Rows of one row group: what is in memory at once."""


def pick_format(path: Path, asked: OutputFormat, *, is_batch: bool) -> ResultFormat:
    """The format of `path`: the one asked for, or the one of its ending; of JSON lines those of OpenAI's batches
    where the input was one. Raises OutputError for an ending that says nothing."""
    if asked != "auto":
        return asked
    if path.suffix.lower() not in _ENDINGS:
        raise OutputError(
            f"what {path} shall hold does not follow from its ending, {path.suffix}",
            hint=f"{', '.join(filter(None, _ENDINGS))}, or --output-format {'|'.join(OUTPUT_FORMATS[1:])}",
        )
    said = _ENDINGS[path.suffix.lower()]
    return "openai" if said == "jsonl" and is_batch else said


def check_format(path: Path, asked: OutputFormat) -> None:
    """Raises OutputError as `pick_format` does, EnvironmentProblem where such files cannot be written here."""
    if pick_format(path, asked, is_batch=False) != "parquet":
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


def writer_for(
    form: ResultFormat, results: Iterator[Result], columns: Mapping[str, type], envelope: Envelope
) -> Callable[[int], None]:
    """A writer for `write_new`; `columns` are those that some results have beside their own."""
    if form == "parquet":
        return lambda descriptor: _write_parquet(descriptor, results, columns)
    if form == "csv":
        return lambda descriptor: _write_csv(descriptor, results, columns)
    if form == "openai":
        return write_lines(envelope.lines(results))
    return write_lines(result.to_line() for result in results)


def _write_parquet(descriptor: int, results: Iterator[Result], columns: Mapping[str, type]) -> None:
    import pyarrow
    from pyarrow import parquet

    kinds = {bool: pyarrow.bool_(), int: pyarrow.int64(), float: pyarrow.float64()}
    schema = pyarrow.schema(
        [(name, kinds.get(kind, pyarrow.string())) for name, kind in {**_COLUMNS, **columns}.items()]
    )
    with io.BufferedWriter(_Raw(descriptor)) as file, parquet.ParquetWriter(file, schema) as writer:
        while rows := [_whole(result.to_fields(), columns) for result in islice(results, _PARQUET_ROWS)]:
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))


def _write_csv(descriptor: int, results: Iterator[Result], columns: Mapping[str, type]) -> None:
    with io.TextIOWrapper(io.BufferedWriter(_Raw(descriptor)), "utf-8", newline="") as file:
        writer = csv.DictWriter(file, list({**_COLUMNS, **columns}), lineterminator="\n")
        writer.writeheader()
        writer.writerows(_whole(result.to_fields(), columns) for result in results)


def _whole(fields: dict[str, Any], columns: Mapping[str, type]) -> dict[str, Any]:
    """Tables' text is UTF-8, which half a surrogate pair has none of; what is nested, or of several kinds in one
    column, becomes JSON."""
    whole = {}
    for name, value in fields.items():
        mixed = columns.get(name) is str and value is not None and not isinstance(value, str)
        if mixed or isinstance(value, list | dict):
            value = json.dumps(value, ensure_ascii=False)
        whole[name] = value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
    return whole


class _Raw(io.RawIOBase):
    """A descriptor that somebody else closes."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return os.write(self._descriptor, data)
