"""Reads the requests of a job from `--prompt` and input files.

An entry that cannot be run becomes a `Refusal` and never stops the job. A file that cannot be read in its format raises
InputError.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, count, islice
from typing import BinaryIO, NamedTuple

from zeroinf.errors import InputError
from zeroinf.generation.row import Sampling
from zeroinf.jobs.entries import Draft, draft_of
from zeroinf.jobs.formats import InputFormat, InputRecord, read_records
from zeroinf.jobs.inputs import InputFile
from zeroinf.jobs.shape import EntryShape, LineError, Shaper
from zeroinf.service.requests import Extra, Refusal, Request

_NOTHING = Extra()
_EMPTY_HINT = "give --prompt, or a file with a prompt or a JSON object a line"


class InputRequests(NamedTuple):
    """The requests and refusals of an input. `unused`: columns that are neither used nor kept."""

    requests: list[Request]
    refusals: list[Refusal]
    unused: Sequence[str] = ()


def none_can_run(refusals: Sequence[Refusal]) -> str:
    """What there is to say of a job of which every request is refused."""
    return f"none of the {len(refusals)} requests can be run: {refusals[0].reason}"


def read_inputs(
    prompts: Sequence[str],
    files: Sequence[InputFile],
    defaults: Sampling,
    *,
    input_format: InputFormat = "auto",
    shape: EntryShape | None = None,
) -> InputRequests:
    """All requests of a job in input order: `prompts` first, then the records of `files`, made as `shape` says.

    Requests and refusals share one count of indices, 0 to n - 1. An entry without an id is called `request-<n>`, n
    being its line; or its position from 1 where there is no line, or several files. An id that the user gave wins over
    such a name. `defaults` holds for every setting that an entry leaves out.

    Raises InputError if there is nothing at all to read, or for a file that cannot be read.
    """
    many = len(files) > 1

    def records() -> Iterator[tuple[str | None, InputRecord]]:
        for file in files:
            try:
                with file.open() as source:
                    for record in read_records(source, file.name, input_format):
                        yield (file.name if many else None), record
            except OSError as error:
                raise InputError(f"cannot read {file.name}: {error.strerror or error}") from error

    shaper = Shaper(EntryShape() if shape is None else shape)
    requests, refusals = _requests(prompts, records(), defaults, ", ".join(file.name for file in files), shaper)
    return InputRequests(requests, refusals, tuple(shaper.unused))


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
    return _requests(prompts, ((None, record) for record in records), defaults, "" if source is None else name)


def _requests(
    prompts: Sequence[str],
    records: Iterable[tuple[str | None, InputRecord]],
    defaults: Sampling,
    names: str,
    shaper: Shaper | None = None,
) -> tuple[list[Request], list[Refusal]]:
    drafts: list[tuple[int, int | None, str | None, Draft]] = []
    refusals: list[Refusal] = []
    given_at: dict[str, str] = {}
    asked = ((None, InputRecord(0, "text", prompt)) for prompt in prompts)
    index, limit = 0, None if shaper is None else shaper.shape.limit
    for file, record in islice(chain(asked, records), limit):
        line = record.line or None
        try:
            draft = draft_of(record, defaults, shaper)
            if draft.id in given_at:
                raise LineError(f"id {draft.id!r} was already given on {given_at[draft.id]}", id=draft.id)
        except LineError as error:
            refusals.append(Refusal(index=index, line=line, id=error.id, reason=str(error), file=file))
            index += 1
            continue
        if draft.id is not None:
            given_at[draft.id] = f"line {line}" + (f" of {file}" if file is not None else "")
        drafts.append((index, line, file, draft))
        index += draft.choices
    if not index:
        what = f"{names} holds no request" if names else "no prompt was given"
        raise InputError(f"empty input: {what}", hint=_EMPTY_HINT)
    return _numbered(drafts, set(given_at)), refusals


def _numbered(drafts: Iterable[tuple[int, int | None, str | None, Draft]], taken: set[str]) -> list[Request]:
    requests: list[Request] = []
    for index, line, file, draft in drafts:
        request_id = draft.id
        if request_id is None:
            stem = f"request-{index + 1 if line is None or file is not None else line}"
            candidates = chain([stem], (f"{stem}-{suffix}" for suffix in count(2)))
            request_id = next(candidate for candidate in candidates if candidate not in taken)
            taken.add(request_id)
        requests += choices_of(draft, index, line, file, request_id)
    return requests


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
