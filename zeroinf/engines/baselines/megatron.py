"""Converts Megatron-LM's names and layouts of weights to those of transformers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from zeroinf.errors import ModelError

# Megatron's name (layers by number), and what models of each family call the same thing.
_BLOCK = {
    "input_layernorm": ("input_layernorm", "ln_1"),
    "post_attention_layernorm": ("post_attention_layernorm", "ln_2"),
    "attention.query_key_value": ("attention.query_key_value", "self_attention.query_key_value", "attn.c_attn"),
    "attention.dense": ("attention.dense", "self_attention.dense", "attn.c_proj"),
    "mlp.dense_h_to_4h": ("mlp.dense_h_to_4h", "mlp.c_fc"),
    "mlp.dense_4h_to_h": ("mlp.dense_4h_to_h", "mlp.c_proj"),
}
_OUTSIDE = {
    "embedding.word_embeddings": ("gpt_neox.embed_in", "transformer.word_embeddings", "transformer.wte"),
    "embedding.word_embeddings.norm": ("transformer.word_embeddings_layernorm",),
    "embedding.position_embeddings": ("transformer.wpe",),
    "transformer.final_layernorm": ("gpt_neox.final_layer_norm", "transformer.ln_f"),
    "output_layer": ("embed_out", "lm_head", "gpt_neox.embed_out"),
}
_VOCABULARIES = ("embed_in", "embed_out", "lm_head", "word_embeddings", "wte")
_LAYER = re.compile(r"^(?:transformer|encoder)\.layers\.(\d+)\.(.+)\.(weight|bias)$")
# From this version on each head's queries, keys and values lie together; before, all queries come first.
_HEADS_TOGETHER = 2.0


def megatron_parts(saved: Sequence[Mapping[str, Any]], version: float, model: Any) -> dict[str, Sequence[torch.Tensor]]:
    """Each rank's parts of every tensor under transformers' names, with a head's queries, keys and values together.

    `version` is Megatron's checkpoint version (0, 1, 2 or 3), overruled by what the files say themselves. GPT-NeoX and
    BLOOM keep fused weights as Megatron does; GPT-2 transposes, and is given them whole. Raises ModelError for others.
    """
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    path = next((p for p in ("gpt_neox.layers", "transformer.h") if f"{p}.0.mlp.dense_h_to_4h.weight" in own), None)
    if path is None and "transformer.h.0.attn.c_attn.weight" in own:
        path = "transformer.h"
    if path is None:
        raise ModelError(
            f"Megatron's weights cannot become {type(model).__name__}",
            hint="GPT-2, GPT-NeoX and BLOOM are laid out alike",
        )
    ranks = []
    for rank in saved:
        version = float(rank.get("checkpoint_version", version))
        ranks.append(dict(_flat(rank.get("module") or rank.get("model") or rank)))
    heads = int(model.config.num_attention_heads)
    parts: dict[str, Sequence[torch.Tensor]] = {}
    for name in ranks[0]:
        target = _target(name, own, path)
        if target is None:
            continue
        given = [rank[name] for rank in ranks]
        if "query_key_value" in name:
            given = [_heads_together(part, version, heads // len(ranks)) for part in given]
        parts[target] = _as_the_model(target, given, own[target], heads)
    return parts


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in tree.items():
        whole = f"{prefix}{name}".removeprefix("language_model.").removeprefix("module.")
        if isinstance(value, Mapping):
            yield from _flat(value, f"{whole}.")
        elif isinstance(value, torch.Tensor):
            yield whole.replace("self_attention.", "attention."), value


def _target(name: str, own: Mapping[str, Any], path: str) -> str | None:
    """transformers' name of Megatron's `name`; None for what the model does not keep."""
    if match := _LAYER.match(name):
        index, inner, kind = match.groups()
        candidates = [f"{path}.{index}.{known}.{kind}" for known in _BLOCK.get(inner, ())]
    else:
        base, _, kind = name.removeprefix("encoder.").rpartition(".")
        base = base if base != "final_layernorm" else "transformer.final_layernorm"
        candidates = [f"{known}.{kind}" for known in _OUTSIDE.get(base, ())]
    return next((candidate for candidate in candidates if candidate in own), None)


def _heads_together(part: torch.Tensor, version: float, heads: int) -> torch.Tensor:
    """(heads x 3 x width, ...) from what `version` keeps: (3 x heads x width), or (heads x width x 3)."""
    width = part.shape[0] // heads // 3
    if version >= _HEADS_TOGETHER:
        return part
    if version >= 1.0:
        return part.view(heads, width, 3, *part.shape[1:]).transpose(1, 2).reshape(part.shape)
    return part.view(3, heads, width, *part.shape[1:]).transpose(0, 1).reshape(part.shape)


def _as_the_model(
    name: str, parts: Sequence[torch.Tensor], shape: tuple[int, ...], heads: int
) -> Sequence[torch.Tensor]:
    """Vocabularies lose what Megatron padded them with; GPT-2's fused and transposed weights are put together."""
    if name.rpartition(".")[0].endswith(_VOCABULARIES):
        return [torch.cat(list(parts))[: shape[0]]]
    if ".attn." not in name and ".mlp.c_" not in name:
        return parts
    whole = _joined(parts, name)
    if ".c_attn." in name:
        width = whole.shape[0] // heads // 3
        whole = whole.view(heads, 3, width, *whole.shape[1:]).transpose(0, 1).reshape(whole.shape)
    return [whole.t().contiguous() if whole.dim() == 2 else whole]


def _joined(parts: Sequence[torch.Tensor], name: str) -> torch.Tensor:
    """Column-parallel layers are split in rows; row-parallel ones in columns, with a whole bias on each rank."""
    is_row_parallel = name.removesuffix(".weight").removesuffix(".bias").endswith("c_proj")
    if is_row_parallel:
        return parts[0] if parts[0].dim() == 1 else torch.cat(list(parts), 1)
    return torch.cat(list(parts))
