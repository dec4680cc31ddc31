"""Converts a `.gguf` file to an ordinary checkpoint folder, unpacked to bfloat16, once, in the user's cache.

A model that is split over several files (`NAME-00001-of-00003.gguf`) is converted as one, whichever part is named.
"""

from __future__ import annotations

import hashlib
import io
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from zeroinf.errors import EnvironmentProblem, ModelError
from zeroinf.model.cache import build_once, file_digest
from zeroinf.paths import cache_directory

# Part of the folder's name: raise it when the conversion writes something else than before.
CONVERTER_VERSION = 2

_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})")
_NAMED = 3


def convert_gguf(path: Path) -> Path:
    """Convert `path` to a folder with config, safetensors weights (bfloat16) and tokenizer; return that folder.

    The folder is named by the digest of all parts, so a second call returns at once. The conversion holds the whole
    model in host memory. Raises ModelError for a file that cannot be read, for missing parts, and where tensors of the
    model are missing or have another shape; EnvironmentProblem without the `gguf` package.
    """
    parts = _parts(path)
    digest = file_digest(path) if len(parts) == 1 else _joined_digest(parts)
    folder = cache_directory() / "gguf" / f"{parts[0].stem}-{digest[:16]}-v{CONVERTER_VERSION}"
    return build_once(folder, partial(_convert, parts))


def _parts(path: Path) -> list[Path]:
    """All files of the model that `path` is a part of, in order, as their names say. Raises ModelError where one is
    missing."""
    found = _PART.fullmatch(path.stem)
    if found is None:
        return [path]
    name, _, count = found.groups()
    parts = [path.with_name(f"{name}-{number:05}-of-{count}.gguf") for number in range(1, int(count) + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise ModelError(
            f"{path} is one of {int(count)} parts: {', '.join(missing[:_NAMED])}{more} missing in {path.parent}",
            hint="fetch all parts into one folder",
        )
    return parts


def _joined_digest(parts: Sequence[Path]) -> str:
    return hashlib.sha256("".join(file_digest(part) for part in parts).encode()).hexdigest()


def _convert(parts: Sequence[Path], folder: Path) -> None:
    if find_spec("gguf") is None:
        raise EnvironmentProblem("the package gguf is needed to read a .gguf file", hint="pip install gguf")
    path = parts[0]
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    with _apart_from_results(), _parsed_once(parts):
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                **place, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True), output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(**place)
        except ModelError:
            raise
        except Exception as error:  # the readers check little: damage shows as struct, index, memory and other errors
            raise ModelError(
                f"{path} cannot be converted: {error}",
                hint="is the file complete, and its architecture one transformers reads?",
            ) from error
        if missing := sorted(info["missing_keys"]):
            named = ", ".join(missing[:_NAMED]) + (f" and {len(missing) - _NAMED} more" if missing[_NAMED:] else "")
            counted = f"{len(missing)} tensor{'s' if missing[1:] else ''}"
            raise ModelError(
                f"{path} cannot be converted: it lacks {counted} of {type(model).__name__}: {named}",
                hint="fetch the file again; a model in several parts needs all of them, under the names they came with",
            )
        # Some releases leave the mark of the quantized file on the unpacked model, and then refuse to save it.
        if quantizer := getattr(model, "hf_quantizer", None):
            quantizer.remove_quantization_config(model)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def _apart_from_results() -> Iterator[None]:
    """Keep stdout free of what libraries log there that saving imports, and show progress on terminals only."""
    shown = sys.stderr if sys.stderr.isatty() else io.StringIO()
    with redirect_stdout(shown), redirect_stderr(shown):
        yield


@contextmanager
def _parsed_once(parts: Sequence[Path]) -> Iterator[None]:
    """Let one reader of `parts` serve transformers, which asks for one of the first for the config, the weights and the
    tokenizer; each takes seconds over a large vocabulary."""
    import gguf

    reader = gguf.GGUFReader
    vars(gguf)["GGUFReader"] = lru_cache(maxsize=1)(lambda _: _read(reader, parts))
    try:
        yield
    finally:
        vars(gguf)["GGUFReader"] = reader


def _read(reader: Any, parts: Sequence[Path]) -> Any:
    """A reader of the first part that has the tensors of all. Raises ModelError for parts of several models."""
    first, *others = (reader(part) for part in parts)
    count = first.fields.get("split.count")
    if count is not None and (said := int(count.contents())) not in (0, len(parts)):
        raise ModelError(
            f"{parts[0]} is one of {said} parts, and its name does not say so",
            hint="give all parts the names they came with: NAME-00001-of-00002.gguf and so on",
        )
    for other in others:
        first.tensors += other.tensors
    if (total := first.fields.get("split.tensors.count")) is not None and int(total.contents()) != len(first.tensors):
        raise ModelError(
            f"the {len(parts)} parts of {parts[0]} hold {len(first.tensors)} tensors instead of {total.contents()}",
            hint="fetch them again: they are not of one model, or not whole",
        )
    return first
