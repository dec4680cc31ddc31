"""Lets a recurrent layer go on from states that are kept elsewhere than in transformers' own cache.

Relies on `LinearAttentionLayer` and on how its attributes are read and written by the methods of `Cache` and by models:
`conv_states`, `recurrent_states`, `conv_kernel_size`, `has_previous_state` and what says that these are there, as they
are in transformers 5.17 to 5.24. `tests/unit/test_compat.py` fails when they change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

StateKind = Literal["conv", "recurrent"]


def keeps_states_and_keys(layer: Any) -> bool:
    """Whether a layer's cache holds keys and values as `DynamicLayer` does, and has states beside them."""
    return isinstance(layer, LinearAttentionLayer) and isinstance(layer, DynamicLayer) and layer.is_initialized


def states_in(layer: Any) -> Iterator[tuple[StateKind, int, torch.Tensor]]:
    """The states in a layer's cache, (rows, ...) each: their kind, their number among those of their kind."""
    if not isinstance(layer, LinearAttentionLayer):
        return
    for number, state in layer.conv_states.items():
        if state is not None:
            yield "conv", number, state
    for number, state in layer.recurrent_states.items():
        if state is not None:
            yield "recurrent", number, state


class StatesOfOneLayer(DynamicCache):  # type: ignore[misc]
    """A cache for one call of the recurrent module of layer `index`, which goes on from `states` of its rows.

    A row without a past has states of zeros, with which a module computes what it would without any.
    """

    def __init__(self, index: int, states: Sequence[tuple[StateKind, int, torch.Tensor]]) -> None:
        super().__init__()
        self._own = layer = LinearAttentionLayer(number_of_states=1 + max(number for _, number, _ in states))
        self.layers = [layer] * (index + 1)
        for kind, number, state in states:
            if kind == "conv":
                layer.dtype, layer.device = state.dtype, state.device
                layer.conv_states[number], layer.conv_kernel_size[number] = state, state.shape[-1]
                layer.is_conv_states_initialized[number] = True
            else:
                layer.recurrent_states[number] = state
                layer.is_recurrent_states_initialized[number] = True
            layer.has_previous_state[number] = True

    def left(self) -> list[torch.Tensor]:
        """The states that the call leaves behind, in the order of those it was given."""
        return [state for _, _, state in states_in(self._own)]
