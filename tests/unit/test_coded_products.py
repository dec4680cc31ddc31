"""Kernels of forwards whose weights are codes: what multiplies as codes, and what is expanded first."""

from __future__ import annotations

import pytest

from zeroinf.planner.coded_products import (
    EXPAND_MXFP4,
    ON_CODES_BY_EXPERT,
    ON_EXPANDED_MXFP4,
    ON_INTEGERS,
    ON_MXFP4,
    at_once,
    in_parts,
    with_many_rows,
)
from zeroinf.planner.figures import fitted_figures
from zeroinf.planner.kernel_times import kernel_s
from zeroinf.planner.workload import Kernel, Kernels

EXPERTS, EACH, WIDTH = 128, 4, 2880
# Both products of a layer of gpt-oss-120b on an H200, in ms, by tokens (docs/data/80-kernels.json).
MEASURED = {256: 1.34, 1024: 3.0, 2080: 4.6, 4160: 6.14, 8320: 7.97}


def layer(tokens: int) -> list[Kernels]:
    """Nothing outside of the layers, and a layer's products as codes."""
    kernels = []
    for outputs in (2 * WIDTH, WIDTH):
        elements, slots = EXPERTS * outputs * WIDTH, tokens * EACH
        nbytes = elements // 2 + elements // 32 + 2 * slots * (WIDTH + outputs)
        kernels.append(Kernel(2 * slots * outputs * WIDTH, nbytes, ON_MXFP4))
    return [Kernels(1.0, ()), Kernels(1.0, (Kernel(0, 1 << 20, "add"), *kernels))]


@pytest.mark.parametrize("tokens", MEASURED)
def test_experts_in_mxfp4_take_about_as_long_as_measured(tokens: int) -> None:
    groups, figures = with_many_rows(layer(tokens), tokens, EXPERTS, EACH), fitted_figures((9, 0))
    found = sum(
        group.times * max(kernel_s(kernel, figures, 700, 4231))
        for group in groups
        for kernel in group.kernels
        if kernel.operator != "add"
    )
    assert found * 1e3 == pytest.approx(MEASURED[tokens], rel=0.3)


def test_experts_with_many_rows_are_expanded_some_after_the_others() -> None:
    few, many = (with_many_rows(layer(tokens), tokens, EXPERTS, EACH) for tokens in (2048, 4096))
    assert [kernel.operator for kernel in few[1].kernels] == ["add", ON_MXFP4, ON_MXFP4]
    assert [kernel.operator for kernel in many[1].kernels] == ["add"]
    assert [[kernel.operator for kernel in group.kernels] for group in many[2:]] == [
        [EXPAND_MXFP4, ON_EXPANDED_MXFP4],
        [EXPAND_MXFP4, ON_EXPANDED_MXFP4],
    ]
    assert [group.times for group in many[2:]] == [8, 4]
    flops = [
        sum(group.times * kernel.flops for group in groups for kernel in group.kernels)
        for groups in (layer(4096), many)
    ]
    assert flops[0] == flops[1]


def test_experts_in_integers_are_multiplied_as_codes_with_any_rows() -> None:
    product = Kernel(2 * 3000 * 1024 * 1024, 64 << 20, ON_INTEGERS)
    groups = with_many_rows([Kernels(1.0, ()), Kernels(2.0, (product,))], 3000, 2, 1)
    assert [group.kernels for group in groups] == [(), (Kernel(*product[:2], ON_CODES_BY_EXPERT),)]


def test_each_part_of_the_experts_multiplies_its_own_rows_alone() -> None:
    product, other = Kernel(800, 50, ON_MXFP4), Kernel(800, 50, "mm")
    simulated = [Kernels(1.0, ()), Kernels(3.0, (other, *[product] * 4))]
    groups = in_parts(simulated, 4)
    assert groups[1] == Kernels(3.0, (other, *[Kernel(200, 50, ON_MXFP4)] * 4))
    assert in_parts(simulated, 1) == tuple(simulated)


def test_experts_that_are_brought_one_by_one_launch_once_what_parts_launch_each() -> None:
    attend, route, product, add = (
        Kernel(8, 50, name) for name in ("packed attention", "route_tokens", ON_MXFP4, "add")
    )
    simulated = [Kernels(1.0, (add, add)), Kernels(3.0, (attend, attend, *(route, product, product) * 4, add))]
    groups = at_once(simulated, 4)
    assert groups == (Kernels(1.0, (add, add)), Kernels(3.0, (attend, attend, route, product, product, add)))
    assert at_once(simulated, 1) == tuple(simulated)
