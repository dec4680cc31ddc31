"""Computes a digest that identifies a model's weights without reading all of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from zeroinf.model.adapter import CONFIG_FILE
from zeroinf.model.source import ModelSource
from zeroinf.model.weights import weight_files

_SAMPLES = 16
_SAMPLE_BYTES = 4096


def weights_identity(source: ModelSource, *, times: bool = True) -> str:
    """A digest (hex) that changes when the weights of `source` do; takes milliseconds.

    Of the hub's models it is made of the commit. Of a folder it covers the names, sizes and times of change of the
    config and the weight files, and samples of what they hold: an edit in place changes the times, another model's
    files that were given the same times hold other samples. Random weights follow from the config. Without `times` it
    is the same for a copy on another machine.
    """
    facts: Any
    if source.random_weights:
        facts = {k: v for k, v in source.config.to_dict().items() if k not in ("transformers_version", "_name_or_path")}
    elif source.adapter is None and not source.is_local and (commit := hub_commit(source)):
        facts = [source.location, commit]
    else:
        files = weight_files(source)
        folder = Path(source.location) if source.weights else files[0].parent
        own = (source.adapter.folder / CONFIG_FILE,) if source.adapter is not None else ()
        facts = [_sampled(file, times) for file in (folder / "config.json", *own, *files)]
    return hashlib.blake2b(json.dumps(facts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def hub_commit(source: ModelSource) -> str | None:
    """The commit of a hub's model, known from where its config lies in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(source.location, "config.json", revision=source.revision)
    return Path(config).parent.name if isinstance(config, str) else None


def _sampled(file: Path, times: bool) -> list[Any]:
    status = file.stat()
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as opened:
        for sample in range(_SAMPLES):
            opened.seek(sample * status.st_size // _SAMPLES)
            digest.update(opened.read(_SAMPLE_BYTES))
    return [file.name, status.st_size, status.st_mtime_ns if times else None, digest.hexdigest()]
