"""Experts of mixtures on a GPU, for every module that takes part in transformers' experts interface.

Tokens are routed by two kernels. Where experts have few rows each, a product reads these where they lie and its weights
as they rest (codes, or numbers); where they have many, rows are gathered in order of experts and multiplied by weights
in full, by torch. One kernel sums what a token's experts gave: no sort, no scatter over everything, and nothing that
waits for the device. Activations are the module's own, except for SiLU and a product, which is one kernel. What these
kernels do not do runs as transformers runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from zeroinf.compat import experts
from zeroinf.compat.experts import grouped_product
from zeroinf.compat.models import experts_method, is_experts
from zeroinf.engines.stream.coded_weight import CodedWeight, WeightMatrix, matrix_of
from zeroinf.engines.stream.products import DTYPES, expert_products
from zeroinf.model.anatomy import Anatomy
from zeroinf.model.quantized.expansion import expansion_of, expansions, opened
from zeroinf.model.quantized.expert_codes import CodeKind
from zeroinf.planner.coded_products import by_expert
from zeroinf.planner.wire import CODES, MOST_ROWS_BY_EXPERT, Codes, Wire

NAME = "zeroinf"

_MANY = 128
"""Rows of a tile in tables that nothing reads."""
_FLOAT_DTYPES = (torch.bfloat16,)
"""Which codes that are numbers, times their scales, fit."""
_GROUPED_CAPABILITIES = (9, 10)
"""Major compute capabilities for which torch has kernels of grouped products."""


def use_experts_kernels(model: Any, device: torch.device, kind: Codes | None) -> bool:
    """Let the experts of `model`, if any, run here where they would run as transformers runs them by default, and where
    kernels multiply by their weights, which rest as codes of `kind` or (None) as numbers; say whether they do."""
    modules = [module for module in model.modules() if is_experts(module)]
    if not modules or not experts.runs_by_default(model):
        return False
    coded = [module for module in coded_experts(model) if expert_products(device, model.dtype, kind_of(module))]
    if not coded and not expert_products(device, model.dtype, kind):
        return False
    experts.replace_default_experts(model, NAME, run_experts)
    multiply_by_codes(coded, NAME)
    return True


def coded_experts(model: Any) -> list[Any]:
    """The experts of `model` whose weights its checkpoint has as codes that kernels multiply by."""
    modules = (module for module in model.modules() if is_experts(module))
    found = ((module, kind_of(module)) for module in modules)
    return [
        module
        for module, kind in found
        if kind is not None and model.dtype in (_FLOAT_DTYPES if kind.is_float else DTYPES)
    ]


def kind_of(module: Any) -> CodeKind | None:
    """The kind of codes that the experts `module` holds; None where products cannot be computed with them."""
    owner = expansion_of(module)
    return next(iter(owner.codes().values())).kind if owner is not None and owner.has_codes else None


def multiply_by_codes(modules: Sequence[Any], name: str) -> None:
    """Leave the weights of `coded_experts` as codes wherever transformers runs experts as `name`."""
    for module in modules:
        owner = expansion_of(module)
        assert owner is not None
        owner.rest(lambda own=module: experts_method(own) == name)  # type: ignore[misc]


def expert_compilations(model: Any, anatomy: Anatomy, wire: Wire, device: torch.device) -> list[Callable[[], None]]:
    """Calls that each compile the products with one kind of weights of experts of `model`, which lies on the meta
    device, as those of weights that cross as `wire` would be launched on `device`."""
    modules, coded = dict(model.named_modules()), by_expert(anatomy, wire)
    found: dict[object, Callable[[], None]] = {}
    for own in anatomy.experts:
        module = modules[own.module]
        with opened(expansions(module)):
            matrices = matrices_of(module)
        for name, one, each in zip(_names(module), matrices or (), (own.each, 1), strict=False):
            matrix = one.matrix
            if wire != "model":
                if f"{own.module}.{name}" not in coded:
                    continue
                bits, group = CODES[wire].bits, CODES[wire].group
                codes = torch.empty(0, dtype=torch.uint8, device="meta")
                matrix = WeightMatrix(codes, codes.bfloat16(), matrix.shape, bits, group)
            kind = matrix.shape[1:], matrix.bits, matrix.data.stride()[1:], one.bias is None, each
            found[kind] = partial(_compile_product, matrix, one.bias, each, device, model.dtype)
    return list(found.values())


def _compile_product(*given: Any) -> None:
    from zeroinf.engines.stream.expert_kernels import compile_product_by_expert

    compile_product_by_expert(*given)


def run_experts(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """`hidden_states` (tokens, width) through the experts of `module` that `top_k_index` (tokens, of each) names.

    A token whose number no expert of the module has goes through none.
    """
    matrices = matrices_of(module) if _fits(hidden_states, top_k_index) else None
    if matrices is None:
        return run_by_default(module, hidden_states, top_k_index, top_k_weights)
    from zeroinf.engines.stream import expert_kernels

    rows = -(-top_k_index.numel() // matrices[0].matrix.shape[0])
    compute = (
        compute_few
        if rows <= MOST_ROWS_BY_EXPERT[matrices[0].matrix.bits] or not _takes_grouped(matrices, hidden_states.dtype)
        else compute_many
    )
    return compute(expert_kernels, module, matrices, hidden_states, top_k_index, top_k_weights)


def run_by_default(module: Any, states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """As transformers runs experts, with weights in full."""
    owner = expansion_of(module)
    with opened([] if owner is None or not owner.rests else [owner]):
        return experts.run_by_default(module, states, index, weights)


@dataclass(frozen=True, slots=True)
class ExpertMatrix:
    """The weights of all experts in one of their products."""

    matrix: WeightMatrix
    bias: torch.Tensor | None
    """(experts, outputs)."""
    full: Callable[[], torch.Tensor] | None
    """Gives the weights in full (experts, outputs, inputs), until those of another product are asked for; None where
    they are never in full."""


Matrices = tuple[ExpertMatrix, ExpertMatrix]


def compute_few(
    kernels: Any, module: Any, matrices: Matrices, states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """As `run_experts`, by the kernels that read rows where they lie and weights as they rest; codes of a checkpoint
    become weights before products of many rows, of some experts after the others."""
    up, down = matrices
    count, each = up.matrix.shape[0], index.shape[-1]
    rows = -(-index.numel() // count)
    in_full = kernels.are_in_full(up.matrix, rows)
    tile = kernels.tile_for(rows, 16 if in_full else up.matrix.bits, states.device)
    routing = kernels.route(index, count, tile.rows)

    def product(x: torch.Tensor, one: ExpertMatrix, each: int, **how: bool) -> torch.Tensor:
        multiply = kernels.product_in_full if in_full else kernels.product_by_expert
        out: torch.Tensor = multiply(x, one.matrix, one.bias, routing, each, tile, **how)
        return out

    hidden = product(states, up, each)
    if _is_gated_by_kernel(module) and not in_full:
        out = product(kernels.gate(hidden, down.matrix), down, 1, is_ordered=True)
    else:
        out = product(_gated(kernels, module, hidden), down, 1)
    out = _normed(module, out)
    result: torch.Tensor = kernels.combine(out, index, weights, count)
    return result


def compute_many(
    kernels: Any, module: Any, matrices: Matrices, states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """As `run_experts`, by torch's grouped products with rows in order of experts and weights in full."""
    up, down = matrices
    count = up.matrix.shape[0]
    routing = kernels.route(index, count, _MANY)
    rows = kernels.gather(states, index, routing)
    hidden = _grouped(kernels, rows, up, routing)
    del rows  # which take the most memory of all
    hidden = _gated(kernels, module, hidden)
    out = _normed(module, _grouped(kernels, hidden, down, routing))
    result: torch.Tensor = kernels.combine(out, index, weights, count, routing)
    return result


def _grouped(kernels: Any, rows: torch.Tensor, one: ExpertMatrix, routing: Any) -> torch.Tensor:
    assert one.full is not None
    out = grouped_product(rows, one.full().mT, routing.ends)
    if one.bias is not None:
        kernels.add_bias(out, one.bias, routing)
    return out


def _gated(kernels: Any, module: Any, hidden: torch.Tensor) -> torch.Tensor:
    if _is_gated_by_kernel(module):
        return kernels.gate(hidden)  # type: ignore[no-any-return]
    if module.has_gate:
        return experts.gated(module, hidden)
    activated: torch.Tensor = module.act_fn(hidden)
    return activated


def _normed(module: Any, out: torch.Tensor) -> torch.Tensor:
    if getattr(module, "has_post_expert_norm", False):
        return module.post_expert_norm(out)  # type: ignore[no-any-return]
    return out


def _fits(states: torch.Tensor, index: torch.Tensor) -> bool:
    return states.is_cuda and states.dim() == index.dim() == 2 and states.numel() > 0 and states.dtype in DTYPES


def takes_grouped(matrices: Matrices) -> bool:
    """Whether torch multiplies rows in order of experts by such weights: they are in full, and their rows aligned."""
    return all(one.full is not None and one.matrix.shape[1] % 8 == one.matrix.shape[2] % 8 == 0 for one in matrices)


def _takes_grouped(matrices: Matrices, dtype: torch.dtype) -> bool:
    """The same for this GPU, which has a kernel for them: elsewhere torch waits for the GPU."""
    weights = matrices[0].matrix.data
    return dtype == torch.bfloat16 and _has_grouped(weights.device) and takes_grouped(matrices)


@cache
def _has_grouped(device: torch.device) -> bool:
    """Asked once: torch takes its time for an answer."""
    return torch.cuda.get_device_capability(device)[0] in _GROUPED_CAPABILITIES


def matrices_of(module: Any) -> Matrices | None:
    """The weights and biases of both products, None where a kernel cannot read them."""
    found = []
    for name in _names(module):
        one = _matrix(module, name)
        if one is None:
            return None
        found.append(one)
    return found[0], found[1]


def _names(module: Any) -> tuple[str, str]:
    """The parameters of both products."""
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


def _matrix(module: Any, name: str) -> ExpertMatrix | None:
    bias = getattr(module, f"{name}_bias") if module.has_bias else None
    if isinstance(bias, CodedWeight):
        bias = bias.full()
    owner = expansion_of(module)
    if owner is not None and owner.rests:
        return ExpertMatrix(matrix_of(owner.codes()[name]), bias, None)
    weight = getattr(module, name, None)
    if isinstance(weight, CodedWeight):
        matrix = weight.matrix() if len(weight.location.shape) == 3 and not module.is_transposed else None
        return ExpertMatrix(matrix, bias, weight.in_passing) if matrix is not None else None
    if not isinstance(weight, torch.Tensor) or weight.dim() != 3 or weight.dtype not in DTYPES:
        return None
    if not (weight.is_meta or expert_products(weight.device, weight.dtype, None)):
        return None
    full = weight.mT if module.is_transposed else weight
    if not (full.is_contiguous() or full.mT.is_contiguous()):
        return None
    return ExpertMatrix(WeightMatrix(full, None, tuple(full.shape), 16, 1), bias, lambda: full)


def _is_gated_by_kernel(module: Any) -> bool:
    """Whether `module` gates by SiLU, of halves that lie side by side, as transformers does by default."""
    return (
        module.has_gate and experts.gates_halves(module) and type(module.act_fn).__name__ in ("SiLU", "SiLUActivation")
    )
