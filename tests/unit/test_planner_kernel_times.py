"""Seconds of kernels: by arithmetic or by memory, and by how well an operator goes over it."""

from __future__ import annotations

import pytest

from zeroinf.planner.figures import fitted_figures
from zeroinf.planner.kernel_times import kernel_s
from zeroinf.planner.workload import Kernel

TFLOPS, GBPS = 100.0, 1000.0
FITTED = fitted_figures()


def memory_s(kernel: Kernel) -> float:
    return kernel_s(kernel, FITTED, TFLOPS, GBPS)[1]


def test_a_product_takes_the_longer_of_its_arithmetic_and_its_memory() -> None:
    arithmetic, memory = kernel_s(Kernel(10**12, 10**9, "mm"), FITTED, TFLOPS, GBPS)
    assert 0.5 * 1e-2 < arithmetic < 1.5 * 1e-2
    assert 1e-3 < memory < 1.5e-3


def test_a_kernel_without_products_takes_no_arithmetic() -> None:
    assert kernel_s(Kernel(0, 10**9, "mul"), FITTED, TFLOPS, GBPS)[0] == 0


@pytest.mark.parametrize(
    ("quick", "slow"),
    [
        (Kernel(0, 10**9, "mul"), Kernel(0, 10**9, "mul", "crossed")),
        (Kernel(0, 10**9, "_to_copy"), Kernel(0, 10**9, "_to_copy", "converted")),
        (Kernel(0, 10**9, "clone", "crossed"), Kernel(0, 10**9, "clone", "repeated")),
        (Kernel(0, 10**9, "mul", "crossed"), Kernel(0, 10**9, "cat", "crossed")),
        (Kernel(1, 10**9, "mm"), Kernel(1, 10**9, "efficient attention")),
    ],
)
def test_what_goes_over_memory_in_a_worse_way_takes_longer(quick: Kernel, slow: Kernel) -> None:
    assert memory_s(slow) > 1.2 * memory_s(quick)


def test_no_kernel_is_faster_than_the_shortest() -> None:
    assert memory_s(Kernel(0, 1, "add")) == memory_s(Kernel(0, 2, "add")) > 1e-6
