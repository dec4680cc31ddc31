"""Takes part in transformers' experts interface: a function that runs the experts of every model that dispatches them.

Relies on `transformers.integrations.moe` (since transformers 5.0): `ALL_EXPERTS_FUNCTIONS`, the config's
`_experts_implementation`, and `_apply_gate` and the other attributes that `use_experts_implementation` gives a module.
Without it, experts would run as transformers runs them: by products that sort, gather and scatter.
`tests/unit/test_compat.py` fails when it changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_DEFAULT = "grouped_mm"

Experts = Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""From the module, states (tokens, width), and of each token the numbers and weights (tokens, of each) of its experts
to what these give (tokens, width)."""


def runs_by_default(model: Any) -> bool:
    """Whether experts of `model`, if it has any, run as transformers runs them by default."""
    return getattr(model.config, "_experts_implementation", None) == _DEFAULT


def replace_default_experts(model: Any, name: str, function: Experts) -> bool:
    """Let experts of `model` run by `function`, known to transformers as `name`, where they run by the default, and say
    whether they do."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if not runs_by_default(model):
        return False
    ALL_EXPERTS_FUNCTIONS.register(name, function)
    model.set_experts_implementation(name)
    return True


def run_by_default(module: Any, states: torch.Tensor, numbers: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """As transformers runs the experts `module` by default."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    result: torch.Tensor = ALL_EXPERTS_FUNCTIONS[_DEFAULT](module, states, numbers, weights)
    return result


def gated(module: Any, states: torch.Tensor) -> torch.Tensor:
    """`states`, what the first product of `module` gives, after its gate."""
    result: torch.Tensor = module._apply_gate(states)
    return result


def gates_halves(module: Any) -> bool:
    """Whether `module` gates as transformers does by default: the second half of its states by `act_fn` of the first.
    Relies on `_default_apply_gate`; False without it."""
    from transformers.integrations import moe

    return getattr(type(module), "_apply_gate", None) is getattr(moe, "_default_apply_gate", ())


def grouped_product(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """`rows` (rows, inputs) in order of groups, which end at `ends` (groups,), each by the weights (groups, inputs,
    outputs) of its group. Relies on `torch._grouped_mm` (since torch 2.8), which transformers' own products call."""
    result: torch.Tensor = torch._grouped_mm(rows, weights, offs=ends)
    return result
