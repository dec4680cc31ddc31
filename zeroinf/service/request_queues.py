"""Queues of requests for the ranks that run them, and the events that ranks send back, within a process or between
processes.

Rank 0 posts requests; any rank that has room takes them. Nothing here knows of tensors or passes.
"""

from __future__ import annotations

import pickle
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from zeroinf.errors import RankError
from zeroinf.generation.row import FinishReason, Likelihood, Sampling
from zeroinf.generation.scoring import TokenScores

if TYPE_CHECKING:
    import torch.distributed as dist

Kind = Literal["urgent", "batch", "score"]
KINDS: tuple[Kind, ...] = ("urgent", "batch", "score")

_ASLEEP_S = 0.5
_COUNT_EVERY_S = 0.5
_POLL_S = (0.002, 0.05)
"""How long a rank without work waits before it looks again: at first, and at the most."""


@dataclass(frozen=True, slots=True)
class QueuedRequest:
    """A request as ranks receive it."""

    number: int
    tokens: Sequence[int]
    sampling: Sampling | None
    """None: the tokens are scored."""
    index: int
    """What tells its random numbers from those of requests with the same seed; or from where on tokens are scored."""
    is_streamed: bool = False
    following: Sequence[Sequence[int]] = ()
    """Continuations to be scored behind the last token."""

    @property
    def length(self) -> int:
        """Tokens that are computed for scores."""
        return len(self.tokens) + sum(len(each) - 1 for each in self.following)


@dataclass(frozen=True, slots=True)
class RequestEvent:
    """An event of a request: new text and tokens, or its end."""

    number: int
    text: str = ""
    tokens: Sequence[int] = ()
    likelihoods: Sequence[Likelihood] = ()
    finish_reason: FinishReason | None = None
    scores: TokenScores | None = None
    problem: str = ""
    """Why it ended in error, where the model's scores were numbers."""


class RequestQueue(Protocol):
    """A queue as ranks use it. Each pass begins with `look`; the other methods use the state that it read."""

    def look(self) -> Sequence[int]:
        """See what there is; numbers of requests that were cancelled since the last look.

        Raises RankError where another rank has failed.
        """
        ...

    def take(self, kind: Kind, most: int) -> list[QueuedRequest]: ...

    @property
    def is_over(self) -> bool:
        """Whether it is closed, and all that was posted has been taken."""
        ...

    def tell(self, told: Sequence[RequestEvent]) -> None: ...

    def count(self, tokens: int) -> None:
        """Add `tokens` to those that were generated."""
        ...

    def wait(self) -> None:
        """Return when there may be something new, or after a moment."""
        ...

    @property
    def reports_asked(self) -> int:
        """How often ranks have been asked for a report."""
        ...

    def report(self, number: int, rank: int, report: object) -> None:
        """Answer such a question."""
        ...


class LocalRequestQueue:
    """A queue within one process. `heard` receives the events."""

    def __init__(self, heard: Callable[[RequestEvent], None]) -> None:
        self._heard = heard
        self._changed = threading.Condition()
        self._posted: dict[Kind, deque[QueuedRequest]] = {kind: deque() for kind in KINDS}
        self._cancelled: list[int] = []
        self._is_closed = self._is_new = False
        self.tokens = 0
        """Generated until now."""
        self.reports_asked = 0
        self._reports: dict[int, object] = {}

    def post(self, kind: Kind, *posted: QueuedRequest) -> None:
        with self._changed:
            self._posted[kind] += posted
            self._wake()

    def withdraw(self, number: int) -> bool:
        """Take a request back, if no rank has it yet."""
        with self._changed:
            for queue in self._posted.values():
                for posted in queue:
                    if posted.number == number:
                        queue.remove(posted)
                        return True
        return False

    def cancel(self, number: int) -> None:
        with self._changed:
            self._cancelled.append(number)
            self._wake()

    def close(self) -> None:
        """Nothing will be posted any more."""
        with self._changed:
            self._is_closed = True
            self._wake()

    def holds(self, kind: Kind) -> bool:
        """Whether any request of this kind waits."""
        return bool(self._posted[kind])

    def _wake(self) -> None:
        self._is_new = True
        self._changed.notify_all()

    def look(self) -> Sequence[int]:
        with self._changed:
            self._is_new = False
            cancelled, self._cancelled = self._cancelled, []
        return cancelled

    def take(self, kind: Kind, most: int) -> list[QueuedRequest]:
        with self._changed:
            queue = self._posted[kind]
            return [queue.popleft() for _ in range(min(most, len(queue)))]

    @property
    def is_over(self) -> bool:
        with self._changed:
            return self._is_closed and not any(self._posted.values())

    def tell(self, told: Sequence[RequestEvent]) -> None:
        for one in told:
            self._heard(one)

    def count(self, tokens: int) -> None:
        self.tokens += tokens

    def wait(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_new, _ASLEEP_S)

    def ask_reports(self) -> int:
        """Ask for a report, which `reports` has in a moment; the number of the question."""
        with self._changed:
            self.reports_asked += 1
            self._wake()
            return self.reports_asked

    def report(self, number: int, rank: int, report: object) -> None:
        self._reports[number] = report

    def reports(self, number: int, ranks: int) -> list[object] | None:
        """The report that question `number` asked for; None as long as it is not there."""
        return [self._reports.pop(number)] if number in self._reports else None


class SharedRequestQueue:
    """A queue of several ranks, in the store of rank 0."""

    def __init__(self, store: dist.Store, rank: int, ahead: int, heard: Callable[[RequestEvent], None]) -> None:
        """Made on rank 0 first. `ahead`: requests of a kind that are posted before any rank has taken them."""
        self._store, self._rank, self._ahead, self._heard = store, rank, ahead, heard
        self._seen = dict.fromkeys((*KINDS, "cancels", "closed", "failed", "reports"), 0)
        self._cancels_seen = self._takes = 0
        self._idle_s = _POLL_S[0]
        self._waiting = LocalRequestQueue(heard)
        self._numbers = 0
        self._awaited: list[int] = []
        self._moving = threading.Lock()
        self._taken_kinds: dict[Kind, int] = dict.fromkeys(KINDS, 0)
        self._posted_kinds: dict[Kind, int] = dict.fromkeys(KINDS, 0)
        self._untold_tokens, self._tokens_due = 0, 0.0
        if rank == 0:
            for name in self._seen:
                store.set(name, "0")
            for kind in KINDS:
                store.set(f"taken/{kind}", "0")

    def post(self, kind: Kind, *posted: QueuedRequest) -> None:
        """On rank 0, as are `withdraw`, `cancel`, `close` and `hear`."""
        self._waiting.post(kind, *posted)
        self.move()

    def withdraw(self, number: int) -> bool:
        return self._waiting.withdraw(number)

    def move(self) -> None:
        """Post what waits here, as far as ranks will soon take it."""
        with self._moving:
            for kind in filter(self._waiting.holds, KINDS):
                while (room := self._ahead - self._posted_kinds[kind] + self._taken(kind)) > 0:
                    if not (found := self._waiting.take(kind, room)):
                        break
                    for posted in found:
                        self._posted_kinds[kind] += 1
                        self._store.set(f"post/{kind}/{self._posted_kinds[kind]}", pickle.dumps(posted))  # type: ignore[arg-type]
                        self._store.add(kind, 1)
            if self._waiting.is_over:
                self._store.set("closed", "1")

    def _taken(self, kind: Kind) -> int:
        return int(self._store.get(f"taken/{kind}").partition(b"/")[0])

    def cancel(self, number: int) -> None:
        with self._moving:
            self._store.set(f"cancel/{int(self._store.add('cancelling', 1))}", str(number))
            self._store.add("cancels", 1)

    def close(self) -> None:
        self._waiting.close()
        self.move()

    def fail(self) -> None:
        """This rank can go on no longer."""
        self._store.set("failed", "1")

    def hear(self) -> bool:
        """Take in what ranks have told since the last call. False where one of them has failed."""
        numbers = int(self._store.add("told", 0))
        self._awaited += range(self._numbers + 1, numbers + 1)
        self._numbers = numbers
        for number in tuple(self._awaited):
            # A rank that dies between number and words never sends them: waiting would block the store for all.
            if self._store.check([f"told/{number}"]):
                self._awaited.remove(number)
                for told in pickle.loads(self._store.get(f"told/{number}")):
                    self._heard(told)
                self._store.delete_key(f"told/{number}")
        self.move()
        return int(self._store.get("failed")) == 0

    def look(self) -> Sequence[int]:
        values = self._store.multi_get(list(self._seen))
        self._seen = {name: int(value) for name, value in zip(self._seen, values, strict=True)}
        if self._seen["failed"]:
            raise RankError("another rank has failed", hint="its own message says why")
        first, self._cancels_seen = self._cancels_seen + 1, self._seen["cancels"]
        return [int(self._store.get(f"cancel/{n}")) for n in range(first, self._cancels_seen + 1)]

    def take(self, kind: Kind, most: int) -> list[QueuedRequest]:
        if self._taken_kinds[kind] >= self._seen[kind]:
            return []
        return list(self._taking(kind, most))

    def _taking(self, kind: Kind, most: int) -> Iterator[QueuedRequest]:
        known = self._store.get(f"taken/{kind}")
        while (start := int(known.partition(b"/")[0])) < self._seen[kind]:
            end = min(start + most, self._seen[kind])
            self._takes += 1
            mine = f"{end}/{self._rank}/{self._takes}".encode()  # no other rank would write the same
            known = self._store.compare_set(f"taken/{kind}", known.decode(), mine.decode())
            if known == mine:
                self._taken_kinds[kind] = end
                self._idle_s = _POLL_S[0]
                for number in range(start + 1, end + 1):
                    yield pickle.loads(self._store.get(f"post/{kind}/{number}"))
                    self._store.delete_key(f"post/{kind}/{number}")
                return
        self._taken_kinds[kind] = start

    @property
    def is_over(self) -> bool:
        return bool(self._seen["closed"]) and all(self._taken(kind) >= self._seen[kind] for kind in KINDS)

    def tell(self, told: Sequence[RequestEvent]) -> None:
        if self._rank == 0:
            for one in told:
                self._heard(one)
        elif told:
            number = int(self._store.add("telling", 1))
            self._store.set(f"told/{number}", pickle.dumps(list(told)))  # type: ignore[arg-type]
            self._store.add("told", 1)

    def count(self, tokens: int) -> None:
        self._untold_tokens += tokens
        if time.monotonic() >= self._tokens_due:
            self._store.add("tokens", self._untold_tokens)
            self._untold_tokens, self._tokens_due = 0, time.monotonic() + _COUNT_EVERY_S

    @property
    def tokens(self) -> int:
        """Generated by all ranks until half a second ago, and by this one until now. From any thread."""
        return int(self._store.add("tokens", 0)) + self._untold_tokens

    @property
    def reports_asked(self) -> int:
        return self._seen["reports"]

    def ask_reports(self) -> int:
        """Ask all ranks for a report, which `reports` has in a moment; the number of the question. On rank 0."""
        return int(self._store.add("reports", 1))

    def report(self, number: int, rank: int, report: object) -> None:
        self._store.set(f"report/{number}/{rank}", pickle.dumps(report))  # type: ignore[arg-type]

    def reports(self, number: int, ranks: int) -> list[object] | None:
        """The reports of all ranks on question `number`; None as long as one is missing."""
        keys = [f"report/{number}/{rank}" for rank in range(ranks)]
        if not self._store.check(keys):
            return None
        found = [pickle.loads(self._store.get(key)) for key in keys]
        for key in keys:
            self._store.delete_key(key)
        return found

    def wait(self) -> None:
        time.sleep(self._idle_s)
        self._idle_s = min(2 * self._idle_s, _POLL_S[1])
