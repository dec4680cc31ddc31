"""Predicts kernel times from the share of a GPU's measured rates that each kind of operator reaches."""

from __future__ import annotations

from zeroinf.planner.workload import Kernel, Pattern

# Fitted by hand to runs of `scripts/bench-kernels` on an H200 (docs/benchmarks-archive.md, "Kernels, operator
# by operator").
_PRODUCT_SHARES = (1.05, 0.8)  # of arithmetic, of memory
_OWN_PRODUCT_SHARES = {
    "efficient attention": (0.17, 0.48),
    "packed attention": (0.3, 0.8),
    "bmm": (1.05, 0.65),
    "baddbmm": (1.05, 0.45),
}
_PATTERN_SHARES: dict[Pattern, float] = {"straight": 0.95, "converted": 0.62, "crossed": 0.4, "repeated": 0.4}
_SHARES: dict[tuple[str, Pattern], float] = {
    ("gelu", "straight"): 0.7,
    ("silu", "straight"): 0.86,
    ("_softmax", "straight"): 0.73,
    ("index_select", "crossed"): 0.8,
    ("mean", "crossed"): 0.9,
    ("amax", "crossed"): 0.9,
    ("argmax", "crossed"): 0.9,
    ("native_layer_norm", "crossed"): 0.55,
    ("index_copy_", "crossed"): 0.28,
    ("clone", "crossed"): 0.33,
    ("clone", "repeated"): 0.2,
    ("cat", "crossed"): 0.2,
    # Of scripts/bench-expansion on an H200; of GGUF's types Q6_K, the slowest whose kernel takes a block at a time.
    ("expand_ggml", "crossed"): 0.25,
    ("expand_words", "crossed"): 0.18,
    ("expand_fp4", "crossed"): 0.3,
    ("expand_fp8", "crossed"): 0.6,
}
_SHORTEST_S = 2e-6


def kernel_s(kernel: Kernel, tflops: float, hbm_gbps: float) -> tuple[float, float]:
    """Seconds by its arithmetic (10^12 operations a second) and by its memory traffic (GB/s); it takes the longer."""
    arithmetic, memory = _shares(kernel)
    return kernel.flops / tflops / 1e12 / arithmetic, max(kernel.nbytes / hbm_gbps / 1e9 / memory, _SHORTEST_S)


def _shares(kernel: Kernel) -> tuple[float, float]:
    if kernel.flops:
        return _OWN_PRODUCT_SHARES.get(kernel.operator, _PRODUCT_SHARES)
    return 1.0, _SHARES.get((kernel.operator, kernel.pattern), _PATTERN_SHARES[kernel.pattern])
