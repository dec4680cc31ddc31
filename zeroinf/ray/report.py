"""The report of a run on a cluster: the job's figures, and each node's part of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from zeroinf.service.observer import rate


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeReport:
    """One node's part of a run."""

    name: str
    gpus: int
    plan: str | None
    """How it ran, in one line; None where it was never ready."""
    load_s: float | None
    requests: int
    """Results that came from it."""
    tokens: int
    """Tokens that it generated, those of sequences that another node had to do again included."""
    left_out: str | None
    """Why it was left out, if it was."""
    has_left: bool
    """It left the cluster during the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterReport:
    """A run on a cluster. Times in seconds."""

    generate_s: float
    """From the moment when the first node was ready to the last result."""
    nodes: tuple[NodeReport, ...]
    requests: int = 0
    """Results of this run."""
    refused: int = 0
    failed: int = 0
    cut: int = 0
    cut_answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Completion tokens over the time to generate them, all nodes together."""
        return rate(self.completion_tokens, self.generate_s)

    def to_json(self) -> dict[str, Any]:
        """Every figure of the run, for `--report`. `schema` changes when a name or a meaning does."""
        return {"schema": 1, "kind": "cluster", **asdict(self), "tokens_per_second": self.tokens_per_second}
