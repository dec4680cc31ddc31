"""Messages between the driver of a cluster's run and its nodes.

The driver sends a `NodeSpec` once and then lists of `Work`; a node answers with events. All of them are pickled, and
know neither Ray nor torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from zeroinf.errors import ZeroinfError
from zeroinf.options.options import RunOptions
from zeroinf.planner.workload import Lengths
from zeroinf.service.requests import Result


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeInfo:
    """A node of the cluster that can take a part of the job."""

    id: str
    name: str
    gpus: int = 0
    cpus: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeSpec:
    """The facts that every node is told before its first request."""

    options: RunOptions
    lengths: Lengths
    requests: int
    """As many as one node is likely to get: its plan need not hold more at once."""
    facts: Mapping[str, str]
    """What must be the same on every node for its completions to be: versions, weights, dtype (`node_facts`)."""
    environ: Mapping[str, str]
    """Variables of the driver's environment that the node's process gets."""
    folder: Path
    """The driver's working folder, where relative paths begin if the node has it too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeReady:
    """The model is loaded."""

    capacity: int
    """Sequences that run at once."""
    load_s: float
    """From the start of the process."""
    plan: str
    """How it runs, in one line."""


@dataclass(frozen=True, slots=True)
class NodeNote:
    """Something that the user should know."""

    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeResults:
    """Results since the last event."""

    results: Sequence[Result] = ()
    tokens: int
    """Generated since the node was ready, those of unfinished sequences included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeFailed:
    """The node's process has ended, or will. What it had not finished is lost."""

    message: str
    hint: str | None = None
    exit_code: int | None = None
    """The process's; as a shell has it after a signal. None where nobody knows it."""
    is_final: bool = False
    """Starting it again would end the same way: its plan does not fit, or it lacks something."""

    @classmethod
    def of(cls, error: BaseException, *, is_final: bool) -> NodeFailed:
        """A message that tells of `error`."""
        if isinstance(error, ZeroinfError):
            return cls(message=error.message, hint=error.hint, exit_code=error.exit_code, is_final=is_final)
        words = str(error).strip().splitlines()
        name = type(error).__name__
        return cls(message=f"{name}: {words[-1]}" if words else name, exit_code=ZeroinfError.exit_code)


NodeEvent: TypeAlias = NodeReady | NodeNote | NodeResults | NodeFailed
