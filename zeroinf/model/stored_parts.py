"""Describes parameters that consist of other stored tensors than one with the parameter's own name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

_ATTRIBUTE = "stored_parts"


@dataclass(frozen=True, slots=True)
class StoredPart:
    """A part of a parameter: the elements from `start` on (flattened) are `make` of the stored tensors `names`."""

    names: tuple[str, ...]
    make: Callable[..., torch.Tensor]
    start: int = 0


def set_parts(parameter: torch.Tensor, parts: tuple[StoredPart, ...]) -> None:
    """Note that `parameter` of a skeleton is made of `parts`, which cover all of it."""
    setattr(parameter, _ATTRIBUTE, parts)


def parts_of(parameter: torch.Tensor) -> tuple[StoredPart, ...] | None:
    """The stored tensors that `parameter` is made of; None where it is one of its own name."""
    found: tuple[StoredPart, ...] | None = getattr(parameter, _ATTRIBUTE, None)
    return found


def as_stored(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` itself: for parts that are not changed."""
    return tensor
