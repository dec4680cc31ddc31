"""Finds the embeddings of a model of which a token reads a few rows, so that the others need not be on the GPU.

One forward on the meta device shows which `nn.Embedding` modules are handed token-shaped numbers and use their weights
for nothing else. A matrix that is the head's, too, is multiplied as a whole and is none of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import Embedding, Module, functional
from torch.overrides import TorchFunctionMode

from zeroinf.model.anatomy import Table
from zeroinf.model.kv import ReadsAsZero, dense_experts

# Rows and tokens of the probing forward; no table has as few rows.
_ROWS, _TOKENS = 2, 5
_SMALL = 16
"""A table of less than one in so many parts of the largest one's elements stays where it is."""


def find_tables(model: Any) -> tuple[Table, ...]:
    """The tables of `model`, which lies on the meta device; none where an encoder reads the prompts."""
    candidates = {path: module for path, module in _untied(model) if not model.config.is_encoder_decoder}
    if not candidates:
        return ()
    probe = _Probe(candidates)
    try:
        with torch.no_grad(), torch.device("meta"), dense_experts(model), probe.watching(), ReadsAsZero():
            model(input_ids=torch.zeros(_ROWS, _TOKENS, dtype=torch.long), use_cache=False)
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError, IndexError, KeyError):
        return ()  # it does not run so: its weights stay together
    found = probe.tables()
    largest = max((table.elements for table in found), default=0)
    return tuple(table for table in found if table.elements * _SMALL >= largest)


def _untied(model: Module) -> Iterator[tuple[str, Embedding]]:
    """Embeddings whose weights no other module has."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for path, module in model.named_modules(remove_duplicate=True):
        if isinstance(module, Embedding) and uses[id(module.weight)] == 1 and len(list(module.parameters())) == 1:
            yield path, module


class _Probe(TorchFunctionMode):
    """Notes what is done with the weights of some embeddings."""

    def __init__(self, candidates: dict[str, Embedding]) -> None:
        super().__init__()
        self._candidates = candidates
        self._paths = {id(module.weight): path for path, module in candidates.items()}
        self._given: dict[str, Any] = {}
        self._rows: dict[str, set[int]] = {path: set() for path in candidates}
        """Rows that a token reads; 0 stands for every other use."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While it lasts, calls of the embeddings and uses of their weights are noted."""
        hooks = [
            module.register_forward_pre_hook(self._before(path), with_kwargs=True)
            for path, module in self._candidates.items()
        ]
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _before(self, path: str) -> Any:
        def note(module: Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
            self._given[path] = args[0] if len(args) == 1 and not kwargs else None

        return note

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.embedding:
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            if (path := self._paths.get(id(weight))) is not None:
                self._rows[path].add(self._rows_read(path, args[0] if args else kwargs.get("input")))
        elif getattr(func, "__name__", "") != "__get__":
            for value in (*args, *kwargs.values()):
                if (path := self._paths.get(id(value))) is not None:
                    self._rows[path].add(0)
        return func(*args, **kwargs)

    def _rows_read(self, path: str, ids: Any) -> int:
        """Rows that a token reads by `ids`; 0 where these are not the numbers that the module was given, or no token's
        own."""
        if not isinstance(ids, torch.Tensor) or id(ids) != id(self._given.get(path)):
            return 0
        return ids.numel() // (_ROWS * _TOKENS) if ids.shape[:2] == (_ROWS, _TOKENS) else 0

    def tables(self) -> tuple[Table, ...]:
        """Those whose weights are read by row, as many for each token, and used for nothing else."""
        return tuple(
            Table(
                tensor=f"{path}.weight",
                rows=self._candidates[path].weight.shape[0],
                width=self._candidates[path].weight.shape[1],
                dtype=str(self._candidates[path].weight.dtype).removeprefix("torch."),
                rows_per_token=max(rows),
            )
            for path, rows in self._rows.items()
            if len(rows) == 1 and max(rows) > 0
        )
