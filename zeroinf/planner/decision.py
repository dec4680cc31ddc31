"""The result of the search: the best plan, the alternatives, and why each of them was not chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil

from zeroinf.errors import DoesNotFitError
from zeroinf.model.cache_layout import HostSize, PoolSize
from zeroinf.planner.choice import Choice, Fetch, Offload
from zeroinf.planner.memory import MemoryPlace, Term
from zeroinf.planner.timing import Timing

_HUNDREDTH = 2**30 / 100  # of a GiB, in bytes: sizes that are asked for are rounded up
_NAMES: dict[MemoryPlace, str] = {"gpu": "GPU memory", "host": "host memory", "disk": "disk space"}
# Of a byte, beside one of host memory.
_PRICES: dict[MemoryPlace, float] = {"gpu": 8.0, "host": 1.0, "disk": 0.05}


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A choice that fits, with all it takes and how fast it is."""

    choice: Choice
    pool: PoolSize
    host: HostSize | None
    least_terms: tuple[Term, ...] = field(compare=False)
    """The terms, or those without what an allocator loses, which takes longer to know."""
    counted: Callable[[], tuple[Term, ...]] = field(compare=False, repr=False)
    timing: Timing

    @property
    def terms(self) -> tuple[Term, ...]:
        """All that it takes."""
        return self.counted()


@dataclass(frozen=True, kw_only=True, slots=True)
class Shortage:
    """A place that is too small."""

    place: MemoryPlace
    needed_bytes: int
    available_bytes: int

    @property
    def missing_gib(self) -> float:
        """Rounded up to hundredths."""
        return ceil((self.needed_bytes - self.available_bytes) / _HUNDREDTH) / 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejection:
    """A way to run that does not fit, and all that it lacks."""

    offload: Offload
    fetch: Fetch
    batch_size: int
    host_rows: int
    """Rows of which keys and values would rest in host memory."""
    shortages: tuple[Shortage, ...]

    @classmethod
    def of(cls, choice: Choice, *shortages: Shortage) -> Rejection:
        """The rejection of `choice`."""
        return cls(
            offload=choice.offload,
            fetch=choice.fetch,
            batch_size=choice.batch_size,
            host_rows=choice.host_rows,
            shortages=shortages,
        )

    @property
    def price(self) -> float:
        """The price of all that is missing, in bytes of host memory that cost about as much."""
        return sum(
            _PRICES[shortage.place] * (shortage.needed_bytes - shortage.available_bytes) for shortage in self.shortages
        )

    @property
    def reason(self) -> str:
        rows, need = ("1 sequence", "needs") if self.batch_size == 1 else (f"{self.batch_size} sequences", "need")
        kept = f", KV cache of {self.host_rows} in host memory," if self.host_rows else ""
        where = {"gpu": "of GPU memory", "host": "of host memory", "disk": "on the disk"}
        return f"{rows}{kept} {need} " + " and ".join(
            f"{short.needed_bytes / 2**30:.2f} GiB {where[short.place]}, "
            f"{short.available_bytes / 2**30:.2f} GiB are there"
            for short in self.shortages
        )

    @property
    def wanted(self) -> str:
        """The memory that would have to be added, in words."""
        return " and ".join(
            f"{shortage.missing_gib:.2f} GiB more {_NAMES[shortage.place]}" for shortage in self.shortages
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """The best candidate, the best of each other way to run, and what was turned down."""

    chosen: Candidate
    alternatives: tuple[Candidate, ...]
    tried: tuple[Candidate, ...]
    """All that was tried the chosen way, by rows: how memory and speed grow."""
    rejected: tuple[Rejection, ...]
    budgets: dict[MemoryPlace, int]

    @property
    def tokens_per_second(self) -> float:
        return self.chosen.timing.tokens_per_second


class NothingFitsError(DoesNotFitError):
    """No candidate fits."""

    def __init__(self, rejected: Sequence[Rejection]) -> None:
        """`rejected` has at least one."""
        self.nearest = min(rejected, key=lambda one: one.price)
        """The one whose lacks cost least."""
        names = [_NAMES[shortage.place] for shortage in self.nearest.shortages]
        short = f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} short"
        ways = "; ".join(f"offload {one.offload}: {one.reason}" for one in rejected)
        super().__init__(
            f"nothing fits, {short}: {ways}",
            hint=f"{self.nearest.wanted} would do for --offload {self.nearest.offload}",
        )
