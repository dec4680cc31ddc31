"""Quantized linear layers of a checkpoint, as layers of the model or fused into stacks of experts.

A `MatrixFormat` says which tensors represent one matrix and how they are expanded. This module finds the matrices in a
model, lets modules hold their tensors (stacked for experts), and expands all matrices of a stack together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import Linear, Module

from zeroinf.compat.modules import own_parameters
from zeroinf.model.quantized.coded_experts import Parts, can_hold_coded, hold_coded_experts, tensors_of
from zeroinf.model.quantized.expansion import Expansion, Held, meta, refused, whole_weights
from zeroinf.model.quantized.expert_codes import CodeKind
from zeroinf.model.quantized.origins import EXPERT, Origin, name_others, origins_of
from zeroinf.model.stored_parts import StoredPart, set_parts

STORED = "stored"
"""Key of a quantization config under which `note_stored` keeps names in files, and what of that is coded."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Coded:
    """How the tensors of a matrix are those of codes that products read."""

    kind: CodeKind
    names: Mapping[str, str]
    """The tensors that become each of `tensors_of`, by the names of these."""
    checked: tuple[str, ...] = ()
    """Tensors that are read beside the codes, and held by none."""


class MatrixFormat(ABC):
    """The storage format of one matrix of (rows, columns) weights. Tensors are named by what follows the layer's
    name.
    """

    __slots__ = ()

    @abstractmethod
    def usual(self, rows: int, columns: int) -> dict[str, Stored]:
        """Its tensors, as the config lets expect them where files are not at hand."""

    def usual_expert(self, rows: int, columns: int) -> dict[str, Stored]:
        """The same for a matrix of a stack of experts."""
        return self.usual(rows, columns)

    @abstractmethod
    def why_not(self, rows: int, columns: int, stored: Mapping[str, Stored]) -> str | None:
        """Why tensors `stored` are not known to be expanded exactly; None where they are."""

    @abstractmethod
    def expand(self, held: Held, whole: torch.Tensor) -> None:
        """Write the weights into `whole` (..., rows, columns; strided). Of a stack, each of `held` is stacked too."""

    def is_needed(self, name: str) -> bool:
        """Whether weights depend on the tensor `name`; others are not read."""
        return name != "bias"

    def coded(self, rows: int, columns: int, stored: Mapping[str, Stored]) -> Coded | None:
        """How products read a matrix of a stack of experts, as it is held; None where it is expanded before."""
        return None

    def held(self, name: str, one: Stored) -> Stored:
        """The part of the tensor `name` that is held: all of it."""
        return one

    def read(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        """The held tensor, made of the stored values. Raises ModelError where they are not those that are expected."""
        return stored


@dataclass(frozen=True, slots=True)
class _Matrices:
    """Linear layers `names` of the checkpoint, which fill `rows` of a parameter: of one matrix, or of a stack."""

    parameter: str
    names: tuple[str, ...]
    first: int
    end: int
    is_stack: bool

    def view(self, whole: torch.Tensor) -> torch.Tensor:
        return whole[..., self.first : self.end, :]


def note_stored(config: Any, held: Mapping[str, Any]) -> None:
    """Keep on a quantized `config` what files hold: `held` has each tensor's meta by name."""
    found = getattr(config, "quantization_config", None)
    if not isinstance(found, dict):
        return
    coded = {}
    for name, tensor in held.items():
        if not name.endswith((".weight", ".bias")) or not tensor.meta.is_floating_point() or tensor.meta.itemsize == 1:
            coded[EXPERT.sub("*", name)] = [str(tensor.meta.dtype).removeprefix("torch."), [*tensor.meta.shape]]
    found[STORED] = {"coded": coded, "names": sorted({EXPERT.sub("*", name) for name in held})}


def hold_linears(
    model: Any,
    found: Mapping[str, Any],
    what: str,
    form: MatrixFormat,
    key: str | tuple[str, ...],
    is_kept: Callable[[str], bool],
) -> None:
    """Let the modules of `model` hold their matrices as `form` has them.

    Where files were read, those are quantized that have a tensor `key`, or one of these; else all linear layers but
    those that `is_kept`. `what` names the format in messages. Raises ModelError for what is not known to be exact.
    """
    noted = found.get(STORED) or {"coded": None, "names": None}
    stored, origins = _by_layer(noted["coded"]), origins_of(model, what, noted["names"])
    owners = {f"{path}.{own}": module for path, module in model.named_modules() for own in own_parameters(module)}
    keys = {key} if isinstance(key, str) else set(key)

    def is_coded(layer: str) -> bool:
        return not keys.isdisjoint((stored or {}).get(layer, ()))

    plans: dict[Module, list[_Plan]] = defaultdict(list)
    for matrices in _matrices(model, origins.whole):
        module, own = owners[matrices.parameter], matrices.parameter.rpartition(".")[2]
        parameter = own_parameters(module)[own]
        rows, columns = matrices.end - matrices.first, parameter.shape[-1]
        layer = EXPERT.sub("*", matrices.names[0])
        if stored is None:
            usual = form.usual_expert if matrices.is_stack else form.usual
            held = None if is_kept(matrices.names[0]) else usual(rows, columns)
        else:
            held = stored.get(layer) if is_coded(layer) else None
        if held is None:
            continue
        if (why := form.why_not(rows, columns, held)) is not None:
            raise refused(model, what, f"{layer} {why}")
        plans[module].append(_Plan(own, parameter.shape, parameter.dtype, matrices, held))
    if fused := next((layer for layer in origins.layers_by_row() if is_coded(layer)), None):
        raise refused(model, what, f"transformers fuses or reorders {fused} row by row")
    for module, own_plans in plans.items():
        _hold(model, what, module, own_plans, form)
    name_others(model, origins)


@dataclass(frozen=True, slots=True)
class _Plan:
    """Describes what a module holds of one of its parameters, `own`."""

    own: str
    shape: torch.Size
    dtype: torch.dtype
    matrices: _Matrices
    stored: Mapping[str, Stored]


def _hold(model: Any, what: str, module: Module, plans: Sequence[_Plan], form: MatrixFormat) -> None:
    covered: dict[str, int] = defaultdict(int)
    for plan in plans:
        covered[plan.own] += plan.matrices.end - plan.matrices.first
    for plan in plans:
        if covered[plan.own] != plan.shape[-2]:
            raise refused(
                model, what, f"{plan.matrices.names[0]} is quantized, but the weights that it is fused with are not"
            )
    if can_hold_coded(covered) and (coded := _coded(plans, form)) is not None:
        _hold_codes(module, plans, form, coded)
        return
    for plan in plans:
        own_parameters(module).pop(plan.own, None)
    steps = []
    for number, plan in enumerate(plans):
        names = {}
        for suffix, one in plan.stored.items():
            if not form.is_needed(suffix):
                continue
            stack = (len(plan.matrices.names),) if plan.matrices.is_stack else ()
            kept = form.held(suffix, one)
            held = meta((*stack, *(kept.shape or (stack and (1,)))), kept.dtype)
            set_parts(held, tuple(_parts(form, plan.matrices, suffix, one)))
            own_name = f"{plan.own}_{number}_{suffix}" if plan.matrices.is_stack else suffix
            names[suffix] = own_name.replace(".", "_")
            module.register_parameter(names[suffix], held)
        steps.append((plan.own, names, plan.matrices))
    shapes = {plan.own: (plan.shape, plan.dtype) for plan in plans}
    Expansion(module, partial(_expand, form, shapes, steps))


def _coded(plans: Sequence[_Plan], form: MatrixFormat) -> Coded | None:
    """How products read all matrices of a module; None where they cannot, or not all of them alike."""
    first: Coded | None = None
    for plan in plans:
        rows = plan.matrices.end - plan.matrices.first
        one = form.coded(rows, plan.shape[-1], plan.stored) if plan.matrices.is_stack else None
        if one is None or (first is not None and one != first) or plan.matrices.first % rows or plan.shape[-2] % rows:
            return None
        first = one
    return first


def _hold_codes(module: Module, plans: Sequence[_Plan], form: MatrixFormat, coded: Coded) -> None:
    """Hold what products read of a stack of experts, in one tensor each for all that is fused."""
    parts: dict[str, Parts | None] = {}
    for own in dict.fromkeys(plan.own for plan in plans):
        made: dict[str, list[StoredPart]] = defaultdict(list)
        some = [plan for plan in plans if plan.own == own]
        for plan in some:
            (outputs, inputs), first = plan.shape[-2:], plan.matrices.first
            rows = plan.matrices.end - first
            of_expert, before, of_matrix = (
                tensors_of(coded.kind, 1, count, inputs, count // rows) for count in (outputs, first, rows)
            )
            for role, name in coded.names.items():
                (size, dtype), checked = of_matrix[role], coded.checked if role == "blocks" else ()
                make = partial(_codes, form, name, plan.stored[name].shape, checked, size, dtype)
                for number, layer in enumerate(plan.matrices.names):
                    start = number * torch.Size(of_expert[role][0]).numel() + torch.Size(before[role][0]).numel()
                    stored = tuple(f"{layer}.{each}" for each in (name, *checked))
                    made[role].append(StoredPart(stored, make, start))
        parts[own] = {role: tuple(sorted(found, key=lambda part: part.start)) for role, found in made.items()}
    joined = max(plan.shape[-2] // (plan.matrices.end - plan.matrices.first) for plan in plans)
    hold_coded_experts(module, coded.kind, parts, is_transposed=False, matrices=joined)


def _codes(
    form: MatrixFormat,
    name: str,
    shape: tuple[int, ...],
    checked: Sequence[str],
    size: tuple[int, ...],
    dtype: torch.dtype,
    stored: torch.Tensor,
    *others: torch.Tensor,
) -> torch.Tensor:
    """The held form of a stored tensor, as `size` and `dtype`, if it is of the `shape` that the others of its stack
    have. Raises ModelError where the tensors `checked`, which are `others`, are not those that are expected."""
    for each, other in zip(checked, others, strict=True):
        form.read(each, other)
    made = _read(form, name, shape, stored)
    return made.view(dtype).view(size) if made.numel() else made


def _parts(form: MatrixFormat, matrices: _Matrices, suffix: str, one: Stored) -> Iterator[StoredPart]:
    size = torch.Size(form.held(suffix, one).shape).numel()
    make = partial(_read, form, suffix, one.shape if matrices.is_stack else None)
    for number, name in enumerate(matrices.names):
        yield StoredPart((f"{name}.{suffix}",), make, number * size)


def _read(form: MatrixFormat, name: str, of_stack: tuple[int, ...] | None, stored: torch.Tensor) -> torch.Tensor:
    """The held form of a stored tensor; of one in a stack, if it is of the shape `of_stack` that the others have. A
    single number is a row there, since experts are told by their rows."""
    if of_stack is None:
        return form.read(name, stored)
    if tuple(stored.shape) != of_stack:
        return stored.new_empty(0)
    made = form.read(name, stored)
    return made[None] if made.dim() else made.view(1, 1)


def _expand(
    form: MatrixFormat,
    shapes: Mapping[str, tuple[torch.Size, torch.dtype]],
    steps: Sequence[tuple[str, Mapping[str, str], _Matrices]],
    held: Held,
) -> dict[str, torch.Tensor]:
    device = next(iter(held.values())).device
    # Of a stack of experts there may be some alone.
    stacks = {own: held[next(iter(names.values()))].shape[:1] for own, names, stacked in steps if stacked.is_stack}
    whole = {
        own: whole_weights((*stacks[own], *shape[1:]) if own in stacks else shape, dtype, device)
        for own, (shape, dtype) in shapes.items()
    }
    for own, names, matrices in steps:
        form.expand({suffix: held[name] for suffix, name in names.items()}, matrices.view(whole[own]))
    return whole


def _by_layer(stored: Mapping[str, Any] | None) -> dict[str, dict[str, Stored]] | None:
    if stored is None:
        return None
    layers: dict[str, dict[str, Stored]] = defaultdict(dict)
    for name, (dtype, shape) in stored.items():
        layer, is_beside, suffix = name.partition(".weight.")
        if is_beside:  # bitsandbytes' names
            suffix = f"weight.{suffix}"
        else:
            layer, _, suffix = name.rpartition(".")
        layers[layer][suffix] = Stored(getattr(torch, dtype), tuple(shape))
    return layers


def _matrices(model: Any, origins: Mapping[str, Origin]) -> Iterator[_Matrices]:
    """The linear layers of the checkpoint that the parameters of `model` are made of."""
    linear = {f"{path}.weight" for path, module in model.named_modules() if type(module) is Linear}
    stacks = {name for name, parameter in model.named_parameters() if parameter.dim() == 3 and ".experts." in name}
    sizes = {name: parameter.shape for name, parameter in model.named_parameters()}
    found: dict[tuple[str, int, int], dict[int, str]] = defaultdict(dict)
    for name, origin in origins.items():
        if name.endswith(".weight") and origin.parameter in linear | stacks:
            layer = name.removesuffix(".weight")
            found[origin.parameter, origin.first, origin.end][origin.number] = layer
    for (parameter, first, end), layers in found.items():
        names = tuple(layers[number] for number in range(len(layers)))
        yield _Matrices(parameter, names, first, end, is_stack=len(sizes[parameter]) == 3)
