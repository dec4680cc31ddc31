"""Chats in turns: a conversation with its history, and the two places that answers come from.

`ServerChat` asks a server of OpenAI's API; `ModelChat` a model that was loaded into this process. Nothing here knows of
terminals, and nothing imports torch.
"""

from __future__ import annotations

import secrets
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from zeroinf.errors import InputError, ZeroinfError
from zeroinf.serve.http_client import ApiServer, PromptTooLongError

if TYPE_CHECKING:
    from zeroinf.generation.row import Sampling
    from zeroinf.runs.session import Session

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class ChatPiece:
    """Some text of an answer. The last one has a `finish_reason`: stop or length."""

    text: str
    finish_reason: str | None = None


class Chat(Protocol):
    """A model that answers chats."""

    def answer(self, messages: Sequence[Message]) -> Generator[ChatPiece]:
        """The answer to `messages` as it comes; closing the generator ends the work for it.

        Raises PromptTooLongError where they are too long, ZeroinfError for whatever else goes wrong.
        """
        ...


@dataclass(kw_only=True)
class Conversation:
    """Messages so far, and the `chat` that answers them."""

    chat: Chat
    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    """Of user and assistant in turns, beginning with the user."""
    left_out: int = 0
    """Messages that were dropped from the beginning, since the rest would not have fitted."""

    def say(self, text: str) -> Generator[ChatPiece]:
        """The answer to `text` as it comes. One that is broken off stays in the history as far as it came; a message
        that got no answer does not. Raises as the chat's `answer` does.
        """
        self.messages.append({"role": "user", "content": text})
        said = ""
        try:
            for piece in self._answer():
                said += piece.text
                yield piece
        finally:
            if said:
                self.messages.append({"role": "assistant", "content": said})
            else:
                self.messages.pop()

    def take_back(self) -> str | None:
        """Forget the last message of the user and its answer; returns the message, None where there is none."""
        if not self.messages:
            return None
        *self.messages, last, _ = self.messages
        return last["content"]

    def clear(self) -> None:
        """Begin anew; the system prompt stays."""
        self.messages, self.left_out = [], 0

    def _answer(self) -> Iterator[ChatPiece]:
        while True:
            system = [] if self.system is None else [{"role": "system", "content": self.system}]
            with closing(self.chat.answer([*system, *self.messages])) as pieces:
                try:
                    yield from pieces
                    return
                except PromptTooLongError:
                    if len(self.messages) < 3:
                        raise
            del self.messages[:2]
            self.left_out += 2


@dataclass(frozen=True, kw_only=True)
class ServerChat:
    """A chat with `model` of a server. `settings` are keys of requests."""

    server: ApiServer
    model: str
    settings: Mapping[str, Any]

    def answer(self, messages: Sequence[Message]) -> Generator[ChatPiece]:
        """Answer as `Chat` says."""
        body = {**self.settings, "model": self.model, "messages": list(messages), "stream": True}
        with closing(self.server.stream("/v1/chat/completions", body)) as events:  # type: ignore[type-var]
            for event in events:
                for choice in event.get("choices") or ():
                    yield ChatPiece(choice["delta"].get("content") or "", choice.get("finish_reason"))


def served_model(server: ApiServer, named: str | None) -> str:
    """The model's name in requests: `named`, or the only one that `server` has. Raises InputError."""
    known = [str(one["id"]) for one in server.get("/v1/models").get("data", ())]
    if named in known:
        return str(named)
    if named is not None:
        raise InputError(f"{server.name} has no model {named!r}", hint=f"it has {', '.join(known)}")
    if len(known) != 1:
        raise InputError(f"{server.name} has {len(known)} models", hint=f"name one of {', '.join(known[:9])}")
    return known[0]


@dataclass(frozen=True, kw_only=True)
class ModelChat:
    """A chat with the model of `session`."""

    session: Session
    sampling: Sampling
    fixed_seed: bool
    """Sampled answers are drawn with the seed of `sampling`, not each with one by chance."""

    def answer(self, messages: Sequence[Message]) -> Generator[ChatPiece]:
        """Answer as `Chat` says."""
        from zeroinf.service.requests import Request

        sampling = self.sampling if self.fixed_seed else replace(self.sampling, seed=secrets.randbits(31))
        request = Request(
            index=0, line=None, id="chat", prompt=None, messages=tuple(map(dict, messages)), sampling=sampling
        )
        self._check_length(request)
        handle = self.session.submit(request, stream=True)
        try:
            for event in handle:
                if event.finish_reason == "error":
                    raise ZeroinfError("the model's scores were not numbers", hint="--dtype bfloat16 does not overflow")
                yield ChatPiece(event.text, event.finish_reason)
        finally:
            handle.cancel()

    def _check_length(self, request: Any) -> None:
        plan, codec = self.session.plan, self.session.model.codec
        try:
            tokens = len(codec.tokens(request))
        except ValueError as error:
            raise InputError(str(error)) from None
        limit = plan.anatomy.context_limit
        new = request.sampling.max_new_tokens
        if tokens > plan.prompt_tokens or (limit is not None and plan.anatomy.positions(tokens, new) > limit):
            raise PromptTooLongError(
                f"the conversation has {tokens} tokens, and there is room for {plan.prompt_tokens}",
                hint="--max-prompt-tokens makes room, as far as the model's context goes",
            )
