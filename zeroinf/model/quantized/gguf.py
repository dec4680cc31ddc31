"""Models of GGUF files: linear layers and experts hold the file's quantized blocks, everything else full weights.

Names are those of the package gguf. Where llama.cpp stores weights in another order than transformers, rows are
reordered when they are read, and columns and experts when they are expanded; where columns change places across
blocks, inputs do instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch.nn import Linear, Module

from zeroinf.compat.modules import own_buffers, own_parameters, unsaved_buffers
from zeroinf.errors import ModelError
from zeroinf.model.quantized.coded_experts import Parts, can_hold_coded, hold_coded_experts
from zeroinf.model.quantized.expansion import Expansion, Held, meta, whole_weights
from zeroinf.model.quantized.expert_codes import MXFP4
from zeroinf.model.quantized.ggml import QUANTIZED_TYPES, codes_of_mxfp4, expand, powers_of_mxfp4
from zeroinf.model.quantized.gguf_names import file_name
from zeroinf.model.quantized.gguf_pieces import Change, GgufPiece, Tiles, View, pieces_of
from zeroinf.model.stored_parts import StoredPart, as_stored, set_parts

# Weights that are expanded as they are read are so a few rows at a time.
_AT_ONCE = 1 << 24
# Tensors that a config has taken up, or that are computed.
_IN_CONFIG = re.compile(r"rope_(freqs|factors_(long|short))\.weight|blk\.\d+\.attn_rot_embd\.weight")
_LAYER = re.compile(r"blk\.(\d+)\.")
_SCALE = "_scale"
_KEYS = ("attn_k.", "attn_k_norm.", "attn_v.")


def hold_gguf(model: Any, found: dict[str, Any]) -> None:
    """Let the modules of `model` hold what the file has, of which `found` names the tensors, their types and shapes.

    Where `found` says `in_full`, all parameters are expanded as they are read.

    Raises ModelError where the file lacks a tensor of the model, has it in another shape, or has one that would not be
    used.
    """
    names = _Names(model, found)
    outside = {id(parameter) for name, parameter in model.named_parameters() if not names.of(name).startswith("blk.")}
    seen: set[int] = set()
    for path, module in list(model.named_modules()):
        held: dict[str, tuple[torch.Size, torch.dtype, list[GgufPiece]]] = {}
        for own, parameter in list(own_parameters(module).items()):
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            pieces = names.pieces(f"{path}.{own}", parameter)
            names.use(pieces, f"{path}.{own}", parameter.shape)
            packed = not found.get("in_full") and parameter.dim() > 1 and id(parameter) not in outside
            if packed and _can_hold(module, pieces, names.kinds):
                held[own] = parameter.shape, parameter.dtype, pieces
            else:
                _expand_as_read(parameter, pieces, names)
        for own, buffer in own_buffers(module).items():
            if buffer is not None and own not in unsaved_buffers(module):
                pieces = names.pieces(f"{path}.{own}", buffer)
                names.use(pieces, f"{path}.{own}", buffer.shape)
                _expand_as_read(buffer, pieces, names)
        if hasattr(module, "is_transposed") and _are_coded(held, names.kinds):
            _hold_codes(module, held)
        elif held:
            _hold(module, held, names.kinds)
    names.refuse_unused()


def _can_hold(module: Module, pieces: Sequence[GgufPiece], kinds: Mapping[str, int]) -> bool:
    known = type(module) is Linear or type(module).__name__.endswith("Experts")
    return known and all(kinds[piece.name] in QUANTIZED_TYPES for piece in pieces)


_Holds = dict[str, tuple[torch.Size, torch.dtype, list[GgufPiece]]]
"""Of parameters, by their own names: shape, dtype and what they are made of."""


def _are_coded(held: _Holds, kinds: Mapping[str, int]) -> bool:
    """Whether these are the weights of experts, in codes that products read."""
    pieces = [piece for *_, own in held.values() for piece in own]
    are_alike = all(QUANTIZED_TYPES[kinds[piece.name]].name == "MXFP4" and piece.scale is None for piece in pieces)
    return can_hold_coded(held) and are_alike


def _hold_codes(module: Module, held: _Holds) -> None:
    """Replace the weights of experts by codes in the order of products, which are made as they are read."""
    is_transposed = bool(getattr(module, "is_transposed", False))
    parts: dict[str, Parts | None] = {}
    for own, (shape, _, pieces) in held.items():
        size = (shape[2], shape[1]) if is_transposed else (shape[1], shape[2])
        codes, powers = (
            tuple(
                StoredPart(
                    tuple(piece.name for piece in pieces),
                    partial(_of_expert, expert, make, [piece.view for piece in pieces], size, is_transposed),
                    expert * size[0] * size[1] // of_each,
                )
                for expert in range(shape[0])
            )
            for make, of_each in ((codes_of_mxfp4, 2), (powers_of_mxfp4, MXFP4.group))
        )
        parts[own] = {"blocks": codes, "scales": powers}
    hold_coded_experts(module, MXFP4, parts, is_transposed=is_transposed)


def _of_expert(
    expert: int,
    make: Change,
    views: Sequence[View],
    size: tuple[int, int],
    is_transposed: bool,
    *stored: torch.Tensor,
) -> torch.Tensor:
    """What `make` makes of one expert's rows in all pieces of a weight of `size`."""
    found = [make(piece[expert : expert + 1]) for piece in stored]
    whole = found[0].new_empty(1, size[0], found[0][0, 0].numel())
    for view, piece in zip(views, found, strict=True):
        view(whole.mT if is_transposed else whole).copy_(piece.flatten(2))
    return whole.view(1, size[0], *found[0].shape[2:])


def _hold(
    module: Module,
    held: _Holds,
    kinds: Mapping[str, int],
) -> None:
    """Replace parameters by the blocks that each is made of."""
    plans = []
    for own, (shape, _, pieces) in held.items():
        sample = torch.empty(shape, dtype=torch.uint8, device="meta")
        del own_parameters(module)[own]
        for number, piece in enumerate(pieces):
            kind = QUANTIZED_TYPES[kinds[piece.name]]
            rows = piece.view(sample).shape
            blocks = meta((*rows[:-1], kind.row_bytes(rows[-1])), torch.uint8)
            set_parts(blocks, (StoredPart((piece.name,), piece.change),))
            name = own if len(pieces) == 1 else f"{own}_{number}"
            module.register_parameter(name, blocks)
            plans.append((own, name, kind, piece.view))
            if piece.scale is not None:
                numbers = meta((shape[0] if len(shape) > 2 else 1, *[1] * (len(shape) - 1)), torch.float32)
                set_parts(numbers, (StoredPart((piece.scale,), partial(_for_each, len(shape))),))
                module.register_parameter(f"{name}{_SCALE}", numbers)
            if piece.tiles is not None:
                module.forward = partial(_in_tiles, module.forward, piece.tiles)
    shapes = {own: (shape, dtype) for own, (shape, dtype, _) in held.items()}
    Expansion(module, partial(_expand, shapes, plans, bool(getattr(module, "is_transposed", False))))


def _in_tiles(run: Callable[[torch.Tensor], torch.Tensor], tiles: Tiles, x: torch.Tensor) -> torch.Tensor:
    """What `run` makes of `x` (..., inputs), brought into the order of the columns of its weights."""
    inner, outer, each = tiles
    heads: torch.Tensor = x.reshape(*x.shape[:-1], inner, outer, each)
    return run(heads.transpose(-3, -2).reshape(x.shape))


def _expand(
    shapes: Mapping[str, Any], plans: Sequence[tuple[str, str, Any, View]], is_transposed: bool, held: Held
) -> Held:
    device = held[plans[0][1]].device
    # Of a stack of experts there may be some alone.
    stacks = {own: held[name].shape[:1] for own, name, *_ in plans if len(shapes[own][0]) > 2}
    whole = {
        own: whole_weights(
            (*stacks[own], *shape[1:]) if own in stacks else shape, dtype, device, is_transposed=is_transposed
        )
        for own, (shape, dtype) in shapes.items()
    }
    for own, name, kind, view in plans:
        expand(held[name], kind, view(whole[own]))
        if (scale := held.get(f"{name}{_SCALE}")) is not None:
            view(whole[own]).mul_(scale)
    return whole


def _expand_as_read(parameter: torch.Tensor, pieces: Sequence[GgufPiece], names: _Names) -> None:
    """Let `parameter` be read in full, with the numbers that it has in transformers."""
    shape, dtype, kinds = parameter.shape, parameter.dtype, [names.kinds[piece.name] for piece in pieces]
    plain = len(pieces) == 1 and pieces[0] == GgufPiece(pieces[0].name, pieces[0].view, tiles=None)
    if plain and parameter.dim() == 2:
        rows = max(1, _AT_ONCE // shape[1])
        parts = tuple(
            StoredPart(
                (pieces[0].name,),
                partial(_rows, kinds[0], dtype, slice(start, min(start + rows, shape[0]))),
                start * shape[1],
            )
            for start in range(0, shape[0], rows)
        )
    else:
        stored = (*(piece.name for piece in pieces), *(piece.scale for piece in pieces if piece.scale is not None))
        parts = (StoredPart(stored, partial(_whole, shape, dtype, kinds, pieces)),)
    set_parts(parameter, parts)


def _rows(kind: int, dtype: torch.dtype, rows: slice, stored: torch.Tensor) -> torch.Tensor:
    return _numbers(stored.view(-1, stored.shape[-1])[rows], kind, dtype)


def _whole(
    shape: torch.Size, dtype: torch.dtype, kinds: Sequence[int], pieces: Sequence[GgufPiece], *stored: torch.Tensor
) -> torch.Tensor:
    whole = torch.empty(shape, dtype=dtype)
    scales = iter(stored[len(pieces) :])
    for kind, piece, tensor in zip(kinds, pieces, stored, strict=False):
        numbers = _numbers(tensor, kind, dtype)
        if piece.scale is not None:
            numbers = numbers * _for_each(numbers.dim(), next(scales))
        piece.write(piece.change(numbers), piece.view(whole))
    return whole


def _for_each(dimensions: int, scales: torch.Tensor) -> torch.Tensor:
    """`scales` of all of a matrix, or of each of a stack, to multiply tensors of so many dimensions."""
    return scales.view(-1, *[1] * (dimensions - 1))


def _numbers(stored: torch.Tensor, kind: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of `stored`: as they are, or those that blocks stand for."""
    if kind not in QUANTIZED_TYPES:
        return stored
    found = QUANTIZED_TYPES[kind]
    columns = stored.shape[-1] // found.nbytes * found.weights
    numbers = torch.empty((*stored.shape[:-1], columns), dtype=dtype)
    expand(stored, found, numbers)
    return numbers


class _Names:
    """Translates between the model's parameters and their names in the file."""

    def __init__(self, model: Any, found: dict[str, Any]) -> None:
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        self.architecture = str(found["architecture"])
        self.kinds: dict[str, int] = {name: kind for name, (kind, *_) in found["tensors"].items()}
        self._shapes: dict[str, tuple[int, ...]] = {name: tuple(own) for name, (_, *own) in found["tensors"].items()}
        self.config = model.config
        self.owner = type(model).__name__
        arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == self.architecture)
        self._layers: int = model.config.num_hidden_layers
        self._map = get_tensor_name_map(arch, self._layers)
        self._used: set[str] = set()

    def of(self, name: str) -> str:
        """The file's name for the parameter `name` of the model, if one tensor were all of it."""
        found = file_name(self._map, name, self.architecture, self.kinds)
        if found is None:
            raise self._refusal(f"what it calls {name} is not known")
        return found

    def pieces(self, name: str, parameter: torch.Tensor) -> list[GgufPiece]:
        """The tensors that make the parameter `name`."""
        found = pieces_of(self.of(name), name, parameter, self.architecture, self.config, self.kinds)
        return [replace(piece, scale=self._scale(piece.name)) for piece in found]

    def _scale(self, name: str) -> str | None:
        base, _, suffix = name.rpartition(".")
        is_own = self.architecture == "gemma4" and base.endswith(("ffn_gate_inp", "ffn_down_exps"))  # of its routers
        return f"{base}.scale" if suffix == "weight" and not is_own and f"{base}.scale" in self.kinds else None

    def use(self, pieces: Sequence[GgufPiece], name: str, shape: torch.Size) -> None:
        """`pieces` make the parameter `name` of `shape`."""
        whole = torch.empty(shape, dtype=torch.uint8, device="meta")
        for piece in pieces:
            if piece.name not in self.kinds:
                raise self._refusal(f"it lacks {piece.name}, the model's {name}")
            found, expected = self._shapes[piece.name], tuple(piece.view(whole).shape)
            if piece.change is not as_stored and len(expected) > len(found):  # rows of several heads, each by itself
                expected = (prod(expected[:-1]), expected[-1])
            if len(expected) == 1:  # what some files have as a row for each group
                found = (prod(found),)
            if _without_ones(found) != _without_ones(expected):
                raise self._refusal(f"it holds {piece.name} as {found}, the model has {expected}")
            if piece.scale is not None and prod(self._shapes[piece.scale]) not in (1, *shape[: len(shape) - 2]):
                raise self._refusal(f"it holds {piece.scale} as {self._shapes[piece.scale]}")
            self._used |= {piece.name, piece.scale or piece.name}

    def refuse_unused(self) -> None:
        unused = [name for name in self.kinds if name not in self._used and not self._is_needless(name)]
        if unused:
            raise self._refusal(f"it holds {', '.join(unused[:3])}, which this model does not know")

    def _is_needless(self, name: str) -> bool:
        if name.endswith(".input_scale"):  # by which activations would be rounded
            return True
        if _IN_CONFIG.fullmatch(name) or (layer := _LAYER.match(name)) is None:
            return _IN_CONFIG.fullmatch(name) is not None
        takes_keys_of_others = int(layer[1]) >= self._layers - getattr(self.config, "num_kv_shared_layers", 0)
        return int(layer[1]) >= self._layers or (takes_keys_of_others and name[layer.end() :].startswith(_KEYS))

    def _refusal(self, why: str) -> ModelError:
        return ModelError(
            f"the GGUF file of this {self.owner} is not known to run: {why}",
            hint="fetch the file again, or take the model's safetensors",
        )


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Files have tensors with and without dimensions of one."""
    return tuple(size for size in shape if size != 1)
