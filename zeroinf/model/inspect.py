"""Reads an `Anatomy` off a model that transformers builds on the meta device: real shapes, no weights, no memory."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch.nn import Module, ModuleList
from transformers import AutoModelForCausalLM

from zeroinf.errors import ModelError
from zeroinf.model.anatomy import Anatomy, Block, TensorSpec
from zeroinf.model.kv import read_cache

# The names under which configs keep the longest sequence their positions allow. A model with none of them (ALiBi,
# state space) has no such limit.
_LIMIT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx")


def read_anatomy(config: Any, *, dtype: str | None = None, trust_remote_code: bool = False) -> Anatomy:
    """Count the model that `config` (a transformers config) describes, in `dtype` (default: the config's own).

    Takes seconds and no memory, whatever the size. Raises ModelError when transformers cannot build the model, when no
    stack of decoder layers is found, or when the cache cannot be read.
    """
    dtype = dtype or config_dtype(config)
    model = build_meta(config, dtype, trust_remote_code)
    path, layers = find_blocks(model)
    text = model.config.get_text_config(decoder=True)
    limit = _context_limit(text)
    inside, outside, tied = _sort_tensors(model, path)
    return Anatomy(
        architecture=type(model).__name__,
        dtype=dtype,
        blocks_path=path,
        blocks=tuple(Block(index=i, tensors=tuple(inside.get(i, ()))) for i in range(len(layers))),
        outside=tuple(outside),
        tied=tuple(tied),
        cache=read_cache(model, limit),
        hidden_size=text.hidden_size,
        vocabulary=model.get_input_embeddings().weight.shape[0],
        context_limit=limit,
        loads="piece by piece" if is_converted(model) else "in place",
    )


def config_dtype(config: Any) -> str:
    """The dtype that the config says its weights have, float32 when it says nothing."""
    found = getattr(config, "dtype", None) or getattr(config.get_text_config(decoder=True), "dtype", None)
    return str(found or "float32").removeprefix("torch.")


def build_meta(config: Any, dtype: str, trust_remote_code: bool = False) -> Any:
    """The causal language model of `config` on the meta device, in evaluation mode; `config` itself is not changed.

    Parameters get the dtypes that `from_pretrained` would give them; buffers keep the ones they are made with.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
            )
    except (ValueError, TypeError, AttributeError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError(
            f"transformers cannot build a causal language model of {type(config).__name__}: {error}"
        ) from error
    keep_in_float32(model, dtype)
    return model.eval()


def find_blocks(model: Any) -> tuple[str, ModuleList]:
    """The decoder layers of `model` and their dotted path: the ModuleList as long as the config's layer count.

    Of several, the one with the most parameters. Raises ModelError when there is none.
    """
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    stacks = [(n, m) for n, m in model.named_modules() if isinstance(m, ModuleList) and len(m) == layers]
    if not stacks:
        raise ModelError(f"{type(model).__name__} has no stack of {layers} decoder layers that could be streamed")
    return max(stacks, key=lambda stack: sum(p.numel() for p in stack[1].parameters()))


def is_converted(model: Any) -> bool:
    """Whether transformers renames, splits or fuses weights as it loads a checkpoint of `model`."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return bool(get_model_conversion_mapping(model, add_legacy=False))


def keep_in_float32(model: Any, dtype: str) -> None:
    """Apply transformers' lists of modules that stay float32 when a model is loaded in a smaller dtype."""
    kept = set(model._keep_in_fp32_modules_strict or ()) if dtype in ("float16", "bfloat16") else set()
    if dtype == "float16":
        kept |= set(model._keep_in_fp32_modules or ())
    if not kept:
        return
    pattern = re.compile("|".join(rf"((^|\.){name}($|\.))" for name in kept))
    for name, parameter in model.named_parameters():
        if pattern.search(name):
            parameter.data = parameter.data.to(torch.float32)


def _sort_tensors(
    model: Module, path: str
) -> tuple[dict[int, list[TensorSpec]], list[TensorSpec], list[tuple[str, str]]]:
    """Specs of the tensors in each block, of those outside, and the tied pairs (alias, canonical)."""
    inside: dict[int, list[TensorSpec]] = {}
    outside: list[TensorSpec] = []
    tied: list[tuple[str, str]] = []
    first_name: dict[int, str] = {}
    in_block = re.compile(rf"^{re.escape(path)}\.(\d+)\.")
    named: list[tuple[str, torch.Tensor, bool]] = [
        (n, p, False) for n, p in model.named_parameters(remove_duplicate=False)
    ]
    named += [(n, b, True) for n, b in model.named_buffers(remove_duplicate=False)]
    for name, tensor, is_buffer in named:
        if (canonical := first_name.setdefault(id(tensor), name)) != name:
            if not is_buffer:
                tied.append((name, canonical))
            continue
        spec = TensorSpec(
            name=name, shape=tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."), is_buffer=is_buffer
        )
        match = in_block.match(name)
        (inside.setdefault(int(match[1]), []) if match else outside).append(spec)
    return inside, outside, tied


def _context_limit(text: Any) -> int | None:
    """The longest sequence of the text config's positions; None where nothing limits it."""
    if getattr(text, "alibi", False):
        return None
    limits = [getattr(text, name, None) for name in _LIMIT_NAMES]
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)
