"""Says for which lengths of prompts and completions memory is planned where requests come later."""

from __future__ import annotations

from zeroinf.errors import UsageError
from zeroinf.model.anatomy import Anatomy
from zeroinf.options.contradictions import check_max_model_len
from zeroinf.planner.workload import Lengths


def planned_lengths(
    anatomy: Anatomy,
    *,
    prompt_tokens: int | None,
    most_prompt_tokens: int,
    new_tokens: int,
    logprobs: int | None,
    rows: int | None = None,
    scores_prompts: bool = False,
    max_model_len: int | None = None,
) -> Lengths:
    """Lengths for prompts of `prompt_tokens`; None: of `most_prompt_tokens`, or what the model's context holds beside
    `new_tokens` new ones. With `rows`, so many of the longest have room at once; else as many of each length. With
    `scores_prompts`, all tokens of a prompt may be scored.

    Raises UsageError where no prompt has room, or the context holds less than `max_model_len`.
    """
    check_max_model_len(max_model_len, anatomy)
    limit = anatomy.context_limit
    room = most_prompt_tokens if limit is None else min(most_prompt_tokens, limit - new_tokens)
    if (prompt_tokens or room) < 1:
        raise UsageError(
            f"--max-new-tokens {new_tokens}, and the model's context holds {limit}: no prompt has room beside them",
            hint="lower it",
        )
    return Lengths.up_to(
        anatomy,
        prompt_tokens or room,
        new_tokens,
        rows=rows,
        logprobs=logprobs,
        sampled=True,
        penalized=True,
        structured=True,
        scored_tokens=(prompt_tokens or room) if scores_prompts else 0,
    )
