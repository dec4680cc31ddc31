"""Runs transformers' own conversion of checkpoints, which renames, splits and fuses tensors.

Relies on `transformers.conversion_mapping`, `transformers.core_model_loading` and `LoadStateDictConfig`, as they are in
transformers 5.17 to 5.24: they are what `from_pretrained` uses, and have no public counterpart that takes a part of a
model. Without them, checks of checkpoints and loading a layer at a time would have to repeat the conversions of each
model. `tests/unit/test_compat.py` fails when they change.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch


def conversions(model: Any, *, of_old_names: bool = True) -> Sequence[Any]:
    """The renamings and conversions that apply to checkpoints of `model`; those of names in old files too, or not."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    found: Sequence[Any] = get_model_conversion_mapping(model, **({} if of_old_names else {"add_legacy": False}))
    return found


def convert_and_load(model: Any, stored: Mapping[str, Any], *, on_meta: bool = False) -> Any:
    """Load the tensors `stored`, by their names in a checkpoint, into `model`; with `on_meta` their shapes alone.

    Returns transformers' account of it: missing, unexpected and mismatched keys, and errors of conversions. Its
    progress bar is not shown.
    """
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig
    from transformers.utils import logging

    where = {"device_map": {"": torch.device("meta")}} if on_meta else {}
    mapping = conversions(model)
    for one in mapping if on_meta else ():
        if getattr(one, "force_cpu", False):  # it would copy shapes alone to the host
            one.force_cpu = False
    asked = LoadStateDictConfig(dtype=model.dtype, weight_mapping=mapping, **where)
    shows = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        account, _ = convert_and_load_state_dict_in_model(model, stored, asked)
    finally:
        if shows:
            logging.enable_progress_bar()
    return account


def converted_name(name: str, mapping: Sequence[Any], prefix: str, own: Container[str]) -> tuple[str, str | None]:
    """The name of the model's tensor (one of `own`, below `prefix` or not) that the stored tensor `name` becomes, or a
    part of; and the pattern of a conversion of several tensors into one, None where there is none."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    found, pattern = rename_source_key(name, renamings, converters, prefix, own)
    if found not in own and name in own:
        found, pattern = rename_source_key(name, [], [], prefix, own)
    return found, pattern


def as_in_checkpoint(model: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The model's tensors as its checkpoint has them: conversions undone."""
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, Any] = revert_weight_conversion(model, tensors)
    return found


def joins_rows(mapping: Sequence[Any], pattern: str) -> bool:
    """Whether the conversion with the source `pattern`, one of `mapping`, puts tensors one below the other, in the
    order of the numbers in their names, and does nothing else."""
    from transformers.core_model_loading import Concatenate, WeightConverter

    return any(
        isinstance(one, WeightConverter)
        and list(one.source_patterns) == [pattern]
        and all(type(step) is Concatenate and step.dim == 0 for step in one.operations)
        for one in mapping
    )
