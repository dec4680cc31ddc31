"""Gives access to the tensors that a `torch.nn.Module` holds itself, by name.

Relies on the dictionaries in which every module has kept them since torch 0.1, `_parameters`, `_buffers` and
`_non_persistent_buffers_set` (the last since torch 1.5): torch has public ways to read them, but none to replace a
parameter by a tensor that is not one, or to learn which buffers no checkpoint holds. Without them, weights could not be
streamed into an unmodified model. `tests/unit/test_compat.py` fails when they change.
"""

from __future__ import annotations

from typing import Any

from torch.nn import Module


def own_parameters(module: Module) -> dict[str, Any]:
    """The module's own parameters, None among them; changes of the dictionary are changes of the module."""
    return module._parameters


def own_buffers(module: Module) -> dict[str, Any]:
    """The module's own buffers, None among them; changes of the dictionary are changes of the module."""
    return module._buffers


def unsaved_buffers(module: Module) -> set[str]:
    """Names of the module's own buffers that no checkpoint holds."""
    return module._non_persistent_buffers_set
