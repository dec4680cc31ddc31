"""The tensors of a GGUF file that make a parameter of transformers, and the orders in which llama.cpp has elements.

Facts are those of llama.cpp's converters (`conversion/`), and for Qwen3.5 of transformers' `integrations/gguf` too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from zeroinf.model.stored_parts import as_stored

View = Callable[[torch.Tensor], torch.Tensor]
Change = Callable[[torch.Tensor], torch.Tensor]
Tiles = tuple[int, int, int]
"""Inner heads, outer heads, and elements of each: a file has them as (outer, inner, of each), a parameter as (inner,
outer, of each)."""

# llama.cpp's converters turn the rows of queries and keys of these round, and add one to the norms of those.
_TURNED = (
    *("arcee", "granite", "granitehybrid", "granitemoe", "llama", "mistral3", "nemotron_h", "nemotron_h_moe"),
    *("olmo", "smollm3"),
)
_NORMS_PLUS_ONE = ("gemma", "gemma2", "gemma3", "nemotron", "qwen3next", "qwen35", "qwen35moe")
# Experts that transformers has with inputs before outputs.
_TRANSPOSED = ("gpt-oss", "llama4")
# Value heads of linear attention lie tiled: the first of each key head, then the second of each.
_TILED = ("qwen35", "qwen35moe")


@dataclass(frozen=True, slots=True)
class GgufPiece:
    """A tensor of the file, `name`, which fills `view` of a parameter."""

    name: str
    view: View
    change: Change = as_stored
    """Of rows as they lie in the file, bytes or numbers."""
    tiles: Tiles | None = None
    """How columns lie, if not as the parameter has them. Held in blocks, they stay so, and inputs are reordered."""
    scale: str | None = None
    """A tensor by which its numbers are multiplied: one number, or one for each expert."""

    def write(self, numbers: torch.Tensor, into: torch.Tensor) -> None:
        """Write `numbers` (rows, columns as in the file) to `into`, the view of the parameter."""
        if self.tiles is None:
            into.copy_(numbers.view(into.shape))
            return
        inner, outer, each = self.tiles
        rows = numbers.shape[:-1]
        into.view(*rows, inner, outer, each).copy_(numbers.view(*rows, outer, inner, each).transpose(-3, -2))


def pieces_of(
    own: str, name: str, parameter: torch.Tensor, architecture: str, config: Any, stored: Collection[str]
) -> list[GgufPiece]:
    """The tensors that make the parameter `name`, which the file calls `own` if one tensor is all of it; `stored` are
    the file's names."""
    if name.endswith((".experts.gate_up_proj", ".experts.gate_up_proj_bias", ".input_linear.weight")) and (
        "ffn_gate_up" not in own
    ):
        return _gates_and_ups(own, parameter, architecture)
    if name.endswith(".experts.down_proj") and architecture in _TRANSPOSED:
        return [GgufPiece(own, lambda whole: whole.transpose(1, 2))]
    if name.endswith(".kv_b_proj.weight") and own not in stored:
        heads, keys, values = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
        return [
            GgufPiece(own.replace("attn_kv_b", "attn_k_b"), partial(_keys, heads, keys, values)),
            GgufPiece(own.replace("attn_kv_b", "attn_v_b"), partial(_values, heads, keys, values)),
        ]
    if "ssm_conv1d_q" in own:
        return [
            GgufPiece(own.replace("conv1d_q", f"conv1d_{which}"), partial(_part_of_three, number))
            for number, which in enumerate("qkv")
        ]
    if "linear_attn" in name:
        tiled = architecture in _TILED
        return [_of_linear_attention(own, config)] if tiled else _of_joined_linear_attention(own, config, stored)
    change: Change = as_stored
    if architecture in _TURNED and ".attn_q." in own:
        change = partial(_turn_back, config.num_attention_heads)
    elif architecture in _TURNED and ".attn_k." in own:
        change = partial(_turn_back, config.num_key_value_heads)
    elif architecture in _NORMS_PLUS_ONE and own.endswith("norm.weight"):
        change = _less_one
    elif own.endswith("ssm_a"):
        change = _decay
    return [GgufPiece(own, as_stored, change)]


def _gates_and_ups(own: str, parameter: torch.Tensor, architecture: str) -> list[GgufPiece]:
    """The two tensors of a parameter that has gates and what they gate as one: one after the other, or in turn."""
    up = own.replace("ffn_gate", "ffn_up")
    if architecture == "gpt-oss":
        is_bias = parameter.dim() == 2
        return [GgufPiece(name, partial(_in_turn, first, is_bias)) for first, name in enumerate((own, up))]
    if architecture in _TRANSPOSED:
        middle = parameter.shape[-1] // 2
        return [
            GgufPiece(own, lambda whole: whole.mT[..., :middle, :]),
            GgufPiece(up, lambda whole: whole.mT[..., middle:, :]),
        ]
    middle = parameter.shape[-2] // 2
    return [
        GgufPiece(own, lambda whole: whole[..., :middle, :]),
        GgufPiece(up, lambda whole: whole[..., middle:, :]),
    ]


def _of_linear_attention(own: str, config: Any) -> GgufPiece:
    """What linear attention has for each value head is brought from tiles into groups, one for each key head."""
    inner, width = config.linear_num_key_heads, config.linear_value_head_dim
    outer, leaf = config.linear_num_value_heads // inner, own.split(".")[2]
    if leaf == "ssm_out":
        return GgufPiece(own, as_stored, tiles=(inner, outer, width))
    each, first = 1, 0
    if leaf in ("attn_qkv", "ssm_conv1d"):  # after queries and keys
        each, first = width, 2 * inner * config.linear_key_head_dim
    elif leaf == "attn_gate":
        each = width
    elif leaf == "ssm_norm":
        return GgufPiece(own, as_stored)
    return GgufPiece(own, as_stored, partial(_grouped, (inner, outer, each), first, leaf == "ssm_a"))


def _of_joined_linear_attention(own: str, config: Any, stored: Collection[str]) -> list[GgufPiece]:
    """Of Qwen3-Next, which joins what each key head has of queries, keys, values and gates: files have it so, or gates
    apart, and all heads' queries before all heads' keys and values."""
    leaf = own.split(".")[2]
    if leaf == "ssm_a":
        return [GgufPiece(own, as_stored, _decay)]
    if leaf != "ssm_in" or own in stored:
        return [GgufPiece(own, as_stored)]
    heads, keys = config.linear_num_key_heads, config.linear_key_head_dim
    values = config.linear_num_value_heads // heads * config.linear_value_head_dim
    sizes, middle = (keys, keys, values), 2 * keys + values
    return [
        GgufPiece(
            own.replace("ssm_in", "attn_qkv"),
            lambda whole: whole.view(heads, middle + values, -1)[:, :middle],
            partial(_by_head, heads, sizes),
        ),
        GgufPiece(
            own.replace("ssm_in", "attn_gate"),
            lambda whole: whole.view(heads, middle + values, -1)[:, middle:],
            partial(_by_head, heads, (values,)),
        ),
    ]


def _by_head(heads: int, sizes: tuple[int, ...], rows: torch.Tensor) -> torch.Tensor:
    """`rows`, the parts of all heads one after the other, as (heads, rows of all parts, columns)."""
    parts = torch.split(rows, [heads * size for size in sizes])
    return torch.cat([part.view(heads, -1, rows.shape[-1]) for part in parts], dim=1)


def _decay(rows: torch.Tensor) -> torch.Tensor:
    """The logarithm of how fast states decay, of which a file has minus the exponential."""
    return (-rows).log()


def _grouped(tiles: Tiles, first: int, is_decay: bool, rows: torch.Tensor) -> torch.Tensor:
    """`rows` from `first` on in groups."""
    inner, outer, each = tiles
    rows = _decay(rows) if is_decay else rows
    tiled = rows[first:].reshape(outer, inner, each, *rows.shape[1:])
    return torch.cat((rows[:first], tiled.transpose(0, 1).flatten(0, 2)))


def _in_turn(first: int, is_bias: bool, whole: torch.Tensor) -> torch.Tensor:
    return (whole if is_bias else whole.transpose(1, 2))[:, first::2]


def _part_of_three(number: int, whole: torch.Tensor) -> torch.Tensor:
    return whole.chunk(3)[number]


def _keys(heads: int, keys: int, values: int, whole: torch.Tensor) -> torch.Tensor:
    return whole.view(heads, keys + values, -1)[:, :keys].transpose(1, 2)


def _values(heads: int, keys: int, values: int, whole: torch.Tensor) -> torch.Tensor:
    return whole.view(heads, keys + values, -1)[:, keys:]


def _turn_back(heads: int, rows: torch.Tensor) -> torch.Tensor:
    """`rows` of each head, of which pairs that turn together lie side by side, with these pairs half a head apart."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _less_one(norms: torch.Tensor) -> torch.Tensor:
    return norms - 1
