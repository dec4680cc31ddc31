"""Models of GGUF files: linear layers and experts hold the file's quantized blocks, everything else full weights.

Names are those of the package gguf. Where llama.cpp stores weights in another order than transformers, rows are
reordered when they are read, and columns and experts when they are expanded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import Linear, Module

from zeroinf.compat.modules import own_buffers, own_parameters, unsaved_buffers
from zeroinf.errors import ModelError
from zeroinf.model.quantized.expansion import Expansion, Held, meta, whole_weights
from zeroinf.model.quantized.ggml import QUANTIZED_TYPES, codes_of_mxfp4, expand, powers_of_mxfp4
from zeroinf.model.quantized.mxfp4 import GROUP, CodedParts, can_hold_coded, hold_coded_experts
from zeroinf.model.stored_parts import StoredPart, as_stored, set_parts

_View = Callable[[torch.Tensor], torch.Tensor]
_Change = Callable[[torch.Tensor], torch.Tensor]

# Weights that are expanded as they are read are so a few rows at a time.
_AT_ONCE = 1 << 24
# llama.cpp's converters turn the rows of queries and keys of these round, and add one to the norms of those.
_TURNED = ("llama",)
_NORMS_PLUS_ONE = ("gemma", "gemma2", "gemma3")
# Tensors that a config has taken up, or that are computed.
_IN_CONFIG = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd\.weight")
_PREDICTION = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class _Piece:
    """A tensor of the file, `name`, which fills `view` of a parameter."""

    name: str
    view: _View
    change: _Change = as_stored
    """Of rows as they lie in the file, bytes or numbers."""


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
        held: dict[str, tuple[torch.Size, torch.dtype, list[_Piece]]] = {}
        for own, parameter in list(own_parameters(module).items()):
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            pieces = _pieces(names, f"{path}.{own}", parameter)
            names.use(pieces, f"{path}.{own}", parameter.shape)
            packed = not found.get("in_full") and parameter.dim() > 1 and id(parameter) not in outside
            if packed and _can_hold(module, pieces, names.kinds):
                held[own] = parameter.shape, parameter.dtype, pieces
            else:
                _expand_as_read(parameter, pieces, names)
        for own, buffer in own_buffers(module).items():
            if buffer is not None and own not in unsaved_buffers(module):
                pieces = _pieces(names, f"{path}.{own}", buffer)
                names.use(pieces, f"{path}.{own}", buffer.shape)
                _expand_as_read(buffer, pieces, names)
        if _are_coded(held, names.kinds):
            _hold_codes(module, held)
        elif held:
            _hold(module, held, names.kinds)
    names.refuse_unused()


def _can_hold(module: Module, pieces: Sequence[_Piece], kinds: Mapping[str, int]) -> bool:
    known = type(module) is Linear or type(module).__name__.endswith("Experts")
    return known and all(kinds[piece.name] in QUANTIZED_TYPES for piece in pieces)


_Holds = dict[str, tuple[torch.Size, torch.dtype, list[_Piece]]]
"""Of parameters, by their own names: shape, dtype and what they are made of."""


def _are_coded(held: _Holds, kinds: Mapping[str, int]) -> bool:
    """Whether these are the weights of experts, in codes that products read."""
    pieces = [piece for *_, own in held.values() for piece in own]
    return can_hold_coded(held) and all(QUANTIZED_TYPES[kinds[piece.name]].name == "MXFP4" for piece in pieces)


def _hold_codes(module: Module, held: _Holds) -> None:
    """Replace the weights of experts by codes in the order of products, which are made as they are read."""
    is_transposed = bool(getattr(module, "is_transposed", False))
    parts: dict[str, CodedParts | None] = {}
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
            for make, of_each in ((codes_of_mxfp4, 2), (powers_of_mxfp4, GROUP))
        )
        parts[own] = CodedParts(codes, powers)
    hold_coded_experts(module, parts, is_transposed=is_transposed)


def _of_expert(
    expert: int,
    make: _Change,
    views: Sequence[_View],
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
    shapes = {own: (shape, dtype) for own, (shape, dtype, _) in held.items()}
    Expansion(module, partial(_expand, shapes, plans, bool(getattr(module, "is_transposed", False))))


def _expand(
    shapes: Mapping[str, Any], plans: Sequence[tuple[str, str, Any, _View]], is_transposed: bool, held: Held
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
    return whole


def _expand_as_read(parameter: torch.Tensor, pieces: Sequence[_Piece], names: _Names) -> None:
    """Let `parameter` be read in full, with the numbers that it has in transformers."""
    shape, dtype, kinds = parameter.shape, parameter.dtype, [names.kinds[piece.name] for piece in pieces]
    if len(pieces) == 1 and pieces[0].change is as_stored and parameter.dim() == 2:
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
        parts = (StoredPart(tuple(piece.name for piece in pieces), partial(_whole, shape, dtype, kinds, pieces)),)
    set_parts(parameter, parts)


def _rows(kind: int, dtype: torch.dtype, rows: slice, stored: torch.Tensor) -> torch.Tensor:
    return _numbers(stored[rows], kind, dtype)


def _whole(
    shape: torch.Size, dtype: torch.dtype, kinds: Sequence[int], pieces: Sequence[_Piece], *stored: torch.Tensor
) -> torch.Tensor:
    whole = torch.empty(shape, dtype=dtype)
    for kind, piece, tensor in zip(kinds, pieces, stored, strict=True):
        into = piece.view(whole)
        into.copy_(piece.change(_numbers(tensor, kind, dtype)).view(into.shape))
    return whole


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
        base, _, suffix = name.rpartition(".")
        if suffix not in ("weight", "bias"):
            base, suffix = name, "weight"
        if base.endswith("e_score_correction_bias"):
            base, suffix = base.removesuffix("_bias"), "bias"
        if base.endswith("_proj_bias"):
            base, suffix = base.removesuffix("_bias"), "bias"
        known = self._map.get_name(base) or self._map.get_name(base.replace("gate_up_proj", "gate_proj"))
        if known is None:
            raise self._refusal(f"what it calls {name} is not known")
        return f"{known}.{suffix}"

    def use(self, pieces: Sequence[_Piece], name: str, shape: torch.Size) -> None:
        """`pieces` make the parameter `name` of `shape`."""
        whole = torch.empty(shape, dtype=torch.uint8, device="meta")
        for piece in pieces:
            if piece.name not in self.kinds:
                raise self._refusal(f"it lacks {piece.name}, the model's {name}")
            found, expected = self._shapes[piece.name], tuple(piece.view(whole).shape)
            if found != expected:
                raise self._refusal(f"it holds {piece.name} as {found}, the model has {expected}")
            self._used.add(piece.name)

    def refuse_unused(self) -> None:
        unused = [name for name in self.kinds if name not in self._used and not self._is_needless(name)]
        if unused:
            raise self._refusal(f"it holds {', '.join(unused[:3])}, which this model does not know")

    def _is_needless(self, name: str) -> bool:
        layer = _PREDICTION.match(name)
        return bool(_IN_CONFIG.fullmatch(name)) or (layer is not None and int(layer[1]) >= self._layers)

    def _refusal(self, why: str) -> ModelError:
        return ModelError(
            f"the GGUF file of this {self.owner} is not known to run: {why}",
            hint="fetch the file again, or take the model's safetensors",
        )


def _pieces(names: _Names, name: str, parameter: torch.Tensor) -> list[_Piece]:
    """The tensors that make the parameter `name`."""
    own, config = names.of(name), names.config
    if name.endswith(".experts.gate_up_proj"):
        up, middle = own.replace("ffn_gate_exps", "ffn_up_exps"), parameter.shape[1] // 2
        if names.architecture == "gpt-oss":
            return [_Piece(own, partial(_columns, 0)), _Piece(up, partial(_columns, 1))]
        return [_Piece(own, lambda whole: whole[:, :middle]), _Piece(up, lambda whole: whole[:, middle:])]
    if name.endswith(".experts.gate_up_proj_bias"):
        up = own.replace("ffn_gate_exps", "ffn_up_exps")
        return [_Piece(own, lambda whole: whole[:, 0::2]), _Piece(up, lambda whole: whole[:, 1::2])]
    if name.endswith(".experts.down_proj") and names.architecture == "gpt-oss":
        return [_Piece(own, lambda whole: whole.transpose(1, 2))]
    if name.endswith(".kv_b_proj.weight") and own not in names.kinds:
        heads, keys, values = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
        return [
            _Piece(own.replace("attn_kv_b", "attn_k_b"), partial(_keys, heads, keys, values)),
            _Piece(own.replace("attn_kv_b", "attn_v_b"), partial(_values, heads, keys, values)),
        ]
    change: _Change = as_stored
    if names.architecture in _TURNED and ".attn_q." in own:
        change = partial(_turn_back, config.num_attention_heads)
    elif names.architecture in _TURNED and ".attn_k." in own:
        change = partial(_turn_back, config.num_key_value_heads)
    elif names.architecture in _NORMS_PLUS_ONE and own.endswith("norm.weight"):
        change = _less_one
    return [_Piece(own, as_stored, change)]


def _columns(first: int, whole: torch.Tensor) -> torch.Tensor:
    return whole.transpose(1, 2)[:, first::2]


def _keys(heads: int, keys: int, values: int, whole: torch.Tensor) -> torch.Tensor:
    return whole.view(heads, keys + values, -1)[:, :keys].transpose(1, 2)


def _values(heads: int, keys: int, values: int, whole: torch.Tensor) -> torch.Tensor:
    return whole.view(heads, keys + values, -1)[:, keys:]


def _turn_back(heads: int, rows: torch.Tensor) -> torch.Tensor:
    """`rows` of each head, of which pairs that turn together lie side by side, with these pairs half a head apart."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _less_one(norms: torch.Tensor) -> torch.Tensor:
    return norms - 1
