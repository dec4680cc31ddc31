"""Converts between text and token ids with a model's tokenizer and chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import cached_property, partial
from typing import Any

from zeroinf.compat.chat_templates import clock_at
from zeroinf.errors import InputError
from zeroinf.generation.row import Likelihood, Sampling
from zeroinf.generation.scoring import TokenScores
from zeroinf.model.anatomy import Anatomy
from zeroinf.service.requests import ChatOptions, Request
from zeroinf.service.roles import Conversations, LostMessageError
from zeroinf.service.token_bytes import TokenBytes

_AT_A_TIME = 1024
"""Prompts and chats that are tokenized together."""
_DECIMALS = 6
_IMPOSSIBLE = -9999.0  # as OpenAI says it; JSON has no infinity


class TextCodec:
    """A model's tokenizer, or plain UTF-8 bytes for random weights that come without one."""

    def __init__(
        self, tokenizer: Any | None, anatomy: Anatomy, now: float | None = None, most_tokens: int | None = None
    ) -> None:
        """`now` (seconds since 1970) is what chat templates are told that ask for the date; None: the clock's.
        `most_tokens` of a prompt and its completion together are taken, where not all of the model's context is."""
        self._tokenizer = tokenizer
        self._now = now
        self._anatomy, self._most_tokens = anatomy, most_tokens
        self._texts: dict[int, str] = {}
        self._pieces: TokenBytes | None = None
        self._conversations: dict[ChatOptions, Conversations] = {}
        self.templated = 0
        """Plain prompts so far with special tokens: a template has been applied to them."""
        self.doubled = 0
        """Those to which the tokenizer would have added a second beginning-of-sequence token."""
        self._special = () if tokenizer is None else tuple(map(str, tokenizer.all_special_tokens))

    @property
    def tokenizer(self) -> Any | None:
        """transformers' tokenizer, None for random weights without one."""
        return self._tokenizer

    @property
    def pad_token(self) -> int | None:
        """The tokenizer's padding token, or 0 where the model has no embedding for it: no model sees what pads."""
        token = self._tokenizer.pad_token_id if self._tokenizer is not None else None
        return token if token is None or token < self._anatomy.vocabulary else 0

    @property
    def eos_tokens(self) -> tuple[int, ...]:
        token = self._tokenizer.eos_token_id if self._tokenizer is not None else None
        return () if token is None else (token,)

    @cached_property
    def special_tokens(self) -> frozenset[int]:
        """Tokens that are no text."""
        if self._tokenizer is None:
            return frozenset()
        added = self._tokenizer.added_tokens_decoder.items()
        return frozenset(self._tokenizer.all_special_ids) | {token for token, one in added if one.special}

    def encode(self, request: Request) -> list[int]:
        """Token ids of a request's prompt, checked against the model.

        Raises ValueError as `tokens` does, and where prompt and completion together are longer than the model's
        context, or than is taken.
        """
        return self._fitting(self.tokens(request), request)

    def _fitting(self, ids: list[int], request: Request) -> list[int]:
        new_tokens, limit = request.sampling.max_new_tokens, self._anatomy.context_limit
        self._check_settings(request.sampling)
        if limit is not None and self._anatomy.positions(len(ids), new_tokens) > limit:
            raise ValueError(
                f"the prompt has {len(ids)} tokens and max_new_tokens is {new_tokens}, "
                f"but the model's context holds {limit}"
            )
        if self._most_tokens is not None and len(ids) + new_tokens > self._most_tokens:
            raise ValueError(
                f"the prompt has {len(ids)} tokens and max_new_tokens is {new_tokens}, "
                f"but --max-model-len is {self._most_tokens}"
            )
        return ids

    def encode_all(self, requests: Sequence[Request]) -> Iterator[list[int] | ValueError]:
        """Yield what `encode` returns or raises for each of `requests`; fast tokenizers take many at a time, on all
        cores, and chat templates are rendered one by one before."""
        for start in range(0, len(requests), _AT_A_TIME):
            yield from self._encode_batch(requests[start : start + _AT_A_TIME])

    def _encode_batch(self, requests: Sequence[Request]) -> Iterator[list[int] | ValueError]:
        texts: list[str | ValueError | None] = []
        for request in requests:
            try:
                texts.append(self._rendered(request))
            except ValueError as error:
                texts.append(error)
        known: dict[int, list[int]] = {}
        for is_chat in (False, True):
            group = {
                number: text
                for number, (request, text) in enumerate(zip(requests, texts, strict=True))
                if isinstance(text, str) and (request.messages is not None) == is_chat
            }
            if self._tokenizer is not None and group:
                with suppress(Exception):  # whichever of them it was says so below
                    given = self._tokenizer(list(group.values()), add_special_tokens=not is_chat)["input_ids"]
                    known |= dict(zip(group, given, strict=True))
        for number, (request, text) in enumerate(zip(requests, texts, strict=True)):
            try:
                if isinstance(text, ValueError):
                    raise text
                yield self._fitting(self._tokens(request, text, known.get(number)), request)
            except ValueError as error:
                yield error

    def tokens(self, request: Request) -> list[int]:
        """Token ids of a request's prompt; chat messages go through the chat template.

        Raises ValueError when the messages cannot be rendered or one of them would be lost, when nothing is left of the
        prompt, or where it holds a token for which the model has no embedding.
        """
        return self._tokens(request, self._rendered(request), None)

    def _rendered(self, request: Request) -> str | None:
        """The text of a prompt, chat messages through the chat template; None for one that came as tokens."""
        return request.prompt if request.messages is None else self._render_chat(request.messages, request.chat)

    def _tokens(self, request: Request, text: str | None, known: list[int] | None) -> list[int]:
        """`known` are those that the tokenizer gives for `text`, if it was asked already."""
        if request.tokens is not None:
            ids = list(request.tokens)
        elif self._tokenizer is None:
            ids = [byte % self._anatomy.vocabulary for byte in (text or "").encode()]
        else:
            ids = self._tokenized(str(text), known, is_chat=request.messages is not None)
        if not ids:
            raise ValueError("the prompt holds no tokens")
        if request.truncate is not None:
            ids = ids[-request.truncate :]
        self.check(ids)
        return list(ids)

    def _check_settings(self, sampling: Sampling) -> None:
        """Raises ValueError for a setting that names a token which the model has not, or needs a tokenizer."""
        if sampling.answer_format is not None and self._tokenizer is None:
            raise ValueError("response_format needs the text of tokens, and the model has no tokenizer")
        named = {"logit_bias": [token for token, _ in sampling.logit_bias], "stop_token_ids": sampling.stop_token_ids}
        for name, tokens in named.items():
            if tokens and max(tokens) >= self._anatomy.vocabulary:
                raise ValueError(f"{name} names token {max(tokens)}: the model's are below {self._anatomy.vocabulary}")

    def check(self, ids: Sequence[int]) -> None:
        """Raises ValueError where `ids` hold a token for which the model has no embedding."""
        if (largest := max(ids)) >= self._anatomy.vocabulary:
            raise ValueError(
                f"token {largest} ({self._text(largest)!r}) is in the tokenizer, but the model has embeddings for "
                f"tokens below {self._anatomy.vocabulary} only"
            )

    def _tokenized(self, text: str, known: list[int] | None, *, is_chat: bool) -> list[int]:
        """Tokens of a text. Chat templates write special tokens themselves; where a plain text begins with the token
        with which the tokenizer begins, that is there once.
        """
        assert self._tokenizer is not None
        try:
            ids = list(self._tokenizer(text, add_special_tokens=not is_chat)["input_ids"] if known is None else known)
        except Exception as error:  # tokenizers have no error class of their own
            raise ValueError(f"the tokenizer refuses it: {error}") from error
        if is_chat:
            return ids
        bos = self._tokenizer.bos_token_id
        self.templated += any(token in text for token in self._special)
        if bos is None or ids[:2] != [bos, bos] or not text.startswith(str(self._tokenizer.bos_token)):
            return ids
        self.doubled += 1
        return ids[1:]

    @property
    def has_chat_template(self) -> bool:
        return self._tokenizer is not None and bool(self._tokenizer.chat_template)

    def _render_chat(self, messages: Sequence[dict[str, str]], options: ChatOptions) -> str:
        if self._tokenizer is None or not self._tokenizer.chat_template:
            raise ValueError("the model has no chat template: give plain prompts instead of messages")
        if options not in self._conversations:
            self._check_variables(options)
            self._conversations[options] = Conversations(partial(self._render, options))
        try:
            with nullcontext() if self._now is None else clock_at(self._now):  # else other threads may be rendering
                return self._conversations[options].render(messages)
        except LostMessageError:
            raise
        except Exception as error:  # templates are the model author's own programs and raise what they like
            raise ValueError(f"the chat template refuses these messages: {error}") from error

    def _check_variables(self, options: ChatOptions) -> None:
        """Raises ValueError for a variable that the chat template does not read: it would change nothing."""
        assert self._tokenizer is not None
        template = str(self._tokenizer.chat_template)
        for name, _ in options.variables:
            if not re.search(rf"\b{re.escape(name)}\b", template):
                raise ValueError(f"the model's chat template does not read {name!r}: it would change nothing")

    def _render(self, options: ChatOptions, messages: Sequence[Mapping[str, Any]]) -> str:
        assert self._tokenizer is not None
        rendered = self._tokenizer.apply_chat_template(
            list(messages),
            add_generation_prompt=options.add_generation_prompt,
            continue_final_message=options.continue_final_message,
            tokenize=False,
            **{name: json.loads(value) for name, value in options.variables},
        )
        return str(rendered)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of generated tokens, special tokens left out."""
        return self._decoded(tokens, skip_special_tokens=True)

    def decode_all(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special ones included."""
        return self._decoded(tokens, skip_special_tokens=False)

    def decode_as_it_is(self, tokens: Sequence[int]) -> str:
        """Text of generated tokens, special tokens left out, and nothing else changed: tokenizers may drop or add
        spaces."""
        special = self.special_tokens
        pieces = (self.piece(token) or b"" for token in tokens if token not in special)
        return b"".join(pieces).decode(errors="replace")

    def _decoded(self, tokens: Sequence[int], *, skip_special_tokens: bool) -> str:
        if self._tokenizer is not None:
            return str(self._tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens))
        return " ".join(str(token) for token in tokens)

    def piece(self, token: int) -> bytes | None:
        """The bytes that a token adds to a text, special ones included; None for one that has no text."""
        if self._tokenizer is None:
            return f" {token}".encode()
        if self._pieces is None:
            self._pieces = TokenBytes(self._tokenizer)
        return self._pieces(token)

    def told(self, token: int, likelihood: Likelihood) -> dict[str, Any]:
        """A generated token and the likeliest ones in its place, for the output."""
        top = [self._with_text(*one) for one in likelihood.top]
        return {**self._with_text(token, likelihood.logprob), "top_logprobs": top}

    def told_prompt(self, tokens: Sequence[int], scores: TokenScores | None) -> list[dict[str, Any]]:
        """The tokens of a prompt in the same form; the first has no log-probability, since nothing precedes it.

        `scores` are those of all others, None where there are none.
        """
        first = {**self._with_text(tokens[0], 0.0), "logprob": None, "top_logprobs": None}
        if scores is None:
            return [first]
        found = zip(scores.logprobs, scores.likeliest, strict=True)
        return [first, *map(self.told, tokens[1:], (Likelihood(logprob, (best,)) for logprob, best in found))]

    def _with_text(self, token: int, logprob: float) -> dict[str, Any]:
        if token not in self._texts:
            self._texts[token] = self._text(token)
        value = round(max(_IMPOSSIBLE, logprob), _DECIMALS)
        return {"token": self._texts[token], "id": token, "logprob": value}

    def _text(self, token: int) -> str:
        """A token by itself, special ones and spaces included."""
        if self._tokenizer is not None:
            return str(self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        return str(token)


def encode_prompt(codec: TextCodec, request: Request) -> list[int]:
    """Encode as `encode` does; raises InputError that names the prompt by its number."""
    try:
        return codec.encode(request)
    except ValueError as error:
        raise InputError(f"prompt {request.index}: {error}") from error
