"""Makes the prompt of a cell: the user's text, or a text of the requested number of tokens.

Input: a cell and the benchmark's settings. Output: text, or its number of tokens. It loads a tokenizer, never a model.
"""

from __future__ import annotations

from functools import cache

from zeroinf.bench.matrix import BenchmarkSettings, Cell
from zeroinf.generation.row import Sampling
from zeroinf.model.inspect import read_anatomy
from zeroinf.model.resolve import resolve_model
from zeroinf.model.tokenizer import load_tokenizer
from zeroinf.service.requests import Request
from zeroinf.service.text import TextCodec


def prompt_of(cell: Cell, settings: BenchmarkSettings) -> str:
    """The prompt that was given, or a text of `cell.input_len` tokens: of nearly as many where no text has just that.

    Raises a ZeroinfError for a model that cannot be read.
    """
    if cell.input_len is None:
        return settings.prompt or ""
    low, high = 1, max(2, cell.input_len)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _tokens(cell, settings, _text(middle)) <= cell.input_len else (low, middle - 1)
    return _text(low)


def prompt_tokens(cell: Cell, settings: BenchmarkSettings) -> int:
    """Tokens of `prompt_of`, or as many as it should have. Raises as it does."""
    return cell.input_len if cell.input_len is not None else _tokens(cell, settings, settings.prompt or "")


def _tokens(cell: Cell, settings: BenchmarkSettings, text: str) -> int:
    codec = _codec(cell.model, settings.trust_remote_code, settings.random_weights)
    sampling = Sampling(max_new_tokens=1)
    return len(codec.tokens(Request(index=0, line=None, id="", prompt=text, messages=None, sampling=sampling)))


@cache
def _codec(model: str, trust_remote_code: bool, random_weights: bool) -> TextCodec:
    source = resolve_model(model, trust_remote_code=trust_remote_code, random_weights=random_weights)
    return TextCodec(load_tokenizer(source), read_anatomy(source.config))


def _text(words: int) -> str:
    return "a" + " a" * (words - 1)
