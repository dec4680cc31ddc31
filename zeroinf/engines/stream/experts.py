"""Experts of mixtures on a GPU, for every module that takes part in transformers' experts interface.

Tokens are routed by two kernels, each product reads its rows where they lie and its weights as they rest (codes, or
numbers), and one kernel sums what a token's experts gave: no sort, no gather, no scatter over everything, and nothing
that waits for the device. Activations are the module's own, except for SiLU and a product, which is one kernel. What
these kernels do not do runs as transformers runs it.
"""

from __future__ import annotations

from typing import Any

import torch

from zeroinf.compat import experts
from zeroinf.engines.stream.coded_weight import CodedWeight, Matrix

NAME = "zeroinf"


def use_experts_kernels(model: Any) -> None:
    """Let the experts of `model`, if any, run here where they would run as transformers runs them by default."""
    experts.replace_default_experts(model, NAME, run_experts)


def run_experts(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """`hidden_states` (tokens, width) through the experts of `module` that `top_k_index` (tokens, of each) names."""
    up, down = _matrices(module) if hidden_states.is_cuda and hidden_states.numel() else (None, None)
    if up is None or down is None:
        return experts.run_by_default(module, hidden_states, top_k_index, top_k_weights)
    from zeroinf.engines.stream import product_kernels as kernels

    count, each = up.shape[0], top_k_index.shape[-1]
    tile = kernels.tile_for(-(-top_k_index.numel() // count), up.bits)
    routing = kernels.route(top_k_index, count, tile.rows)
    biases = [getattr(module, f"{name}_bias", None) if module.has_bias else None for name in _names(module)]
    hidden = kernels.product_by_expert(hidden_states, up, biases[0], routing, each, tile)
    if not module.has_gate:
        hidden = module.act_fn(hidden)
    elif _is_silu(module):
        hidden = kernels.gate(hidden)
    else:
        hidden = experts.gated(module, hidden)
    out = kernels.product_by_expert(hidden, down, biases[1], routing, 1, tile)
    if getattr(module, "has_post_expert_norm", False):
        out = module.post_expert_norm(out)
    return kernels.combine(out, top_k_index, top_k_weights, count)


def _names(module: Any) -> tuple[str, str]:
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def _matrices(module: Any) -> tuple[Matrix | None, Matrix | None]:
    """The weights of both products, None where a kernel cannot read them."""
    if module.is_transposed or experts.is_split_over_ranks(module):
        return None, None
    up, down = (_matrix(getattr(module, name, None)) for name in _names(module))
    return up, down


def _matrix(weight: Any) -> Matrix | None:
    if isinstance(weight, CodedWeight) and weight.dim() == 3:
        return weight.matrix()
    return None


def _is_silu(module: Any) -> bool:
    """Whether `module` gates by SiLU, of halves that lie side by side, as transformers does by default."""
    return experts.gates_halves(module) and type(module.act_fn).__name__ in ("SiLU", "SiLUActivation")
