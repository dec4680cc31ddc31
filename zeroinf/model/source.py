"""A model that was found: its name, its location, its config, and the facts that only its files of weights know.

`zeroinf.model.resolve` makes a `ModelSource` of a name. Nothing here reads a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zeroinf.errors import UsageError
from zeroinf.model.adapter import Adapter
from zeroinf.model.config import DTYPES, config_dtype


@dataclass(frozen=True, slots=True)
class StoredRows:
    """So many rows of a matrix, which lie in the safetensors `file` one after the other as the tensor `name`."""

    file: Path
    name: str
    rows: int
    dtype: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointFacts:
    """Facts of a complete checkpoint that its config may not say, or may say otherwise."""

    dtype: str | None
    """The dtype of most of its weights; None where that is none of DTYPES."""
    untied: tuple[str, ...]
    """Parameters that the model's class ties to others, which the config marks or the files store as their own."""
    unused: tuple[str, ...]
    """Stored tensors that the model does not have, but for those that transformers drops silently."""
    rows: Mapping[str, tuple[StoredRows, ...]] = field(default_factory=dict, repr=False)
    """Where the rows of embeddings lie, by the full dotted names of their weights: those that can be read by row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """A model that was found. `name` is what the user wrote, `location` a local folder or a hub id."""

    name: str
    location: str
    revision: str | None
    trust_remote_code: bool
    random_weights: bool
    config: Any = field(compare=False, repr=False)
    facts: CheckpointFacts | None = field(default=None, compare=False, repr=False)
    """None where its weights are not on this machine yet, or are none."""
    weights: tuple[Path, ...] = ()
    """Files of weights that do not lie in `location`: all parts of a `.gguf` file."""
    adapter: Adapter | None = field(default=None, repr=False)
    """What is merged with the weights of `location`, its base model."""

    @property
    def is_local(self) -> bool:
        return Path(self.location).is_dir()


def pick_dtype(requested: str, source: ModelSource, device: str, supports_bf16: bool = True) -> str:
    """The dtype to run `source` in on `device` ("cuda" or "cpu"); `auto` is the checkpoint's own where that runs.

    Raises UsageError for a dtype that is unknown, or that the device does not compute in.
    """
    if requested == "int8":
        raise UsageError(
            "no engine computes in int8: DeepSpeed's init_inference refuses the dtype, and its fused layers, which "
            "alone quantize, need transformers 4",
            hint="use --dtype bfloat16, float16 or float32; --wire int8 moves weights as codes of 8 bits",
        )
    if requested != "auto":
        if requested not in DTYPES:
            raise UsageError(f"unknown dtype {requested!r}", hint=f"one of auto, {', '.join(DTYPES)}")
        if requested == "float16" and device == "cpu":
            raise UsageError("float16 does not run on the CPU", hint="use --dtype bfloat16 or float32")
        if requested == "bfloat16" and not supports_bf16:
            raise UsageError("this device does not compute in bfloat16", hint="use --dtype float16 or float32")
        return requested
    own = config_dtype(source.config)
    if own not in DTYPES:
        own = "bfloat16"
    if own == "float16" and device == "cpu":
        own = "bfloat16"
    if own == "bfloat16" and not supports_bf16:
        return "float32" if device == "cpu" else "float16"
    return own
