"""Loads the tokenizer of a model, from its own folder, its adapter's or the hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from zeroinf.compat.models import tokenizer_config
from zeroinf.errors import ModelError
from zeroinf.model.own_code import own_code_error
from zeroinf.model.source import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Any one of these makes a folder's tokenizer; without this check transformers makes an empty one up.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase | None:
    """The tokenizer of `source`, padding on the left, with a pad token.

    None for random weights that come without a tokenizer in a local folder: callers make up token ids. Raises
    ModelError where a real model has none, or one that would run code of its own without `trust_remote_code`.
    """
    folder = _tokenizer_folder(source)
    has_files = any((folder / file).is_file() for file in _TOKENIZER_FILES)
    if source.random_weights and not has_files:
        return None
    if source.is_local and not has_files and not source.trust_remote_code:
        raise _no_tokenizer(source, f"none of {', '.join(_TOKENIZER_FILES)} is there")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder) if source.adapter is not None else source.location,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
            padding_side="left",
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        own_code = tokenizer_config(source.location, source.revision).get("auto_map")
        if own_code and not source.trust_remote_code:
            raise own_code_error(source.location, own_code) from error
        raise _no_tokenizer(source, str(error)) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or _any_special_token(tokenizer)
    return tokenizer


def _tokenizer_folder(source: ModelSource) -> Path:
    """The tokenizer's folder: an adapter may have brought its own."""
    own = source.adapter.folder if source.adapter is not None else None
    if own is not None and any((own / file).is_file() for file in _TOKENIZER_FILES):
        return own
    return Path(source.location)


def _no_tokenizer(source: ModelSource, why: str) -> ModelError:
    return ModelError(f"no tokenizer for {source.name}: {why}", hint="put tokenizer.json beside the weights")


def _any_special_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """A token to pad with where there is no end of text: padding is masked, so any one serves."""
    special = tokenizer.all_special_tokens
    return str(special[0] if special else tokenizer.convert_ids_to_tokens(0))
