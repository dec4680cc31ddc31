"""Options of the harness's model: those of `zeroinf.pipeline` under the same names, and the generation settings of
tasks.

Unknown options, and options without effect, are refused by name.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from zeroinf.api import pipeline
from zeroinf.errors import UsageError
from zeroinf.generation.row import Sampling
from zeroinf.options.definition import from_keywords
from zeroinf.options.options import LoadOptions, RunOptions

_OWN = frozenset({"model", "max_prompt_tokens", "max_new_tokens", "logprobs", "batch_size", "return"})
"""Of the names of `zeroinf.pipeline`, those that mean nothing here or are said otherwise."""
_SAMPLED = ("top_p", "top_k", "min_p")
_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_IDLE = {"num_beams": 1, "use_cache": True, "early_stopping": False, "num_return_sequences": 1}
"""Settings of transformers' `generate` that tasks name, and the values that change nothing."""


def options_of(model: str, batch_size: int | None, given: Mapping[str, Any]) -> tuple[int | None, bool | None, Any]:
    """`num_gpus`, `progress` and the options of a run. Raises UsageError for what is unknown, or no such value."""
    hints = {name: hint for name, hint in get_type_hints(pipeline).items() if name not in _OWN}
    for name in given:
        if name not in hints:
            near = difflib.get_close_matches(name, ("pretrained", *hints), n=1)
            named = "pretrained names the model" if name == "model" else f"did you mean {near[0]}?" if near else None
            raise UsageError(
                f"model_args: zeroinf has no option {name}",
                hint=named or "help(zeroinf.pipeline) and docs/guide/lm-eval.md list them",
            )
    checked = {name: _checked(name, value, hints[name]) for name, value in given.items()}
    num_gpus, progress = checked.pop("num_gpus", None), checked.pop("progress", None)
    asked = {"model": model, "batch_size": batch_size, **checked}
    try:
        return num_gpus, progress, from_keywords(RunOptions, asked, LoadOptions, sampling=Sampling(max_new_tokens=1))
    except UsageError as error:
        raise UsageError(f"model_args: {error.message}", hint=error.hint) from error


def _checked(name: str, value: Any, hint: Any) -> Any:
    """`value` as the Python API takes it: the command line's harness gives text, numbers and lists."""
    if name == "nvme_paths":
        return tuple(map(Path, [value] if isinstance(value, (str, Path)) else value))
    if name == "tensor_parallel" and isinstance(value, int):
        value = {"size": value}
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        raise UsageError(f"model_args: {name}={value!r}: {error.errors()[0]['msg']}") from error


def batch_size_of(asked: int | str | None) -> int | None:
    """The most rows at a time; None leaves it to the planner."""
    if asked is None or str(asked).partition(":")[0] == "auto":
        return None
    try:
        rows = int(asked)
    except ValueError as error:
        raise UsageError(f"batch_size {asked!r} is no number", hint="leave it out, and it is planned") from error
    if rows < 1:
        raise UsageError(f"batch_size {rows}: at least 1", hint="leave it out, and it is planned")
    return None if rows == 1 else rows


def refuse_idle(max_batch_size: int | None, device: str | None, think_end_token: object) -> None:
    """Raises UsageError for what the harness offers and would have no effect."""
    if max_batch_size is not None:
        raise UsageError("max_batch_size has no effect: the batch is planned", hint="--batch_size limits it")
    if device not in (None, "cuda", "cuda:0"):
        raise UsageError(
            f"device {device}: zeroinf takes the GPUs that are visible, else the CPU",
            hint="choose them with CUDA_VISIBLE_DEVICES; DS_ACCELERATOR=cpu computes on the CPU",
        )
    if think_end_token is not None and not isinstance(think_end_token, str):
        raise UsageError(f"think_end_token {think_end_token!r} is no text", hint='such as "</think>"')


def sampling_of(given: Mapping[str, Any], max_new_tokens: int, eos: str) -> Sampling:
    """Read a task's settings of a generation, by the harness's names. Raises UsageError for what it cannot have."""
    settings = dict(given)
    until = settings.pop("until", None) or []
    stops = [until] if isinstance(until, str) else list(until)
    named = [value for name in _LENGTH_NAMES if (value := settings.pop(name, None)) is not None]
    do_sample, temperature = settings.pop("do_sample", None), float(settings.pop("temperature", None) or 0.0)
    if do_sample and not temperature:
        temperature = 1.0
    samples = bool(temperature) and do_sample is not False
    filters = {name: value for name in _SAMPLED if (value := settings.pop(name, None)) is not None}
    more = {name: settings.pop(name) for name in ("seed", "repetition_penalty") if name in settings}
    unknown = [name for name, value in settings.items() if name not in _IDLE or _IDLE[name] != value]
    if unknown:
        raise UsageError(
            f"gen_kwargs: {', '.join(sorted(unknown))} cannot be asked for",
            hint=f"until, {', '.join(_LENGTH_NAMES)}, do_sample, temperature, {', '.join(_SAMPLED)}, seed and "
            "repetition_penalty can",
        )
    try:
        return Sampling(
            max_new_tokens=int(named[0] if named else max_new_tokens),
            temperature=temperature if samples else 0.0,
            stop=tuple(dict.fromkeys(stop for stop in (*stops, eos) if stop)),
            stop_spans_prompt=False,
            **(filters if samples else {}),
            **more,
        )
    except (TypeError, ValueError) as error:
        raise UsageError(f"gen_kwargs: {error}") from error
