"""Finds chat messages that a template drops, and explains what to do about them.

Templates are programs of the models' authors, and many skip a role that they do not know. So a conversation is rendered
once more with a mark in place of each text: a message whose mark is missing was dropped. The check is done once for
conversations with the same roles. Changes that a template makes to a text (stripping it, removing thoughts) keep the
mark.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
Render = Callable[[Sequence[Message]], str]


class LostMessageError(ValueError):
    """A chat template would leave a message out."""


class Conversations:
    """Renders conversations with `render`, which raises what the template raises, and refuses those that lose texts."""

    def __init__(self, render: Render) -> None:
        self._render = render
        self._known: dict[object, frozenset[int]] = {}

    def render(self, messages: Sequence[Message]) -> str:
        """The text of `messages`. Where the template skips `developer` messages, they are rendered as `system`.

        Raises LostMessageError that names a message which would be lost; what `render` raises comes through.
        """
        text = self._render(messages)
        lost = self._lost(messages)
        if not lost:
            return text
        if any(messages[number].get("role") == "developer" for number in lost):
            renamed = [{**one, "role": "system"} if one.get("role") == "developer" else one for one in messages]
            try:
                text = self._render(renamed)
            except Exception:
                text = ""
            if text and not self._lost(renamed):
                return text
        number = min(lost)
        raise LostMessageError(
            f"message {number + 1} (role {messages[number].get('role')!r}) would be lost: the model's chat template "
            "renders nothing of it"
        )

    def _lost(self, messages: Sequence[Message]) -> list[int]:
        """Places of the messages with a text that does not reach the prompt."""
        key = tuple((one.get("role"), _shape(one.get("content")), _rest(one)) for one in messages)
        if key not in self._known:
            marked = [_with_text(one, _mark(number)) for number, one in enumerate(messages)]
            try:
                text = self._render(marked).lower()
            except Exception:
                return [number for number in range(len(messages)) if self._is_lost(messages, number)]
            self._known[key] = frozenset(number for number in range(len(messages)) if _mark(number) not in text)
        return sorted(number for number in self._known[key] if _has_text(messages[number].get("content")))

    def _is_lost(self, messages: Sequence[Message], number: int) -> bool:
        """Whether a mark behind the text of one message is lost; the others keep their texts."""
        one = messages[number]
        content = one.get("content")
        if not _has_text(content):
            return False
        text = f"{content} {_mark(number)}" if isinstance(content, str) else _mark(number)
        try:
            return (
                _mark(number)
                not in self._render([*messages[:number], _with_text(one, text), *messages[number + 1 :]]).lower()
            )
        except Exception:
            return False


def _mark(number: int) -> str:
    return f"zq{number}qz"


def _with_text(message: Message, text: str) -> Message:
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": text}
    if isinstance(content, list | tuple):
        return {**message, "content": [{**part, "text": text} if _is_text(part) else part for part in content]}
    return message


def _has_text(content: object) -> bool:
    if isinstance(content, list | tuple):
        return any(_is_text(part) and part["text"].strip() for part in content)
    return isinstance(content, str) and bool(content.strip())


def _is_text(part: object) -> bool:
    """Whether `part` of a content is a text, as OpenAI writes it."""
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)


def _shape(content: object) -> object:
    """The parts of a content that may matter beside its text."""
    if isinstance(content, list | tuple):
        return tuple(repr({**part, "text": ""} if _is_text(part) else part) for part in content)
    return type(content).__name__


def _rest(message: Message) -> str:
    return repr({name: value for name, value in message.items() if name not in ("role", "content")})
