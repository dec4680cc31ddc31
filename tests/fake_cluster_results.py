"""Made-up results of requests, for nodes without a model. It imports no torch."""

from __future__ import annotations

import os

from zeroinf.service.requests import Result, Work

CHARACTERS = "FAKE_CHARACTERS"
"""The variable that says how long completions are; without it they are short."""


def result_of(work: Work) -> Result:
    """A made-up result that depends on the request alone. Nodes know neither ids nor texts."""
    most = work.sampling.max_new_tokens
    return Result(
        index=work.index,
        id="",
        prompt=None,
        completion=f"{sum(work.prompt)} é".ljust(int(os.environ.get(CHARACTERS, 0)), "x"),
        finish_reason="length",
        prompt_tokens=len(work.prompt),
        completion_tokens=most,
    )
