"""The table of engines. An engine is added in a folder of its own, with a descriptor, and named here.

Modules above the engines take `descriptor_of` from here, so that the table is there before anything is looked up.
Imports no torch: command lines and plans are checked before it is loaded.
"""

from __future__ import annotations

from zeroinf.engines.baselines.descriptors import ACCELERATE, RESIDENT, TENSOR_PARALLEL
from zeroinf.engines.stream.descriptor import STREAM
from zeroinf.engines.zero.descriptor import ZERO
from zeroinf.planner.descriptor import default_engine, descriptor_of, engines, register_engines

__all__ = ["ENGINES", "ENGINE_NAMES", "default_engine", "descriptor_of", "engines"]

ENGINES = (STREAM, ZERO, RESIDENT, ACCELERATE, TENSOR_PARALLEL)
"""All of them; the first runs unless another one is asked for."""

ENGINE_NAMES = tuple(engine.name for engine in ENGINES)

register_engines(ENGINES)
