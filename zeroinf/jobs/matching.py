"""Matches results of an earlier run with the requests of a changed job: a result is kept if its request is still there,
at any position.

A request is matched by its prompt and its id. Ids that the input does not give are line numbers, which change when a
line is inserted; such requests are matched by their prompts alone, equal prompts in the order of the input.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence

from zeroinf.jobs.journal import Runs
from zeroinf.service.requests import Work

_DIGEST_BYTES = 8
_COUNTED = re.compile(r"request-\d+(-\d+)?")


def request_digest(work: Work) -> str:
    """Digest of a prompt as it was written; of its tokens where it came as messages."""
    return work.digest or prompt_digest(work.text, work.prompt)


def prompt_digest(text: str | None, tokens: Sequence[int]) -> str:
    """The digest of a prompt that was written as `text`, or of messages."""
    prompt = json.dumps(list(tokens) if text is None else text)
    return hashlib.blake2b(prompt.encode(), digest_size=_DIGEST_BYTES).hexdigest()


def kept_results(results: Iterable[tuple[int, str, str]], work: Iterable[Work]) -> Runs:
    """The positions of `results` (index, id and digest of their requests, in the order of indices) in `work`."""
    places: defaultdict[tuple[str, str], deque[int]] = defaultdict(deque)
    for index, request_id, digest in results:
        places[_known_by(request_id), digest].append(index)
    runs: list[list[int]] = []
    for item in work:
        found = places.get((_known_by(item.id), request_digest(item)))
        if not found:
            continue
        then = found.popleft()
        if runs and (then, item.index) == (runs[-1][0] + runs[-1][2], runs[-1][1] + runs[-1][2]):
            runs[-1][2] += 1
        else:
            runs.append([then, item.index, 1])
    return runs


def _known_by(request_id: str) -> str:
    return "" if _COUNTED.fullmatch(request_id) else request_id
