"""The files a checkpoint's weights lie in, checked to be complete."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from zeroinf.errors import ModelError
from zeroinf.model.hub import hub_error

if TYPE_CHECKING:
    from zeroinf.model.source import ModelSource

# In the order in which transformers looks for them: a single file, or the index of many.
_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
_INDEX_SUFFIX = ".index.json"

_TEXT_FILES = ("*.json", "*.jinja", "*.txt", "tokenizer*", "*.model")
_SAFETENSORS = ("model*.safetensors",)
_TORCH_FILES = ("pytorch_model*.bin",)


def weight_files(source: ModelSource) -> list[Path]:
    """Paths of the weight files of `source`, fetched from the hub when it is not a local folder.

    Of the hub's files only config, tokenizer and safetensors are fetched; `.bin` files where there are no safetensors.
    The user's hub token and HF_HUB_OFFLINE are honoured. Raises ModelError when a file is missing.
    """
    if source.is_local:
        return local_weight_files(Path(source.location))
    code = ("*.py",) if source.trust_remote_code else ()
    folder = _fetch(source, (*_TEXT_FILES, *_SAFETENSORS, *code))
    if not any((folder / f"{_SINGLE_FILES[0]}{suffix}").exists() for suffix in ("", _INDEX_SUFFIX)):
        folder = _fetch(source, (*_TEXT_FILES, *_TORCH_FILES, *code))
    return local_weight_files(folder)


def can_be_converted(files: Sequence[Path]) -> bool:
    """Whether weights can be loaded a piece at a time: not if they are pickled."""
    return all(file.suffix == ".safetensors" for file in files)


def local_weight_files(folder: Path) -> list[Path]:
    """Paths of the weight files in `folder`; raises ModelError when there are none, or a shard is missing."""
    for single in _SINGLE_FILES:
        if (folder / single).is_file():
            return [folder / single]
        index = folder / f"{single}{_INDEX_SUFFIX}"
        if index.is_file():
            return _shards(index)
    raise ModelError(
        f"{folder} holds no weights", hint=f"it needs one of {', '.join(_SINGLE_FILES)}, or their {_INDEX_SUFFIX}"
    )


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index} is not an index of weights: {error!r}", hint="fetch the file again") from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ModelError(
            f"{index.parent} lacks {missing[0]}" + (f" and {len(missing) - 1} more shards" if missing[1:] else ""),
            hint=f"{index.name} names {len(names)} shards; fetch the rest",
        )
    return [index.parent / name for name in names]


def _fetch(source: ModelSource, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(source.location, revision=source.revision, allow_patterns=list(patterns)))
    except (OSError, HfHubHTTPError, ValueError) as error:
        raise hub_error(source.location, source.revision, error) from error
