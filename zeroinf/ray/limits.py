"""Reads which cluster a job wants, and how many of its nodes; before Ray or torch is imported."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec

from zeroinf.errors import EnvironmentProblem, UsageError

_LIMITS = re.compile(r"(?:(\d*):)?(\d*)")


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeLimits:
    """The fewest and the most nodes that a job wants."""

    least: int = 1
    """The job begins when so many are there."""
    most: int | None = None
    """No more are used at once."""
    waits: bool = False
    """Where there is none, the job waits for one to join."""

    @classmethod
    def parse(cls, text: str) -> NodeLimits:
        """The limits of MIN:MAX, MIN:, :MAX or MAX. Raises UsageError."""
        found = _LIMITS.fullmatch(text.strip())
        if found is None or not (found[1] or found[2]):
            raise UsageError(f"--ray-nodes {text!r}", hint="write MIN:MAX, MIN: or MAX, such as 2:8")
        least, most = int(found[1] or 1), int(found[2]) if found[2] else None
        if least < 1 or (most is not None and most < least):
            raise UsageError(f"--ray-nodes {text!r}: at least 1, and MAX no less than MIN", hint="write such as 2:8")
        return cls(least=least, most=most, waits=True)


def check_address(address: str) -> None:
    """Raise UsageError for a cluster that cannot be joined in this way, EnvironmentProblem where Ray is missing."""
    if address.startswith("ray://"):
        raise UsageError(
            f"--ray {address}: Ray's client cannot drive a job",
            hint="start it on a node of the cluster with --ray auto: ray job submit -- zeroinf run --ray auto ...",
        )
    if find_spec("ray") is None:
        raise EnvironmentProblem("--ray needs Ray, which is not installed", hint="pip install 'zeroinf[ray]'")
