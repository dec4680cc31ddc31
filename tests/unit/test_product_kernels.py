"""The GPU's products on codes, interpreted on the CPU: `TRITON_INTERPRET=1`, with Triton and a numpy before 2.4."""

from __future__ import annotations

import importlib.util
import os
from itertools import product
from pathlib import Path

import pytest
import torch
from packed import fill_codes, packed_checkpoint
from quantized import mxfp4_checkpoint
from small_models import build_model
from wire_reference import through_codes

from zeroinf.compat.models import is_experts
from zeroinf.engines.stream import experts
from zeroinf.engines.stream.coded_weight import WeightMatrix
from zeroinf.engines.stream.codes import encode
from zeroinf.model.inspect import build_meta
from zeroinf.model.quantized.expansion import Expansion, expansions
from zeroinf.model.quantized.expert_codes import MXFP4, CodeKind
from zeroinf.model.resolve import resolve_model
from zeroinf.planner.wire import CODES, Codes, Wire

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None,
    reason="needs TRITON_INTERPRET=1 and Triton",
)


def coded(weights: torch.Tensor, wire: Wire) -> WeightMatrix:
    if wire == "model":
        return WeightMatrix(weights, None, tuple(weights.shape), 16, 1)
    kind, elements = CODES[wire], weights.numel()
    codes = torch.empty(kind.nbytes(elements), dtype=torch.uint8)
    scales = torch.empty(elements // kind.group, dtype=torch.bfloat16)
    encode(weights.view(-1), weights.dtype, kind, codes, scales)
    return WeightMatrix(codes, scales, tuple(weights.shape), kind.bits, kind.group)


def decoded(weights: torch.Tensor, wire: Wire) -> torch.Tensor:
    return weights if wire == "model" else through_codes(weights, wire)


WIRES: list[Wire] = ["int4", "int8", "model"]


@pytest.fixture(params=[False, True], ids=["warps", "warp groups"])
def as_on_hopper(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes of four bits are multiplied in the order of other GPUs, and of Hopper."""
    from zeroinf.engines.stream import product_kernels

    monkeypatch.setattr(product_kernels, "has_warp_groups", lambda device: request.param)


@pytest.mark.usefixtures("as_on_hopper")
@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "parts"), [(5, 40, 256, 1), (17, 70, 320, None), (3, 64, 1024, 2)]
)
def test_products_are_those_of_the_weights(rows: int, outputs: int, inputs: int, parts: int | None, wire: Wire) -> None:
    from zeroinf.engines.stream.product_kernels import product

    weights, x, bias = torch.randn(outputs, inputs), torch.randn(rows, inputs), torch.randn(outputs)
    found = product(x, coded(weights, wire), bias, parts=parts)
    assert torch.allclose(found, x @ decoded(weights, wire).T + bias, atol=1e-4)


@pytest.mark.usefixtures("as_on_hopper")
@pytest.mark.parametrize("wire", WIRES)
def test_experts_are_those_that_tokens_are_routed_to(wire: Wire) -> None:
    from zeroinf.engines.stream import expert_kernels as kernels
    from zeroinf.engines.stream.product_kernels import ProductTile

    count, each, tokens, width, inner = 5, 3, 23, 64, 128
    up, down = torch.randn(count, 2 * inner, width) / 8, torch.randn(count, width, inner) / 8
    x, weights = torch.randn(tokens, width), torch.rand(tokens, each)
    index = torch.rand(tokens, count).topk(each).indices
    index[3, 1] = count  # of nobody
    tile, second = ProductTile(16, 64, 64, 4, 2), coded(down, wire)
    routing = kernels.route(index, count, tile.rows)
    both = kernels.product_by_expert(x, coded(up, wire), None, routing, each, tile)
    out = kernels.product_by_expert(kernels.gate(both), second, None, routing, 1, tile)
    found = kernels.combine(out, index, weights, count)
    out = kernels.product_by_expert(kernels.gate(both, second), second, None, routing, 1, tile, is_ordered=True)
    assert torch.equal(kernels.combine(out, index, weights, count), found)
    right = torch.zeros(tokens, width)
    for token in range(tokens):
        for turn, expert in enumerate(index[token].tolist()):
            if expert < count:
                gate, value = (decoded(up, wire)[expert] @ x[token]).chunk(2)
                own = decoded(down, wire)[expert] @ (torch.nn.functional.silu(gate) * value)
                right[token] += weights[token, turn] * own
    assert torch.allclose(found, right, atol=1e-4)


def test_rows_are_gathered_in_order_of_experts() -> None:
    from zeroinf.engines.stream import expert_kernels as kernels

    x, index = torch.randn(9, 40)[:, ::2], torch.rand(9, 5).topk(3).indices
    index[2, 1] = 5  # of nobody
    routing = kernels.route(index, 5, 16)
    found, known = kernels.gather(x, index, routing), int(routing.ends[-1])
    slots = routing.slots[:known].long()
    assert known == 26
    assert index.flatten()[slots].tolist() == sorted(index.flatten()[index.flatten() < 5].tolist())
    assert torch.equal(found[:known], x[slots // 3])


def test_experts_that_lie_transposed_are_multiplied() -> None:
    from zeroinf.engines.stream import expert_kernels as kernels
    from zeroinf.engines.stream.product_kernels import ProductTile

    weights, x = torch.randn(4, 64, 48), torch.randn(9, 64)  # (experts, inputs, outputs)
    index, turned = torch.arange(9).remainder(4)[:, None], weights.transpose(1, 2)
    routing, bias = kernels.route(index, 4, 16), torch.randn(4, 48)
    matrix = WeightMatrix(turned, None, (4, 48, 64), 16, 1)
    found = kernels.product_by_expert(x, matrix, bias, routing, 1, ProductTile(16, 64, 64, 4, 2))
    right = torch.einsum("toi,ti->to", turned[index[:, 0]], x) + bias[index[:, 0]]
    assert torch.allclose(found, right, atol=1e-4)


NVFP4 = [CodeKind(4, 16, torch.float8_e4m3fn, is_float=True, shared=way) for way in ("times", "divides")]
INTEGERS = [
    CodeKind(bits, group, scales, has_zeros=has_zeros)
    for bits, group, scales, has_zeros in (
        (4, 32, torch.bfloat16, False), (4, 128, torch.float16, True), (4, 64, torch.float32, False),
        (4, 16, torch.bfloat16, True),
    )
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "each"),
    [
        *product((CODES["int4"], CODES["int8"], Codes(16, 1)), (0, 2)),
        *((kind, 2) for kind in (MXFP4, *NVFP4, *INTEGERS)),
    ],
)
def test_kernels_are_tried_before_they_are_used(
    kind: Codes | CodeKind, each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zeroinf.engines.stream import expert_kernels, kernel_trials, product_kernels

    monkeypatch.setattr(kernel_trials, "ROWS_TRIED", (16,))
    given = torch.device("cpu"), torch.float32, kind, each
    assert kernel_trials.why_not(*given) == ""
    for module in (product_kernels, expert_kernels):
        monkeypatch.setattr(module, "launch_product", lambda *args: args[3].fill_(float("nan")))
    assert "not those of the weights" in kernel_trials.why_not(*given)


@pytest.mark.parametrize("most", [40, 0])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_experts_of_models_compute_what_transformers_computes(
    name: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By few rows of each expert, and by more than that."""
    monkeypatch.setattr(experts, "MOST_ROWS_BY_EXPERT", {16: most})
    monkeypatch.setattr(experts, "_takes_grouped", lambda matrices, dtype: experts.takes_grouped(matrices))
    for each, value in (("DTYPES", (torch.float32,)), ("_fits", lambda *_: True), ("expert_products", lambda *_: True)):
        monkeypatch.setattr(experts, each, value)
    used, kernel = [], experts.run_experts
    monkeypatch.setattr(experts, "run_experts", lambda *args: used.append(args[0]) or kernel(*args))
    model, ids = build_model(name), torch.randint(1, 90, (1, 7))
    with torch.inference_mode():
        right = model(ids, use_cache=False).logits
        experts.use_experts_kernels(model, torch.device("cpu"), None)
        found = model(ids, use_cache=False).logits
    assert used
    assert torch.allclose(found, right, atol=1e-4)


CODED = ["fp8_experts_fp4", "nvfp4", "modelopt_nvfp4", "w4a16", "w4a16_asymmetric", "gptq", "awq"]
"""Ways in which checkpoints have experts that are multiplied as codes."""


@pytest.mark.parametrize(
    ("method", "most"),
    [("mxfp4", 40), ("mxfp4", 0), *((method, 40) for method in CODED), ("nvfp4", 0)],
)
def test_experts_of_a_checkpoint_are_multiplied_as_codes(
    method: str, most: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With few rows of each expert; with more, weights of some experts after the others are expanded."""
    from zeroinf.engines.stream import expert_kernels as kernels

    monkeypatch.setattr(kernels, "MOST_MXFP4_ROWS_BY_EXPERT", most)
    monkeypatch.setattr(kernels, "experts_at_once", lambda weight: 3)
    if method == "mxfp4":
        mxfp4_checkpoint(tmp_path)
    else:
        packed_checkpoint("qwen3_moe", method, tmp_path)
    config = resolve_model(str(tmp_path)).config
    model = build_meta(config, "float32").to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    (module, *_) = [each for each in model.modules() if is_experts(each)]
    fill_codes(module, generator)
    x, index = torch.randn(7, config.hidden_size), torch.rand(7, module.num_experts).topk(2).indices
    weights = torch.rand(7, 2)
    for each, value in (("DTYPES", (torch.float32,)), ("_FLOAT_DTYPES", (torch.float32,)), ("_fits", lambda *_: True)):
        monkeypatch.setattr(experts, each, value)
    tried: list[object] = []
    monkeypatch.setattr(experts, "expert_products", lambda *given: tried.append(given[2]) or True)
    with torch.inference_mode():
        right = module(x, index, weights)
        assert experts.use_experts_kernels(model, torch.device("cpu"), None)
        assert set(tried) == {experts.kind_of(module)}
        assert not expansions(module)  # nothing is expanded
        monkeypatch.setattr(Expansion, "open", lambda *_: pytest.fail("weights are expanded"))
        assert torch.allclose(module(x, index, weights), right, rtol=1e-3, atol=1e-3)


def test_what_hangs_on_the_number_of_experts_is_compiled_ahead() -> None:
    from zeroinf.engines.stream import expert_kernels as kernels

    kernels.compile_for(5, 3, torch.device("cpu"), torch.float32)
