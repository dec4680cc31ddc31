"""Holds the facts of a search: a model, a machine's memory and rates, an engine's memory terms and a job's lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from zeroinf.model.anatomy import Anatomy
from zeroinf.planner.descriptor import EngineTerms
from zeroinf.planner.memory import MemoryPlace
from zeroinf.planner.timing import Speeds
from zeroinf.planner.workload import Lengths, Simulate


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """Facts that stay the same while settings are searched; memory is in bytes that are free."""

    anatomy: Anatomy
    speeds: Speeds
    simulate: Simulate
    engine_terms: EngineTerms
    lengths: Lengths
    device: Literal["cuda", "cpu"]
    gpu_bytes: int
    """Of the GPU that has the least."""
    host_bytes: int
    thorough: bool
    """Try all candidates; False tries few, for a plan that is at most as fast, in a fraction of the time."""

    @property
    def compute_place(self) -> MemoryPlace:
        """The place where rows and forwards take memory."""
        return "gpu" if self.device == "cuda" else "host"
