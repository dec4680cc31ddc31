"""Lists the models that are on this machine: in the cache of Hugging Face's libraries, and the demo model's package.

Takes nothing but the environment (`HF_HOME` and its kind) and imports neither torch nor transformers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from zeroinf.errors import EnvironmentProblem, ModelError
from zeroinf.model.demo import DEMO_ALIAS, demo_file
from zeroinf.model.weights import local_weight_files

State = Literal["whole", "incomplete", "no weights"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalModel:
    """A model on this machine. `name` is what `--model` takes."""

    name: str
    size_bytes: int
    """On the disk, of all its revisions."""
    quantized: str | None
    """The method; None where it is not quantized, or does not say so."""
    state: State
    """Whether its newest revision can be loaded: parts of its weights may be missing, or all."""
    path: Path


def hub_cache() -> Path:
    """The folder in which Hugging Face's libraries keep models."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def local_models() -> list[LocalModel]:
    """The models on this machine, by their names; those of the hub's cache that have a config, and `demo`."""
    found = [*_cached(), *_demo()]
    return sorted(found, key=lambda model: model.name.lower())


def _cached() -> list[LocalModel]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return []
    models = []
    for repository in repositories:
        if repository.repo_type != "model" or not repository.revisions:
            continue
        newest = max(repository.revisions, key=lambda revision: revision.last_modified)
        config = _read_config(newest.snapshot_path / "config.json")
        if config is None:
            continue
        models.append(
            LocalModel(
                name=repository.repo_id,
                size_bytes=repository.size_on_disk,
                quantized=_method(config),
                state=_state(newest.snapshot_path),
                path=newest.snapshot_path,
            )
        )
    return models


def _demo() -> list[LocalModel]:
    try:
        file = demo_file()
    except EnvironmentProblem:
        return []
    size = file.stat().st_size
    return [LocalModel(name=DEMO_ALIAS, size_bytes=size, quantized="gguf", state="whole", path=file)]


def _read_config(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _method(config: dict[str, Any]) -> str | None:
    found = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    return str(found.get("quant_method") or "?") if isinstance(found, dict) else None


def _state(snapshot: Path) -> State:
    try:
        local_weight_files(snapshot)
    except ModelError:
        has_some = any(snapshot.glob("*.safetensors*")) or any(snapshot.glob("*.bin*"))
        return "incomplete" if has_some else "no weights"
    return "whole"
