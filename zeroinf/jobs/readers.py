"""Reads the requests of a job from `--prompt` and input files.

An entry that cannot be run becomes a `Refusal` and never stops the job. A file that cannot be read in its format raises
InputError. Entries are read once and kept on disk until they are asked for: ids that later entries give decide how
earlier ones are called.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, BinaryIO

from zeroinf.errors import InputError
from zeroinf.generation.row import Sampling
from zeroinf.jobs.entries import Draft, draft_of
from zeroinf.jobs.formats import InputFormat, InputRecord, read_records
from zeroinf.jobs.inputs import InputFile
from zeroinf.jobs.shape import EntryShape, LineError, Shaper
from zeroinf.jobs.spool import Spool, ValueTable, first_of_equals
from zeroinf.service.requests import ChatOptions, Extra, Refusal, Request

_NOTHING = Extra()
_NOT_FOUND = 404
_EMPTY_HINT = "give --prompt, or a file with a prompt or a JSON object a line"
_COUNTED = re.compile(r"request-\d+(-\d+)?")


class InputRequests:
    """The requests and refusals of an input, in its order; they are read again each time that they are asked for.

    Requests and refusals share one count of indices, 0 to n - 1. An entry without an id is called `request-<n>`, n
    being its line; or its position from 1 where there is no line, or several files. An id that the user gave wins over
    such a name.
    """

    def __init__(self, folder: Path | None) -> None:
        """More than a few megabytes are kept in a file in `folder`; None: in the one for temporary files."""
        self.unused: Sequence[str] = ()
        """Columns that are neither used nor kept."""
        self._entries: Spool[tuple[Any, ...]] = Spool(folder)
        self._samplings, self._chats = ValueTable[Sampling](), ValueTable[ChatOptions]()
        self._named, self._hashes = array("q"), array("q")
        """Entries whose users named them, and the hashes of those names."""
        self._like_ours: set[str] = set()
        """Names of theirs that look like ours."""
        self._doubles: dict[int, int] = {}
        """Entries with the id of an earlier one, and which that is."""

    def __len__(self) -> int:
        """Entries of the input, of which each is one request, several, or a refusal."""
        return len(self._entries)

    def add(self, line: int | None, file: str | None, draft: Draft) -> None:
        """An entry that can be run, unless its id was given before."""
        if draft.id is not None:
            self._named.append(len(self._entries))
            self._hashes.append(hash(draft.id))
            if _COUNTED.fullmatch(draft.id):
                self._like_ours.add(draft.id)
        held = {"sampling": self._samplings.put(draft.sampling), "chat": self._chats.put(draft.chat)}
        values = (held.get(name, getattr(draft, name)) for name in _DRAFT)
        self._entries.append((line, file, draft.id, None, *values))

    def refuse(self, line: int | None, file: str | None, error: LineError) -> None:
        """An entry that cannot."""
        self._entries.append((line, file, error.id, str(error)))

    def end(self) -> None:
        """All entries are there."""
        named = self._named

        def are_equal(one: int, other: int) -> bool:
            return bool(self._entries[named[one]][2] == self._entries[named[other]][2])

        found = first_of_equals(self._hashes, are_equal)
        self._doubles = {named[later]: named[first] for later, first in found.items()}
        self._named, self._hashes = array("q"), array("q")

    def __iter__(self) -> Iterator[Request | Refusal]:
        index, taken = 0, set(self._like_ours)
        for number, (line, file, request_id, reason, *values) in enumerate(self._entries):
            if reason is None and number in self._doubles:
                first_line, first_file, *_ = self._entries[self._doubles[number]]
                where = f"line {first_line}" + (f" of {first_file}" if first_file is not None else "")
                reason = f"id {request_id!r} was already given on {where}"
            if reason is not None:
                yield Refusal(index=index, line=line, id=request_id, reason=reason, file=file)
                index += 1
                continue
            given = dict(zip(_DRAFT, values, strict=True))
            given |= {"sampling": self._samplings.get(given["sampling"]), "chat": self._chats.get(given["chat"])}
            draft = Draft(**given)
            if request_id is None:
                stem = f"request-{index + 1 if line is None or file is not None else line}"
                candidates = chain([stem], (f"{stem}-{suffix}" for suffix in count(2)))
                request_id = next(candidate for candidate in candidates if candidate not in taken)
                if line is None or request_id != stem:  # names of lines, or of positions, are not given twice
                    taken.add(request_id)
            yield from choices_of(draft, index, line, file, request_id)
            index += draft.choices


_DRAFT = tuple(one.name for one in fields(Draft))


def none_can_run(refusals: Sequence[Refusal]) -> str:
    """What there is to say of a job of which every request is refused."""
    none = f"none of the {len(refusals):,} requests can" if len(refusals) > 1 else "the request cannot"
    return f"{none} be run: {refusals[0].reason}"


def read_inputs(
    prompts: Sequence[str],
    files: Sequence[InputFile],
    defaults: Sampling,
    *,
    input_format: InputFormat = "auto",
    shape: EntryShape | None = None,
    folder: Path | None = None,
) -> InputRequests:
    """All requests of a job in input order: `prompts` first, then the records of `files`, made as `shape` says.

    `defaults` holds for every setting that an entry leaves out. Large inputs are kept in a file without a name in
    `folder`; None: in the folder for temporary files.

    Raises InputError if there is nothing at all to read, or for a file that cannot be read; OutputError where the disk
    has no room for what was read.
    """
    many = len(files) > 1

    def records() -> Iterator[tuple[str | None, InputRecord]]:
        for file in files:
            try:
                with file.open() as source:
                    for record in read_records(source, file.name, input_format):
                        yield (file.name if many else None), record
            except FileNotFoundError as error:
                cause = error.__cause__  # fsspec says the same of hosts that do not answer
                if cause is not None and getattr(cause, "status", None) != _NOT_FOUND:
                    raise InputError(f"cannot read {file.name}: {cause}") from error
                raise InputError(f"no such input file: {file.name}") from error
            except OSError as error:
                raise InputError(f"cannot read {file.name}: {error.strerror or error}") from error

    shaper = Shaper(EntryShape() if shape is None else shape)
    names = ", ".join(file.name for file in files)
    found = _requests(prompts, records(), defaults, names, shaper, folder)
    found.unused = tuple(shaper.unused)
    return found


def read_requests(
    prompts: Sequence[str],
    source: BinaryIO | None,
    defaults: Sampling,
    *,
    input_format: InputFormat = "auto",
    name: str,
) -> tuple[list[Request], list[Refusal]]:
    """Read requests from `prompts` and one stream of bytes, called `name`, whose entries are requests and nothing
    else."""
    records: Iterable[InputRecord] = () if source is None else read_records(source, name, input_format)
    names = "" if source is None else name
    requests, refusals = list[Request](), list[Refusal]()
    for entry in _requests(prompts, ((None, record) for record in records), defaults, names):
        (refusals if isinstance(entry, Refusal) else requests).append(entry)  # type: ignore[arg-type]
    return requests, refusals


def _requests(
    prompts: Sequence[str],
    records: Iterable[tuple[str | None, InputRecord]],
    defaults: Sampling,
    names: str,
    shaper: Shaper | None = None,
    folder: Path | None = None,
) -> InputRequests:
    found = InputRequests(folder)
    asked = ((None, InputRecord(0, "text", prompt)) for prompt in prompts)
    limit = None if shaper is None else shaper.shape.limit
    for file, record in islice(chain(asked, records), limit):
        line = record.line or None
        try:
            found.add(line, file, draft_of(record, defaults, shaper))
        except LineError as error:
            found.refuse(line, file, error)
    if not len(found):
        what = f"{names} holds no request" if names else "no prompt was given"
        raise InputError(f"empty input: {what}", hint=_EMPTY_HINT)
    found.end()
    return found


def choices_of(draft: Draft, index: int, line: int | None, file: str | None, request_id: str) -> Iterator[Request]:
    """A request for each completion that an entry asks for, prompt by prompt."""
    prompts: Sequence[str | tuple[int, ...] | None] = draft.prompts or (None,)
    extra = Extra(columns=draft.columns, echo=draft.echo, endpoint=draft.endpoint, model=draft.model)
    for number, prompt in enumerate(one for one in prompts for _ in range(draft.count)):
        own = replace(extra, choice=number, first=number % draft.count == 0) if draft.choices > 1 else extra
        yield Request(
            index=index + number,
            line=line,
            file=file,
            id=request_id,
            prompt=prompt if isinstance(prompt, str) else None,
            tokens=prompt if isinstance(prompt, tuple) else None,
            messages=draft.messages,
            sampling=draft.sampling,
            chat=draft.chat,
            truncate=draft.truncate,
            extra=own if own != _NOTHING else None,
        )
