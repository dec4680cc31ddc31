"""Gives access to what transformers keeps to itself in models and their configs.

Relies on attributes of `PreTrainedModel` and `PreTrainedConfig` and on `GenerationMixin._get_logits_processor`, as they
are in transformers 5.17 to 5.24; each function names its own. `tests/unit/test_compat.py` fails when they change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def attention_by(model: Any, name: str) -> Iterator[None]:
    """While it lasts, layers of `model` hand attention to what is registered with transformers as `name`.

    Relies on `config._attn_implementation`, which layers read in each forward; `set_attn_implementation` does more than
    that, and takes a hundred times as long.
    """
    config = model.config
    before, config._attn_implementation = config._attn_implementation, name
    try:
        yield
    finally:
        config._attn_implementation = before


@contextmanager
def experts_by(model: Any, name: str) -> Iterator[None]:
    """While it lasts, experts of `model` run by transformers' method `name`; nothing where it has no such choice.

    Relies on `config._experts_implementation`, the only way to learn what is set.
    """
    before = getattr(model.config, "_experts_implementation", None)
    if before is None:
        yield
        return
    model.set_experts_implementation(name)
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def takes_default_cache(model: Any) -> bool:
    """Whether the model's forward takes a `DynamicCache`. Relies on `_supports_default_dynamic_cache`."""
    return bool(model._supports_default_dynamic_cache())


def modules_in_float32(model: Any) -> tuple[set[str], set[str]]:
    """Modules that stay float32 when a model is loaded in a smaller dtype, and those that do in float16 only.

    Relies on `_keep_in_fp32_modules_strict` and `_keep_in_fp32_modules`, which loading reads.
    """
    return set(model._keep_in_fp32_modules_strict or ()), set(model._keep_in_fp32_modules or ())


def ignored_when_missing(model: Any) -> tuple[str, ...]:
    """Patterns of tensors that the model computes by itself where a checkpoint lacks them. Relies on
    `_keys_to_ignore_on_load_missing`."""
    return tuple(model._keys_to_ignore_on_load_missing or ())


def leave_out_ignored(model: Any, account: Any) -> None:
    """Take out of transformers' account of loading what it would not warn of. Relies on
    `_adjust_missing_and_unexpected_keys`."""
    model._adjust_missing_and_unexpected_keys(account)


def greedy_processors(
    model: Any, config: Any, *, prompt_tokens: int, eos_tokens: Sequence[int], device: torch.device
) -> Any:
    """The logits processors that greedy search with the generation config `config` would use for a prompt of so many
    tokens, a LogitsProcessorList.

    Relies on `_get_logits_processor`, and on `_eos_token_tensor` of the config, which `generate` sets before it. There
    is no public way to have the processors without `generate`.
    """
    config._eos_token_tensor = torch.tensor(sorted(eos_tokens), device=device) if eos_tokens else None
    return model._get_logits_processor(generation_config=config, input_ids_seq_length=prompt_tokens, device=str(device))
