"""Keeps the tokenized requests of a job on disk, however many they are, and what planning and progress ask of all of
them in memory: some 40 bytes each.
"""

from __future__ import annotations

import os
import pickle
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from io import BytesIO
from pathlib import Path
from typing import Any, cast, overload

from zeroinf.distributed.control import Control
from zeroinf.errors import EnvironmentProblem
from zeroinf.generation.row import Sampling
from zeroinf.jobs.spool import ByteStore, ValueTable
from zeroinf.service.requests import Extra, Work

_TOKEN_BYTES = array("i").itemsize
_NONE = -1
SAMPLED, WEIGHED, FORMATTED, KNOWN_END, HAS_EXTRA, IN_BATCH = (1 << bit for bit in range(6))
"""Facts of a request: it draws tokens; biases or penalties alter its scores; its answer has a format; an end of a
sequence ends it; the output says more of it than its result; it is of an OpenAI batch."""
_EXTRA = tuple(one.name for one in fields(Extra))
_CHUNK_BYTES = 64 << 20
_REQUEST_BYTES = 120
"""Of a request: where it lies, its lengths, its place in the order, and where its result is (measured:
docs/benchmarks-archive.md)."""


def request_bytes(requests: int, ranks: int) -> int:
    """Host memory that so many requests take on a node with so many ranks; their tokens and texts are on disk."""
    return ranks * _REQUEST_BYTES * requests


class _Store:
    """The requests in the order of their indices. Columns are in memory, the rest is in `bytes`: a request's tokens,
    then its other fields."""

    def __init__(self, folder: Path | None) -> None:
        self.bytes = ByteStore(folder)
        self.samplings = ValueTable[Sampling]()
        self.starts = array("q", [0])
        self.indices = array("q")
        self.prompt_tokens, self.new_tokens = array("i"), array("i")
        self.logprobs, self.facts = array("b"), array("B")

    def append(self, work: Work, extra: Extra | None) -> None:
        sampling = work.sampling
        assert not self.indices or work.index > self.indices[-1], "requests come in the order of their indices"
        self.indices.append(work.index)
        self.prompt_tokens.append(len(work.prompt))
        self.new_tokens.append(sampling.max_new_tokens)
        self.logprobs.append(_NONE if sampling.logprobs is None else sampling.logprobs)
        self.facts.append(
            SAMPLED * (not sampling.is_greedy)
            | WEIGHED * sampling.weighs_tokens
            | FORMATTED * (sampling.answer_format is not None)
            | KNOWN_END * (not sampling.ignore_eos)
            | HAS_EXTRA * (extra is not None)
            | IN_BATCH * (extra is not None and extra.endpoint is not None)
        )
        held = (work.line, work.id, work.text, self.samplings.put(sampling), work.file, work.digest)
        tokens = work.prompt if isinstance(work.prompt, array) else array("i", work.prompt)
        data = tokens.tobytes() + pickle.dumps(held, pickle.HIGHEST_PROTOCOL)
        if extra is not None:
            data += pickle.dumps(tuple(getattr(extra, name) for name in _EXTRA), pickle.HIGHEST_PROTOCOL)
        self.bytes.append(data)
        self.starts.append(self.bytes.size)

    def place_of(self, index: int) -> int:
        place = bisect_left(self.indices, index)
        if place == len(self.indices) or self.indices[place] != index:
            raise KeyError(index)
        return place

    def prompt(self, place: int) -> bytes:
        start = self.starts[place]
        return self.bytes.read(start, start + _TOKEN_BYTES * self.prompt_tokens[place])

    def read(self, place: int) -> Work:
        return self._work(place, self._stream(place))

    def read_with_extra(self, place: int) -> tuple[Work, Extra | None]:
        stream = self._stream(place)
        work = self._work(place, stream)
        if not self.facts[place] & HAS_EXTRA:
            return work, None
        return work, Extra(**dict(zip(_EXTRA, pickle.load(stream), strict=True)))

    def _stream(self, place: int) -> BytesIO:
        return BytesIO(self.bytes.read(self.starts[place], self.starts[place + 1]))

    def _work(self, place: int, stream: BytesIO) -> Work:
        tokens = array("i")
        tokens.frombytes(stream.read(_TOKEN_BYTES * self.prompt_tokens[place]))
        line, request_id, text, sampling, file, digest = pickle.load(stream)
        return Work(
            index=self.indices[place],
            line=line,
            id=request_id,
            text=text,
            prompt=tokens,
            sampling=self.samplings.get(sampling),
            file=file,
            digest=digest,
        )

    @property
    def columns(self) -> tuple[Any, ...]:
        """What of it is in memory."""
        return (
            self.starts, self.indices, self.prompt_tokens, self.new_tokens, self.logprobs, self.facts,
            self.samplings.values,
        )  # fmt: skip

    @classmethod
    def of(cls, columns: tuple[Any, ...], held: ByteStore) -> _Store:
        store = cls(None)
        store.bytes = held
        store.starts, store.indices, store.prompt_tokens, store.new_tokens = columns[:4]
        store.logprobs, store.facts, samplings = columns[4:]
        store.samplings = ValueTable(samplings)
        return store


class WorkList(Sequence[Work]):
    """Requests of a job in some order: all of them as they were appended, or a selection. Each is read when it is asked
    for.

    Ranks and threads may read at the same time.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """Requests are kept in a file of `folder` where they are many; None: in the folder for temporary files."""
        self._store = _Store(folder)
        self._places: Sequence[int] | None = None
        """Where in the store each request of a selection is; None: all of them."""

    @classmethod
    def of(cls, work: Iterable[Work], extras: Mapping[int, Extra] | None = None) -> WorkList:
        """A list of `work`, by rising indices; itself, if it is one. `extras` are by index."""
        if isinstance(work, WorkList):
            return work
        found = cls()
        for item in work:
            found.append(item, (extras or {}).get(item.index))
        return found

    def append(self, work: Work, extra: Extra | None = None) -> None:
        """Append to a list that is no selection. Raises OutputError where the disk has no room."""
        assert self._places is None
        self._store.append(work, extra)

    def __len__(self) -> int:
        return len(self._store.indices) if self._places is None else len(self._places)

    @property
    def _all(self) -> Sequence[int]:
        return range(len(self._store.indices)) if self._places is None else self._places

    @overload
    def __getitem__(self, at: int) -> Work: ...
    @overload
    def __getitem__(self, at: slice) -> WorkList: ...
    def __getitem__(self, at: int | slice) -> Work | WorkList:
        if isinstance(at, slice):
            return self.selected(range(*at.indices(len(self))))
        return self._store.read(self._all[at])

    def __iter__(self) -> Iterator[Work]:
        return map(self._store.read, self._all)

    def selected(self, numbers: Iterable[int]) -> WorkList:
        """The requests of these numbers of this list, in their order."""
        found = WorkList.__new__(WorkList)
        found._store, own = self._store, self._all
        found._places = array("q", (own[number] for number in numbers))
        return found

    def with_extras(self) -> Iterator[tuple[Work, Extra | None]]:
        """Each request, and what the output says of it beside its result."""
        return map(self._store.read_with_extra, self._all)

    def extras(self) -> Iterator[Extra]:
        """What the output says beside results, of requests of which it says anything."""
        facts = self._store.facts
        return (cast(Extra, self._store.read_with_extra(place)[1]) for place in self._all if facts[place] & HAS_EXTRA)

    def at(self, index: int) -> Work:
        """The request of an index, in this list or in the one of which it is a selection. Raises KeyError."""
        return self._store.read(self._store.place_of(index))

    def extra(self, index: int) -> Extra | None:
        """What the output says beside its result of the request of an index, as `at`."""
        place = self._store.place_of(index)
        return self._store.read_with_extra(place)[1] if self._store.facts[place] & HAS_EXTRA else None

    def new_tokens_at(self, index: int) -> int:
        """The most tokens that the request of an index may come to, as `at`."""
        return self._store.new_tokens[self._store.place_of(index)]

    def has_format_at(self, index: int) -> bool:
        """Whether its answer has a format, as `at`."""
        return bool(self._store.facts[self._store.place_of(index)] & FORMATTED)

    @property
    def indices(self) -> Sequence[int]:
        return self._column(self._store.indices)

    @property
    def new_tokens(self) -> Sequence[int]:
        """The most tokens that each may come to."""
        return self._column(self._store.new_tokens)

    @property
    def lengths(self) -> Sequence[tuple[int, int]]:
        """Tokens of each prompt, and the most that are added to it."""
        prompts, new = self._column(self._store.prompt_tokens), self.new_tokens
        return _Read(len(self), lambda number: (prompts[number], new[number]))

    @property
    def prompts(self) -> Sequence[bytes]:
        """The tokens of each prompt, 4 bytes each."""
        store, places = self._store, self._all
        return _Read(len(self), lambda number: store.prompt(places[number]))

    @property
    def most_logprobs(self) -> int | None:
        """The most log-probabilities that any asks for; None where none does."""
        most = max(self._column(self._store.logprobs), default=_NONE)
        return None if most == _NONE else most

    def any(self, fact: int) -> bool:
        """Whether `fact` holds of any of them."""
        return any(facts & fact for facts in self._column(self._store.facts))

    def having(self, fact: int) -> WorkList:
        """Those of which `fact` holds."""
        return self.selected(at for at, facts in enumerate(self._column(self._store.facts)) if facts & fact)

    def all(self, fact: int) -> bool:
        """Whether `fact` holds of each of them."""
        return all(facts & fact for facts in self._column(self._store.facts))

    def _column(self, column: array[int]) -> array[int]:
        return column if self._places is None else array(column.typecode, (column[place] for place in self._places))

    def shared(self, control: Control) -> WorkList:
        """Rank 0's list on every rank, through one file a node. Every rank calls it, the others on any list."""
        if control.world.size == 1:
            return self
        leads, is_main = control.world.local_rank == 0, control.world.is_main
        held = self._store.bytes
        told = (self._store.columns, self._places, held.size, held.descriptor is not None) if is_main else None
        columns, places, size, is_file = control.broadcast(told)
        one_node = control.world.local_size == control.world.size
        copy = held if is_main else ByteStore(held.folder)
        for start in range(0, 0 if one_node and is_file else size, _CHUNK_BYTES):
            end = min(start + _CHUNK_BYTES, size)
            part = control.broadcast(held.read(start, end) if is_main else None)
            if not is_main and (leads or not is_file):
                copy.append(part)
        if is_file:
            copy = _opened_together(control, copy)
        found = WorkList.__new__(WorkList)
        found._store, found._places = _Store.of(columns, copy), places
        return found


class _Read(Sequence[Any]):
    """Values that are made when they are asked for."""

    def __init__(self, count: int, value: Callable[[int], Any]) -> None:
        self._numbers, self._value = range(count), value

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, at: Any) -> Any:
        return list(map(self._value, self._numbers[at])) if isinstance(at, slice) else self._value(self._numbers[at])


def _opened_together(control: Control, own: ByteStore) -> ByteStore:
    """The file of the first rank of this node, on each of its ranks. Raises EnvironmentProblem."""
    descriptor = own.descriptor if control.world.local_rank == 0 else None
    mine = None if descriptor is None else (os.getpid(), descriptor, os.fstat(descriptor).st_ino)
    # By rank, not by a host's name: nodes that were cloned may have the same.
    theirs = control.all_gather(mine)[control.world.rank - control.world.local_rank]
    found = own if descriptor is not None else None
    if found is None and theirs is not None:
        pid, number, inode = theirs
        try:
            opened = os.open(f"/proc/{pid}/fd/{number}", os.O_RDONLY)
            found = ByteStore.of_file(opened)
            if os.fstat(opened).st_ino != inode:
                found = None
        except OSError:
            found = None
    control.all_gather(None)  # nobody closes it before all have opened it
    if found is None:
        raise EnvironmentProblem(
            "ranks of one node cannot see each other's processes, so they cannot share the requests of the job",
            hint="start them in one container, or as one node each (LOCAL_RANK=0, LOCAL_WORLD_SIZE=1)",
        )
    return found
