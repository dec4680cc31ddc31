"""Checks a checkpoint before it is loaded: every parameter and persistent buffer of the model must be in its files, be
tied to one that is, or be computed by the model itself.

Only headers are read, so that the check takes seconds at any size. transformers' own conversion runs on the meta
device, so its result is what any engine would load. No weights are loaded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import Embedding

from zeroinf.compat.loading import conversions, convert_and_load, converted_name, joins_rows
from zeroinf.compat.models import leave_out_ignored
from zeroinf.errors import ModelError
from zeroinf.model.anatomy import UNTIED
from zeroinf.model.config import DTYPES, config_dtype
from zeroinf.model.inspect import build_meta
from zeroinf.model.quantized.linears import note_stored
from zeroinf.model.source import CheckpointFacts, StoredRows
from zeroinf.model.stored_names import StoredTensors, and_more, repeated_tensors, trace_names
from zeroinf.model.stored_parts import parts_of
from zeroinf.model.stored_rows import find_rows, unchanged_names
from zeroinf.model.weights import HeldTensor, held_tensors, values_of

NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Weights in these are numbers, and may be rounded to another of them; in all others they are codes."""

_NAMED = 3
# Wrappers that leave their name in front of every tensor's, and what takes it away again.
_WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "module.": "DistributedDataParallel",
    "base_model.model.": "peft",
}


def read_facts(name: str, config: Any, files: Sequence[Path], *, trust_remote_code: bool = False) -> CheckpointFacts:
    """Check that `files` hold all of the model that `config` describes; `name` is the model's in messages.

    Raises ModelError for tensors that are missing, stored twice, or of another shape, naming them; for files that are
    damaged; and the errors of `read_anatomy`.
    """
    held = held_tensors(name, files)
    note_stored(config, held)
    model = build_meta(config, config_dtype(config), trust_remote_code)
    account = _Account(StoredTensors(name, held), model, _parted(model))
    account.check(files)
    untied = (*getattr(config, UNTIED, ()), *account.untied())
    return CheckpointFacts(
        dtype=_main_dtype(held.values()), untied=untied, unused=account.unused, rows=account.rows(held)
    )


def _parted(model: Any) -> dict[str, tuple[str, ...]]:
    """Tensors of `model` that the skeleton itself says what they are made of, and the names of that in the files."""
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    found = {own: parts_of(tensor) for own, tensor in tensors}
    return {own: tuple(name for part in parts for name in part.names) for own, parts in found.items() if parts}


def _main_dtype(held: Iterable[HeldTensor]) -> str | None:
    elements: dict[str, int] = defaultdict(int)
    for one in held:
        elements[str(one.meta.dtype).removeprefix("torch.")] += one.meta.numel()
    floating = {dtype: count for dtype, count in elements.items() if dtype in DTYPES}
    return max(floating, key=lambda dtype: floating[dtype], default=None)


class _Account:
    """Tells what becomes of each stored tensor in `model`, a model on the meta device."""

    def __init__(self, stored: StoredTensors, model: Any, parted: Mapping[str, Sequence[str]]) -> None:
        """Tensors of `parted` are made of the stored tensors named there, which transformers does not get to see."""
        taken = {one for names in parted.values() for one in names}
        self._parted, self._lost = set(parted), sorted(taken - stored.tensors.keys())
        self._stored, self._model, self._own = stored.without(taken), model, model.state_dict()
        self._sources = trace_names(self._stored, model, self._own)
        self._shared = _shared_names(model)
        self._tied: dict[str, str] = dict(model.all_tied_weights_keys)
        self._present = {own: names[0] for own, names in self._sources.items()}
        self._info = self._load()
        self.unused = tuple(sorted(self._info.unexpected_keys))

    def _load(self) -> Any:
        """transformers' account of loading. One of the layers that are alike stands for the others, unless something is
        wrong, which is to be named and counted."""
        repeated = repeated_tensors(self._stored, self._own, self._sources)
        info = self._convert({name for own in repeated for name in self._sources.get(own, ())})
        info.missing_keys -= repeated
        is_complete = not (self._missing(info) or info.mismatched_keys or info.conversion_errors)
        return info if is_complete else self._convert(set())

    def _convert(self, left_out: set[str]) -> Any:
        """transformers' account of loading the stored tensors, but for some, made with their shapes alone."""
        stored = {name: one.meta for name, one in self._stored.tensors.items() if name not in left_out}
        info = convert_and_load(self._model, stored, on_meta=True)
        leave_out_ignored(self._model, info)
        return info

    def check(self, files: Sequence[Path]) -> None:
        """Raise ModelError unless every tensor of the model is accounted for."""
        if self._info.mismatched_keys:
            wrong = sorted(self._info.mismatched_keys)
            own, found, expected = wrong[0]
            raise self._stored.refusal(
                f"holds {own} as {tuple(found)}, the model has {tuple(expected)}{and_more(len(wrong), 1)}",
                self._sources.get(own, ()),
                "the weights belong to another config, or are damaged",
            )
        if self._info.conversion_errors:
            own, why = next(iter(self._info.conversion_errors.items()))
            if "meta tensor" not in why:  # else the values decide, and transformers says when it loads them
                reason = next((line for line in why.splitlines()[::-1] if line and not line.startswith("Error")), why)
                raise self._stored.refusal(
                    f"does not make {own}{and_more(len(self._info.conversion_errors), 1)}: {reason}",
                    self._sources.get(own, ()),
                )
        self._refuse_codes()
        if self._lost:
            raise self._lacks(self._lost, files)
        if missing := self._missing(self._info):
            raise self._lacks(sorted(missing), files)

    def _refuse_codes(self) -> None:
        """Refuse codes of quantized weights where the model has numbers: rounded to them they would mean nothing."""
        for own, _ in self._model.named_parameters():
            expected = self._own[own].dtype
            for name in self._sources.get(own, ()) if expected in NUMBERS else ():
                if (found := self._stored.tensors[name].meta.dtype) not in NUMBERS:
                    raise self._stored.refusal(
                        f"holds {name} as {found}, the model has {expected}",
                        (name,),
                        "the weights are quantized, and neither the config nor scales beside them say how",
                    )

    def _missing(self, info: Any) -> set[str]:
        accounted = self._tied_to_present() | self._shared_with_present() | self._parted
        return set(info.missing_keys) - accounted

    def _tied_to_present(self) -> set[str]:
        """Names that take the value of one that is stored, in the order in which transformers ties them."""
        for target, source in self._tied.items():
            if source not in self._present:
                known = next((one for one, of in self._tied.items() if of == source and one in self._present), None)
                if known is not None:
                    self._present[source] = self._present[known]
            if target not in self._present and source in self._present:
                self._present[target] = self._present[source]
        return set(self._present)

    def _shared_with_present(self) -> set[str]:
        return {own for names in self._shared if not self._present.keys().isdisjoint(names) for own in names}

    def untied(self) -> tuple[str, ...]:
        """Names of tensors that the class ties to others, but that are stored with other values."""
        found = []
        for target, source in self._tied.items():
            names = self._present.get(target), self._present.get(source)
            if None not in names and names[0] != names[1] and not self._are_equal(str(names[0]), str(names[1])):
                found.append(target)
        return tuple(found)

    def rows(self, held: Mapping[str, HeldTensor]) -> dict[str, tuple[StoredRows, ...]]:
        """Where the rows of embeddings lie in the files that hold the tensors `held`, for those that can be read by
        row."""
        found = dict[str, tuple[StoredRows, ...]]()
        for path, module in self._model.named_modules():
            own = f"{path}.weight"
            if isinstance(module, Embedding) and own in self._own:
                names = unchanged_names(module.weight) if own in self._parted else self._joined_names(own)
                if rows := find_rows(module.weight, names, held) if names else ():
                    found[own] = rows
        return found

    def _joined_names(self, own: str) -> Sequence[str]:
        """The stored tensors that the tensor `own` is, one below the other; empty where it is made otherwise."""
        names, mapping = self._sources.get(own, ()), conversions(self._model)
        converted = [converted_name(name, mapping, self._model.base_model_prefix, self._own)[1] for name in names[:1]]
        return names if all(pattern is None or joins_rows(mapping, pattern) for pattern in converted) else ()

    def _are_equal(self, first: str, second: str) -> bool:
        one, other = self._stored.tensors[first], self._stored.tensors[second]
        if (one.meta.dtype, one.meta.shape) != (other.meta.dtype, other.meta.shape):
            return False
        return all(torch.equal(*parts) for parts in zip(values_of(first, one), values_of(second, other), strict=True))

    def _lacks(self, missing: Sequence[str], files: Sequence[Path]) -> ModelError:
        named = ", ".join(missing[:_NAMED]) + and_more(len(missing), _NAMED)
        held = self._stored.tensors
        wrapped = next((prefix for prefix in _WRAPPERS if any(name.startswith(prefix) for name in held)), None)
        there = len(self._own) - len(missing)
        hint = f"fetch the checkpoint again: its files make {there} of the model's {len(self._own)} tensors"
        if wrapped is not None:
            hint = f"its names begin with {wrapped!r}: save the model inside {_WRAPPERS[wrapped]}'s wrapper instead"
        elif self.unused:
            unused = ", ".join(self.unused[:_NAMED]) + and_more(len(self.unused), _NAMED)
            hint = f"the model does not know {unused}, which are there instead: is it a checkpoint of this config?"
        what = "tensor" if len(missing) == 1 else "tensors"
        where = files[0] if len(files) == 1 else f"{files[0].parent} ({len(files)} files)"
        return ModelError(f"{where} lacks {len(missing)} {what} of {type(self._model).__name__}: {named}", hint=hint)


def _shared_names(model: Any) -> list[list[str]]:
    """All names of each parameter: custom code shares whole modules, and files hold one of their names."""
    names: dict[int, list[str]] = defaultdict(list)
    for own, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(own)
    return list(names.values())
