"""Reads weights from a checkpoint: directly from safetensors where names match, otherwise through transformers'
conversion.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from zeroinf.distributed.control import Control
from zeroinf.engines.stream.convert import Converter
from zeroinf.engines.stream.tensor_groups import Tensor, TensorGroup
from zeroinf.engines.stream.weight_source import LoadProgress, Pieces
from zeroinf.engines.stream.write_target import WriteTarget
from zeroinf.errors import ModelError
from zeroinf.model.checkpoint import NUMBERS
from zeroinf.model.config import quantization
from zeroinf.model.gguf.tensors import open_tensors
from zeroinf.model.inspect import is_converted
from zeroinf.model.mapped_files import map_safetensors
from zeroinf.model.pretrained import load_pretrained
from zeroinf.model.source import ModelSource, StoredRows
from zeroinf.model.stored_parts import StoredPart, as_stored, parts_of
from zeroinf.model.weights import can_be_converted, weight_files

_THREADS = 8
_RANDOM_SCALE = 0.02
_RANDOM_SEED = 0
# So many random values are drawn, and repeated to a tile so large that few copies and launches are needed for each.
_DRAWN, _TILE = 1 << 22, 1 << 23
# Random codes lie around 120, which is no power of two too large for MXFP4. Two of GGUF's bytes are a scale in float16.
_MIDDLE_CODES = {"gguf": 32}

_Found = tuple[int, torch.Tensor, Path | str]
"""Elements of a tensor from the first number on, and where they were found."""
_Read = Callable[[Tensor], Iterable[_Found]]


class CheckpointWeights:
    """Fills pieces from a checkpoint, or with random values.

    The ranks of a node share the work, each filling its part of the tensors. Where transformers has to rename or fuse
    weights, one rank does, piece by piece, or, where that cannot be, loads all of them and lets go of each as it is
    copied.
    """

    def __init__(
        self,
        groups: Sequence[TensorGroup],
        model: Any,
        source: ModelSource,
        control: Control | None,
        device: torch.device,
        load_progress: LoadProgress,
        tables: Sequence[str] = (),
    ) -> None:
        """`model` is the skeleton that the groups come from. Without a `control` this process does all the work. Codes
        are made on `device`: a GPU does that while the host reads. The `tables`, by name, are no part of other tensors'
        groups: of those whose rows lie in files as they are, no more than a few are in memory twice."""
        world = control.world if control is not None else None
        self._part, self._parts = (world.local_rank, world.local_size) if world is not None else (0, 1)
        self._groups, self._device = groups, device
        self._random = source.random_weights
        self._load_progress = load_progress
        self._team = torch.get_num_threads()
        self._tiles: dict[torch.dtype, torch.Tensor] = {}
        self._read: _Read | None = None
        if self._random:
            found = quantization(source.config)
            self._tiles = _random_tiles(groups, found["quant_method"] if found else "")
        else:
            known = source.facts.rows if source.facts is not None else {}
            self._open(model, source, control, {name: known[name] for name in tables if name in known})

    def _open(
        self, model: Any, source: ModelSource, control: Control | None, rows: Mapping[str, Sequence[StoredRows]]
    ) -> None:
        """Fetch what has to be fetched, and find out how the files can be read."""
        if control is not None:
            if self._part == 0:
                weight_files(source)
            control.all_gather(None)  # one rank of a node fetches
        stored = [tensor for group in self._groups for tensor in group.tensors if tensor.stored]
        files = weight_files(source)
        self._read = _read_directly(stored, model, files)
        self._converter: Converter | None = None
        self._read_rows: _Read | None = None
        if self._read is None:
            if (found := quantization(source.config)) is not None:
                method = found["quant_method"]
                raise ModelError(
                    f"cannot load {source.name}, which is quantized with {method}: its files are pickled",
                    hint="take its safetensors, or the model's unquantized checkpoint",
                )
            self._parts = 1 if self._part == 0 else 0
            if can_be_converted(files) and self._parts:
                apart = {part.name for parts in rows.values() for part in parts}
                self._converter = Converter(model, files, self._groups, apart)
                self._read_rows = _rows_reader(rows, files) if rows else None
        self._rows = rows
        self._source, self._model = source, model
        self._loading = threading.Lock()

    def fill(self, pieces: Pieces) -> None:
        """Write this rank's part of the tensors of each group in `pieces`, converted to their dtypes.

        Raises ModelError for a checkpoint that does not match.
        """
        if not self._parts:
            return
        if self._random or self._read is not None:
            self._fill_all(pieces, self._read)
            return
        for piece in pieces:
            self._fill_all([piece], self._read_piece(piece[0]))

    def _read_piece(self, index: int) -> _Read:
        """A reader for the tensors of a group whose weights transformers converts, or a table."""
        if self._read_rows is not None and self._groups[index].tensors[0].names[0] in self._rows:
            return self._read_rows
        with self._loading:
            if self._read is None and self._converter is not None:
                values = self._converter.convert(self._groups[index])
                if values is not None:
                    return lambda tensor: [(0, values.pop(tensor.names[0]), self._source.location)]
            if self._read is None:
                self._read = _read_through_transformers(self._model, self._source)
            return self._read

    def _fill_all(self, pieces: Pieces, read: _Read | None) -> None:
        targets = [pair for index, piece in pieces for pair in self._groups[index].targets(piece, self._device)]
        targets.sort(key=lambda pair: pair[1].nbytes, reverse=True)
        try:
            # Each computes by itself: with a team of its own for every thread they would be in each other's way.
            with ThreadPoolExecutor(_THREADS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                mine = targets[self._part :: self._parts]
                for done in [pool.submit(self._fill_one, *target, read) for target in mine]:
                    done.result()
        finally:
            torch.set_num_threads(self._team)  # that of threads to come; those that are there keep theirs

    def _fill_one(self, tensor: Tensor, target: WriteTarget, read: _Read | None) -> None:
        if not tensor.is_parameter:
            target.write(tensor.value)
        if self._random:
            self._fill_randomly(tensor, target)
        elif tensor.stored:
            assert read is not None
            _copy(tensor, target, read(tensor))
        self._load_progress.add(target.nbytes * self._parts)

    def _fill_randomly(self, tensor: Tensor, target: WriteTarget) -> None:
        """Normal values that repeat after a while: they must not be zeros, and need not be good."""
        if not tensor.is_parameter:
            return
        elements, tile = target.shape.numel(), self._tiles[target.location.dtype]
        for start in range(0, elements, _TILE):
            target.write_part(start, tile[: elements - start])


def _random_tiles(groups: Sequence[TensorGroup], method: str) -> dict[torch.dtype, torch.Tensor]:
    """Random values of each dtype of `groups`, which are repeated over all tensors, of codes of `method`."""
    drawn = torch.randn(_DRAWN, generator=torch.Generator().manual_seed(_RANDOM_SEED)) * _RANDOM_SCALE
    tile = drawn.repeat(_TILE // _DRAWN)
    kinds = {place.dtype for group in groups for place in group.layout.locations}
    middle = _MIDDLE_CODES.get(method, 120)
    return {kind: (tile if kind.is_floating_point else middle + 100 * tile).to(kind) for kind in kinds}


def _read_directly(tensors: Sequence[Tensor], model: Any, files: Sequence[Path]) -> _Read | None:
    """A reader of tensors straight from `files`: under their own names, with or without the model's prefix, or by the
    parts that the skeleton says they are made of.

    None where transformers renames, splits or fuses weights as it loads them, or some tensor is not there.
    """
    if is_converted(model):
        return None
    stored = _open(files)
    if stored is None:
        return None
    prefix = f"{model.base_model_prefix}."
    origins: dict[str, tuple[StoredPart, ...]] = {}
    for tensor in tensors:
        parts = parts_of(tensor.value)
        if parts is None:
            candidates = (*tensor.names, *(name.removeprefix(prefix) for name in tensor.names))
            parts = next(((StoredPart((name,), as_stored),) for name in candidates if name in stored), None)
        if parts is None or any(name not in stored for part in parts for name in part.names):
            return None
        origins[tensor.names[0]] = parts

    def read(tensor: Tensor) -> Iterator[_Found]:
        for part in _needed(tensor, origins[tensor.names[0]]):
            found = [stored[name] for name in part.names]
            yield part.start, part.make(*(get() for _, get in found)), found[0][0]

    return read


def _rows_reader(rows: Mapping[str, Sequence[StoredRows]], files: Sequence[Path]) -> _Read:
    """A reader of the tensors `rows`, by name, whose rows lie in safetensors `files` as they are."""
    stored = _open(files)
    assert stored is not None

    def read(tensor: Tensor) -> Iterator[_Found]:
        first, width = 0, tensor.value.shape[1]
        for part in rows[tensor.names[0]]:
            file, get = stored[part.name]
            yield first * width, get(), file
            first += part.rows

    return read


def _open(files: Sequence[Path]) -> dict[str, tuple[Path, Callable[[], torch.Tensor]]] | None:
    """Each stored tensor by name: its file, and how to get it. None for pickled files."""
    kinds = {file.suffix for file in files}
    if kinds == {".gguf"}:
        return {name: (path, partial(as_stored, tensor)) for name, (path, tensor) in open_tensors(files).items()}
    if kinds != {".safetensors"}:
        return None
    stored: dict[str, tuple[Path, Callable[[], torch.Tensor]]] = {}
    for file in files:
        stored |= {name: (file, partial(as_stored, tensor)) for name, tensor in map_safetensors(file).items()}
    return stored


def _read_through_transformers(model: Any, source: ModelSource) -> _Read:
    values = load_pretrained(source, model.dtype).state_dict()
    read_entries: Counter[str] = Counter()
    taking = threading.Lock()

    def read(tensor: Tensor) -> Iterator[_Found]:
        with taking:  # parts of a tensor are read in any order, on several threads
            first, *_ = names = [name for name in tensor.names if name in values]
            value = values[first]
            read_entries[first] += tensor.of if tensor.entries is None else len(tensor.entries)
            if tensor.entries is None or read_entries[first] == tensor.of:
                for name in names:
                    del values[name]
        yield 0, value, source.location

    return read


def _copy(tensor: Tensor, target: WriteTarget, found: Iterable[_Found]) -> None:
    """Write what was found of a tensor, part by part. Raises ModelError for what is not of its shape and dtype."""
    written = 0
    shape = target.shape if tensor.entries is None else torch.Size((tensor.of, *target.shape[1:]))
    first, end = _elements(tensor)
    for start, value, origin in found:
        if tensor.entries is not None and value.shape == target.shape:  # no more than these entries were read
            start = first
        is_all = value.numel() == shape.numel()
        is_like = value.shape == shape if is_all else value.shape[1:][-1:] == shape[1:][-1:]
        if not is_like:
            raise _mismatch(tensor, origin, tuple(value.shape), tuple(shape))
        kinds = {value.dtype, target.location.dtype}
        if tensor.is_parameter and len(kinds) > 1 and kinds - set(NUMBERS):
            raise _mismatch(tensor, origin, value.dtype, target.location.dtype)
        some = slice(max(first - start, 0), max(end - start, 0))
        values = value.reshape(-1)[some]
        target.write_part(start + some.start - first, values)
        written += values.numel()
    if written != target.shape.numel():
        raise _mismatch(tensor, origin, tuple(value.shape), tuple(target.shape))


def _needed(tensor: Tensor, parts: Sequence[StoredPart]) -> Iterator[StoredPart]:
    """Those of the parts of a stored tensor that `tensor` has elements of."""
    if tensor.entries is None:
        yield from parts
        return
    first, end = _elements(tensor)
    in_order = sorted(parts, key=lambda part: part.start)
    for part, after in zip_longest(in_order, in_order[1:]):
        if part.start < end and (after is None or after.start > first):
            yield part


def _elements(tensor: Tensor) -> tuple[int, int]:
    """The first of the elements, of all that a checkpoint holds, that `tensor` is, and the one behind the last."""
    each = tensor.value[0].numel() if tensor.value.dim() else 1
    entries = range(tensor.value.shape[0] if tensor.value.dim() else 1) if tensor.entries is None else tensor.entries
    return entries.start * each, entries.stop * each


def _mismatch(tensor: Tensor, origin: Path | str, found: Any, expected: Any) -> ModelError:
    return ModelError(
        f"{origin} holds {tensor.names[0]} as {found}, the model has {expected}",
        hint="the weights belong to another config",
    )
