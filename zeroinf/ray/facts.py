"""Collects what must be the same on every node for its completions to be the same: versions, model, dtype, device."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version

from zeroinf import __version__
from zeroinf.distributed.world import World
from zeroinf.engines.registry import descriptor_of
from zeroinf.model.identity import weights_identity
from zeroinf.model.source import ModelSource, pick_dtype
from zeroinf.options.contradictions import engine_of
from zeroinf.options.model import source_of
from zeroinf.options.options import RunOptions
from zeroinf.service.device import pick_device


def node_facts(options: RunOptions) -> dict[str, str]:
    """The facts of this machine, by their names. Raises ModelError where it does not have the model."""
    device = pick_device(World()).type
    return facts_of(options, source_of(options, device), device)


def facts_of(options: RunOptions, source: ModelSource, device: str) -> dict[str, str]:
    """The facts of a model that was found, on a `device` ("cuda" or "cpu")."""
    config = {k: v for k, v in source.config.to_dict().items() if k not in ("transformers_version", "_name_or_path")}
    return {
        "device": device,
        "zeroinf": __version__,
        **{name: version(name) for name in ("torch", "transformers", *descriptor_of(engine_of(options)[0]).libraries)},
        "dtype": pick_dtype(options.dtype, source, device),
        "config of the model": hashlib.blake2b(json.dumps(config, default=str).encode(), digest_size=8).hexdigest(),
        "weights of the model": weights_identity(source, times=False),
    }
