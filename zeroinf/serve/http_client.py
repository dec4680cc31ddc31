"""Calls servers of OpenAI's API over HTTP, with the standard library alone: JSON in, JSON or a stream of events out."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from zeroinf.errors import InputError, ZeroinfError

API_KEY_VARIABLE = "ZEROINF_SERVE_API_KEY"
"""In the environment: the key of a server, for those who start it and for those who call it."""


class PromptTooLongError(InputError):
    """Prompt and completion are longer than the model's context, or than what memory was planned for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiServer:
    """A server at an address without `/v1`. `name` is how errors call it."""

    name: str
    address: str
    api_key: str | None = field(default=None, repr=False)

    def get(self, path: str) -> dict[str, Any]:
        """The JSON object at `path`. Raises as `post` does."""
        with closing(self._open(path, None)) as answer:
            return self._object(answer.read())

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to `body`.

        Raises PromptTooLongError and InputError for what the server refuses, ZeroinfError where it fails or is not
        there.
        """
        with closing(self._open(path, body)) as answer:
            return self._object(answer.read())

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of the answer to `body`, as they come; closing the iterator hangs up. Raises as `post` does."""
        with closing(self._open(path, body)) as answer:
            try:
                for line in answer:
                    if not line.startswith(b"data:"):
                        continue
                    data = line.removeprefix(b"data:").strip()
                    if data == b"[DONE]":
                        return
                    yield self._object(data)
            except (OSError, http.client.HTTPException) as error:
                raise ZeroinfError(f"{self.name} hung up: {error}") from error
        raise ZeroinfError(f"{self.name} hung up before the end of its answer")

    def _open(self, path: str, body: Mapping[str, Any] | None) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            return urllib.request.urlopen(urllib.request.Request(f"{self.address}{path}", data, headers))
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error.code, error.read()) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ZeroinfError(f"{self.name} does not answer: {getattr(error, 'reason', error)}") from error

    def _refusal(self, status: int, body: bytes) -> ZeroinfError:
        try:
            told = json.loads(body)["error"]
            message, code = str(told["message"]), told.get("code")
        except (ValueError, TypeError, KeyError, AttributeError):
            message, code = f"status {status}", None
        kind = InputError if status < 500 else ZeroinfError
        return (PromptTooLongError if code == "context_length_exceeded" else kind)(f"{self.name}: {message}")

    def _object(self, data: bytes) -> dict[str, Any]:
        """Raises ZeroinfError for the error that an answer of status 200 may hold after a heartbeat."""
        try:
            found = json.loads(data)
        except ValueError:
            raise ZeroinfError(f"{self.name} does not answer in JSON: is it a server of OpenAI's API?") from None
        if not isinstance(found, dict):
            raise ZeroinfError(f"{self.name} answers with other than an object")
        if found.get("error"):
            raise ZeroinfError(f"{self.name}: {found['error'].get('message')}")
        return found


def key_of_environment() -> str | None:
    """The key that the environment has for servers, if any."""
    return os.environ.get(API_KEY_VARIABLE) or None
