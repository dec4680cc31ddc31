"""The GPU's products on codes, interpreted on the CPU: `TRITON_INTERPRET=1`, with Triton and a numpy before 2.4."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from wire_reference import through_codes

from zeroinf.engines.stream.coded_weight import Matrix
from zeroinf.engines.stream.codes import encode
from zeroinf.planner.wire import CODES, Wire

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None,
    reason="needs TRITON_INTERPRET=1 and Triton",
)


def coded(weights: torch.Tensor, wire: Wire) -> Matrix:
    if wire == "model":
        return Matrix(weights, None, tuple(weights.shape), 16, 1)
    kind, elements = CODES[wire], weights.numel()
    codes = torch.empty(kind.nbytes(elements), dtype=torch.uint8)
    scales = torch.empty(elements // kind.group, dtype=torch.bfloat16)
    encode(weights.view(-1), weights.dtype, kind, codes, scales)
    return Matrix(codes, scales, tuple(weights.shape), kind.bits, kind.group)


def decoded(weights: torch.Tensor, wire: Wire) -> torch.Tensor:
    return weights if wire == "model" else through_codes(weights, wire)


WIRES: list[Wire] = ["int4", "int8", "model"]


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "parts"), [(5, 40, 256, 1), (17, 70, 320, None), (3, 64, 1024, 2)]
)
def test_products_are_those_of_the_weights(rows: int, outputs: int, inputs: int, parts: int | None, wire: Wire) -> None:
    from zeroinf.engines.stream.product_kernels import product

    weights, x, bias = torch.randn(outputs, inputs), torch.randn(rows, inputs), torch.randn(outputs)
    found = product(x, coded(weights, wire), bias, parts=parts)
    assert torch.allclose(found, x @ decoded(weights, wire).T + bias, atol=1e-4)


@pytest.mark.parametrize("wire", WIRES)
def test_experts_are_those_that_tokens_are_routed_to(wire: Wire) -> None:
    from zeroinf.engines.stream import product_kernels as kernels

    experts, each, tokens, width, inner = 5, 3, 23, 64, 128
    up, down = torch.randn(experts, 2 * inner, width) / 8, torch.randn(experts, width, inner) / 8
    x, weights = torch.randn(tokens, width), torch.rand(tokens, each)
    index = torch.rand(tokens, experts).topk(each).indices
    index[3, 1] = experts  # of nobody
    tile = kernels.Tile(16, 64, 64, 4, 2)
    routing = kernels.route(index, experts, tile.rows)
    hidden = kernels.gate(kernels.product_by_expert(x, coded(up, wire), None, routing, each, tile))
    out = kernels.product_by_expert(hidden, coded(down, wire), None, routing, 1, tile)
    found = kernels.combine(out, index, weights, experts)
    right = torch.zeros(tokens, width)
    for token in range(tokens):
        for turn, expert in enumerate(index[token].tolist()):
            if expert < experts:
                gate, value = (decoded(up, wire)[expert] @ x[token]).chunk(2)
                own = decoded(down, wire)[expert] @ (torch.nn.functional.silu(gate) * value)
                right[token] += weights[token, turn] * own
    assert torch.allclose(found, right, atol=1e-4)
