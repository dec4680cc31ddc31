"""Sets the clock of chat templates that ask for the date.

Relies on the name `datetime` in `transformers.utils.chat_template_utils`, of whose `now` templates get the date
(`strftime_now`), as it is in transformers 5.17 to 5.24. Without it, a job that is resumed on another day would render
other prompts. `tests/unit/test_compat.py` fails when it changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from types import SimpleNamespace


@contextmanager
def clock_at(now: float) -> Iterator[None]:
    """While it lasts, chat templates find the time `now` (seconds since 1970), in all threads."""
    from transformers.utils import chat_template_utils as templates

    clock = templates.datetime
    templates.datetime = SimpleNamespace(now=lambda: datetime.fromtimestamp(now))
    try:
        yield
    finally:
        templates.datetime = clock
