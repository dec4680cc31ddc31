"""Makes a folder with the config and the tokenizer of a GGUF file, once. The weights stay in the file."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from zeroinf.errors import EnvironmentProblem, ModelError
from zeroinf.model.cache import build_once
from zeroinf.model.gguf.configs import OF_CONFIG, build_config
from zeroinf.model.gguf.header import GgufHeader, read_gguf
from zeroinf.model.gguf.splits import NAMES, set_split
from zeroinf.paths import cache_directory

# Part of the folder's name: raise it when something else is written than before.
_VERSION = 6


def gguf_folder(path: Path) -> tuple[Path, tuple[Path, ...]]:
    """The folder that belongs to `path`, and all parts of the file.

    It is named by a digest of the headers, so a second call returns at once. Raises ModelError for a file that cannot
    be read or is not known to run, EnvironmentProblem without the package gguf.
    """
    if find_spec("gguf") is None:
        raise EnvironmentProblem("the package gguf is needed to read a .gguf file", hint="pip install gguf")
    header = read_gguf(path)
    folder = cache_directory() / "gguf" / f"{header.parts[0].stem}-{_digest(header)[:16]}-packed{_VERSION}"
    return build_once(folder, partial(_write, header)), header.parts


def _digest(header: GgufHeader) -> str:
    """A digest of all bytes before the weights, and of those weights that the config is made of."""
    digest = hashlib.sha256()
    for part in header.parts:
        ends = [tensor.offset for tensor in header.tensors.values() if tensor.path == part]
        with part.open("rb") as file:
            digest.update(file.read(min(ends, default=-1)))
    for tensor in (tensor for name, tensor in header.tensors.items() if name in OF_CONFIG):
        with tensor.path.open("rb") as file:
            file.seek(tensor.offset)
            digest.update(file.read(tensor.nbytes))
    return digest.hexdigest()


def _write(header: GgufHeader, folder: Path) -> None:
    config = build_config(header)
    lies = {name: [tensor.kind, *tensor.shape] for name, tensor in header.tensors.items()}
    config["quantization_config"] = {"quant_method": "gguf", "architecture": header.architecture, "tensors": lies}
    _dump(folder / "config.json", config)
    _dump(folder / "generation_config.json", _generation(header))
    _tokenizer(header).save_pretrained(folder)


def _generation(header: GgufHeader) -> dict[str, Any]:
    """The generation config with the tokens that end a text: a chat's turns may end with another one than texts do."""
    found = {key: header.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "eot", "padding")}
    ends = [end for end in dict.fromkeys((found["eos"], found["eot"])) if end is not None]
    tokens = {"bos_token_id": found["bos"], "eos_token_id": ends, "pad_token_id": found["padding"]}
    return {key: value for key, value in tokens.items() if value not in (None, [])}


def _dump(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _tokenizer(header: GgufHeader) -> Any:
    """The tokenizer, which transformers makes of the metadata, and which splits text as these say."""
    split = str(header.metadata.get("tokenizer.ggml.pre", ""))
    is_byte_level = header.metadata.get("tokenizer.ggml.model") == "gpt2"
    if is_byte_level and split not in NAMES:
        how = f"splits text into words as {split!r}, which is not known" if split else "does not say how it splits text"
        raise ModelError(
            f"{header.parts[0]} {how}: its tokens would be others",
            hint="take the model's safetensors, and --wire int8 or int4 to move fewer bytes",
        )
    tokenizer = _made_by_transformers(header.parts[0])
    if is_byte_level:
        set_split(tokenizer, split)
    return tokenizer


def _made_by_transformers(path: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    with _apart_from_results(), _parsed_once():
        try:
            try:
                return AutoTokenizer.from_pretrained(**place)
            except Exception:  # it makes a config first, which it can of fewer files; what it raises is of many classes
                return PreTrainedTokenizerFast.from_pretrained(**place)
        except Exception as error:  # the readers check little: damage shows as struct, index, memory and other errors
            raise ModelError(
                f"the tokenizer of {path} cannot be read: {error}",
                hint="is the file complete? transformers 5.24 makes tokenizers of more architectures than 5.17",
            ) from error


@contextmanager
def _apart_from_results() -> Iterator[None]:
    """Keep stdout free of what libraries log there, and show progress on terminals only."""
    shown = sys.stderr if sys.stderr.isatty() else io.StringIO()
    with redirect_stdout(shown), redirect_stderr(shown):
        yield


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Let one reader of a file serve transformers, which asks for one more than once: each takes seconds over a large
    vocabulary."""
    import gguf

    reader = gguf.GGUFReader
    vars(gguf)["GGUFReader"] = lru_cache(maxsize=1)(reader)
    try:
        yield
    finally:
        vars(gguf)["GGUFReader"] = reader
