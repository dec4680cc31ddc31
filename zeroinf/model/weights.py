"""Finds the weight files of a checkpoint, checks that they are complete, and reads the names and shapes of their
tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zeroinf.errors import ModelError
from zeroinf.model.hub import hub_error
from zeroinf.model.mapped_files import DTYPES, map_safetensors
from zeroinf.model.reading import reading_weights
from zeroinf.model.source import ModelSource

if TYPE_CHECKING:
    import torch

# In the order in which transformers looks for them: a single file, or the index of many.
_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
_INDEX_SUFFIX = ".index.json"

_TEXT_FILES = ("*.json", "*.jinja", "*.txt", "tokenizer*", "*.model")
_SAFETENSORS = ("model*.safetensors",)
_TORCH_FILES = ("pytorch_model*.bin",)


# Of a tensor that is compared with another, so much is read at a time.
_ELEMENTS_AT_ONCE = 1 << 24


@dataclass(frozen=True, slots=True)
class HeldTensor:
    """A tensor that lies in `file`: its shape and dtype, on the meta device."""

    file: Path
    meta: torch.Tensor


def weight_files(source: ModelSource) -> list[Path]:
    """Paths of the weight files of `source`, fetched from the hub when it is not a local folder.

    Of the hub's files only config, tokenizer and safetensors are fetched; `.bin` files where there are no safetensors.
    The user's hub token and HF_HUB_OFFLINE are honoured. Raises ModelError when a file is missing.
    """
    if source.weights:
        return list(source.weights)
    if source.adapter is not None:
        return [*weight_files(replace(source, adapter=None)), source.adapter.weights]
    if source.is_local:
        return local_weight_files(Path(source.location))
    folder = _fetch(source, pickled=False)
    if not has_safetensors(path.name for path in folder.iterdir()):
        folder = _fetch(source, pickled=True)
    return local_weight_files(folder)


def hub_patterns(*, pickled: bool, trust_remote_code: bool) -> list[str]:
    """Patterns of the files of a hub's model that are needed: config, tokenizer and weights, in safetensors or
    `pickled`; with `trust_remote_code` its code."""
    weights = _TORCH_FILES if pickled else _SAFETENSORS
    return [*_TEXT_FILES, *weights, *(("*.py",) if trust_remote_code else ())]


def has_safetensors(names: Iterable[str]) -> bool:
    """Whether weights in safetensors are among the files of a model."""
    return not {_SINGLE_FILES[0], f"{_SINGLE_FILES[0]}{_INDEX_SUFFIX}"}.isdisjoint(names)


def weights_at_hand(location: str, revision: str | None) -> list[Path] | None:
    """Paths of the weight files of the hub's model `location` that the local cache holds; None unless it holds all."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(location, "config.json", revision=revision)
    if not isinstance(config, str):
        return None
    try:
        return local_weight_files(Path(config).parent)
    except ModelError:
        return None


def hub_dtype(location: str, revision: str | None) -> str | None:
    """The dtype of most weights of the hub's model `location`, of whose safetensors only the headers are fetched; None
    where it has none, or the hub cannot be reached."""
    from huggingface_hub import get_safetensors_metadata

    try:
        counts = get_safetensors_metadata(location, revision=revision).parameter_count
    except Exception:  # whatever it is, fetching the weights will say it better
        return None
    floating = {DTYPES[kind]: count for kind, count in counts.items() if kind in ("BF16", "F16", "F32")}
    return max(floating, key=lambda dtype: floating[dtype], default=None)


def can_be_converted(files: Sequence[Path]) -> bool:
    """Whether weights can be loaded a piece at a time: not if they are pickled."""
    return all(file.suffix in _HEADERS for file in files)


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


def held_tensors(name: str, files: Sequence[Path]) -> dict[str, HeldTensor]:
    """The tensors in `files`, the weights of the model `name`, by the names there; no values are read.

    Raises ModelError for files that are damaged, for pickles that would run code, where an index names a tensor that
    its shard lacks, and where two files hold the same one.
    """
    held: dict[str, HeldTensor] = {}
    with reading_weights(name):
        for file in files:
            read = _HEADERS.get(file.suffix, _pickled_header)
            own = {tensor: HeldTensor(file, meta) for tensor, meta in read(file)}
            if twice := sorted(held.keys() & own.keys()):
                raise ModelError(
                    f"{held[twice[0]].file} and {file.name} both hold {twice[0]}"
                    + (f", and {len(twice) - 1} more" if twice[1:] else ""),
                    hint="fetch the shards again: they are not of one checkpoint",
                )
            held |= own
    for single in _SINGLE_FILES:
        index = files[0].parent / f"{single}{_INDEX_SUFFIX}"
        if files[0].suffix == Path(single).suffix and files[0].name != single and index.is_file():
            _check_index(index, held)
    return held


def values_of(name: str, held: HeldTensor) -> Iterator[torch.Tensor]:
    """The values of the tensor `name`, some of its rows at a time."""
    rows = max(1, _ELEMENTS_AT_ONCE // max(1, held.meta[:1].numel()))
    whole: Any
    if held.file.suffix == ".safetensors":
        whole = map_safetensors(held.file)[name]
    else:
        whole = _unpickled(held.file, "cpu")[name]
    for first in range(0, held.meta.shape[0], rows):
        yield whole[first : first + rows]


def _safetensors_header(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    import torch
    from safetensors import safe_open

    with safe_open(file, framework="np") as opened:  # which maps a file of any size
        for name in opened.keys():  # noqa: SIM118 - it is no mapping
            held = opened.get_slice(name)
            dtype = getattr(torch, DTYPES.get(held.get_dtype(), "uint8"))
            yield name, torch.empty(held.get_shape(), dtype=dtype, device="meta")


def _gguf_header(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    import torch

    from zeroinf.model.gguf.header import read_gguf

    for name, tensor in read_gguf(file).tensors.items():
        if tensor.path == file:
            yield name, torch.empty(tensor.held_shape, dtype=getattr(torch, tensor.held_dtype), device="meta")


_HEADERS = {".safetensors": _safetensors_header, ".gguf": _gguf_header}


def _pickled_header(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    import torch

    return ((name, value) for name, value in _unpickled(file, "meta").items() if isinstance(value, torch.Tensor))


def _unpickled(file: Path, device: str) -> dict[str, Any]:
    """The tensors of a file of torch's, mapped where it is an archive: values that are not used are not read."""
    from zipfile import is_zipfile

    import torch

    return dict(torch.load(file, map_location=device, weights_only=True, mmap=is_zipfile(file)))


def _check_index(index: Path, held: dict[str, HeldTensor]) -> None:
    named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    lost = [name for name, file in named.items() if name not in held or held[name].file.name != Path(file).name]
    if lost:
        raise ModelError(
            f"{index} names {lost[0]} in {named[lost[0]]}, which does not hold it"
            + (f"; so it does {len(lost) - 1} more" if lost[1:] else ""),
            hint="fetch the index and its shards again: they are not of one checkpoint",
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


def _fetch(source: ModelSource, *, pickled: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    patterns = hub_patterns(pickled=pickled, trust_remote_code=source.trust_remote_code)
    try:
        return Path(snapshot_download(source.location, revision=source.revision, allow_patterns=patterns))
    except (OSError, HfHubHTTPError, ValueError) as error:
        raise hub_error(source.location, source.revision, error) from error
