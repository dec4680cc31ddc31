"""Handles of submitted requests, with which callers wait for text, tokens and completions."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from zeroinf.generation.row import FinishReason, Likelihood


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenEvent:
    """Some tokens of a completion. The texts of all events together are the completion."""

    text: str
    """What is certain and was not told before: at times less than the tokens' own text, at times more."""
    tokens: Sequence[int]
    likelihoods: Sequence[Likelihood] = ()
    """Of each of `tokens`, where the request asks for them."""
    finish_reason: FinishReason | None = None
    """In the last event: why it is the last."""
    problem: str = ""
    """Why it ended in error, where the model's scores were numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """The result of a request."""

    tokens: Sequence[int]
    """Generated ones, an end-of-sequence token included."""
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    likelihoods: Sequence[Likelihood] = ()
    problem: str = ""
    """Why it ended in error, where the model's scores were numbers."""


class Handle:
    """A request on its way. Iterating (`for`, `async for`) gives its events, `await` its completion."""

    def __init__(self, number: int, prompt_tokens: int, cancel: Callable[[int], None]) -> None:
        self.number, self.prompt_tokens = number, prompt_tokens
        self._cancel = cancel
        self._changed = threading.Condition()
        self._events: list[TokenEvent] = []
        self._error: BaseException | None = None
        self._listeners: list[Callable[[], None]] = []

    @property
    def done(self) -> bool:
        """Whether it has ended, well or badly."""
        return self._error is not None or (bool(self._events) and self._events[-1].finish_reason is not None)

    def cancel(self) -> None:
        """Nobody wants more of it: it ends within a pass, and keeps what it has come to."""
        if not self.done:
            self._cancel(self.number)

    def result(self, timeout_s: float | None = None) -> Completion:
        """Wait for its end. Raises TimeoutError, and the error with which the model failed, if it did."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.done, timeout_s):
                raise TimeoutError(f"no result within {timeout_s} s")
            if self._error is not None:
                raise self._error
            events = self._events
        last = events[-1].finish_reason
        assert last is not None
        return Completion(
            tokens=[token for event in events for token in event.tokens],
            text="".join(event.text for event in events),
            finish_reason=last,
            prompt_tokens=self.prompt_tokens,
            likelihoods=[one for event in events for one in event.likelihoods],
            problem=events[-1].problem,
        )

    def when_changed(self, listener: Callable[[], None]) -> None:
        """Call `listener` at each event and at the end, from whatever thread; at once, if there was something."""
        with self._changed:
            self._listeners.append(listener)
            now = bool(self._events) or self.done
        if now:
            listener()

    def forget(self, listener: Callable[[], None]) -> None:
        """Call it no more."""
        with self._changed:
            self._listeners.remove(listener)

    def heard(self, event: TokenEvent) -> None:
        """The service's: there is more."""
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()
            listeners = tuple(self._listeners)
        for listener in listeners:
            listener()

    def failed(self, error: BaseException) -> None:
        """The service's: there will be no more, for this reason."""
        with self._changed:
            if self.done:
                return
            self._error = error
            self._changed.notify_all()
            listeners = tuple(self._listeners)
        for listener in listeners:
            listener()

    def _at(self, place: int) -> TokenEvent | None:
        """The event at `place`; None where the end came before it. To be called when there is one of the two."""
        if place < len(self._events):
            return self._events[place]
        if self._error is not None:
            raise self._error
        return None

    def _has(self, place: int) -> bool:
        return place < len(self._events) or self.done

    def __iter__(self) -> Iterator[TokenEvent]:
        place = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda at=place: self._has(at))  # type: ignore[misc]
                event = self._at(place)
            if event is None:
                return
            yield event
            place += 1

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop is over, and nobody waits
                loop.call_soon_threadsafe(changed.set)

        self.when_changed(wake)
        try:
            place = 0
            while True:
                while not self._has(place):
                    changed.clear()
                    if not self._has(place):
                        await changed.wait()
                event = self._at(place)
                if event is None:
                    return
                yield event
                place += 1
        finally:
            self.forget(wake)

    def __await__(self) -> Generator[None, None, Completion]:
        return self._wait().__await__()

    async def _wait(self) -> Completion:
        try:
            async for _ in self:
                pass
        except asyncio.CancelledError:
            self.cancel()
            raise
        return self.result()
