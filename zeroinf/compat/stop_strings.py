"""Matches stop strings as transformers does: the bytes that a token adds to a text.

Relies on three private functions of `transformers.StopStringCriteria`, as they are in transformers 5.17 to 5.24; the
class itself reads the whole vocabulary before the first token. `tests/unit/test_compat.py` fails when they change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def token_bytes(tokenizer: Any) -> Callable[[str], bytes | None]:
    """A function that maps a token, as the vocabulary spells it, to its bytes; to None where only decoding tells."""
    from transformers import StopStringCriteria

    mode = StopStringCriteria._get_stop_string_matching_mode(tokenizer)
    byte_decoder = StopStringCriteria._byte_level_decoder() if mode == "byte_level" else None

    def bytes_of(token: str) -> bytes | None:
        found = StopStringCriteria._token_to_bytes(token, mode, byte_decoder)
        return None if found is None else bytes(found)

    return bytes_of
