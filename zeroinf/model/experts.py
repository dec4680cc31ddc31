"""Splits experts modules of transformers: the experts of a layer are brought and computed in parts.

A part is a range of experts. Each part computes what the tokens that were routed to its experts make of them; the
results are weighted and added up in the order in which transformers does, so that they are the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch.nn import Module

from zeroinf.compat.models import computing_some_experts, experts_method, is_experts
from zeroinf.compat.modules import own_parameters
from zeroinf.model.anatomy import Experts, expert_ranges
from zeroinf.model.kv import ReadsAsZero, dense_experts
from zeroinf.model.quantized.expansion import expansion_of

_TOKENS = 5


def find_experts(model: Any, blocks: Sequence[Module]) -> tuple[Experts, ...]:
    """The experts of `blocks`, the layers of `model`, that can be split.

    One forward on the meta device shows how each module of experts is called.
    """
    owners = {module: index for index, block in enumerate(blocks) for module in block.modules() if is_experts(module)}
    if not owners or model.config.is_encoder_decoder:
        return ()
    fitting: dict[Module, bool] = {}
    each: dict[Module, int] = {}

    def look(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shapes = [tuple(value.shape) for value in args if isinstance(value, torch.Tensor)]
        fits = not kwargs and len(args) == len(shapes) == 3 and all(len(shape) == 2 for shape in shapes)
        fits = fits and shapes[0][0] == _TOKENS and shapes[1] == shapes[2] and shapes[1][0] == _TOKENS
        fitting[module] = fits and module not in fitting
        each[module] = shapes[1][1] if fits else 0

    hooks = [module.register_forward_pre_hook(look, with_kwargs=True) for module in owners]
    try:
        with torch.no_grad(), torch.device("meta"), dense_experts(model), ReadsAsZero():
            model(input_ids=torch.zeros(1, _TOKENS, dtype=torch.long), use_cache=False)
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError, IndexError, KeyError):
        return ()  # it does not run so: its layers stay whole
    finally:
        for hook in hooks:
            hook.remove()
    counts = [list(owners.values()).count(index) for index in range(len(blocks))]
    names = {module: name for name, module in model.named_modules()}
    found = []
    for module, index in owners.items():
        count = int(module.num_experts)  # type: ignore[arg-type]
        tensors = tuple(f"{names[module]}.{own}" for own in split_parameters(module, count))
        if fitting.get(module) and counts[index] == 1 and count > 1 and tensors:
            found.append(
                Experts(
                    block=index,
                    count=count,
                    module=names[module],
                    tensors=tensors,
                    each=each[module],
                    is_transposed=bool(module.is_transposed),
                )
            )
    return tuple(found)


def split_parameters(module: Module, count: int) -> Iterator[str]:
    """Names of what the module has itself that has an entry for each of `count` experts."""
    for name, parameter in own_parameters(module).items():
        if parameter is not None and parameter.dim() > 1 and parameter.shape[0] == count:
            yield name


class ExpertParts:
    """Lets the experts module `module` compute its `count` experts in so many `parts`, one after the other.

    Before a part computes, `enter` is called with its number, and must have given the module its experts; `leave` is
    called after. Between the two nothing else runs.
    """

    def __init__(
        self, module: Any, count: int, parts: int, enter: Callable[[int], None], leave: Callable[[int], None]
    ) -> None:
        self.ranges = self.visited = expert_ranges(count, parts)
        self.module, self.enter, self.leave = module, enter, leave
        self.chosen: ChosenExperts | None = None
        """Where it is set, no part is asked for, but the experts that tokens were routed to alone."""
        owner = expansion_of(module)
        self.expansion = None if owner is None or owner.rests else owner
        self._run = module.forward
        module.forward = self._forward

    def _forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """What `module` makes of `hidden` (tokens, width), of which each token is routed to the experts `index`
        (tokens, of each) with `weights`."""
        each = index.shape[1]
        rows, ids = hidden.repeat_interleave(each, 0), index.reshape(-1, 1)
        ones = weights.new_ones(ids.shape)
        found = torch.zeros_like(rows)
        visited, wanted, chosen = self.visited, list[int](), self.chosen
        if chosen is not None:
            wanted, ids = _numbered(ids, self.ranges[-1].stop)
            visited = _groups(len(wanted), len(self.ranges[0]))
        for part, experts in enumerate(visited):
            if chosen is None:
                self.enter(part)
            else:
                chosen.enter(wanted[experts.start : experts.stop])
            inside = (ids >= experts.start) & (ids < experts.stop)
            with computing_some_experts(self.module, len(experts)) as nobody:
                own = torch.where(inside, ids - experts.start, nobody)
                found = torch.where(inside, self._run(rows, own, ones), found)
            if chosen is None:
                self.leave(part)
            else:
                chosen.leave()
        return _added_up(found, index, weights, experts_method(self.module)).to(hidden.dtype)


class ChosenExperts(Protocol):
    """Brings experts by their numbers."""

    def enter(self, experts: Sequence[int]) -> None:
        """Give the module these experts, which lie at the start of as many as the first part has."""
        ...

    def leave(self) -> None: ...


def _numbered(ids: torch.Tensor, count: int) -> tuple[list[int], torch.Tensor]:
    """Those of `count` experts that are among `ids`, in order, and `ids` as their places in that order. The host waits
    for it."""
    present = ids.new_zeros(count).index_fill_(0, ids.view(-1), 1)
    places = (present.cumsum(0) - 1)[ids]
    return [expert for expert, is_there in enumerate(present.tolist()) if is_there], places


def _groups(count: int, size: int) -> tuple[range, ...]:
    """Ranges of `size` of `count` places, all of one length: the last ends behind them."""
    return tuple(range(start, start + size) for start in range(0, count, size))


def _added_up(found: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, method: str) -> torch.Tensor:
    """The results `found` (tokens x of each, width), weighted and added up as transformers' `method` adds them."""
    tokens, each = index.shape
    weighted = (found * weights.reshape(-1, 1)).view(tokens, each, -1)
    if method != "eager":
        return weighted.sum(dim=1)
    total = torch.zeros_like(found[:tokens])
    order = index.argsort(dim=1)
    for at in order.unbind(1):  # expert after expert, as they are numbered
        total += weighted.gather(1, at.view(-1, 1, 1).expand(-1, 1, weighted.shape[-1])).squeeze(1).to(total.dtype)
    return total


class ExpertsOnPaper(ExpertParts):
    """Experts on the meta device, split: all of them are there at any time.

    Two parts compute, of which the second stands for all others: they do the same.
    """

    def __init__(self, module: Any, experts: Experts, parts: int) -> None:
        self._own = own_parameters(module)
        self.begins: Callable[[], None] = lambda: None
        """Called before a part computes."""
        self.repeats: Callable[[int], None] = lambda times: None
        """Called after one that stands for so many more."""
        self.hold()
        super().__init__(module, experts.count, parts, self._enter, self._leave)
        self.visited = self.ranges[:2]

    def hold(self) -> None:
        """Take what the module has from here on, such as expanded weights."""
        self._held = dict(self._own)

    def _enter(self, part: int) -> None:
        self.begins()
        some = self.ranges[part]
        names = list(split_parameters(self.module, self.ranges[-1].stop))
        self._own.update({name: self._held[name][some.start : some.stop] for name in names})

    def _leave(self, part: int) -> None:
        self._own.update(self._held)
        if part == 1:
            self.repeats(len(self.ranges) - 2)
