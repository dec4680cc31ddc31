"""What `-i` takes: files by ending and content, folders, patterns, URLs; the same requests from each format."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import feather, ipc, parquet

from zeroinf.errors import EnvironmentProblem, InputError
from zeroinf.generation.row import Sampling
from zeroinf.jobs.formats import InputFormat
from zeroinf.jobs.inputs import find_inputs
from zeroinf.jobs.readers import read_inputs
from zeroinf.service.requests import Refusal, Request

DEFAULTS = Sampling(max_new_tokens=16)
ROWS = [
    {"id": "q1", "prompt": "Name a colour, please", "max_tokens": 3},
    {"id": "q2", "prompt": 'Two lines:\nsecond "line"', "max_tokens": None},
    {"id": "q3", "prompt": "Grüße \U0001f642\u2028\tx", "max_tokens": 5},
]


def read(*names: str | Path, input_format: InputFormat = "auto") -> tuple[list[Request], list[Refusal]]:
    found = read_inputs((), find_inputs([str(name) for name in names]), DEFAULTS, input_format=input_format)
    entries = list(found)
    requests = [entry for entry in entries if isinstance(entry, Request)]
    return requests, [entry for entry in entries if isinstance(entry, Refusal)]


def prompts(*names: str | Path, **how: Any) -> list[str | None]:
    requests, refusals = read(*names, **how)
    assert not refusals
    return [request.prompt for request in requests]


def given_values(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def as_csv(rows: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in given_values(rows)).encode()


def as_table(write: Callable[[pyarrow.Table, pyarrow.NativeFile], object]) -> Callable[[list[dict[str, Any]]], bytes]:
    def make(rows: list[dict[str, Any]]) -> bytes:
        sink = pyarrow.BufferOutputStream()
        write(pyarrow.Table.from_pylist(rows), sink)
        return bytes(sink.getvalue())

    return make


def _write_stream(table: pyarrow.Table, sink: pyarrow.NativeFile) -> None:
    with ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def zstd(data: bytes) -> bytes:
    return bytes(pyarrow.compress(data, codec="zstd", asbytes=True))


FORMATS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "in.jsonl": as_lines,
    "in.ndjson": as_lines,
    "in": as_lines,
    "in.json": lambda rows: json.dumps(given_values(rows), indent=2).encode(),
    "array.jsonl.json": lambda rows: json.dumps(given_values(rows)).encode(),
    "objects.json": lambda rows: "\n".join(json.dumps(row, indent=1) for row in given_values(rows)).encode(),
    "array.txt": lambda rows: json.dumps(given_values(rows), indent=1).encode(),
    "in.csv": as_csv,
    "bom.csv": lambda rows: b"\xef\xbb\xbf" + as_csv(rows),
    "utf16.csv": lambda rows: as_csv(rows).decode().encode("utf-16"),
    "utf16.jsonl": lambda rows: as_lines(rows).decode().encode("utf-16-le"),
    "utf32.jsonl": lambda rows: as_lines(rows).decode().encode("utf-32"),
    "in.tsv": lambda rows: as_csv(rows, "\t"),
    "in.parquet": as_table(parquet.write_table),
    "parquet-without-ending": as_table(parquet.write_table),
    "in.arrow": as_table(_write_stream),
    "in.feather": as_table(feather.write_feather),
    "in.jsonl.gz": lambda rows: gzip.compress(as_lines(rows)),
    "gzip.jsonl": lambda rows: gzip.compress(as_lines(rows[:1])) + gzip.compress(as_lines(rows[1:])),
    "in.csv.zst": lambda rows: zstd(as_csv(rows)),
    "two.jsonl.zst": lambda rows: zstd(as_lines(rows[:1])) + zstd(as_lines(rows[1:])),
    "in.parquet.gz": lambda rows: gzip.compress(as_table(parquet.write_table)(rows)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_requests(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FORMATS[name](ROWS))
    requests, refusals = read(tmp_path / name)
    assert not refusals
    assert [(one.index, one.id, one.prompt, one.sampling.max_new_tokens) for one in requests] == [
        (0, "q1", ROWS[0]["prompt"], 3),
        (1, "q2", ROWS[1]["prompt"], 16),
        (2, "q3", ROWS[2]["prompt"], 5),
    ]


@pytest.mark.parametrize("name", ["in.csv", "in.parquet", "in.jsonl.gz", "in.csv.zst", "utf16.csv"])
def test_a_pipe_is_read_as_a_file_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

    monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": Pipe(FORMATS[name](ROWS))}))
    how: Any = {"input_format": "csv"} if "csv" in name else {}
    assert prompts("-", **how) == [row["prompt"] for row in ROWS]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=5), st.data())
def test_any_text_survives_csv_and_json_arrays(texts: list[str], data: st.DataObject) -> None:
    from zeroinf.jobs.readers import read_requests

    name = data.draw(st.sampled_from(["in.csv", "in.tsv", "in.json", "in.jsonl.gz"]))
    texts = [text.lstrip("\ufeff").replace("\n\ufeff", "").replace("\r\ufeff", "") or "x" for text in texts]
    source = FORMATS[name]([{"prompt": text, "id": f"i{number}"} for number, text in enumerate(texts)])
    requests, refusals = read_requests((), io.BytesIO(source), DEFAULTS, name=name)
    assert ([request.prompt for request in requests], refusals) == (texts, [])


# Text


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (b"one\rtwo\r", ["one", "two"]),
        (b"one\rtwo\r\nthree\r\n", ["one\rtwo", "three"]),
        (b"\xef\xbb\xbfone\n\xef\xbb\xbftwo\n", ["one", "two"]),
        ("eins\nüber\n".encode("utf-16"), ["eins", "über"]),
        ("eins\nüber\n".encode("utf-16-be"), ["eins", "über"]),
        (gzip.compress(b"one\ntwo\n"), ["one", "two"]),
        (b"a\x00b\n", ["a\x00b"]),
        (b"[1, 2]\n", ["[1, 2]"]),
    ],
)
def test_text_in_its_many_forms(source: bytes, found: list[str], tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_bytes(source)
    assert prompts(tmp_path / "in.txt") == found


@pytest.mark.parametrize(
    ("name", "source", "words"),
    [
        ("in.txt", b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "is a PNG picture"),
        ("in.txt", b"PK\x03\x04" + bytes(50), "is a ZIP archive"),
        ("in.xlsx", b"PK\x03\x04" + bytes(50), "is a ZIP archive"),
        ("in.txt", bytes(range(256)) * 4, "holds bytes that are no text"),
        ("in.csv", bytes(range(256)) * 4, "holds bytes that are no text"),
        ("in.txt.gz", b"plain", "is not compressed by gzip"),
        ("in.txt", gzip.compress(gzip.compress(b"one")), "is compressed twice"),
        ("in.txt.gz", gzip.compress(b"one\n" * 9999)[:-20], "cannot read"),
        ("in.jsonl", FORMATS["in.parquet"](ROWS), "holds parquet, but its ending says jsonl"),
        ("in.parquet", b"one\n", "holds no parquet"),
        ("in.parquet", b"PAR1 and no more of it", "cannot read"),
        ("in.md", b"# one\n", "does not follow from its ending, .md"),
        ("in.json", b'[{"prompt": "a"}, {"prompt": "b"', "is no JSON: Expecting ',' delimiter"),
        ("in.json", b'[{"prompt": "a"}', "it ends within an array"),
        ("in.json", b'[{"prompt": "a"}] x', "more stands behind its end at character 19"),
        ("in.json", b'[{"prompt": "a"} {"prompt": "b"}]', "expecting ','"),
        ("in.csv", b'prompt\n"a', "in.csv, line 2: unexpected end of data"),
        ("in.csv", b"prompt,prompt\na,b\n", "two columns 'prompt'"),
    ],
)
def test_what_is_no_input_is_refused_by_name(name: str, source: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(source)
    with pytest.raises(InputError) as caught:
        read(tmp_path / name)
    assert name in str(caught.value) and words in str(caught.value)


def test_the_flag_says_what_an_ending_does_not(tmp_path: Path) -> None:
    (tmp_path / "in.md").write_text("# one\n")
    assert prompts(tmp_path / "in.md", input_format="text") == ["# one"]
    (tmp_path / "in.log").write_bytes(as_csv(ROWS))
    assert len(prompts(tmp_path / "in.log", input_format="csv")) == 3


def test_parquet_and_zstd_without_pyarrow_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in (("in.parquet", "pyarrow.parquet"), ("in.csv.zst", "pyarrow")):
        (tmp_path / name).write_bytes(FORMATS[name](ROWS))
        with monkeypatch.context() as patch, pytest.raises(EnvironmentProblem, match=r"needs pyarrow") as caught:
            patch.setitem(sys.modules, module, None)
            read(tmp_path / name)
        assert caught.value.hint == "pip install 'zeroinf[data]'"


# Tables


def test_cells_of_settings_are_read_as_json_and_empty_ones_are_absent(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text(
        'prompt,temperature,stop,messages\na,0.5,"[""x""]",\nb,,end,\n,,,"[{""role"": ""user"", ""content"": ""c""}]"\n'
    )
    (first, second, third), refusals = read(tmp_path / "in.csv")
    assert not refusals
    assert (first.sampling.temperature, first.sampling.stop) == (0.5, ("x",))
    assert (second.sampling.temperature, second.sampling.stop) == (0.0, ("end",))
    assert third.messages == ({"role": "user", "content": "c"},)


def test_a_bad_row_is_refused_with_its_line_and_the_others_run(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_bytes(b'id,prompt\na,"two\nlines"\nb\n\nc,x\xff\nd,ok\n')
    requests, refusals = read(tmp_path / "in.csv")
    assert [(one.line, one.id, one.prompt) for one in requests] == [(2, "a", "two\nlines"), (7, "d", "ok")]
    assert [(one.line, one.reason.split(",")[0]) for one in refusals] == [
        (4, "1 cells"),
        (6, "prompt must be valid Unicode"),
    ]


def test_messages_of_a_parquet_column(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "hi", "name": None}], "id": 7}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in.parquet")
    (request,), _ = read(tmp_path / "in.parquet")
    assert (request.id, request.messages) == ("7", ({"role": "user", "content": "hi"},))


@pytest.mark.parametrize("line", [b"[", b'{"prompt": "\\ud800"}', b'{"prompt": "a", "prompt": "b"}'])
def test_a_bad_element_of_an_array_does_not_stop_the_others(line: bytes, tmp_path: Path) -> None:
    element = b"[1]" if line == b"[" else line
    (tmp_path / "in.json").write_bytes(b"[" + element + b',\n {"prompt": "ok"}]\n')
    requests, refusals = read(tmp_path / "in.json")
    assert [(one.index, one.line, one.prompt) for one in requests] == [(1, 2, "ok")]
    assert [(one.index, one.line) for one in refusals] == [(0, 1)]


def test_a_json_array_is_read_in_parts(tmp_path: Path) -> None:
    rows = [{"prompt": f"{number} " + "x" * (number * 997 % 5000)} for number in range(400)]
    (tmp_path / "in.json").write_text(json.dumps(rows))
    assert prompts(tmp_path / "in.json") == [row["prompt"] for row in rows]


# Several files


def test_several_files_count_on_and_name_the_file_of_a_bad_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n{"id": "x", "prompt": "b"}\n')
    (tmp_path / "b.csv").write_text("id,prompt\nx,c\ny,d\n")
    requests, (refusal,) = read(tmp_path / "b.csv", tmp_path / "a.jsonl")
    assert [(one.index, one.line, one.id) for one in requests] == [(0, 2, "x"), (1, 3, "y"), (2, 1, "request-3")]
    assert refusal.reason == f"id 'x' was already given on line 2 of {tmp_path / 'b.csv'}"
    assert json.loads(refusal.to_line())["file"] == str(tmp_path / "a.jsonl")


def test_a_folder_is_all_its_files_in_order_and_hidden_ones_are_not(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    for name in ("b.txt", "a.txt", "below/c.txt", ".hidden", "_SUCCESS"):
        (tmp_path / name).write_text(f"{name}\n")
    assert prompts(tmp_path) == ["a.txt", "b.txt", "below/c.txt"]
    assert prompts(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    assert prompts(tmp_path / "**" / "c.txt", tmp_path / "a.txt") == ["below/c.txt", "a.txt"]


def test_a_name_with_the_signs_of_a_pattern_is_a_name(tmp_path: Path) -> None:
    (tmp_path / "in[1].txt").write_text("one\n")
    assert prompts(tmp_path / "in[1].txt") == ["one"]


@pytest.mark.parametrize(("name", "words"), [("*.txt", "no input file matches"), ("", "is a folder without files")])
def test_nothing_found_is_an_error(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        find_inputs([str(tmp_path / name)])


def test_standard_input_is_one() -> None:
    with pytest.raises(InputError, match="given twice"):
        find_inputs(["-", "-"])


def test_urls_are_read_through_fsspec() -> None:
    import fsspec

    files = fsspec.filesystem("memory")
    for name in ("in.csv", "in.parquet", "in.jsonl.gz"):
        files.pipe(f"/job/{name}", FORMATS[name]([{**row, "id": f"{name}-{row['id']}"} for row in ROWS]))
    found = [row["prompt"] for row in ROWS]
    try:
        for name in ("in.csv", "in.parquet", "in.jsonl.gz"):
            assert prompts(f"memory://job/{name}") == found
        assert prompts("memory://job") == prompts("memory://job/in.*") == 3 * found
        with pytest.raises(InputError, match="no such input file: memory://job/absent"):
            find_inputs(["memory://job/absent"])
    finally:
        files.rm("/job", recursive=True)


def test_a_url_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(InputError, match="cannot open moon://job: Protocol not known"):
        find_inputs(["moon://job"])
