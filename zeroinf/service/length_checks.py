"""Refuses requests that are longer than a plan has memory for, or than the model's context."""

from __future__ import annotations

from zeroinf.errors import InputError, UsageError
from zeroinf.generation.row import Sampling
from zeroinf.planner.plan import Plan
from zeroinf.service.request_queues import QueuedRequest


def check_lengths(plan: Plan, prompt: int, sampling: Sampling) -> None:
    """Raise InputError for a prompt of so many tokens that could not be completed."""
    new = sampling.max_new_tokens
    if not prompt:
        raise InputError("the prompt holds no tokens", hint="give at least one")
    for name, tokens, planned in (
        ("prompt", prompt, plan.prompt_tokens),
        ("completion", new, plan.new_tokens),
    ):
        if tokens > planned:
            raise InputError(
                f"a {name} of {tokens} tokens, but the plan was made for up to {planned}",
                hint="make the pipeline with a larger max_prompt_tokens or max_new_tokens",
            )
    limit = plan.anatomy.context_limit
    if limit is not None and plan.anatomy.positions(prompt, new) > limit:
        raise InputError(
            f"a prompt of {prompt} tokens and {new} new ones, but the model's context holds {limit}",
            hint="shorten one of them",
        )


def check_scored(plan: Plan, asked: QueuedRequest, *, shares_scores: bool) -> None:
    """Raise InputError for a sequence to be scored that is longer than was planned for or has nothing to score, and
    UsageError where the plan has no memory for scores, or none of continuations of several tokens."""
    count, start = len(asked.tokens), asked.index
    if not 1 <= start < count + bool(asked.following):
        raise InputError(
            f"scores from token {start} on, of {count}", hint="start at 1 or later, and score at least one token"
        )
    if not all(asked.following):
        raise InputError("a continuation holds no tokens", hint="give at least one")
    if not shares_scores and any(len(each) > 1 for each in asked.following):
        raise UsageError(
            "continuations of several tokens do not share what they follow: "
            "scores of this model are computed in padded forwards",
            hint="score each with what it follows",
        )
    tokens, scored = asked.length, count - start + sum(map(len, asked.following))
    if not plan.scored_tokens:
        raise UsageError("the plan has no memory for scores", hint="plan with scored_tokens")
    if tokens > plan.prompt_tokens or scored > plan.scored_tokens:
        raise InputError(
            f"{scored} of {tokens} tokens to be scored, but the plan was made for up to "
            f"{plan.scored_tokens} of {plan.prompt_tokens}",
            hint="plan for longer ones",
        )
