"""Makes the result of a request of what the model completed."""

from __future__ import annotations

from zeroinf.service.handles import Completion
from zeroinf.service.requests import Request, Result, Work
from zeroinf.service.text import TextCodec


def result_of(request: Request | Work, found: Completion, codec: TextCodec) -> Result:
    """The result of `request`; log-probabilities are in it where it asks for them and has not failed."""
    has_logprobs = request.sampling.logprobs is not None and found.finish_reason != "error"
    return Result(
        index=request.index,
        id=request.id,
        prompt=request.text if isinstance(request, Work) else request.prompt,
        completion=found.text,
        finish_reason=found.finish_reason,
        prompt_tokens=found.prompt_tokens,
        completion_tokens=len(found.tokens),
        logprobs=list(map(codec.told, found.tokens, found.likelihoods)) if has_logprobs else None,
        extra=None if isinstance(request, Work) else request.extra,
        problem=found.problem or None,
    )
