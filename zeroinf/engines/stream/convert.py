"""Runs transformers' own conversion (renaming, splitting, fusing of weights) for one group of tensors at a time, so
that no more than that is in memory.
"""

from __future__ import annotations

import re
import threading
from collections import defaultdict
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import torch

from zeroinf.compat.loading import conversions, convert_and_load, converted_name
from zeroinf.engines.stream.tensor_groups import Tensor, TensorGroup
from zeroinf.model.mapped_files import map_safetensors

_NUMBER = re.compile(r"\.(\d+)(?=\.|$)")


class Converter:
    """Lets transformers convert what a checkpoint holds for one group, so that no more than that lies in memory.

    `model` is the skeleton that `groups` come from. A block's weights are those whose names have its number first,
    whatever else transformers does with their names, but for names of tensors outside; those `apart` are no group's.
    """

    def __init__(
        self, model: Any, files: Sequence[Path], groups: Sequence[TensorGroup], apart: Container[str] = ()
    ) -> None:
        self._model = model
        self._siblings: dict[int | None, list[Tensor]] = defaultdict(list)
        for group in groups:
            self._siblings[group.block] += group.tensors
        own = {name for tensor in self._siblings[None] for name in tensor.names}
        outside = own | {name.removeprefix(f"{model.base_model_prefix}.") for name in own}
        self._lock = threading.Lock()
        self._is_traced = False
        self._held: dict[int | None, dict[str, Any]] = defaultdict(dict)
        for file in files:
            for name, tensor in map_safetensors(file).items():
                if name in apart:
                    continue
                number = None if name in outside else _NUMBER.search(name)
                self._held[int(number[1]) if number else None][name] = tensor

    def _stored(self, group: TensorGroup) -> dict[str, Any]:
        """What the checkpoint holds of a group: of a block whose experts are split, some of those that have a number
        behind the block's, or all that has none."""
        held = self._held[group.block]
        if not group.of:
            return held
        experts = {name: int(numbers[1]) for name in held if len(numbers := _NUMBER.findall(name)) > 1}
        if group.entries is None:
            return {name: value for name, value in held.items() if name not in experts}
        return {name: held[name] for name, number in experts.items() if number in group.entries}

    def convert(self, group: TensorGroup) -> dict[str, torch.Tensor] | None:
        """The stored tensors of `group` by their first names; None where its weights do not make all of it."""
        found = self._convert(group)
        if found is None and not self._is_traced:
            self._trace()
            found = self._convert(group)
        return found

    def _trace(self) -> None:
        """Sort what the checkpoint holds by the tensors that it becomes, which takes longer: a name's first number may
        be another one than its block's."""
        self._is_traced, mapping, own = True, conversions(self._model), self._model.state_dict()
        blocks = {name: block for block, tensors in self._siblings.items() for one in tensors for name in one.names}
        before, self._held = self._held, defaultdict(dict)
        for tensors in self._siblings.values():
            for tensor in tensors:
                tensor.bind(tensor.value)  # what was sorted wrongly may have been loaded into other blocks
        for block, held in before.items():
            for name, value in held.items():
                becomes, _ = converted_name(name, mapping, self._model.base_model_prefix, own)
                self._held[blocks.get(becomes, block)][name] = value

    def _convert(self, group: TensorGroup) -> dict[str, torch.Tensor] | None:
        stored = [tensor for tensor in group.tensors if tensor.stored]
        with self._lock:
            try:
                for tensor in stored:
                    tensor.bind(tensor.value)
                convert_and_load(self._model, self._stored(group))
                found = {tensor.names[0]: _loaded(tensor) for tensor in stored}
            finally:
                for tensor in self._siblings[group.block]:
                    tensor.bind(tensor.value)
        whole = {name: value for name, value in found.items() if value is not None}
        return whole if len(whole) == len(stored) else None


def _loaded(tensor: Tensor) -> torch.Tensor | None:
    """The tensor that has taken the place of `tensor` since it was loaded; None where that is still the tensor
    itself."""
    values = [getattr(module, name) for module, name in tensor.sites]
    return next((value for value in values if value is not tensor.value), None)
