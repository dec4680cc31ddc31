"""What is told while a run happens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from zeroinf.service.requests import Refusal

if TYPE_CHECKING:
    from zeroinf.planner.plan import Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """A moment of a run."""

    rows_done: int
    """Results that would survive the machine, those of earlier runs of the same job included."""
    rows_before: int
    """Results of earlier runs."""
    rows: int
    tokens: int
    elapsed_s: float
    streamed_bytes: int


class Observer(Protocol):
    """Whoever shows a run to the user. Only rank 0 has one that speaks."""

    def left_out(self, how: Literal["refused", "failed"], refusals: Sequence[Refusal]) -> None: ...

    def note(self, text: str) -> None: ...

    def failed(self, text: str) -> None:
        """Say what went wrong where no exception can carry it to the command line."""
        ...

    def loading(self, plan: Plan) -> None: ...

    def filled(self, done_bytes: int, total_bytes: int) -> None:
        """Weights loaded so far, all ranks of this node together. Called from any thread."""
        ...

    def loaded(self, seconds: float) -> None: ...

    def progress(self, progress: Progress) -> None: ...

    def ended(self) -> None:
        """Generation is over, well or badly: clear whatever is being redrawn."""
        ...
