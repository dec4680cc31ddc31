"""Reads how many nodes of a cluster a job wants."""

from __future__ import annotations

import re
from dataclasses import dataclass

from zeroinf.errors import UsageError

_LIMITS = re.compile(r"(?:(\d*):)?(\d*)")


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeLimits:
    """The fewest and the most nodes that a job wants."""

    least: int = 1
    """The job begins when so many are there."""
    most: int | None = None
    """No more are used at once."""

    @classmethod
    def parse(cls, text: str) -> NodeLimits:
        """The limits of MIN:MAX, MIN:, :MAX or MAX. Raises UsageError."""
        found = _LIMITS.fullmatch(text.strip())
        if found is None or not (found[1] or found[2]):
            raise UsageError(f"--ray-nodes {text!r}", hint="write MIN:MAX, MIN: or MAX, such as 2:8")
        least, most = int(found[1] or 1), int(found[2]) if found[2] else None
        if least < 1 or (most is not None and most < least):
            raise UsageError(f"--ray-nodes {text!r}: at least 1, and MAX no less than MIN", hint="write such as 2:8")
        return cls(least=least, most=most)
