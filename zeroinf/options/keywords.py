"""Tells who calls the Python API with a keyword of another program what zeroinf calls it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from zeroinf.errors import UsageError
from zeroinf.options.definition import definitions
from zeroinf.options.options import PlanOptions, RunOptions

_P = ParamSpec("_P")
_R = TypeVar("_R")


class KeywordError(UsageError, TypeError):
    """A keyword that a function does not have; its message says what it is called."""


def with_known_keywords(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """`function`, which raises KeywordError for a keyword that it does not have."""
    names = inspect.signature(function).parameters
    has_any = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in names.values())

    @functools.wraps(function)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        unknown = next((name for name in kwargs if name not in names), None)
        if unknown is not None and not has_any:
            raise _keyword_error(function.__name__, unknown, list(names))
        return function(*args, **kwargs)

    return checked


def _keyword_error(function: str, name: str, names: list[str]) -> KeywordError:
    from zeroinf.options.foreign import advice

    known = {each: each for each in names}
    for options in (PlanOptions, RunOptions):
        for one in definitions(options):
            plain = [flag.strip("-").replace("-", "_") for flag in one.flags]
            keyword = next((each for each in (*plain, one.path[-1], one.path[0]) if each in names), None)
            if keyword is not None:
                known |= {each: keyword for each in plain if len(each) > 1}
    hint = advice(name, known) or f"it has {', '.join(each for each in names if each != 'self')}"
    return KeywordError(f"{function}() has no keyword {name!r}: {hint}")
