"""Simulates experts, norms and rotary embeddings as the stream engine's kernels compute them on a GPU: their
allocations, arithmetic and traffic.

On the meta device each kernel is an operator of its own, which the recorder notes under its name. What the kernels do
not do runs as transformers runs it, here as there.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from zeroinf.compat import experts
from zeroinf.engines.stream.coded_weight import WeightMatrix, experts_at_once
from zeroinf.engines.stream.experts import (
    coded_experts,
    compute_few,
    compute_many,
    matrices_of,
    multiply_by_codes,
    run_by_default,
    takes_grouped,
)
from zeroinf.engines.stream.norms import NormByKernel, norms_of
from zeroinf.engines.stream.rotary import find_rotary, rotating

_NAME = "zeroinf on paper"
_PREFIX = "zeroinf::"
_ROWS = 64
"""Of a tile: sizes of what routing holds hang on it by some bytes."""


def simulate_kernels(model: Any) -> None:
    """Let experts, norms and rotary embeddings of `model`, on the meta device, take what the kernels take where these
    would run."""
    if experts.replace_default_experts(model, _NAME, _run):
        multiply_by_codes(coded_experts(model), _NAME)
    for module, form in list(norms_of(model)):
        NormByKernel(module, form, _norm)
    if find_rotary(model):
        model.forward = rotating(_rotate)(model.forward)


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float, **form: bool) -> torch.Tensor:
    out: torch.Tensor = torch.ops.zeroinf.rms_norm(x, weight)
    return out


def _rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, turned: int
) -> tuple[torch.Tensor, torch.Tensor]:
    found: tuple[torch.Tensor, torch.Tensor] = torch.ops.zeroinf.rotate(q, k, cos, sin)
    return found


def _run(module: Any, states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    matrices = matrices_of(module) if states.dim() == index.dim() == 2 and states.numel() > 0 else None
    if matrices is None:
        return run_by_default(module, states, index, weights)
    # Many rows take more memory than few, and forwards of any size are to do the same things.
    compute = compute_many if takes_grouped(matrices) else compute_few
    return compute(_OnPaper, module, matrices, states, index, weights)


class _OnPaper:
    """What `expert_kernels` has, as operators."""

    @staticmethod
    def are_in_full(weight: WeightMatrix, rows: int) -> bool:
        return weight.is_float  # what takes more memory

    @staticmethod
    def product_in_full(
        x: torch.Tensor, weight: WeightMatrix, bias: torch.Tensor | None, routing: Any, each: int, tile: Any
    ) -> torch.Tensor:
        whole = x.new_empty(experts_at_once(weight), *weight.shape[1:])
        out: torch.Tensor = torch.ops.zeroinf.multiply_mxfp4_by_experts(
            x, weight.data, weight.scales, bias, each, weight.shape[1]
        )
        del whole
        return out

    @staticmethod
    def tile_for(rows: int, bits: int, device: torch.device) -> Any:
        return SimpleNamespace(rows=_ROWS)

    @staticmethod
    def route(index: torch.Tensor, count: int, rows: int) -> Any:
        held = torch.ops.zeroinf.route_tokens(index, count, rows)
        return SimpleNamespace(held=held, ends=held[:count], slots=index.numel())

    @staticmethod
    def gather(x: torch.Tensor, index: torch.Tensor, routing: Any) -> torch.Tensor:
        out: torch.Tensor = torch.ops.zeroinf.gather_rows(x, index.shape[-1])
        return out

    @staticmethod
    def add_bias(y: torch.Tensor, bias: torch.Tensor, routing: Any) -> None:
        torch.ops.zeroinf.add_bias(y, bias)

    @staticmethod
    def product_by_expert(
        x: torch.Tensor,
        weight: WeightMatrix,
        bias: torch.Tensor | None,
        routing: Any,
        each: int,
        tile: Any,
        **how: bool,
    ) -> torch.Tensor:
        operators = torch.ops.zeroinf
        are_codes = weight.of_checkpoint is not None
        multiply = operators.multiply_integers_by_experts if are_codes else operators.multiply_by_experts
        out: torch.Tensor = multiply(x, weight.data, bias, each)
        return out

    @staticmethod
    def gate(x: torch.Tensor, before: WeightMatrix | None = None) -> torch.Tensor:
        out: torch.Tensor = torch.ops.zeroinf.gate_halves(x)
        return out

    @staticmethod
    def combine(
        y: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, count: int, routing: Any = None
    ) -> torch.Tensor:
        out: torch.Tensor = torch.ops.zeroinf.combine_experts(y, weights)
        return out


for schema in (
    "route_tokens(Tensor index, int count, int rows) -> Tensor",
    "gather_rows(Tensor x, int each) -> Tensor",
    "multiply_by_experts(Tensor x, Tensor weight, Tensor? bias, int each) -> Tensor",
    "multiply_mxfp4_by_experts(Tensor x, Tensor codes, Tensor scales, Tensor? bias, int each, int outputs) -> Tensor",
    "multiply_integers_by_experts(Tensor x, Tensor codes, Tensor? bias, int each) -> Tensor",
    "add_bias(Tensor(a!) y, Tensor bias) -> ()",
    "gate_halves(Tensor x) -> Tensor",
    "combine_experts(Tensor y, Tensor weights) -> Tensor",
    "rms_norm(Tensor x, Tensor weight) -> Tensor",
    "rotate(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
):
    torch.library.define(_PREFIX + schema.partition("(")[0], "(" + schema.partition("(")[2])


@torch.library.impl(_PREFIX + "route_tokens", "Meta")
def _routed(index: torch.Tensor, count: int, rows: int) -> torch.Tensor:
    """Of 4 bytes each: slots in order, their places, their ranks by expert, counts, ends, and the table of tiles. Tiles
    are as many as their kernel may need, rounded up for each token: so the table grows evenly with the tokens."""
    tokens, each = index.shape
    tiles = tokens * -(-each // rows) + count
    return index.new_empty(3 * index.numel() + 2 * count + 3 * tiles, dtype=torch.int32)


def _multiplied(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, each: int) -> torch.Tensor:
    return x.new_empty(x.shape[0] * each, weight.shape[1])


for own in ("multiply_by_experts", "multiply_integers_by_experts"):
    torch.library.impl(_PREFIX + own, "Meta", _multiplied)


@torch.library.impl(_PREFIX + "multiply_mxfp4_by_experts", "Meta")
def _multiplied_by_codes(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, each: int, outputs: int
) -> torch.Tensor:
    return x.new_empty(x.shape[0] * each, outputs)


@torch.library.impl(_PREFIX + "gather_rows", "Meta")
def _gathered(x: torch.Tensor, each: int) -> torch.Tensor:
    return x.new_empty(x.shape[0] * each, x.shape[1])


@torch.library.impl(_PREFIX + "add_bias", "Meta")
def _biased(y: torch.Tensor, bias: torch.Tensor) -> None:
    """Nothing is computed."""


@torch.library.impl(_PREFIX + "gate_halves", "Meta")
def _gated(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // 2)


@torch.library.impl(_PREFIX + "combine_experts", "Meta")
def _combined(y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return y.new_empty(weights.shape[0], y.shape[1])


@torch.library.impl(_PREFIX + "rms_norm", "Meta")
def _normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.impl(_PREFIX + "rotate", "Meta")
def _rotated(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token by token in memory."""
    outs = (x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k))
    return next(outs), next(outs)


def product_flops(x: torch.Tensor, weight: torch.Tensor, *ignored: Any, out_val: torch.Tensor, **more: Any) -> int:
    """Of `multiply_by_experts` and `multiply_mxfp4_by_experts`, as `torch.utils.flop_counter` counts."""
    return 2 * out_val.numel() * x.shape[1]
