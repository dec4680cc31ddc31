"""Live rows as the scheduler sees them: how far each is, and where its keys and values lie. No tensors."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field

from zeroinf.generation.prefixes import PrefixPage
from zeroinf.generation.row import Row
from zeroinf.model.cache_layout import PAGE_TOKENS


@dataclass(slots=True, eq=False)
class Seat:
    """A live row: its `number` among the live ones, and how far it is."""

    row: Row
    number: int
    known: int
    """Tokens of the prompt and those generated, the one that the host has not read yet included."""
    computed: int = 0
    """Tokens whose keys and values are in the cache."""
    has_left: bool = False
    host_start: int | None = None
    """Where its keys and values begin in host memory, in tokens; None where they lie on the GPU."""
    ends: Container[int] = frozenset()
    """Tokens after which the row may have ended; after any other it goes on, unless it has all its tokens."""
    may_end_early: bool = False
    """Whether one of them may be chosen by the model."""
    prefix: tuple[PrefixPage, ...] = ()
    """The pages that its prompt begins with, which other rows may share."""
    total: int = field(init=False)
    """Tokens at the most."""
    is_plain: bool = field(init=False)
    """Each token is that of the highest score, and nothing but the token is told of it."""

    def __post_init__(self) -> None:
        self.total = most_tokens(self.row)
        how = self.row.sampling
        self.is_plain = how.is_greedy and not how.alters_scores and how.logprobs is None

    @property
    def on_host(self) -> bool:
        return self.host_start is not None

    @property
    def due(self) -> int:
        """Tokens to be computed before the next one can be chosen."""
        return self.known - self.computed

    @property
    def prefix_tokens(self) -> int:
        """Tokens that lie in shared pages."""
        return PAGE_TOKENS * len(self.prefix)

    def begins_at(self, planned: Container[PrefixPage] = ()) -> int:
        """The position of its next tokens: behind those of shared pages that are computed, or `planned` to be
        before."""
        at = self.computed
        while at < self.prefix_tokens:
            page = self.prefix[at // PAGE_TOKENS]
            if not page.is_computed and page not in planned:
                break
            at = (at // PAGE_TOKENS + 1) * PAGE_TOKENS
        return at

    def pages_between(self, start: int, end: int) -> tuple[PrefixPage, ...]:
        """Shared pages that are complete with the tokens from `start` up to `end`."""
        return self.prefix[start // PAGE_TOKENS : end // PAGE_TOKENS]


def most_tokens(row: Row) -> int:
    """Tokens of `row` at the most, those of its prompt included."""
    return len(row.prompt) + row.sampling.max_new_tokens
