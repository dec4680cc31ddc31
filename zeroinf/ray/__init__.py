"""Runs on Ray clusters: `zeroinf run --ray` spreads one job over the nodes of a cluster, and `Generate` is a stage of
Ray Data.

The unit is a node: one model with one copy of the weights in host memory, on all of the node's GPUs.
"""

from __future__ import annotations

from zeroinf.ray.generate import Generate, GenerateSettings

__all__ = ["Generate", "GenerateSettings"]
