"""Computes a job's fingerprint: everything that can change a completion, field by field.

A job is resumed only with the same fingerprint. Settings that only move work about are not in it: ranks, batches,
offload, fetch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from zeroinf import __version__
from zeroinf.engines.registry import descriptor_of
from zeroinf.generation.row import Sampling
from zeroinf.model.cache import file_digest
from zeroinf.model.identity import weights_identity
from zeroinf.model.skeleton import read_generation_config
from zeroinf.model.source import ModelSource
from zeroinf.service.requests import Refusal, Request, Work

_DIGEST_BYTES = 8
_DIGEST = re.compile("[0-9a-f]{16,}")
_MOST_CHARACTERS = 200
"""Of settings that are told in words."""


def fingerprint(
    source: ModelSource,
    tokenizer: Any | None,
    prompts: str,
    work: Sequence[Work],
    refusals: Sequence[Refusal],
    *,
    engine: str,
    options: Mapping[str, Any],
    device: str,
) -> dict[str, str]:
    """Name and value of everything that can change a completion; long values as digests.

    `prompts` is the digest of all requests (`request_value`), those refused by the model included; `options` are those
    that change completions, of which files count with what they hold.
    """
    libraries = ("torch", "transformers", *descriptor_of(engine).libraries)
    tokens, settings = ListDigest(), ListDigest()
    encoded, kinds = lru_cache(_encoded_settings), set[Sampling]()
    for item in work:
        tokens.add([item.index, list(item.prompt)])
        settings.add_encoded(encoded(item.sampling))
        if len(kinds) < 2:
            kinds.add(item.sampling)
    return {
        **{name: _option(value) for name, value in options.items() if value is not None},
        "code of the model": _code_digest(source),
        "model": weights_identity(source),
        "revision": str(source.revision),
        "config": _digest(_config(source.config)),
        "generation config": _digest(read_generation_config(source).to_dict()),
        "template": _digest(getattr(tokenizer, "chat_template", None)),
        "prompts": prompts,
        "tokens": tokens.digest(),
        "refused requests": _digest_of_all(r.index for r in refusals),
        "sampling": _in_words(kinds.pop()) if len(kinds) == 1 else settings.digest(),
        "device": device,
        "zeroinf": __version__,
        **{name: version(name) for name in libraries},
    }


def is_digest(value: str | None) -> bool:
    """Whether a value of a fingerprint tells nothing but whether it is another one's."""
    return value is not None and _DIGEST.fullmatch(value) is not None


def _in_words(sampling: Sampling) -> str:
    """The settings that are not as they are without being given, or a digest where these are long."""
    given = asdict(sampling)
    usual = {field.name: field.default for field in fields(sampling)}
    words = ", ".join(f"{name}={value!r}" for name, value in given.items() if name not in usual or value != usual[name])
    return words if len(words) <= _MOST_CHARACTERS else _digest(given)


def _encoded_settings(sampling: Sampling) -> bytes:
    return json.dumps(asdict(sampling), default=str).encode()


def _option(value: Any) -> str:
    if isinstance(value, Path):
        return file_digest(value)
    return value if isinstance(value, str) else _digest(value)


def request_value(request: Request) -> list[Any]:
    """The parts of a request as it was written that can change its completion."""
    r = request
    return [r.index, r.id, r.prompt, r.tokens, r.messages, repr(r.chat), r.truncate]


class ListDigest:
    """The digest of a list that is never there as a whole."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(b"[", digest_size=_DIGEST_BYTES)
        self._separator = b""

    def add(self, value: Any) -> None:
        self.add_encoded(json.dumps(value, default=str).encode())

    def add_encoded(self, value: bytes) -> None:
        """Add a value by its JSON."""
        self._hash.update(self._separator + value)
        self._separator = b", "

    def digest(self) -> str:
        """The digest of all that was added; nothing can be added afterwards."""
        self._hash.update(b"]")
        return self._hash.hexdigest()


def _digest_of_all(values: Iterable[Any]) -> str:
    found = ListDigest()
    for value in values:
        found.add(value)
    return found.digest()


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, default=str).encode(), digest_size=_DIGEST_BYTES).hexdigest()


def _code_digest(source: ModelSource) -> str:
    """A digest of the code that a local folder would run here; the code of the hub's models belongs to their commit."""
    folder = Path(source.location)
    code = sorted(folder.rglob("*.py")) if source.trust_remote_code and source.is_local else []
    return _digest([[str(file.relative_to(folder)), file_digest(file)] for file in code])


def _config(config: Any) -> dict[str, Any]:
    return {k: v for k, v in config.to_dict().items() if k not in ("transformers_version", "_name_or_path")}
