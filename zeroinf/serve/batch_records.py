"""Batches as OpenAI's API describes them, and as they lie on disk; and what is wrong with a batch's input."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from zeroinf.jobs.contents import compression_of
from zeroinf.jobs.entries import parse_object
from zeroinf.jobs.fields import as_id, as_text
from zeroinf.jobs.files import rename, write_lines, write_new
from zeroinf.jobs.foreign import endpoint_of
from zeroinf.jobs.formats import read_records
from zeroinf.jobs.shape import LineError
from zeroinf.serve.asks import PATHS
from zeroinf.serve.errors import ApiError

Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
OVER: frozenset[Status] = frozenset({"failed", "completed", "expired", "cancelled"})
_UNITS_S = {"m": 60, "h": 3600, "d": 86400}
_LINE_KEYS = ("custom_id", "method", "url", "body")
_MOST_ERRORS = 100
_MOST_METADATA = 16
_MAGIC_BYTES = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One batch. Times in seconds since 1970."""

    id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    model: str
    created_at: int
    expires_at: int
    status: Status = "validating"
    metadata: dict[str, str] | None = None
    errors: list[dict[str, Any]] = field(default_factory=list)
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    input_tokens: int = 0
    output_tokens: int = 0

    @property
    def is_over(self) -> bool:
        return self.status in OVER

    def to_json(self) -> dict[str, Any]:
        """The batch as the API gives it."""
        told = asdict(self)
        errors, counts = told.pop("errors"), {name: told.pop(name) for name in ("total", "completed", "failed")}
        spent = {name: told.pop(name) for name in ("input_tokens", "output_tokens")}
        usage = {
            **spent,
            "total_tokens": sum(spent.values()),
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": 0},
        }
        return {
            **told,
            "object": "batch",
            "errors": {"object": "list", "data": errors} if errors else None,
            "request_counts": counts,
            "usage": usage,
        }

    def save(self, folder: Path) -> None:
        """Durably, in the place of what was saved before."""
        write_new(folder / "batch.json.new", write_lines([json.dumps(asdict(self))]))
        rename(folder / "batch.json.new", folder / "batch.json")

    @classmethod
    def load(cls, folder: Path) -> Batch:
        return cls(**json.loads((folder / "batch.json").read_text()))


def new_batch(body: dict[str, Any], model: str) -> Batch:
    """A batch as `body` asks for it. Raises ApiError."""
    asked = {name: body.pop(name, None) for name in ("endpoint", "input_file_id", "completion_window", "metadata")}
    if unknown := next((name for name, value in body.items() if value is not None), None):
        raise ApiError(400, f"{unknown} is not supported", param=unknown)
    endpoint = endpoint_of(asked["endpoint"]) if isinstance(asked["endpoint"], str) else None
    if endpoint is None:
        raise ApiError(400, f"endpoint must be one of {', '.join(PATHS.values())}", param="endpoint")
    if not isinstance(asked["input_file_id"], str):
        raise ApiError(400, "input_file_id must be the id of a file", param="input_file_id")
    window = asked["completion_window"]
    match = re.fullmatch(r"([1-9]\d{0,4})([mhd])", window) if isinstance(window, str) else None
    if match is None:
        raise ApiError(400, f"completion_window must be as 24h, not {window!r}", param="completion_window")
    metadata = asked["metadata"]
    if metadata is not None and not (
        isinstance(metadata, dict)
        and len(metadata) <= _MOST_METADATA
        and all(isinstance(value, str) and len(value) <= 512 and len(key) <= 64 for key, value in metadata.items())
    ):
        raise ApiError(400, f"metadata takes up to {_MOST_METADATA} short texts", param="metadata")
    now = int(time.time())
    return Batch(
        id=f"batch_{secrets.token_hex(12)}",
        endpoint=PATHS[endpoint],
        input_file_id=asked["input_file_id"],
        completion_window=window,
        model=model,
        created_at=now,
        expires_at=now + int(match[1]) * _UNITS_S[match[2]],
        metadata=metadata,
    )


def check_input(path: Path, endpoint: str) -> tuple[int, list[dict[str, Any]]]:
    """Lines of a batch's input, and what fails all of it: lines that are no requests, double ids, other endpoints.

    Raises InputError for a file that is no text."""
    known: dict[str, int] = {}
    errors: list[dict[str, Any]] = []
    with path.open("rb") as file:
        if packed := compression_of(file.read(_MAGIC_BYTES)):  # it could grow beyond what --max-state allows
            message = f"the file is compressed by {packed}: upload its lines as they are"
            return 0, [{"code": "invalid_file", "line": None, "message": message, "param": None}]
        file.seek(0)
        for record in read_records(file, "the input file", "jsonl"):
            assert isinstance(record.value, bytes)
            text = record.value.decode("utf-8", "replace")
            for code, message, param in _complaints(text, endpoint, known, record.line):
                if len(errors) < _MOST_ERRORS:
                    errors.append({"code": code, "line": record.line, "message": message, "param": param})
    if not known and not errors:
        errors.append({"code": "empty_file", "line": None, "message": "the input file has no line", "param": None})
    return len(known), errors


def _complaints(text: str, endpoint: str, known: dict[str, int], number: int) -> Iterator[tuple[str, str, str | None]]:
    try:
        line = parse_object(text)
    except LineError as error:
        yield "invalid_json_line", str(error), None
        return
    if unknown := next((key for key in line if key not in _LINE_KEYS), None):
        yield "unknown_key", f"unknown key {unknown!r}", unknown
    try:
        custom_id = as_text(as_id(line.get("custom_id")))
    except ValueError as error:
        yield "missing_required_parameter", f"custom_id {error}", "custom_id"
    else:
        first = known.setdefault(custom_id, number)
        if first != number:
            yield "duplicate_custom_id", f"custom_id {custom_id!r} was already given on line {first}", "custom_id"
    if str(line.get("method")).upper() != "POST":
        yield "invalid_method", "method must be 'POST'", "method"
    url = line.get("url")
    if not isinstance(url, str) or endpoint_of(url) != endpoint_of(endpoint):
        yield "mismatched_endpoint", f"url must be the batch's endpoint, {endpoint}, not {url!r}", "url"
    if not isinstance(line.get("body"), dict):
        yield "missing_required_parameter", "body must be an object", "body"
