"""Defines the protocol between the generation loop and the engines that run a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class Stalls:
    """Time of this rank by cause, in seconds, as measured on its compute stream."""

    link_s: float = 0.0
    """Waits for a block that was crossing the links."""
    disk_s: float = 0.0
    """Waits for a block that had not been read yet."""
    compute_s: float = 0.0
    """Computing layers, streamed and resident ones, with work queued."""
    host_s: float = 0.0
    """In layers at whose end the GPU had no work queued, and from there to the next layer: at the host's pace."""
    between_s: float = 0.0
    """Between the layers of one pass and those of the next: the head, sampling, and the host's own work."""

    def __sub__(self, earlier: Stalls) -> Stalls:
        return Stalls(**{name: getattr(self, name) - getattr(earlier, name) for name in self.__slots__})


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """Counters of one engine on this rank since it was loaded."""

    passes: int
    """Walks over all blocks, warm-up included."""
    streamed_bytes_per_pass: int
    """Weight bytes that cross links, from where they rest to where they compute, in one walk over all blocks. Ranks in
    step make one walk together, of which each pulls its part; other ranks make one each."""
    encodings: int = 0
    """Walks over the blocks of an encoder, which some passes begin with."""
    streamed_bytes_per_encoding: int = 0
    """The same bytes in such a walk; a pass is counted without it."""
    routed_passes: int = 0
    """Those of the passes that brought only the experts that their tokens were routed to."""
    spared_bytes: int = 0
    """Weight bytes of walks that did not cross since no token was routed to them."""
    rows_read: int = 0
    """Rows of tables that were read from the checkpoint's files, each once a forward."""
    rows_read_s: float = 0.0
    """Seconds that forwards waited for them."""
    shared_host_bytes: int = 0
    """Host memory that all ranks of a node map, and that is there once."""
    pinned_host_bytes: int = 0
    """Host memory that this rank has page-locked for its GPU, what it shares with others included."""
    slot_bytes: int = 0
    """Device memory that blocks pass through."""
    link_busy_s: float = 0.0
    """Seconds in which weights crossed this rank's link."""
    stalls: Stalls = Stalls()

    @property
    def streamed_bytes(self) -> int:
        """All that was streamed."""
        encoded = self.encodings * self.streamed_bytes_per_encoding
        return self.passes * self.streamed_bytes_per_pass + encoded - self.spared_bytes


class LoadListener(Protocol):
    """Receives notes and progress while an engine loads."""

    def note(self, text: str) -> None: ...

    def fetching(self, name: str) -> None:
        """Weights of the model `name` are being downloaded."""
        ...

    def doing(self, step: str) -> None:
        """Reports the step that runs now, which may take seconds."""
        ...

    def filled(self, done_bytes: int, total_bytes: int) -> None:
        """Weights that have been loaded so far. Called from any thread."""
        ...


class SilentListener:
    """A LoadListener that does nothing."""

    def note(self, text: str) -> None: ...

    def fetching(self, name: str) -> None: ...

    def doing(self, step: str) -> None: ...

    def filled(self, done_bytes: int, total_bytes: int) -> None: ...


class Engine(Protocol):
    """A loaded model that runs forwards. Sampling, batching and KV caches belong to the caller."""

    name: str
    in_step: bool
    """Every rank must walk over the blocks the same number of times (collectives inside)."""
    shares_passes: bool
    """One pass serves all micro-batches of a `forward`; otherwise each of them makes its own."""
    link_stream: Any
    """The CUDA stream on which weights cross this rank's link, in the order of their use; None where none do."""

    @property
    def model(self) -> Any:
        """The transformers model: for its config, its generation config and its way to prepare inputs."""
        ...

    def forward(self, micro_batches: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Run one forward for each set of keyword arguments of the model's own `forward`.

        Returns the model's outputs in the same order; logits have shape (rows, positions kept, vocabulary).
        """
        ...

    def recover(self) -> bool:
        """Get ready for the next forward after one that ended in an exception, such as a lack of memory.

        Returns False where that cannot be done. Ranks in step carry out what is left of the forward's collectives.
        """
        ...

    def stats(self) -> EngineStats: ...

    def close(self) -> None:
        """Free what was allocated and remove what was written."""
        ...
