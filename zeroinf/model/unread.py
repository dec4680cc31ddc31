"""Finds the modules of a multimodal model that text does not go through, such as a vision tower, and leaves them out.

One forward on the meta device shows which modules outside of the layers run, and which parameters are used without
their modules. Another one, without the modules that were not, shows whether the model can do without them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.nn import Module, Parameter
from torch.overrides import TorchFunctionMode

from zeroinf.model.kv import ReadsAsZero, dense_experts

_TOKENS = 5


def find_unread(model: Any, blocks_path: str) -> tuple[str, ...]:
    """Full dotted names of the modules of `model`, which lies on the meta device, that text does not need, the layers
    at `blocks_path` and what they lie in left out; none of a model for text alone."""
    config = model.config
    if config.is_encoder_decoder or config.get_text_config(decoder=True) is config:
        return ()
    called: set[Module] = set()
    hooks = [module.register_forward_pre_hook(lambda module, _: called.add(module)) for module in model.modules()]
    uses = _Uses()
    try:
        if not _runs(model, uses):
            return ()
    finally:
        for hook in hooks:
            hook.remove()
    found = tuple(_outermost(model, "", f"{blocks_path}.", called, uses.of))
    whole = {name: model.get_submodule(name) for name in found}
    leave_out(model, found)
    can_do_without = _runs(model)
    for name, module in whole.items():
        model.set_submodule(name, module)
    return found if can_do_without else ()


def leave_out(model: Module, names: Sequence[str]) -> None:
    """Take the modules of these names out of `model`, with all that they hold."""
    for name in names:
        model.set_submodule(name, Module())


def _runs(model: Any, mode: TorchFunctionMode | None = None) -> bool:
    """Whether `model` reads text on the meta device, under `mode`."""
    ids = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
    try:
        with torch.no_grad(), torch.device("meta"), dense_experts(model), mode or _Uses(), ReadsAsZero():
            model(input_ids=ids, use_cache=False)
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError, IndexError, KeyError):
        return False
    return True


def _outermost(module: Module, path: str, blocks: str, called: set[Module], used: set[int]) -> Iterator[str]:
    for name, child in module.named_children():
        own = f"{path}{name}"
        holds_blocks = blocks.startswith(f"{own}.")
        parameters = [id(parameter) for parameter in child.parameters()]
        if f"{own}.".startswith(blocks):
            continue
        if not holds_blocks and parameters and called.isdisjoint(child.modules()) and used.isdisjoint(parameters):
            yield own
        else:
            yield from _outermost(child, f"{own}.", blocks, called, used)


class _Uses(TorchFunctionMode):
    """Notes the parameters that functions are given."""

    def __init__(self) -> None:
        super().__init__()
        self.of: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") != "__get__":
            self.of |= {id(value) for value in _flat((*args, *(kwargs or {}).values())) if isinstance(value, Parameter)}
        return func(*args, **(kwargs or {}))


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value
