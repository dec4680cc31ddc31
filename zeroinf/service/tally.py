"""Counts what came of the requests of a service."""

from __future__ import annotations

from dataclasses import dataclass

from zeroinf.service.request_queues import RequestEvent


@dataclass(slots=True)
class Tally:
    """What came of the requests of a service: those that were cancelled count by their tokens alone."""

    results: int = 0
    failed: int = 0
    cut: int = 0
    """Results that reached their most tokens."""
    cut_answers: int = 0
    """Those of them whose answer has a format, which it does not keep then."""
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, told: RequestEvent, prompt_tokens: int, *, has_format: bool) -> None:
        """Count an event of a request whose prompt has so many tokens, and whose answer may have a format."""
        self.completion_tokens += len(told.tokens)
        if told.finish_reason not in (None, "cancelled"):
            self.results += 1
            self.failed += told.finish_reason == "error"
            self.cut += told.finish_reason == "length"
            self.cut_answers += has_format and told.finish_reason == "length"
            self.prompt_tokens += prompt_tokens
