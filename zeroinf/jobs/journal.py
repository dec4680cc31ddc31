"""The journal of a job: its manifest and every result as soon as it exists, so that the job can stop at any moment and
be resumed.

Each line is a JSON object, a tab and the CRC-32 of the object: `cut -f1 out.jsonl.journal | jq` reads it. The first
line is the manifest. A line counts if it is complete and its checksum holds, whatever surrounds it.
"""

from __future__ import annotations

import json
import time
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any, TypeVar

from zeroinf.errors import OutputError
from zeroinf.jobs.files import LineFile, encoded
from zeroinf.paths import flush
from zeroinf.service.requests import Result

FORMAT = 1

Runs = Sequence[Sequence[int]]
"""Results that a changed job keeps: (first index before, first index now, count) of each run of neighbours."""

_Value = TypeVar("_Value")

_OPENING = f'{{"zeroinf_journal": {FORMAT}, '.encode()
_NOWHERE = -1
_SYNC_EVERY_S = 0.5
_SYNC_SHARE = 0.01
"""The most of a run's time that goes into making results durable: after a slow fsync the next one waits longer."""


class _Places(Mapping[int, int]):
    """Offsets by index, in 8 bytes each, by rising indices."""

    def __init__(self, known: Mapping[int, int] | None = None) -> None:
        self._places, self._count = array("q"), 0
        for index, offset in (known or {}).items():
            self.put(index, offset)

    def put(self, index: int, offset: int) -> None:
        if (missing := index + 1 - len(self._places)) > 0:
            self._places.extend(repeat(_NOWHERE, missing))
        self._count += self._places[index] == _NOWHERE
        self._places[index] = offset

    def __getitem__(self, index: int) -> int:
        if index not in self:
            raise KeyError(index)
        return self._places[index]

    def __contains__(self, index: object) -> bool:
        return isinstance(index, int) and 0 <= index < len(self._places) and self._places[index] != _NOWHERE

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        return (index for index, offset in enumerate(self._places) if offset != _NOWHERE)


class Journal:
    """The journal at `path`, held by this process alone until `close`. A torn end is cut off when it is opened.

    What is appended survives this process at once, and the machine once `sync` has made it durable.
    """

    def __init__(self, path: Path) -> None:
        """Raises OutputError where another run holds it, where it is no journal, or where it cannot be written."""
        self.path = path
        self.manifest: dict[str, Any] | None = None
        self.fingerprint: dict[str, str] = {}
        """What the last run that wrote here was like."""
        self.results = _Places()
        """Where each result lies: offset by index."""
        self.failed: set[int] = set()
        """Indices of the results that came to nothing."""
        self.published: str | None = None
        """Digest of the output that was made of it; None before there is one."""
        self.damaged = 0
        """Lines that count no longer, those of a torn end aside."""
        self.durable = 0
        """Results that will survive the machine."""
        self._sync_due = 0.0
        try:
            self._file = LineFile(path)
        except BlockingIOError as error:
            raise _in_use(path) from error
        try:
            self._recover()
        except BaseException:
            self._file.close()
            raise

    def _recover(self) -> None:
        size, sound, bad = self.path.stat().st_size, 0, 0
        for offset, record, end in read_records(self.path):
            if record is None:
                bad += 1
                continue
            self._take(offset, record)
            self.damaged, sound = bad, end
        if self.manifest is None and size:
            if self.results or not (sound or _is_torn_opening(self.path)):
                raise OutputError(
                    f"{self.path} is not a journal of zeroinf, or its first line is damaged",
                    hint="move it away, or choose another output name",
                )
            sound = self.damaged = 0  # of a run that was stopped as it began: nothing depends on it
        if sound < size:
            self._file.cut(sound)
        self._file.size_bytes = sound
        self.durable = len(self.results)

    def _take(self, offset: int, record: dict[str, Any]) -> None:
        if offset == 0 and "zeroinf_journal" in record:
            self.manifest, self.fingerprint = record, record["fingerprint"]
        if "result" in record:
            result = record["result"]
            self._place(result["index"], offset, failed=result["finish_reason"] == "error")
        if "session" in record:
            session = record["session"]
            self.fingerprint = session.get("fingerprint", self.fingerprint)
            if "kept" in session:
                self.keep(session["kept"])
        self.published = record.get("published", self.published)

    def _place(self, index: int, offset: int, *, failed: bool) -> None:
        self.results.put(index, offset)
        if failed:
            self.failed.add(index)
        else:  # a forced resume may have done it again
            self.failed.discard(index)

    def start(self, manifest: dict[str, Any]) -> None:
        """Begin anew with `manifest`; whatever is in the file goes."""
        self._file.cut(0)
        self.manifest, self.results, self.failed = {"zeroinf_journal": FORMAT, **manifest}, _Places(), set()
        self.published, self.durable = None, 0
        self._file.append(_line(self.manifest))
        self.sync()
        flush(self.path.parent)

    def note(self, **record: Any) -> None:
        """Append a record that is no result, with the time."""
        self.published = record.get("published", self.published)
        self._file.append(_line({**record, "at": round(time.time(), 3)}))

    def add(self, result: Result, digest: str) -> None:
        """Append a result, with the digest of its request. Raises ValueError where its index has one already."""
        if result.index in self.results:
            raise ValueError(f"index {result.index} was added twice")
        offset = self._file.size_bytes
        self.note(result=result.to_record(), request=digest)
        self._place(result.index, offset, failed=result.failed)

    def requests(self) -> Iterator[tuple[int, str, str]]:
        """Yield each result's index, the id of its request and the request's digest, in the order of indices."""
        for index, record in zip(self.results, self._records(self.results), strict=True):
            yield index, record["result"]["id"], record.get("request", "")

    def keep(self, kept: Runs) -> None:
        """Forget all results but those in `kept`, which get the indices that it says."""
        failed = moved(dict.fromkeys(self.failed, True), kept)
        self.results, self.failed = _Places(moved(self.results, kept)), set(failed)
        self.durable = len(self.results)

    def sync_if_due(self) -> None:
        """Make results durable, unless that would take too much of the run's time."""
        if self.durable < len(self.results) and time.monotonic() >= self._sync_due:
            self.sync()

    def sync(self) -> None:
        """Make all that was appended durable. Raises OSError."""
        started = time.monotonic()
        self._file.sync()
        self.durable = len(self.results)
        now = time.monotonic()
        self._sync_due = now + max(_SYNC_EVERY_S, (now - started) / _SYNC_SHARE)

    def read(self, indices: Iterable[int]) -> Iterator[Result]:
        """The results of `indices`, in that order, as they were added: with the index and id that they had then."""
        for record in self._records(indices):
            yield Result.from_record(record["result"])

    def _records(self, indices: Iterable[int]) -> Iterator[dict[str, Any]]:
        with self.path.open("rb") as file:
            for index in indices:
                file.seek(self.results[index])
                record = _parse(file.readline())
                if record is None:
                    raise OutputError(f"{self.path} was changed during the run", hint="start again with --resume")
                yield record

    def rescue(self) -> None:
        """Write the journal again where somebody removed it. Raises OSError."""
        self._file.rescue()
        self.durable = len(self.results)

    def close(self) -> None:
        self._file.close()

    def discard(self) -> None:
        """Remove the journal: there is nothing in it to go on from."""
        self._file.remove()
        self._file.close()


def read_records(path: Path, start: int = 0) -> Iterator[tuple[int, dict[str, Any] | None, int]]:
    """Each line from byte `start` on: where it begins, what it says (None: damaged or not whole), and where it ends."""
    with path.open("rb") as file:
        file.seek(start)
        offset = start
        for line in file:
            end = offset + len(line)
            yield offset, _parse(line), end
            offset = end


def moved(values: Mapping[int, _Value], kept: Runs) -> dict[int, _Value]:
    """The values, by index, that a changed job keeps, each with the index that it has now."""
    return {now + i: values[then + i] for then, now, count in kept for i in range(count) if then + i in values}


def _line(record: dict[str, Any]) -> bytes:
    body = encoded(json.dumps(record, ensure_ascii=False))[:-1]
    return b"%b\t%08x\n" % (body, zlib.crc32(body))


def _parse(line: bytes) -> dict[str, Any] | None:
    body, _, checksum = line.rpartition(b"\t")
    if checksum != b"%08x\n" % zlib.crc32(body):
        return None
    record: dict[str, Any] = json.loads(body)
    return record


def _is_torn_opening(path: Path) -> bool:
    """Whether the file is all that came of a first line: a part of it, or room for it."""
    with path.open("rb") as file:
        start = file.read(len(_OPENING))
        whole_lines = file.read().count(b"\n")
    return not whole_lines and (_OPENING.startswith(start.rstrip(b"\0")) or start == _OPENING)


def _in_use(path: Path) -> OutputError:
    sessions = [record["session"] for _, record, _ in read_records(path) if record and "session" in record]
    who = f" (process {sessions[-1]['pid']} on {sessions[-1]['host']})" if sessions else ""
    return OutputError(f"another run{who} is writing {path}", hint="wait for its end, or choose another output name")
