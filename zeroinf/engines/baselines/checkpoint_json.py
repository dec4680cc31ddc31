"""Loads the weights that a DeepSpeed checkpoint JSON lists: whole files, or shards as a number of ranks saved them.

    {"type": "BLOOM" | "ds_model" | "Megatron", "version": 1.0, "checkpoints": [FILE, ...],
     "base_dir": FOLDER, "parallelization": "pp" | "tp", "tp_size": N}

"pp" lists files that hold whole tensors; "tp" lists the files of rank 0 to N-1, repeatedly. `checkpoints` may also be
`{"tp": [...], "non_tp": [...]}`, as DeepSpeed itself saves them. Megatron saves one file for each rank. Shards are
joined tensor by tensor, whatever the number of ranks that saved them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from zeroinf.compat.deepspeed import fused_rows
from zeroinf.compat.models import ignored_when_missing
from zeroinf.distributed.control import Control
from zeroinf.engines.baselines.megatron import megatron_parts
from zeroinf.engines.stream.tensor_groups import Tensor, TensorGroup
from zeroinf.engines.stream.weight_source import LoadProgress, Pieces
from zeroinf.errors import ModelError, OutputError
from zeroinf.model.inspect import find_blocks
from zeroinf.planner.plan import Plan

# GPT-NeoX's head has changed its name.
_ALIASES = {"lm_head.weight": ("embed_out.weight",)}

LISTING_NAME = "ds_inference_config.json"

Parts = Mapping[str, Sequence[torch.Tensor]]
"""By name, what each rank that saved a tensor has of it; one where it is whole."""


@dataclass(frozen=True, slots=True)
class _Listing:
    kind: str
    version: float
    whole: tuple[Path, ...]
    by_rank: tuple[tuple[Path, ...], ...]


class ListedWeights:
    """Fills pieces from a checkpoint JSON. One rank of a node does the work, for all of them."""

    def __init__(
        self, groups: Sequence[TensorGroup], model: Any, listing: Path, control: Control, load_progress: LoadProgress
    ) -> None:
        """Raises ModelError for a listing that cannot be read, or files that are not there."""
        self._groups, self._model, self._load_progress = groups, model, load_progress
        self._name = listing
        self._listing = _read_listing(listing)
        self._fills = control.world.local_rank == 0
        self._parts_each = control.world.local_size

    def fill(self, pieces: Pieces) -> None:
        """Write all tensors of `pieces`. Raises ModelError for a checkpoint that does not match the model."""
        parts = self._parts() if self._fills else {}
        for index, piece in pieces if self._fills else ():
            for tensor, memory in self._groups[index].views(piece):
                if not tensor.is_parameter:
                    memory.copy_(tensor.value)
                if tensor.stored and (found := self._find(tensor, parts)) is not None:
                    memory.copy_(self._together(tensor, found))
                self._load_progress.add(memory.nbytes)

    def _parts(self) -> Parts:
        listing = self._listing
        saved = [_merged(files) for files in listing.by_rank]
        if listing.kind == "megatron":
            return megatron_parts(saved, listing.version, self._model)
        names = {name: None for rank in saved for name in rank}
        parts: dict[str, Sequence[torch.Tensor]] = {
            name: [rank[name] for rank in saved if name in rank] for name in names
        }
        return {**parts, **{name: [value] for name, value in _merged(listing.whole).items()}}

    def _find(self, tensor: Tensor, parts: Parts) -> Sequence[torch.Tensor] | None:
        prefix = f"{self._model.base_model_prefix}."
        known = [alias for own in tensor.names for alias in (own, own.removeprefix(prefix), *_ALIASES.get(own, ()))]
        found = [name for name in known if name in parts]
        computed = ignored_when_missing(self._model)
        if not found and (tensor.is_parameter or not any(re.search(one, tensor.names[0]) for one in computed)):
            raise ModelError(f"{self._name} lists no {tensor.names[0]}", hint="is it a checkpoint of this model?")
        return parts[found[0]] if found else None

    def _together(self, tensor: Tensor, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        whole, first = tensor.value.shape, parts[0].shape
        differ = [dim for dim in range(len(whole)) if len(first) == len(whole) and first[dim] != whole[dim]]
        if first == whole:
            return parts[0]
        if len(first) != len(whole) or len(differ) != 1:
            raise self._mismatch(tensor, parts)
        dim = differ[0]
        sections = self._sections(tensor, whole, len(parts)) if dim == 0 else (whole[dim],)
        joined = _join(parts, sections, dim)
        if joined.shape != whole:
            raise self._mismatch(tensor, parts)
        return joined

    def _sections(self, tensor: Tensor, whole: Sequence[int], ranks: int) -> tuple[int, ...]:
        """Rows of queries, keys and values where DeepSpeed split each of them over the ranks."""
        name = tensor.names[0]
        if self._listing.kind == "megatron":
            return (whole[0],)
        block = find_blocks(self._model)[1][0]
        sections = fused_rows(name, whole, ranks, block, self._model.config)
        if sections is None:
            raise ModelError(
                f"{self._name}: parts of {name} cannot be put together again: DeepSpeed interleaves them",
                hint="load it with as many ranks as saved it through DeepSpeed itself, or use the original checkpoint",
            )
        return tuple(sections)

    def _mismatch(self, tensor: Tensor, parts: Sequence[torch.Tensor]) -> ModelError:
        shapes = ", ".join(str(tuple(part.shape)) for part in parts)
        return ModelError(
            f"{self._name} lists {tensor.names[0]} as {shapes}, the model has {tuple(tensor.value.shape)}",
            hint="the weights belong to another config",
        )


def save_parts(model: Any, folder: Path, rank: int, plan: Plan) -> None:
    """Write this rank's part of the weights into `folder` and, on rank 0, the listing of all.

    Raises OutputError where that cannot be done.
    """
    ranks = plan.tensor_parallel.size
    files = [f"tp_{number:02}.pt" for number in range(ranks)]
    listing = {
        "type": "ds_model",
        "version": 1.0,
        "parallelization": "tp",
        "tp_size": ranks,
        "dtype": plan.dtype,
        "checkpoints": {"tp": files, "non_tp": []},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(dict(model.state_dict()), folder / files[rank])
        if rank == 0:
            (folder / LISTING_NAME).write_text(json.dumps(listing, indent=2) + "\n")
    except (OSError, RuntimeError) as error:
        raise OutputError(f"cannot save the weights in {folder}: {error}", hint="choose another folder") from error


def _join(parts: Sequence[torch.Tensor], sections: Sequence[int], dim: int) -> torch.Tensor:
    """Each section is put together for itself from what every part has of it."""
    sizes = [section // len(parts) for section in sections]
    if len(sections) == 1 or sum(sizes) != parts[0].shape[dim]:
        return torch.cat(list(parts), dim)
    cut = [torch.split(part, sizes, dim) for part in parts]
    return torch.cat([part for pieces in zip(*cut, strict=True) for part in pieces], dim)


def _read_listing(path: Path) -> _Listing:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        kind, files = str(data["type"]).lower(), data["checkpoints"]
        listed = files if isinstance(files, dict) else {"tp" if _by_rank(data) else "non_tp": files}
        folder = Path(data.get("base_dir") or path.parent)
        tp, whole = ([folder / name for name in listed.get(key, [])] for key in ("tp", "non_tp"))
        ranks = int(data.get("mp_size") or data.get("tp_size") or len(tp)) if tp else 0
        version = float(data.get("version", 0))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"--checkpoint-json {path}: {error!r}", hint="docs/from-elsewhere.md shows them") from error
    if kind not in ("bloom", "ds_model", "megatron"):
        raise ModelError(f"--checkpoint-json {path}: unknown type {data['type']!r}", hint="BLOOM, ds_model or Megatron")
    if tp and len(tp) % ranks:
        raise ModelError(f"--checkpoint-json {path}: {len(tp)} files of {ranks} ranks", hint="each rank has as many")
    if missing := [file for file in (*tp, *whole) if not file.is_file()]:
        raise ModelError(f"--checkpoint-json {path}: {missing[0]} is missing", hint="check base_dir and the names")
    return _Listing(kind, version, tuple(whole), tuple(tuple(tp[rank::ranks]) for rank in range(ranks)))


def _by_rank(data: Mapping[str, Any]) -> bool:
    return str(data["type"]).lower() == "megatron" or data.get("parallelization", "pp") == "tp"


def _merged(files: Sequence[Path]) -> dict[str, Any]:
    return {name: value for file in files for name, value in _load(file).items()}


def _load(file: Path) -> dict[str, Any]:
    """The file's tensors, mapped where that is possible: what is not used takes no memory."""
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return dict(load_file(file))
    try:
        return dict(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
    except UnpicklingError as error:
        raise ModelError(
            f"cannot load {file}: it holds more than weights, and could run code here",
            hint="convert it to safetensors where you trust it",
        ) from error
    except (OSError, RuntimeError) as error:
        raise ModelError(f"cannot load {file}: {str(error).splitlines()[0]}") from error
