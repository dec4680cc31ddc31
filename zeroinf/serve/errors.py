"""Errors as OpenAI's API gives them: a status, and `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zeroinf.errors import ZeroinfError

_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error that a client gets instead of an answer. `retry_after_s` says when to ask again, in whole seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s

    @classmethod
    def of(cls, error: BaseException) -> ApiError:
        """The error that a client gets for `error`: nothing of its insides unless it was raised on purpose."""
        if isinstance(error, ApiError):
            return error
        known = isinstance(error, ZeroinfError)
        return cls(500, f"the model failed: {error}" if known else "the server failed; its log says more")

    @property
    def headers(self) -> Mapping[str, str]:
        named = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        return named | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})

    def to_json(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = _KINDS.get(self.status) or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
