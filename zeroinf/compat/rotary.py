"""Finds and replaces the function by which the modules of a model rotate queries and keys for their positions.

Relies on the global `apply_rotary_pos_emb` of transformers' modeling files, which attention looks up as it runs; a
model whose file has none, or one that takes other arguments, is left as it is. `tests/unit/test_compat.py` fails when
it changes.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

_NAME = "apply_rotary_pos_emb"
_ARGUMENTS = ("q", "k", "cos", "sin", "unsqueeze_dim")

Rotate = Callable[..., Any]


def rotations_of(model: Any) -> Iterator[tuple[str, Rotate]]:
    """Names of the Python modules that the parts of `model` are defined in, each with its function."""
    for name in sorted({type(part).__module__ for part in model.modules()}):
        found = getattr(sys.modules.get(name), _NAME, None)
        if found is not None:
            yield name, found


def takes_queries_and_keys(rotate: Rotate) -> bool:
    """Whether `rotate` is called with queries, keys, cosines and sines."""
    try:
        return tuple(inspect.signature(rotate).parameters) == _ARGUMENTS
    except (TypeError, ValueError):
        return False


def replace_rotation(name: str, rotate: Rotate) -> None:
    """Let every model of the Python module `name` call `rotate` from now on."""
    setattr(sys.modules[name], _NAME, rotate)
