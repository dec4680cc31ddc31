"""The result of the search: the best plan, the alternatives, and why each of them was not chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from zeroinf.errors import DoesNotFitError
from zeroinf.model.anatomy import HostSize, PoolSize
from zeroinf.planner.choice import Choice, Fetch, Offload
from zeroinf.planner.memory import Place, Term
from zeroinf.planner.timing import Timing

_HUNDREDTH = 2**30 / 100  # of a GiB, in bytes: sizes that are asked for are rounded up


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A choice that fits, with all it takes and how fast it is."""

    choice: Choice
    pool: PoolSize
    host: HostSize | None
    terms: tuple[Term, ...]
    timing: Timing


@dataclass(frozen=True, kw_only=True, slots=True)
class Lack:
    """A place that is too small."""

    place: Place
    needed_bytes: int
    available_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejection:
    """A way to run that does not fit, and all that it lacks."""

    offload: Offload
    fetch: Fetch
    batch_size: int
    host_rows: int
    """Rows of which keys and values would rest in host memory."""
    lacks: tuple[Lack, ...]

    @classmethod
    def of(cls, choice: Choice, *lacks: Lack) -> Rejection:
        """That of `choice`."""
        return cls(
            offload=choice.offload,
            fetch=choice.fetch,
            batch_size=choice.batch_size,
            host_rows=choice.host_rows,
            lacks=lacks,
        )

    @property
    def missing_bytes(self) -> int:
        """Of all places together."""
        return sum(lack.needed_bytes - lack.available_bytes for lack in self.lacks)

    @property
    def reason(self) -> str:
        rows, need = ("1 row", "needs") if self.batch_size == 1 else (f"{self.batch_size} rows", "need")
        kept = f", keys and values of {self.host_rows} in host memory," if self.host_rows else ""
        where = {"gpu": "of GPU memory", "host": "of host memory", "disk": "on the disk"}
        return f"{rows}{kept} {need} " + " and ".join(
            f"{lack.needed_bytes / 2**30:.2f} GiB {where[lack.place]}, {lack.available_bytes / 2**30:.2f} GiB are there"
            for lack in self.lacks
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """The best candidate, the best of each other way to run, and what was turned down."""

    chosen: Candidate
    alternatives: tuple[Candidate, ...]
    tried: tuple[Candidate, ...]
    """All that was tried the chosen way, by rows: how memory and speed grow."""
    rejected: tuple[Rejection, ...]
    budgets: dict[Place, int]

    @property
    def tokens_per_second(self) -> float:
        return self.chosen.timing.tokens_per_second


def does_not_fit(rejected: Sequence[Rejection]) -> DoesNotFitError:
    """Why each way does not fit, and what would do of the one that lacks least."""
    return DoesNotFitError(_nothing_fits(rejected), hint=_smallest_changes(rejected))


def _nothing_fits(rejected: Sequence[Rejection]) -> str:
    return "nothing fits: " + "; ".join(f"offload {one.offload}: {one.reason}" for one in rejected)


def _smallest_changes(rejected: Sequence[Rejection]) -> str:
    nearest = min(rejected, key=lambda one: one.missing_bytes)
    where = {"gpu": "GPU", "host": "host", "disk": "disk"}
    more = (
        f"{ceil((lack.needed_bytes - lack.available_bytes) / _HUNDREDTH) / 100:.2f} GiB more {where[lack.place]} memory"
        for lack in nearest.lacks
    )
    return f"{' and '.join(more)} would do for --offload {nearest.offload}"
