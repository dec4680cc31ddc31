"""Filling the host tier: straight from safetensors where names match, through transformers where they do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from zeroinf.errors import ModelError
from zeroinf.model.source import ModelSource
from zeroinf.model.weights import weight_files

_THREADS = 8
_RANDOM_SCALE = 0.02
_RANDOM_SEED = 0
_TILE = 1 << 22


@dataclass(frozen=True, slots=True)
class Target:
    """Memory that waits for a tensor of the checkpoint, known there by one of `names`."""

    names: tuple[str, ...]
    memory: torch.Tensor


def fill(targets: Sequence[Target], model: Any, source: ModelSource) -> None:
    """Copy every target's tensor into its memory, converting to its dtype.

    `model` is the skeleton that the names come from. Raises ModelError for a checkpoint that does not match.
    """
    if source.random_weights:
        _fill_randomly(targets)
        return
    origins = _direct_origins(targets, model, weight_files(source))
    if origins is None:
        _fill_through_transformers(targets, model, source)
    else:
        _fill_directly(targets, origins)


def _fill_randomly(targets: Sequence[Target]) -> None:
    """Normal values that repeat after a while: they must not be zeros, and need not be good."""
    generator = torch.Generator().manual_seed(_RANDOM_SEED)
    tile = torch.randn(_TILE, generator=generator) * _RANDOM_SCALE

    def one(target: Target) -> None:
        flat, values = target.memory.view(-1), tile.to(target.memory.dtype)
        for start in range(0, flat.numel(), _TILE):
            part = flat[start : start + _TILE]
            part.copy_(values[: part.numel()])

    _in_parallel([partial(one, target) for target in targets])


def _direct_origins(targets: Sequence[Target], model: Any, files: Sequence[Path]) -> list[tuple[Path, str]] | None:
    """Where each target lies, if all lie in safetensors under their own names, with or without the model's prefix.

    None where transformers renames, splits or fuses weights as it loads them.
    """
    from safetensors import safe_open
    from transformers.conversion_mapping import get_model_conversion_mapping

    if any(file.suffix != ".safetensors" for file in files) or get_model_conversion_mapping(model, add_legacy=False):
        return None
    stored: dict[str, Path] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            stored |= dict.fromkeys(tensors.keys(), file)
    prefix = f"{model.base_model_prefix}."
    origins = []
    for target in targets:
        candidates = (*target.names, *(name.removeprefix(prefix) for name in target.names))
        found = next((name for name in candidates if name in stored), None)
        if found is None:
            return None
        origins.append((stored[found], found))
    return origins


def _fill_directly(targets: Sequence[Target], origins: Sequence[tuple[Path, str]]) -> None:
    from safetensors import safe_open

    with ExitStack() as stack:
        files = {path: stack.enter_context(safe_open(path, framework="pt")) for path, _ in origins}

        def one(target: Target, path: Path, name: str) -> None:
            _copy(target, files[path].get_tensor(name), path)

        _in_parallel([partial(one, target, *origin) for target, origin in zip(targets, origins, strict=True)])


def _fill_through_transformers(targets: Sequence[Target], model: Any, source: ModelSource) -> None:
    """Let transformers rename and fuse as it must; for a moment the weights lie in host memory twice."""
    from transformers import AutoModelForCausalLM

    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            source.location,
            config=source.config,
            dtype=model.dtype,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"cannot load {source.name}: {error}") from error
    values = loaded.state_dict()
    _in_parallel([partial(_copy, target, values[target.names[0]], source.location) for target in targets])


def _copy(target: Target, value: torch.Tensor, origin: Path | str) -> None:
    if value.shape != target.memory.shape:
        raise ModelError(
            f"{origin} holds {target.names[0]} as {tuple(value.shape)}, the model has {tuple(target.memory.shape)}",
            hint="the weights belong to another config",
        )
    target.memory.copy_(value)


def _in_parallel(copies: Sequence[Callable[[], None]]) -> None:
    with ThreadPoolExecutor(_THREADS) as pool:
        for done in [pool.submit(copy) for copy in copies]:
            done.result()
