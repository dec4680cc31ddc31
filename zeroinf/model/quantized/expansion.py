"""Expands quantized weights: a module holds the tensors of its checkpoint, and has full weights only while it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import Module, Parameter

from zeroinf.compat.modules import own_parameters
from zeroinf.errors import ModelError

Held = Mapping[str, torch.Tensor]
Expand = Callable[[Held], Mapping[str, torch.Tensor]]
"""From what a module holds to the parameters that its forward uses."""

OTHER_CHECKPOINT = "take the model's unquantized checkpoint, and --wire int8 or int4 to move fewer bytes"
"""What to do about a checkpoint that does not run."""


class Expansion:
    """Gives `module` its weights in full: for the time of its own forward, or from `open` until `close`.

    In between it has what its checkpoint holds and nothing more.
    """

    def __init__(self, module: Module, expand: Expand) -> None:
        """Let `module` run with what `expand` makes of its own parameters."""
        self._own: dict[str, Any] = own_parameters(module)
        self._expand, self._run = expand, module.forward
        self._held: dict[str, Any] | None = None
        module.forward = self._forward

    def open(self) -> None:
        """Expand what the module holds now."""
        held = self._held = dict(self._own)
        self._own.update(self._expand({name: tensor for name, tensor in held.items() if tensor is not None}))

    def close(self) -> None:
        """Let go of the weights, if there are any."""
        if self._held is not None:
            self._own.clear()
            self._own.update(self._held)
            self._held = None

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._held is not None:
            return self._run(*args, **kwargs)
        self.open()
        try:
            return self._run(*args, **kwargs)
        finally:
            self.close()


def expansions(module: Module) -> list[Expansion]:
    """The expansions of `module` and all modules inside; none where its weights are in full."""
    found = (getattr(inner.forward, "__self__", None) for inner in module.modules())
    return [owner for owner in found if isinstance(owner, Expansion)]


def meta(shape: tuple[int, ...], dtype: torch.dtype) -> Parameter:
    """A parameter on the meta device that takes no gradient, as the checkpoint has it."""
    return Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


def refused(model: Any, what: str, why: str) -> ModelError:
    """The error for a checkpoint of `model` that is quantized as `what`, and `why` that does not run."""
    return ModelError(
        f"the checkpoint of {type(model).__name__} is quantized already, as {what}, which does not stream: {why}",
        hint=OTHER_CHECKPOINT,
    )
