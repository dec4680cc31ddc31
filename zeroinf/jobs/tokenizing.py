"""Tokenizes the entries of an input, and says what a plan has to know of them: lengths, sampling, shared prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from zeroinf.jobs.fingerprint import ListDigest, request_value
from zeroinf.jobs.matching import prompt_digest
from zeroinf.jobs.readers import InputRequests
from zeroinf.jobs.spool import Spool
from zeroinf.jobs.work_list import FORMATTED, SAMPLED, WEIGHED, WorkList
from zeroinf.model.anatomy import Anatomy
from zeroinf.planner.prefixes import PrefixGroups
from zeroinf.planner.workload import Lengths
from zeroinf.service.requests import Refusal, Request, Work
from zeroinf.service.text import TextCodec

_PART = 4096
"""Entries that are in memory, and tokenized, together."""


@dataclass(frozen=True, slots=True)
class TokenizedInput:
    """Requests that became work and those that could not, each by rising indices."""

    work: WorkList
    refusals: Spool[Refusal]
    prompts: str
    """The digest of all prompts as they were written."""
    plain: int
    """Prompts that are no chats."""


def tokenize(
    entries: InputRequests, codec: TextCodec, cannot_sample: str | None, folder: Path | None, *, keeps_text: bool
) -> TokenizedInput:
    """Tokenize `entries` part by part: there may be more of them than memory has room for. They are kept in `folder`.

    `cannot_sample` is why sampled requests are refused, if they are.
    """
    work, refusals, prompts, plain = WorkList(folder), Spool[Refusal](folder), ListDigest(), 0
    following = iter(entries)
    while part := list(islice(following, _PART)):
        tokens = codec.encode_all([entry for entry in part if isinstance(entry, Request)])
        for entry in part:
            if isinstance(entry, Refusal):
                refusals.append(entry)
                continue
            found = next(tokens)
            prompts.add(request_value(entry))
            plain += entry.prompt is not None
            if isinstance(found, list) and cannot_sample is not None and not entry.sampling.is_greedy:
                found = ValueError(cannot_sample)
            if isinstance(found, ValueError):
                refusals.append(Refusal.of(entry, str(found)))
                continue
            text = _text(entry, found, codec)
            item = Work(
                index=entry.index,
                line=entry.line,
                file=entry.file,
                id=entry.id,
                text=text if keeps_text or (entry.extra is not None and entry.extra.echo) else None,
                prompt=found,
                sampling=entry.sampling,
                digest=prompt_digest(text, found),
            )
            work.append(item, entry.extra)
    return TokenizedInput(work, refusals, prompts.digest(), plain)


def _text(request: Request, prompt: Sequence[int], codec: TextCodec) -> str | None:
    """A prompt as it is shown and known again: as it was written, unless it came as tokens or was cut."""
    whole = request.tokens is None and request.truncate is None
    return request.prompt if whole or request.messages is not None else codec.decode_all(prompt)


def lengths_of(anatomy: Anatomy, work: WorkList, groups: PrefixGroups | None = None) -> Lengths:
    """The lengths that are planned for: those of `work`, what its sampling takes, and what its prompts share by
    `groups`."""
    rows = work.lengths
    return replace(
        Lengths.of(anatomy, rows, work.most_logprobs),
        prefixes=None if groups is None else groups.shared(anatomy, rows),
        sampled=work.any(SAMPLED),
        penalized=work.any(WEIGHED),
        structured=work.any(FORMATTED),
    )


def groups_of(work: WorkList) -> PrefixGroups:
    """`work` in groups that begin alike."""
    return PrefixGroups(work.prompts)
