"""Predicts kernel times from a GPU's measured rates, and from the share of them that each kind of operator reaches."""

from __future__ import annotations

from zeroinf.planner.figures import FittedFigures
from zeroinf.planner.workload import Kernel


def kernel_s(kernel: Kernel, fitted: FittedFigures, tflops: float, hbm_gbps: float) -> tuple[float, float]:
    """Seconds by its arithmetic (10^12 operations a second) and by its memory traffic (GB/s); it takes the longer."""
    shares = fitted.shares(kernel)
    traffic_s = kernel.nbytes / hbm_gbps / 1e9 / shares.memory
    return kernel.flops / tflops / 1e12 / shares.arithmetic, max(traffic_s, fitted.kernels.shortest_s)
