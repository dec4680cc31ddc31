"""Files of clients on disk: what they upload, and what batches come to. Each is there as a whole or not at all.

A file's folder is named by an id that the server draws, and nothing that a client says becomes a part of a path.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from zeroinf.jobs.files import make_folder, rename, write_lines, write_new
from zeroinf.paths import flush
from zeroinf.serve.errors import ApiError

_CHUNK_BYTES = 1 << 20
_MOST_LISTED = 10_000
_UNFINISHED = ".new"


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFile:
    """A file as OpenAI's API describes it. Times in seconds since 1970."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "object": "file", "status": "processed", "expires_at": None, "status_details": None}


class FileStore:
    """The files below `folder`, from any thread."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Removes what earlier servers did not finish. `max_bytes`: the most that all files together may have."""
        self._folder, self._max_bytes = folder, max_bytes
        self._lock = threading.Lock()
        make_folder(folder)
        self._files: dict[str, StoredFile] = {}
        for each in sorted(folder.iterdir()):
            if each.name.endswith(_UNFINISHED):
                shutil.rmtree(each)
            else:
                found = StoredFile(**json.loads((each / "file.json").read_text()))
                self._files[found.id] = found

    def add(self, source: BinaryIO, filename: str, purpose: str) -> StoredFile:
        """Keep what `source` holds. Raises ApiError where there is no room."""

        def write(descriptor: int) -> None:
            while chunk := source.read(_CHUNK_BYTES):
                os.write(descriptor, chunk)

        source.seek(0, os.SEEK_END)
        size = source.tell()
        source.seek(0)
        with self._lock:
            used = sum(file.bytes for file in self._files.values())
        if used + size > self._max_bytes:
            raise ApiError(413, f"the server keeps files of {self._max_bytes} bytes, and {used} are taken: delete some")
        return self._keep(f"file-{secrets.token_hex(12)}", filename, purpose, lambda path: write_new(path, write))

    def keep(self, file_id: str, content: Path, filename: str, purpose: str) -> StoredFile:
        """Keep the finished file `content` under an id that is known beforehand; once, however often it is asked."""
        with self._lock:
            if file_id in self._files:
                return self._files[file_id]
        return self._keep(file_id, filename, purpose, lambda path: os.link(content, path))

    def _keep(self, file_id: str, filename: str, purpose: str, write: Any) -> StoredFile:
        made = self._folder / f"{file_id}{_UNFINISHED}"
        if made.exists():
            shutil.rmtree(made)
        try:
            made.mkdir()
            write(made / "content")
            size = (made / "content").stat().st_size
            file = StoredFile(id=file_id, bytes=size, created_at=int(time.time()), filename=filename, purpose=purpose)
            write_new(made / "file.json", write_lines([json.dumps(asdict(file))]))
            flush(made)
            rename(made, self._folder / file_id)
        except OSError as error:
            shutil.rmtree(made, ignore_errors=True)
            raise ApiError(507, f"the server cannot keep the file: {error.strerror}") from error
        with self._lock:
            self._files[file_id] = file
        return file

    def get(self, file_id: str) -> StoredFile:
        """Raises ApiError where there is none of that id."""
        with self._lock:
            if (found := self._files.get(file_id)) is None:
                raise ApiError(404, f"there is no file {file_id!r}")
            return found

    def content(self, file_id: str) -> Path:
        """The path of a file's content. Raises ApiError where there is none of that id."""
        return self._folder / self.get(file_id).id / "content"

    def delete(self, file_id: str) -> None:
        """Raises ApiError where there is none of that id."""
        with self._lock:
            if self._files.pop(file_id, None) is None:
                raise ApiError(404, f"there is no file {file_id!r}")
        gone = self._folder / f"{file_id}{_UNFINISHED}"
        rename(self._folder / file_id, gone)
        shutil.rmtree(gone)

    def all(self, purpose: str | None) -> Sequence[StoredFile]:
        """The files of a purpose, or all, the newest first."""
        with self._lock:
            files = [file for file in self._files.values() if purpose in (None, file.purpose)]
        return sorted(files, key=lambda file: (file.created_at, file.id), reverse=True)


def page_of(items: Sequence[Any], limit: int | None, after: str | None, order: str = "desc") -> dict[str, Any]:
    """A page of a list, newest first: up to `limit` behind the one with the id `after`. Raises ApiError."""
    found: Iterable[Any] = items if order == "desc" else reversed(items)
    found = list(found)
    if after is not None:
        ids = [item.id for item in found]
        if after not in ids:
            raise ApiError(400, f"after={after!r} is not in the list", param="after")
        found = found[ids.index(after) + 1 :]
    shown = found[: limit or _MOST_LISTED]
    return {
        "object": "list",
        "data": [item.to_json() for item in shown],
        "has_more": len(found) > len(shown),
        "first_id": shown[0].id if shown else None,
        "last_id": shown[-1].id if shown else None,
    }
