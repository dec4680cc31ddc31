"""Tries the kernels of products and of experts before a model uses them, each against products of the weights."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch

from zeroinf.engines.stream.coded_weight import WeightMatrix, matrix_of
from zeroinf.engines.stream.expert_kernels import (
    add_bias,
    combine,
    gate,
    gather,
    product_by_expert,
    product_in_full,
    route,
)
from zeroinf.engines.stream.product_kernels import ROWS_TRIED, in_order, product, tile_for
from zeroinf.model.quantized.coded_experts import tensors_of
from zeroinf.model.quantized.expert_codes import CodeKind, ExpertCodes, expand_experts
from zeroinf.planner.wire import Codes


def why_not(device: torch.device, dtype: torch.dtype, kind: Codes | CodeKind, each: int = 0) -> str:
    """Why these kernels do not run on `device`, empty where they do: each is compiled and used once, those of experts
    where a token goes to `each` of them, or (0) the dense ones. Codes of 16 bits are the weights themselves.

    What they give is compared with products of the weights: a compiler's fault must not become a model's.
    """
    try:
        for rows in ROWS_TRIED:
            generator = torch.Generator(device).manual_seed(rows)
            weights = _example((max(4, each), 256, 1024), device, dtype, kind, generator)
            x = torch.randn(rows, 1024, device=device, generator=generator).to(dtype)
            pairs = _by_expert(x, *weights, each, generator) if each else _dense(x, *weights)
            if not all(bool((one.float() - other).norm() <= 0.01 * other.norm()) for one, other in pairs):
                return f"products of {rows} rows are not those of the weights"
    except Exception as error:  # Triton has errors of many kinds, and none of them may end a run
        return (str(error).splitlines() or [type(error).__name__])[0]
    return ""


_Pairs = list[tuple[torch.Tensor, torch.Tensor]]


def _dense(x: torch.Tensor, stack: WeightMatrix, full: torch.Tensor) -> _Pairs:
    """What products give, with what they should."""
    outputs, inputs = stack.shape[1:]
    first = WeightMatrix(stack.data[0], None, (outputs, inputs), 16, 1)
    if stack.scales is not None:
        elements = outputs * inputs
        codes, scales = stack.data[: elements * stack.bits // 8], stack.scales[: elements // stack.group]
        first = WeightMatrix(codes, scales, (outputs, inputs), stack.bits, stack.group)
    right, bias = x.float() @ full[0].T, x[0, :outputs]
    found = [(product(x, first, None, parts=parts), right) for parts in (1, 2)]
    return [*found, *((product(x, first, bias, parts=parts), right + bias.float()) for parts in (1, 2))]


def _by_expert(
    x: torch.Tensor, stack: WeightMatrix, full: torch.Tensor, each: int, generator: torch.Generator
) -> _Pairs:
    rows, (experts, outputs, _) = x.shape[0], stack.shape
    index = torch.rand(rows, experts, device=x.device, generator=generator).topk(each).indices
    tile = tile_for(rows, stack.bits, x.device)
    routing = route(index, experts, tile.rows)
    found = product_by_expert(x, stack, None, routing, each, tile)
    right = torch.einsum("ti,eoi->teo", x.float(), full)
    right = right.gather(1, index[..., None].expand(-1, -1, outputs)).flatten(0, 1)
    tiles = tile_for(rows, 16, x.device)
    expanded = (
        product_in_full(x, stack, None, route(index, experts, tiles.rows), each, tiles) if stack.is_float else found
    )
    again = product_by_expert(x.repeat_interleave(each, 0), stack, None, routing, 1, tile)
    weights = torch.rand(rows, each, device=x.device, generator=generator).to(x.dtype)
    summed = (found.float().view(rows, each, outputs) * weights.float()[..., None]).sum(1)
    gated, value = found.float().chunk(2, -1)
    half = replace(stack, shape=(experts, outputs, outputs // 2))  # what the gate gives is read by such weights
    by_place = gather(x, index, routing)
    bias = x[:experts].contiguous()
    biased = by_place.clone()
    add_bias(biased, bias, routing)
    of_slot = (x.float().repeat_interleave(each, 0) + bias[index.flatten()].float())[routing.slots.long()]
    return [
        (biased, of_slot), (expanded, right),
        (found, right), (again, right), (combine(found, index, weights, experts), summed),
        (combine(by_place, index, weights, experts, routing), x.float() * weights.float().sum(1, keepdim=True)),
        (gate(found), torch.nn.functional.silu(gated) * value),
        (gate(found, half), in_order(gate(found), half)),
    ]  # fmt: skip


def _example(
    shape: tuple[int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    kind: Codes | CodeKind,
    generator: torch.Generator,
) -> tuple[WeightMatrix, torch.Tensor]:
    """Weights as they rest, and in full in float32."""
    if isinstance(kind, CodeKind):
        return _codes_of_checkpoint(shape, device, kind)
    bits, group = kind.bits, kind.group
    if bits == 16:
        weight = torch.randn(shape, device=device, generator=generator).to(dtype)
        return WeightMatrix(weight, None, shape, 16, 1), weight.float()
    elements = prod(shape)
    codes = torch.randint(0, 256, (elements * bits // 8,), dtype=torch.uint8, device=device, generator=generator)
    scales = (torch.rand(elements // group, device=device, generator=generator) * 0.01 + 0.01).bfloat16()
    low = codes.view(-1, group * bits // 8).int()
    values = torch.cat((low & 15, low >> 4), 1) - 8 if bits == 4 else low - 128
    full = (values * scales.float()[:, None]).to(dtype).float().view(shape)
    return WeightMatrix(codes, scales, shape, bits, group), full


def _codes_of_checkpoint(
    shape: tuple[int, int, int], device: torch.device, kind: CodeKind
) -> tuple[WeightMatrix, torch.Tensor]:
    """The same of a checkpoint, random, with weights in full as the CPU expands them."""
    generator = torch.Generator().manual_seed(shape[0])
    made = {}
    for role, (size, dtype) in tensors_of(kind, *shape, matrices=2).items():
        number = torch.randint(0, 256, (*size, dtype.itemsize), dtype=torch.uint8, generator=generator)
        if role in ("blocks", "zeros"):
            made[role] = number.view(dtype)[..., 0]
        elif dtype.itemsize == 1:  # near one, as an exponent and in FP8
            made[role] = (number[..., 0] % 8 + (118 if dtype == torch.uint8 else 52)).view(dtype)
        else:
            made[role] = (torch.rand(size, generator=generator) * 0.01 + 0.01).to(dtype)
    codes = made["blocks"].view(torch.uint8).flatten(2), made["scales"], made.get("zeros"), made.get("shared")
    full = torch.empty(shape)
    expand_experts(full, ExpertCodes(kind, *codes))
    moved = (None if one is None else one.to(device) for one in codes)
    return matrix_of(ExpertCodes(kind, *moved)), full.to(device)  # type: ignore[arg-type]
