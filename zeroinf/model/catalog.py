"""Configs of well-known models, so that planning works without a network: one JSON file for each model in
`configs/models/`.

A file is a `config.json` reduced to the fields that determine shapes, with `_name` (hub id) and, where it was published
exactly, `_parameters`; where it was published rounded, `_billions` of them, of the language model. A quantized
checkpoint of a model in the catalog has that one's name as `_base` and only the fields that differ, its
`quantization_config` among them.
"""

from __future__ import annotations

import json
from difflib import get_close_matches
from functools import cache
from typing import Any

from zeroinf.errors import ModelError
from zeroinf.model.anatomy import UNTIED
from zeroinf.paths import configs_directory


def catalog_names() -> tuple[str, ...]:
    """Names of all models in the catalog, sorted."""
    return tuple(sorted(_entries()))


def catalog_hub_id(name: str) -> str | None:
    """The hub id of the catalog's model `name` (a catalog name or a hub id, in any case); None when it is not there."""
    entry = _find(name)
    return str(entry["_name"]) if entry else None


def catalog_parameters(name: str) -> int | None:
    """The published exact number of parameters, where it is known."""
    entry = _find(name)
    return entry.get("_parameters") if entry else None


def catalog_method(name: str) -> str | None:
    """The quantization method of the catalog's checkpoint `name`; None where it has none."""
    entry = _find(name)
    found = entry.get("quantization_config") if entry else None
    return str(found["quant_method"]) if found else None


def catalog_billions(name: str) -> float | None:
    """The published number of parameters of the language model, in billions, rounded as it was published; None where an
    exact one is known, or none."""
    entry = _find(name)
    return entry.get("_billions") if entry else None


def catalog_quantized(name: str) -> dict[str, str]:
    """The quantized checkpoints of the catalog's model `name` (a catalog name or a hub id, in any case): their hub ids
    by their names, in the catalog's order."""
    entry = _find(name)
    found = {} if entry is None else {other: one for other, one in _entries().items() if one.get("_base")}
    return {other: str(one["_name"]) for other, one in found.items() if _entries()[one["_base"]] is entry}


def catalog_close_to(name: str, *, cutoff: float = 0.8) -> list[str]:
    """Names of the catalog that are spelt much like `name`, the closest first."""
    return get_close_matches(name.lower().rpartition("/")[2], catalog_names(), n=3, cutoff=cutoff)


def hub_ids_close_to(hub_id: str) -> list[str]:
    """Hub ids of the catalog that are spelt much like `hub_id`, the closest first."""
    known = {str(entry["_name"]).lower(): str(entry["_name"]) for entry in _entries().values()}
    return [known[one] for one in get_close_matches(hub_id.lower(), known, n=3, cutoff=0.8)]


def catalog_config(name: str) -> Any:
    """The transformers config of the catalog's model `name`; raises ModelError with the closest names otherwise."""
    entry = _find(name)
    if entry is None:
        close = catalog_close_to(name, cutoff=0.5)
        hint = f"close to it: {', '.join(close)}" if close else f"known: {', '.join(catalog_names())}"
        raise ModelError(f"no model {name!r} in the catalog", hint=hint)
    from transformers import CONFIG_MAPPING

    fields = {key: value for key, value in entry.items() if not key.startswith("_")}
    if fields["model_type"] not in CONFIG_MAPPING:
        raise ModelError(f"this release of transformers has no models of type {fields['model_type']}", hint="update it")
    config = CONFIG_MAPPING[fields["model_type"]](**{k: v for k, v in fields.items() if k != "model_type"})
    mark_own_head(config, fields)
    return config


def mark_own_head(config: Any, fields: dict[str, Any]) -> None:
    """Note on `config`, made of the JSON `fields`, that the head is not the embeddings' although its class (T5's and
    its kind) says so. Files that are there say it better."""
    if fields.get("tie_word_embeddings") is False and config.tie_word_embeddings:
        setattr(config, UNTIED, ("lm_head.weight",))


def _find(name: str) -> dict[str, Any] | None:
    entries = _entries()
    wanted = name.lower()
    by_hub_id = {str(entry["_name"]).lower(): entry for entry in entries.values()}
    return entries.get(wanted) or by_hub_id.get(wanted)


@cache
def _entries() -> dict[str, dict[str, Any]]:
    files = (configs_directory() / "models").glob("*.json")
    own = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(files)}
    return {name: own.get(entry.get("_base"), {}) | entry if "_base" in entry else entry for name, entry in own.items()}
