"""JSON and server-sent events as bytes."""

from __future__ import annotations

import json
from typing import Any

from fastapi.sse import format_sse_event

DONE = format_sse_event(data_str="[DONE]")
"""What ends a stream."""


def json_bytes(value: Any) -> bytes:
    """Half a surrogate pair, which has no UTF-8, becomes its escape."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace")


def event(value: Any) -> bytes:
    """One event whose data is `value`."""
    return format_sse_event(data_str=json_bytes(value).decode())
