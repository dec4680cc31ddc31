"""A `.gguf` file as an ordinary checkpoint folder: unpacked to bfloat16 and written once into the user's cache."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path

from zeroinf.errors import EnvironmentProblem, ModelError
from zeroinf.model.cache import build_once, file_digest
from zeroinf.paths import cache_directory

# Part of the folder's name: raise it when the conversion writes something else than before.
CONVERTER_VERSION = 1


def convert_gguf(path: Path) -> Path:
    """Convert `path` to a folder with config, safetensors weights (bfloat16) and tokenizer; return that folder.

    The folder is named by the file's digest, so a second call returns at once. The conversion holds the whole model
    in host memory. Raises ModelError for a file that cannot be read, EnvironmentProblem without the `gguf` package.
    """
    folder = cache_directory() / "gguf" / f"{path.stem}-{file_digest(path)[:16]}-v{CONVERTER_VERSION}"
    return build_once(folder, partial(_convert, path))


def _convert(path: Path, folder: Path) -> None:
    if find_spec("gguf") is None:
        raise EnvironmentProblem("the package gguf is needed to read a .gguf file", hint="pip install gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    with _apart_from_results(), _parsed_once():
        try:
            model = AutoModelForCausalLM.from_pretrained(
                **place, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
            )
            tokenizer = AutoTokenizer.from_pretrained(**place)
        except Exception as error:  # the readers check little: damage shows as struct, index, memory and other errors
            raise ModelError(
                f"{path} cannot be converted: {error}",
                hint="is the file complete, and its architecture one transformers reads?",
            ) from error
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
def _parsed_once() -> Iterator[None]:
    """Let one reader of a file serve transformers, which asks for one for the config, the weights and the tokenizer;
    each takes seconds over a large vocabulary."""
    import gguf

    reader = gguf.GGUFReader
    vars(gguf)["GGUFReader"] = lru_cache(maxsize=1)(reader)
    try:
        yield
    finally:
        vars(gguf)["GGUFReader"] = reader
