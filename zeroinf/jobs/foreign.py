"""Settings of other programs in requests: OpenAI's API, and the additions of vLLM, transformers and llama.cpp.

A setting that cannot change a completion, or has a value without effect, is accepted. A setting that zeroinf does not
support is refused by name, and an unknown key is refused with the name that has the same meaning here.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from typing import Literal
from urllib.parse import urlsplit

from zeroinf.jobs.shape import LineError

Endpoint = Literal["chat", "completions"]

HARMLESS = frozenset(
    {
        *("model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
        *("prompt_cache_retention", "stream_options", "parallel_tool_calls", "priority", "request_id", "cache_salt"),
    }
)
"""Keys of a request body that cannot change the completion."""

NEUTRAL: dict[str, tuple[object, ...]] = {
    "add_special_tokens": (True,),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "detokenize": (True,),
    "documents": ([],),
    "early_stopping": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "prompt_logprobs": (False,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "stream": (False,),
    "suffix": ("",),
    "tfs_z": (1,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_a": (0,),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    **dict.fromkeys(
        ("audio", "guided_choice", "guided_grammar", "guided_json", "guided_regex", "prediction", "structured_outputs"),
        (),
    ),
}
"""Settings that zeroinf does not do, and their values that ask for nothing. Null asks for nothing everywhere."""

_INSTEAD = {
    "guided_choice": 'response_format does it, with {"type": "choices", "choices": [...]}',
    "guided_grammar": 'response_format does it, with {"type": "grammar", "grammar": "..."}',
    "guided_json": 'response_format does it, with {"type": "json_schema", "json_schema": {"schema": {...}}}',
    "guided_regex": 'response_format does it, with {"type": "regex", "regex": "..."}',
    "structured_outputs": "response_format does it, with the types json_schema, regex, choices and grammar",
}
"""What does the same as a setting that zeroinf does not have."""

_SAME: dict[str, str] = {
    "do_sample": "temperature",
    "max_length": "max_tokens",
    "max_output_tokens": "max_tokens",
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
    "num_return_sequences": "n",
    "num_samples": "n",
    "random_seed": "seed",
    "repeat_penalty": "repetition_penalty",
    "stop_sequences": "stop",
    "stop_strings": "stop",
    "stopping_strings": "stop",
    "n_probs": "top_logprobs",
    "min_length": "min_tokens",
    "eos_token_id": "stop_token_ids",
    "thinking": "enable_thinking",
    "system": "messages",
    "text": "prompt",
    "input": "prompt",
    "inputs": "prompt",
    "conversation": "messages",
    "conversations": "messages",
}
"""Names elsewhere, and what means the same here."""

_ALIKE = 0.8


def endpoint_of(url: str) -> Endpoint | None:
    """The endpoint that a batch line's `url` names, with or without a host, a version and slashes around; None for
    others."""
    parts = urlsplit(url.strip().lower()).path.strip("/").split("/")
    if parts[-1] != "completions":
        return None
    return "chat" if parts[-2:-1] == ["chat"] else "completions"


def asks_for_nothing(key: str, value: object) -> bool:
    """Whether a key of a request can be left out. Raises LineError for a setting that zeroinf does not do."""
    if key in HARMLESS or value is None:
        return True
    if key not in NEUTRAL:
        return False
    # To Python False equals 0 and True equals 1; to the API they are of different types.
    if any(value == nothing and isinstance(value, bool) == isinstance(nothing, bool) for nothing in NEUTRAL[key]):
        return True
    instead = f"; {_INSTEAD[key]}" if key in _INSTEAD else ""
    raise LineError(f"{key}={reprlib.repr(value)} is not supported{instead}")


def is_foreign(key: str) -> bool:
    """Whether `key` is a setting elsewhere, of which `asks_for_nothing` knows."""
    return key in HARMLESS or key in NEUTRAL


def meant_by(key: str, known: Iterable[str]) -> str | None:
    """The name among `known` that a key probably means: the name of the same thing, or one that is spelt alike."""
    known = list(known)
    if (same := _SAME.get(key)) in known:
        return same
    near = difflib.get_close_matches(key, known, n=1, cutoff=_ALIKE)
    return near[0] if near else None
