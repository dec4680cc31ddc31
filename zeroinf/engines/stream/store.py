"""Defines the format of a store: a model's pieces in files on one disk or striped over several, written once and
reused.

Below each `--nvme-path` lies `zeroinf-store/NAME/` with `data` and, once the store is complete, `header.json`. While it
is being written, a `journal` beside the first data file lists the pieces that are done. NAME is derived from the
weights' identity and from their layout, so a store with the right name has the right contents. This module knows the
format; it reads and writes no weights.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from zeroinf.errors import StoreError, UsageError
from zeroinf.paths import GUARDED_FILE, flush, owner_of
from zeroinf.planner.memory import CHUNK_BYTES, round_up
from zeroinf.planner.wire import Wire

FORMAT = 3
"""Part of every name: raise it when a store of the same name would hold something else than before, or when what wrote
it is no longer trusted. Stores of other formats are neither read nor gone on with."""
STRIPE_BYTES = 8 << 20
REQUEST_BYTES = 4 << 20
"""The most that one read or write moves: large enough for any disk's full rate, small enough to share among threads."""

_FOLDER = "zeroinf-store"
_DIGEST_BYTES = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredPiece:
    """`offset` and `nbytes` count in the data of all parts together; a tensor is (name, dtype, shape, offset)."""

    offset: int
    nbytes: int
    tensors: tuple[tuple[str, str, tuple[int, ...], int], ...]


@dataclass(frozen=True, slots=True)
class FileRange:
    """A contiguous range of bytes in one part of a store: `at` is its offset in the file, `start` its offset in the
    piece.
    """

    part: int
    at: int
    start: int
    nbytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreContents:
    """The description of a store's contents, known before it is written."""

    model: str
    revision: str | None
    architecture: str
    dtype: str
    wire: Wire
    """How the weights of blocks lie in it."""
    source: str
    """The weights' identity: hex."""
    made: str
    """A digest of the buffers that the model makes by itself, which are stored too: hex."""
    parts: int
    pieces: tuple[StoredPiece, ...]

    @property
    def name(self) -> str:
        """The store's name: stores of the same name hold the same bytes."""
        layout = [CHUNK_BYTES, STRIPE_BYTES, self.architecture, self.made, [asdict(p) for p in self.pieces]]
        return f"{source_key(self.source, self.dtype, self.wire, self.parts)}-{digest_of(_canonical(layout))[:12]}"

    @property
    def data_bytes(self) -> int:
        last = self.pieces[-1]
        return last.offset + padded(last.nbytes)

    def part_bytes(self, part: int) -> int:
        """The length of a part's data file."""
        stripes, rest = divmod(self.data_bytes, STRIPE_BYTES)
        return (stripes + self.parts - 1 - part) // self.parts * STRIPE_BYTES + (
            rest if stripes % self.parts == part else 0
        )

    def file_ranges(self, piece: int, start: int, stop: int) -> Iterator[FileRange]:
        """The bytes `start` (a multiple of CHUNK_BYTES) to `stop` of a piece, cut at multiples of REQUEST_BYTES."""
        base = self.pieces[piece].offset
        while start < stop:
            stripe, inside = divmod(base + start, STRIPE_BYTES)
            nbytes = min(stop - start, REQUEST_BYTES - (base + start) % REQUEST_BYTES)
            yield FileRange(stripe % self.parts, stripe // self.parts * STRIPE_BYTES + inside, start, nbytes)
            start += nbytes


@dataclass(frozen=True, slots=True)
class Store:
    """A whole store. `folders` hold its parts in order; `digests` are those of each piece's chunks: hex."""

    contents: StoreContents
    folders: tuple[Path, ...]
    digests: tuple[tuple[str, ...], ...]

    def check(self, piece: int, request: FileRange, data: memoryview) -> None:
        """Compare what was read with its digests; `data` holds the request's bytes. Raises StoreError."""
        for at, found in zip(range(0, request.nbytes, CHUNK_BYTES), chunk_digests(data), strict=True):
            if found != self.digests[piece][(request.start + at) // CHUNK_BYTES]:
                raise damaged(data_file(self.folders[request.part]), f"byte {request.at + at} and on were changed")


def source_key(identity: str, dtype: str, wire: Wire, parts: int) -> str:
    """The part of a name that is known without building the model: which weights, in which form, how many paths."""
    return digest_of(_canonical([FORMAT, identity, dtype, wire, parts]))[:12]


def in_order(paths: Iterable[Path]) -> list[Path]:
    """Sort `paths`, so that each holds the same part in whatever order the user names them."""
    return sorted(paths, key=Path.resolve)


def store_folder(path: Path, name: str) -> Path:
    return path / _FOLDER / name


def store_names(path: Path, pattern: str = "*") -> list[str]:
    """Names of the stores below `path`, whole or not."""
    return sorted(folder.name for folder in (path / _FOLDER).glob(pattern) if folder.is_dir())


def is_whole(path: Path, name: str) -> bool:
    """Whether all of the store `name` has been written, as far as its first part, below `path`, says."""
    return is_there(header_file(store_folder(path, name)))


def is_there(file: Path) -> bool:
    """Whether a store's `file` exists. Raises ForbiddenStoreError where another user's store may not be read."""
    try:
        return file.exists()
    except PermissionError as error:
        raise forbidden(file.parent, "read") from error


def of_other_formats(path: Path) -> list[str]:
    """Names of the whole stores below `path` that another version of zeroinf wrote: no run of this one uses them."""
    return [name for name in store_names(path) if _is_of_another_format(header_file(store_folder(path, name)))]


def _is_of_another_format(header: Path) -> bool:
    try:
        return bool(json.loads(header.read_text(encoding="ascii"))["format"] != FORMAT)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def lock_file(path: Path, name: str) -> Path:
    return path / _FOLDER / f"{name}.lock"


def header_file(folder: Path) -> Path:
    """It is there once the store is whole; the first part's comes last."""
    return folder / "header.json"


def journal_file(folder: Path) -> Path:
    return folder / "journal"


def data_file(folder: Path) -> Path:
    return folder / "data"


def padded(nbytes: int) -> int:
    """Bytes that a piece of `nbytes` takes in the data file."""
    return round_up(nbytes, CHUNK_BYTES)


def digest_of(data: bytes | memoryview) -> str:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).hexdigest()


def chunk_digests(data: memoryview) -> list[str]:
    return [digest_of(data[at : at + CHUNK_BYTES]) for at in range(0, len(data), CHUNK_BYTES)]


def write_headers(store: Store) -> None:
    """Say that the store is whole: from here on it is used. Each header appears all at once, the first part's last."""
    for part, folder in reversed(list(enumerate(store.folders))):
        body = {"format": FORMAT, "part": part, **asdict(store.contents), "digests": store.digests}
        text = json.dumps({"digest": digest_of(_canonical(body)), **body})
        partial = header_file(folder).with_suffix(".partial")
        partial.touch(GUARDED_FILE)
        with partial.open("w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(header_file(folder))
        flush(folder)


def open_store(paths: Sequence[Path], name: str) -> Store | None:
    """The whole store `name`, whose parts lie below `paths`; None where there is none yet.

    Checks headers and lengths, not the data. Raises StoreError for what is damaged or not what its name says,
    UsageError for too few or too many paths.
    """
    folders = tuple(store_folder(path, name) for path in paths)
    if not is_whole(paths[0], name):
        return None
    stores = [_read_header(folders, part) for part in range(len(folders))]
    return stores[0]


def _read_header(folders: tuple[Path, ...], part: int) -> Store:
    file = header_file(folders[part])
    try:
        body = json.loads(file.read_text(encoding="ascii"))
        digest = body.pop("digest")
    except FileNotFoundError:
        raise damaged(file, "it is not there, though the first part's is") from None
    except PermissionError as error:
        raise forbidden(file.parent, "read") from error
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise damaged(file, f"it cannot be read: {error}") from error
    if digest != digest_of(_canonical(body)):
        raise damaged(file, "it was changed after it was written")
    if body.pop("format") != FORMAT:
        raise StoreError(
            f"the store {folders[part].name} was written by another version of zeroinf, and is not used",
            hint=_removal(folders[part]),
        )
    if body["parts"] != len(folders):
        raise UsageError(
            f"{folders[part].name} lies over {body['parts']} paths, not {len(folders)}",
            hint="name every --nvme-path of it",
        )
    if (found := body.pop("part")) != part:
        raise damaged(file, f"it is part {found}, not {part}")
    digests = tuple(map(tuple, body.pop("digests")))
    pieces = tuple(StoredPiece(**{**piece, "tensors": _tuples(piece["tensors"])}) for piece in body.pop("pieces"))
    contents = StoreContents(pieces=pieces, **body)
    if contents.name != folders[part].name:
        raise damaged(file, f"it belongs to another store, {contents.name}")
    _check_length(data_file(folders[part]), contents.part_bytes(part))
    return Store(contents, folders, digests)


def _check_length(file: Path, expected: int) -> None:
    try:
        found = file.stat().st_size
    except OSError as error:
        raise damaged(file, os.strerror(error.errno or errno.EIO)) from error
    if found != expected:
        raise damaged(file, f"it has {found} bytes instead of {expected}")


class ForbiddenStoreError(StoreError):
    """Another user's store, which this one may not read or write."""


def forbidden(folder: Path, what: str) -> ForbiddenStoreError:
    """The error for a store of which this user may not do `what`."""
    return ForbiddenStoreError(
        f"the store {folder} belongs to {owner_of(folder)}, and you may not {what} it",
        hint="ask them, or choose another --nvme-path",
    )


def damaged(file: Path, what: str) -> StoreError:
    """The error for a store that must not be used."""
    folder = file.parent
    return StoreError(
        f"the store's {file} is damaged: {what}",
        hint=f"{_removal(folder)}; the next run writes it again",
    )


def _removal(folder: Path) -> str:
    return f"zeroinf store remove {folder.name} --nvme-path {folder.parent.parent}"


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _tuples(tensors: Any) -> tuple[tuple[str, str, tuple[int, ...], int], ...]:
    return tuple((name, dtype, tuple(shape), offset) for name, dtype, shape, offset in tensors)
