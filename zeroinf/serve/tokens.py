"""Text to token ids and back, as vLLM's routes do it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from zeroinf.serve.asks import check_model, read_ask
from zeroinf.serve.errors import ApiError
from zeroinf.serve.gateway import Gateway
from zeroinf.serve.wire import json_bytes

_OWN = ("add_special_tokens", "return_token_strs")


def tokenized(gateway: Gateway, body: dict[str, Any]) -> dict[str, Any]:
    """`tokens`, `count` and `max_model_len` of a `prompt` or of `messages`. Raises ApiError."""
    for name in _OWN:
        if not isinstance(body.get(name, False), bool | None):
            raise ApiError(400, f"{name} must be true or false, not {body[name]!r}", param=name)
    codec, asked = gateway.codec, {key: value for key, value in body.items() if key not in _OWN}
    bare = body.get("add_special_tokens") is False
    if bare and "messages" not in body and codec.tokenizer is not None and isinstance(body.get("prompt"), str):
        check_model(body.get("model"), gateway.settings.model_name)
        if unknown := next((key for key in asked if key not in ("model", "prompt")), None):
            raise ApiError(400, f"unknown key {unknown!r}", param=unknown)
        ids = list(codec.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"])
    else:
        if body.get("add_special_tokens") and "messages" in body:
            raise ApiError(400, "add_special_tokens=True is for prompts: the chat template adds those of chats")
        endpoint = "chat" if "messages" in body else "completions"
        defaults = replace(gateway.defaults, max_new_tokens=1, min_tokens=0)
        request = read_ask(json_bytes(asked), endpoint, gateway.settings.model_name, defaults).requests  # type: ignore[arg-type]
        if len(request) != 1:
            raise ApiError(400, "one prompt at a time", param="prompt")
        try:
            ids = codec.tokens(request[0])
        except ValueError as error:
            raise ApiError(400, str(error)) from None
    told: dict[str, Any] = {"count": len(ids), "max_model_len": gateway.max_model_len, "tokens": ids}
    texts = [codec.decode_all([token]) for token in ids] if body.get("return_token_strs") else None
    return told | {"token_strs": texts}


def detokenized(gateway: Gateway, body: dict[str, Any]) -> dict[str, Any]:
    """`prompt`: the text of `tokens`, special ones included. Raises ApiError."""
    check_model(body.get("model"), gateway.settings.model_name)
    tokens, codec = body.get("tokens"), gateway.codec
    if not isinstance(tokens, list) or not all(type(token) is int and token >= 0 for token in tokens):
        raise ApiError(400, "tokens must be a list of token ids", param="tokens")
    if unknown := next((key for key in body if key not in ("model", "tokens")), None):
        raise ApiError(400, f"unknown key {unknown!r}", param=unknown)
    try:
        if tokens:
            codec.check(tokens)
        return {"prompt": codec.decode_all(tokens)}
    except (ValueError, OverflowError) as error:
        raise ApiError(400, str(error), param="tokens") from None


def tokenizer_info(gateway: Gateway) -> dict[str, Any]:
    """The facts that lm-eval's remote tokenizer asks for. Raises ApiError for a model without a tokenizer."""
    tokenizer = gateway.codec.tokenizer
    if tokenizer is None:
        raise ApiError(404, "the model has no tokenizer")
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    return {
        "tokenizer_class": type(tokenizer).__name__,
        "vocab_size": len(tokenizer),
        "model_max_length": gateway.max_model_len,
        "chat_template": tokenizer.chat_template,
        "add_bos_token": getattr(tokenizer, "add_bos_token", None),
        "add_eos_token": getattr(tokenizer, "add_eos_token", None),
        **special,
    }
