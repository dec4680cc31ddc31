"""Recognizes the contents of an input file from its first bytes: compression, encoding, and binary data.

`open_contents` takes a stream of bytes and returns one of its contents: decompressed, and text as UTF-8.
"""

from __future__ import annotations

import codecs
import gzip
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

from zeroinf.errors import EnvironmentProblem, InputError

_HEAD_BYTES = 1 << 16
_CHUNK_BYTES = 1 << 18
PARQUET, ARROW_FILE, ARROW_STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_COMPRESSED_ENDINGS = {".gz": "gzip", ".gzip": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_FOREIGN = {
    b"PK\x03\x04": "a ZIP archive (or an office document)",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ\x00": "compressed by xz",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"%PDF-": "a PDF",
    b"\xd0\xcf\x11\xe0": "an office document",
    b"SQLite format 3\x00": "an SQLite database",
    b"Obj\x01": "an Avro file",
    b"ORC": "an ORC file",
    b"GGUF": "a GGUF model",
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"\x7fELF": "a program",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
}
# Control characters that no text has: NUL is not among them, tabs, line ends, form feeds and escapes aside.
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
_UTF16_SHARE = 0.4
"""The least share of NULs in every other byte, with hardly any in those between, that is UTF-16 without a byte order
mark; and at least four of them."""


@dataclass(frozen=True, slots=True)
class FileContents:
    """The contents of a file: `stream` gives it from its beginning on, `head` is its first 64 KiB, `name` lacks the
    ending of a compression."""

    name: str
    stream: BinaryIO
    head: bytes


def open_contents(source: BinaryIO, name: str) -> FileContents:
    """Recognize the contents of `source`. Raises InputError for what is known not to be an input, and for other binary
    bytes."""
    stream, head = _with_head(source)
    ending = PurePosixPath(name.lower()).suffix
    packed = compression_of(head)
    if (promised := _COMPRESSED_ENDINGS.get(ending)) and head and packed != promised:
        raise InputError(f"{name} is not compressed by {promised}, as its ending says", hint="rename it")
    inner = name[: -len(ending)] if promised else name
    if packed is not None:
        stream, head = _with_head(_decompressed(stream, packed, name))
    if head.startswith((PARQUET, ARROW_FILE, ARROW_STREAM)):
        return FileContents(inner, stream, head)
    foreign = next((what for magic, what in {**_FOREIGN, **dict.fromkeys(_COMPRESSED, "compressed twice")}.items()
                    if head.startswith(magic)), None)  # fmt: skip
    if foreign is not None:
        raise InputError(f"{name} is {foreign}, which is no input", hint="text, JSONL, JSON, CSV, TSV, Parquet, Arrow")
    if encoding := _wide_encoding(head):
        stream, head = _with_head(cast(BinaryIO, io.BufferedReader(_Recoded(stream, encoding), _CHUNK_BYTES)))
    elif _is_binary(head):
        raise InputError(f"{name} holds bytes that are no text", hint="text, JSONL, JSON, CSV, TSV, Parquet, Arrow")
    return FileContents(inner, stream, head)


def compression_of(head: bytes) -> str | None:
    """What compressed the file that begins with `head`; None for nothing that is known."""
    return next((kind for magic, kind in _COMPRESSED.items() if head.startswith(magic)), None)


def lines_of(contents: FileContents) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers from 1, without line ends and byte order marks.

    Lines end in LF or CR LF; in CR where no LF stands in the first 64 KiB.
    """
    for number, raw in enumerate(_lines(contents), start=1):
        text = raw.removeprefix(codecs.BOM_UTF8)
        if text.strip():
            yield number, text.rstrip(b"\r\n")


def _lines(contents: FileContents) -> Iterator[bytes]:
    if b"\r" not in contents.head or b"\n" in contents.head:
        yield from contents.stream
        return
    text = io.TextIOWrapper(contents.stream, "utf-8", errors="surrogateescape", newline=None)
    for line in text:
        yield line.encode("utf-8", "surrogateescape")


def seekable(stream: BinaryIO) -> BinaryIO:
    """The bytes of `stream` in a stream that can be read at any place; in a temporary file where `stream` cannot."""
    if stream.seekable():
        return stream
    from shutil import copyfileobj
    from tempfile import TemporaryFile

    file = TemporaryFile()  # noqa: SIM115 - whoever reads it closes it
    copyfileobj(stream, file, _CHUNK_BYTES)
    file.seek(0)
    return cast(BinaryIO, file)


def _with_head(source: BinaryIO) -> tuple[BinaryIO, bytes]:
    """`source` from its beginning, and its first bytes: all 64 KiB of them, unless there are no more."""
    head = bytearray()
    while len(head) < _HEAD_BYTES and (more := source.read(_HEAD_BYTES - len(head))):
        head += more
    if source.seekable():
        source.seek(-len(head), io.SEEK_CUR)
        return source, bytes(head)
    return cast(BinaryIO, io.BufferedReader(_Joined(bytes(head), source), _CHUNK_BYTES)), bytes(head)


def _decompressed(stream: BinaryIO, kind: str, name: str) -> BinaryIO:
    if kind == "gzip":
        return cast(BinaryIO, io.BufferedReader(_Onward(gzip.GzipFile(fileobj=stream, mode="rb")), _CHUNK_BYTES))
    try:
        import pyarrow
    except ImportError as error:
        raise EnvironmentProblem(f"-i {name} needs pyarrow", hint="pip install 'zeroinf[data]'") from error
    return cast(
        BinaryIO,
        io.BufferedReader(_Onward(pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, "r"), kind)), _CHUNK_BYTES),
    )


def _wide_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32, by byte order mark, and UTF-16 by the NULs of its upper halves."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    low, high = head[0 : len(head) & ~1 : 2], head[1::2]
    if not high:
        return None
    for encoding, zeros, others in (("utf-16-le", high, low), ("utf-16-be", low, high)):
        if zeros.count(0) >= max(4, _UTF16_SHARE * len(zeros)) and others.count(0) * 20 < zeros.count(0):
            return encoding
    return None


def _is_binary(head: bytes) -> bool:
    """Whether there is neither UTF-8 nor another text in `head`; single bytes that are not UTF-8 are their lines' own
    matter."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return _CONTROL.search(head) is not None
    return False


class _Onward(io.RawIOBase):
    """A stream that goes on only: what can seek in compressed bytes does so by reading all of them again."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._source.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _Joined(_Onward):
    """`head`, then what is left of `source`."""

    def __init__(self, head: bytes, source: Any) -> None:
        super().__init__(source)
        self._head = memoryview(head)

    def readinto(self, buffer: Any) -> int:
        if not self._head:
            return super().readinto(buffer)
        count = min(len(self._head), len(buffer))
        buffer[:count] = self._head[:count]
        self._head = self._head[count:]
        return count


class _Recoded(io.RawIOBase):
    """A text in another encoding as UTF-8. Half surrogate pairs stay what they are."""

    def __init__(self, source: BinaryIO, encoding: str) -> None:
        self._source = source
        self._decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
        self._waiting = b""
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._waiting and not self._ended:
            data = self._source.read(_CHUNK_BYTES)
            self._ended = not data
            self._waiting = self._decoder.decode(data, final=self._ended).encode("utf-8", "surrogatepass")
        count = min(len(self._waiting), len(buffer))
        buffer[:count] = self._waiting[:count]
        self._waiting = self._waiting[count:]
        return count
