"""Formats results as OpenAI's batch output: one line for each line of the input, with the body that the API would
return.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from zeroinf.service.requests import Extra, Refusal, Result


@dataclass(frozen=True, slots=True)
class Envelope:
    """Writes lines for a job. `model` is named where a request named none; `created`: seconds since 1970."""

    model: str
    created: int

    def lines(self, results: Iterable[Result]) -> Iterator[str]:
        """A line for each entry of the input; completions of one entry stand together in `results`."""
        for _, choices in groupby(results, key=lambda result: result.id):
            yield self.line(list(choices))

    def line(self, choices: Sequence[Result]) -> str:
        """The line of one entry, whose completions are `choices`."""
        return self._wrapped(choices[0].id, 200, self.body(choices))

    def body(self, choices: Sequence[Result]) -> dict[str, Any]:
        """The API's answer to one entry, whose completions are `choices`."""
        first = choices[0]
        extra = first.extra or Extra()
        chat = extra.endpoint == "chat" or (extra.endpoint is None and first.prompt is None)
        prompt_tokens = sum(one.prompt_tokens for one in choices if (one.extra or Extra()).first)
        completion_tokens = sum(one.completion_tokens for one in choices)
        return {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{self._digest(first.id)}",
            "object": "chat.completion" if chat else "text_completion",
            "created": self.created,
            "model": extra.model or self.model,
            "choices": [(_chat_choice if chat else _text_choice)(one) for one in choices],
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": completion_tokens,
                "total_tokens": prompt_tokens + completion_tokens,
            },
        }

    def error(self, refusal: Refusal, *, failed: bool) -> str:
        """The line of an entry that was refused, or that `failed` while it ran."""
        kind = "server_error" if failed else "invalid_request_error"
        error = {"message": refusal.reason, "type": kind, "param": None, "code": None, "line": refusal.line}
        return self._wrapped(refusal.id, 500 if failed else 400, {"error": error})

    def _wrapped(self, custom_id: str | None, status: int, body: dict[str, Any]) -> str:
        digest = self._digest(custom_id or body["error"]["message"])
        response = {"status_code": status, "request_id": f"req_{digest}", "body": body}
        line = {"id": f"batch_req_{digest}", "custom_id": custom_id, "response": response, "error": None}
        return json.dumps(line, ensure_ascii=False)

    def _digest(self, name: str) -> str:
        """A digest that is the same for the same entry, so that an output that is written again has the same bytes."""
        return hashlib.blake2b(f"{self.created}/{name}".encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


def chat_logprobs(told: Sequence[dict[str, Any]] | None) -> dict[str, Any] | None:
    """Log-probabilities of tokens (`TextCodec.told`) as chats have them."""
    return None if told is None else {"content": [_chat_logprob(one) for one in told], "refusal": None}


def _chat_choice(result: Result) -> dict[str, Any]:
    return {
        "index": (result.extra or Extra()).choice or 0,
        "message": {"role": "assistant", "content": result.completion, "refusal": None},
        "logprobs": chat_logprobs(result.logprobs),
        "finish_reason": result.finish_reason,
    }


def _chat_logprob(one: dict[str, Any]) -> dict[str, Any]:
    top = [_with_bytes(other) for other in one["top_logprobs"]]
    return {**_with_bytes(one), "top_logprobs": top}


def _with_bytes(one: dict[str, Any]) -> dict[str, Any]:
    """A token with its bytes, unless it is a part of a character: its text does not tell them then."""
    text = one["token"]
    return {
        "token": text,
        "logprob": one["logprob"],
        "bytes": None if "\ufffd" in text else list(text.encode("utf-8", "surrogatepass")),
    }


def _text_choice(result: Result) -> dict[str, Any]:
    return {
        "index": (result.extra or Extra()).choice or 0,
        "text": result.text,
        "logprobs": text_logprobs(result.logprobs),
        "finish_reason": result.finish_reason,
    }


def text_logprobs(told: Sequence[dict[str, Any]] | None, offset: int = 0) -> dict[str, Any] | None:
    """Log-probabilities as text completions have them; the first token begins at character `offset`."""
    if told is None:
        return None
    offsets = []
    for one in told:
        offsets.append(offset)
        offset += len(one["token"])
    return {
        "tokens": [one["token"] for one in told],
        "token_logprobs": [one["logprob"] for one in told],
        "top_logprobs": [_by_token(one["top_logprobs"]) for one in told],
        "text_offset": offsets,
    }


def _by_token(top: Sequence[dict[str, Any]] | None) -> dict[str, float] | None:
    """None for the first token of a prompt, which has nothing before it."""
    return None if top is None else {one["token"]: one["logprob"] for one in top}
