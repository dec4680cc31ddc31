"""Simulates the recurrent modules of a forward: the most memory that any of its calls takes, and their kernels.

Which calls a module gets depends on the prompts that happen to meet in a forward. Each call is limited, so the largest
ones that prompts of some length can come to stand for all of them where memory is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zeroinf.generation.states import CallLimits, Mixing
from zeroinf.model.mixers import hidden_of
from zeroinf.simulation.recorder import Recorder


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a recurrent module: so many rows, with so many tokens each."""

    rows: int
    tokens: int


def largest_calls(limits: CallLimits, prompt_tokens: int) -> list[Call]:
    """The calls of which one takes the most memory, where prompts have up to so many tokens."""
    most = min(limits.tokens, prompt_tokens) if limits.continues else prompt_tokens
    lengths = dict.fromkeys((most, min(most, limits.chunk_tokens)))
    return [Call(limits.rows_of(tokens), tokens) for tokens in lengths if tokens > 1]


class MixingOnPaper(Mixing):
    """Takes the memory of `calls` in each recurrent module, one after the other, and has the kernels of `timed`, each
    with how many times it is made."""

    def __init__(self, recorder: Recorder, calls: Sequence[Call], timed: Counter[Call], *of_forward: Any) -> None:
        super().__init__(*of_forward)
        self._recorder, self._calls, self._timed, self._total = recorder, calls, timed, of_forward[-1]

    def __call__(self, index: int, forward: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        hidden = hidden_of(args, kwargs)
        out: torch.Tensor | None = None

        def run(call: Call, part: torch.Tensor) -> torch.Tensor:
            with self._recorder.kernels_alone():
                seats = self.seats.new_empty(call.rows)
            return self.run(index, forward, args, kwargs, part, seats)

        with self._recorder.kernels_alone():
            for call, times in self._timed.items():
                part = hidden.new_empty(call.rows, call.tokens, hidden.shape[2])
                self._recorder.repeat(lambda call=call, part=part: run(call, part), times)  # type: ignore[misc]
        with self._recorder.memory_alone():
            for call in self._calls:
                found = run(call, self._part(hidden, call))
                if self._is_all(call):
                    return found.view(*hidden.shape[:2], -1)
                if out is None:
                    out = found.new_empty(self._total, found.shape[2])
                del found
        assert out is not None
        return out.view(*hidden.shape[:2], -1)

    def _is_all(self, call: Call) -> bool:
        """Whether the forward has no other call, and no padding."""
        return len(self._calls) == 1 and self.is_full and call.rows * call.tokens == self._total

    def _part(self, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        """The hidden states of a call: those of the forward, or a copy where several prompts may lie apart."""
        if call.rows > 1 and call.tokens > 1 and not self._is_all(call):
            return hidden.new_empty(call.rows, call.tokens, hidden.shape[2])
        with self._recorder.kernels_alone():
            return hidden.new_empty(call.rows, call.tokens, hidden.shape[2])
