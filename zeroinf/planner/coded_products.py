"""Adjusts the kernels of a forward for weights that rest as codes and are multiplied as they are.

Simulated forwards multiply by weights of `--wire` in full. On codes, a product of few rows reads fewer bytes; before
others, weights are expanded. By experts that a checkpoint has as codes, they multiply as codes: with many rows, those
of MXFP4 and NVFP4 are expanded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil

from zeroinf.model.anatomy import Anatomy, TensorSpec
from zeroinf.planner.memory import piece_bytes, pieces
from zeroinf.planner.wire import (
    CODES,
    EXPANDED_AT_ONCE_BYTES,
    MOST_CODED_ROWS,
    MOST_MXFP4_ROWS_BY_EXPERT,
    MOST_ROWS_BY_EXPERT,
    MXFP4,
    Wire,
    experts_are_expanded,
    is_coded,
)
from zeroinf.planner.workload import Kernel, Kernels

_BY_EXPERT, _DENSE = ("_grouped_mm", "multiply_by_experts"), ("mm", "addmm")
ON_CODES, ON_CODES_BY_EXPERT, EXPAND = "multiply wire codes", "multiply wire codes by expert", "expand wire codes"
"""What kernels are called that multiply by codes, and that make weights of them."""
ON_MXFP4, ON_EXPANDED_MXFP4, EXPAND_MXFP4 = "multiply_mxfp4_by_experts", "multiply_expanded_mxfp4", "expand_fp4"
"""The same for experts of a checkpoint in MXFP4 (and in NVFP4, whose codes take a sixteenth more), with those that
multiply by what was expanded."""
ON_INTEGERS = "multiply_integers_by_experts"
"""What simulated products with a checkpoint's experts in integers of four bits are called, which are as fast as those
with wire codes."""


@dataclass(frozen=True, slots=True)
class CodedLayers:
    """What products with codes depend on."""

    share: float
    """The bytes of the layers as codes, as a part of those in full."""
    dense: Kernels
    """Kernels that expand every coded weight of the layers but those of experts, once."""
    experts: Kernels
    """The same for those of experts."""
    expert_elements: int
    """Weights of the experts of a layer that has most."""
    bits: int
    """Of a code."""


@lru_cache(maxsize=64)
def by_expert(anatomy: Anatomy, wire: Wire) -> frozenset[str]:
    """Names of the weights of experts that are multiplied as codes: rows are whole groups."""
    if wire == "model":
        return frozenset()
    names = {name for experts in anatomy.experts if not experts.is_transposed for name in experts.tensors}
    return frozenset(
        tensor.name
        for _, tensor in _coded(anatomy, wire)
        if tensor.name in names and len(tensor.shape) == 3 and tensor.shape[-1] % CODES[wire].group == 0
    )


@lru_cache(maxsize=64)
def expanded_bytes(anatomy: Anatomy, wire: Wire, parts: int) -> int:
    """Bytes of the slots in which a layer is expanded, whose experts come in so many parts: weights of experts share a
    place there, if they are ever expanded."""
    experts = by_expert(anatomy, wire)
    own = ([tensor for tensor in block.tensors if tensor.name not in experts] for block in anatomy.blocks)
    weights = (tensor for _, tensor in _coded(anatomy, wire) if tensor.name in experts)
    shared = (tensor.nbytes // tensor.shape[0] * ceil(tensor.shape[0] / parts) for tensor in weights)
    has_place = wire != "model" and experts_are_expanded(CODES[wire])
    return max(piece_bytes(rest) for rest in own) + (max(shared, default=0) if has_place else 0)


@lru_cache(maxsize=64)
def coded_layers(anatomy: Anatomy, wire: Wire) -> CodedLayers:
    """The layers of `anatomy` whose weights are transferred as `wire`."""
    share, experts = sum(pieces(anatomy, wire)) / max(1, sum(pieces(anatomy))), by_expert(anatomy, wire)
    kernels: dict[bool, list[Kernel]] = {True: [], False: []}
    elements: dict[int, int] = {}
    for block, tensor in _coded(anatomy, wire):
        kernels[tensor.name in experts].append(Kernel(0, int(tensor.nbytes * (1 + share)), EXPAND))
        if tensor.name in experts:
            elements[block] = elements.get(block, 0) + tensor.numel
    return CodedLayers(
        share=share,
        dense=Kernels(1.0, tuple(kernels[False])),
        experts=Kernels(1.0, tuple(kernels[True])),
        expert_elements=max(elements.values(), default=0),
        bits=CODES[wire].bits if wire != "model" else 16,
    )


def on_codes(groups: Sequence[Kernels], tokens: int, layers: CodedLayers) -> tuple[Kernels, ...]:
    """The kernels `groups` of a forward of so many tokens, those outside of the layers first, with products on codes
    where these are faster and expansions where not."""
    outside, *inside = groups
    rows = max((_rows_by_expert(group, layers) for group in inside), default=0.0)
    are_few = tokens <= MOST_CODED_ROWS[layers.bits], rows <= MOST_ROWS_BY_EXPERT[layers.bits]
    few = {*(_DENSE if are_few[0] else ()), *(_BY_EXPERT if are_few[1] else ())}
    coded = [
        replace(
            group,
            kernels=tuple(
                Kernel(kernel.flops, int(kernel.nbytes * layers.share), _on_codes(kernel), kernel.pattern)
                if kernel.operator in few
                else kernel
                for kernel in group.kernels
            ),
        )
        for group in inside
    ]
    expanded = [one for one, few_rows in zip((layers.dense, layers.experts), are_few, strict=True) if not few_rows]
    return (outside, *coded, *expanded)


def in_parts(groups: Sequence[Kernels], parts: int) -> tuple[Kernels, ...]:
    """The kernels `groups` where experts compute in so many parts: each part was simulated with the rows of all, and
    multiplies its own alone."""
    if parts == 1:
        return tuple(groups)
    own = {*_BY_EXPERT, ON_MXFP4, ON_INTEGERS}
    return tuple(
        replace(
            group,
            kernels=tuple(
                Kernel(kernel.flops // parts, *kernel[1:]) if kernel.operator in own else kernel
                for kernel in group.kernels
            ),
        )
        for group in groups
    )


def at_once(groups: Sequence[Kernels], parts: int) -> tuple[Kernels, ...]:
    """The kernels `groups`, simulated with experts in so many parts, where experts that were brought one by one compute
    as one part: what a layer launches for each part, one after the other, it launches once."""
    if parts == 1:
        return tuple(groups)
    return tuple(replace(group, kernels=_without_repeats(group.kernels, parts)) for group in groups)


def _without_repeats(kernels: tuple[Kernel, ...], times: int) -> tuple[Kernel, ...]:
    """The longest run of kernels that comes so many times without a pause, once; all where there is none."""
    for length in range(len(kernels) // times, 0, -1):
        for start in range(len(kernels) - times * length + 1):
            run, end = kernels[start : start + length], start + times * length
            if kernels[start:end] == run * times:
                return kernels[: start + length] + kernels[end:]
    return kernels


def with_many_rows(groups: Sequence[Kernels], tokens: int, count: int, each: int) -> tuple[Kernels, ...]:
    """The kernels `groups` of a forward of so many tokens, each of which is routed to `each` of `count` experts, with
    those that are in MXFP4 expanded before products where that is faster."""
    groups = [replace(group, kernels=tuple(map(_as_measured, group.kernels))) for group in groups]
    if tokens * each <= count * MOST_MXFP4_ROWS_BY_EXPERT:
        return tuple(groups)
    found = [
        replace(group, kernels=tuple(kernel for kernel in group.kernels if kernel.operator != ON_MXFP4))
        for group in groups
    ]
    for group in groups:
        for kernel in group.kernels:
            if kernel.operator == ON_MXFP4:
                elements = kernel.flops // (2 * tokens * each) * count
                codes, full = MXFP4.nbytes(elements) + MXFP4.scale_bytes(elements), 2 * elements
                turns = ceil(full / EXPANDED_AT_ONCE_BYTES)
                expand = Kernel(0, (codes + full) // turns, EXPAND_MXFP4)
                multiply = Kernel(kernel.flops // turns, (kernel.nbytes - codes + full) // turns, ON_EXPANDED_MXFP4)
                found.append(Kernels(group.times * turns, (expand, multiply)))
    return tuple(found)


def _as_measured(kernel: Kernel) -> Kernel:
    """The kernel under the name that has rates."""
    return Kernel(*kernel[:2], ON_CODES_BY_EXPERT, *kernel[3:]) if kernel.operator == ON_INTEGERS else kernel


def _on_codes(kernel: Kernel) -> str:
    return ON_CODES_BY_EXPERT if kernel.operator in _BY_EXPERT else ON_CODES


def _rows_by_expert(group: Kernels, layers: CodedLayers) -> float:
    """Rows of an expert on average, by the arithmetic of a layer's products."""
    flops = sum(kernel.flops for kernel in group.kernels if kernel.operator in _BY_EXPERT)
    return flops / 2 / layers.expert_elements if layers.expert_elements else 0.0


def _coded(anatomy: Anatomy, wire: Wire) -> list[tuple[int, TensorSpec]]:
    """The weights of the layers that are quantized, with the numbers of these."""
    return [
        (number, tensor)
        for number, block in enumerate(anatomy.blocks)
        for tensor, codes in zip(block.tensors, is_coded(block.tensors, anatomy.dtype, wire), strict=True)
        if codes
    ]
