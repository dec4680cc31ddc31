"""Figures that plans take for granted: which file counts, and what a wrong one says."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from zeroinf.paths import configs_directory
from zeroinf.planner.coded_products import (
    EXPAND,
    EXPAND_MXFP4,
    ON_CODES,
    ON_CODES_BY_EXPERT,
    ON_EXPANDED_MXFP4,
)
from zeroinf.planner.figures import FittedFigures, fitted_figures, nearest, unmeasured_figures
from zeroinf.planner.kernel_times import kernel_s
from zeroinf.planner.workload import Kernel

H200 = configs_directory() / "figures" / "h200.json"


def test_the_figures_of_the_nearest_generation_count() -> None:
    hopper = fitted_figures((9, 0))
    ampere = replace(hopper, gpu="another", compute_capability=(8, 0))
    found = [nearest((hopper, ampere), capability).gpu for capability in [(7, 5), (8, 6), (8, 9), (9, 0), (12, 0)]]
    assert found == ["another", "another", "another", hopper.gpu, hopper.gpu]


def test_a_card_of_an_unknown_generation_counts_as_the_slowest_products() -> None:
    figures = unmeasured_figures()
    assert figures.card((99, 9)) == figures.card(None)
    assert figures.card(None).tflops == min(card.tflops for card in figures.cards)
    assert figures.card((9, 0)).tflops > figures.card((8, 9)).tflops


@pytest.mark.parametrize("group", ["kernels", "expansion", "passes", "memory", "engines"])
def test_each_group_names_its_source_and_its_date(group: str) -> None:
    written = json.loads(H200.read_bytes())
    for wrong in ({"date": "some day"}, {"unknown": 1}):
        with pytest.raises(ValidationError, match=group):
            TypeAdapter(FittedFigures).validate_python({**written, group: {**written[group], **wrong}})
    del written[group]["source"]
    with pytest.raises(ValidationError, match=rf"{group}.source"):
        TypeAdapter(FittedFigures).validate_python(written)


def test_another_file_changes_what_is_planned() -> None:
    written = json.loads(H200.read_bytes())
    written["expansion"]["operators"]["expand_fp8"] /= 2
    slower = TypeAdapter(FittedFigures).validate_python(written)
    kernel = Kernel(0, 10**9, "expand_fp8", "crossed")
    times = [kernel_s(kernel, figures, 1.0, 1000.0)[1] for figures in (slower, fitted_figures())]
    assert times[0] == pytest.approx(2 * times[1])


def test_each_operator_is_one_that_forwards_have() -> None:
    """A name that no kernel has would be ignored, and the kernel's own figure with it."""
    import zeroinf.simulation.kernels  # noqa: F401  it defines operators

    written = json.loads(H200.read_bytes())
    names = {
        *written["kernels"]["own_products"],
        *written["kernels"]["operators"],
        *written["passes"]["triton_kernels"],
    }
    called = {ON_CODES, ON_CODES_BY_EXPERT, EXPAND, ON_EXPANDED_MXFP4, EXPAND_MXFP4}
    called |= {"packed attention", "efficient attention", "packed write"}
    known = (torch.ops.aten, torch.ops.zeroinf)
    assert [name for name in names - called if not any(hasattr(each, name) for each in known)] == []
