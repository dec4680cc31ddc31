"""Takes part in transformers' experts interface: a function that runs the experts of every model that dispatches them.

Relies on `transformers.integrations.moe` (since transformers 5.0): `ALL_EXPERTS_FUNCTIONS`, the config's
`_experts_implementation`, and `_apply_gate`, `_is_expert_parallel` (since 5.18) and the other attributes that
`use_experts_implementation` gives a module. Without it, experts would run as transformers runs them: by products that
sort, gather and scatter. `tests/unit/test_compat.py` fails when it changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_DEFAULT = "grouped_mm"

Experts = Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""From the module, states (tokens, width), and of each token the numbers and weights (tokens, of each) of its experts
to what these give (tokens, width)."""


def replace_default_experts(model: Any, name: str, function: Experts) -> None:
    """Let experts of `model` run by `function`, known to transformers as `name`, where they run by the default."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if getattr(model.config, "_experts_implementation", None) != _DEFAULT:
        return
    ALL_EXPERTS_FUNCTIONS.register(name, function)
    model.set_experts_implementation(name)


def run_by_default(module: Any, states: torch.Tensor, numbers: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """As transformers runs the experts `module` by default."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    result: torch.Tensor = ALL_EXPERTS_FUNCTIONS[_DEFAULT](module, states, numbers, weights)
    return result


def is_split_over_ranks(module: Any) -> bool:
    """Whether `module` holds some of the experts only, since transformers runs them on several ranks."""
    return bool(getattr(module, "_is_expert_parallel", False))


def gated(module: Any, states: torch.Tensor) -> torch.Tensor:
    """`states`, what the first product of `module` gives, after its gate."""
    result: torch.Tensor = module._apply_gate(states)
    return result


def gates_halves(module: Any) -> bool:
    """Whether `module` gates as transformers does by default: the second half of its states by `act_fn` of the first.
    Relies on `_default_apply_gate`; False without it."""
    from transformers.integrations import moe

    return getattr(type(module), "_apply_gate", None) is getattr(moe, "_default_apply_gate", ())
