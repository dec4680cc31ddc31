"""The protocol between whatever generates tokens and whatever runs a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """What an engine did on this rank since it was loaded."""

    forwards: int
    """Forwards of the whole model, warm-up included."""
    streamed_bytes_per_pass: int
    """Weight bytes that cross links, from where they rest to where they compute, in one walk over all blocks. Ranks in
    step make one walk together, of which each pulls its part; other ranks make one each."""
    shared_host_bytes: int = 0
    """Host memory that all ranks of a node map, and that is there once."""


class Engine(Protocol):
    """A loaded model that runs forwards. Sampling, batching and caches belong to the caller."""

    name: str
    in_step: bool
    """Every rank must call `forward` the same number of times (collectives inside)."""

    @property
    def model(self) -> Any:
        """The transformers model: for its config, its generation config and its way to prepare inputs."""
        ...

    def forward(self, micro_batches: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Run one forward for each set of keyword arguments of the model's own `forward`.

        Returns the model's outputs in the same order; logits have shape (rows, positions kept, vocabulary).
        """
        ...

    def stats(self) -> EngineStats: ...

    def close(self) -> None:
        """Free what was allocated and remove what was written."""
        ...
