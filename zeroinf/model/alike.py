"""Tells which blocks of a model on the meta device are alike, so that one of them can stand for the others.

Blocks are alike where their modules are of the same classes, hold parameters of the same shapes and have the same
settings, but for those that count the blocks; and where the config says the same of both in what it lists block by
block. Whatever is not known to be the same counts as different.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch.nn import Module

_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)

_Settings = dict[tuple[str, str], Any]
"""By the name of a module, or "config", and that of an attribute."""


def first_alike(config: Any, blocks: Sequence[Module]) -> list[int]:
    """For each of `blocks`, the number of the first that is like it. `config` is the decoder's."""
    lists = {
        ("config", name): value
        for name, value in vars(config).items()
        if isinstance(value, list | tuple) and len(value) == len(blocks)
    }
    settings = [
        {**_settings(block), **{key: value[index] for key, value in lists.items()}}
        for index, block in enumerate(blocks)
    ]
    places, firsts = _places(settings), dict[Any, int]()
    return [
        firsts.setdefault(tuple([(key, _mark(value)) for key, value in own.items() if key not in places]), index)
        for index, own in enumerate(settings)
    ]


def _settings(block: Module) -> _Settings:
    found: _Settings = {}
    for name, module in block.named_modules(prefix="block"):
        found[name, ""] = type(module)
        for attribute, value in vars(module).items():
            if attribute != "_modules":  # which are visited themselves
                found[name, attribute] = value
    return found


def _places(settings: Sequence[_Settings]) -> set[tuple[str, str]]:
    """Settings that count the blocks."""
    counts = defaultdict(set)
    for index, of_block in enumerate(settings):
        for key, value in of_block.items():
            if type(value) is int:
                counts[key].add(value - index)
    return {key for key, differences in counts.items() if len(differences) == 1}


def _mark(value: Any) -> Any:
    """Something that is equal for equal values, and for tensors of equal shapes."""
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, torch.Tensor):
        return type(value), tuple(value.shape), value.stride(), value.dtype
    if isinstance(value, dict):
        return tuple([(key, _mark(one)) for key, one in value.items()])
    if isinstance(value, list | tuple):
        return tuple([_mark(one) for one in value])
    if isinstance(value, set | frozenset):
        return frozenset(map(_mark, value))
    if isinstance(value, MethodType):  # of an object that the module has for itself
        return value.__func__
    if isinstance(value, partial):
        return value.func, _mark(value.args)
    return id(value)
