"""Refuses checkpoints that bring Python code of their own, unless the user trusts it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zeroinf.errors import ModelError


def own_code_error(location: str, named: Mapping[str, Any]) -> ModelError:
    """The error for `location`, whose code would run here.

    `named` is an `auto_map`: classes as `module.Class`, or `repository--module.Class`, one or several each.
    """
    classes = [
        one for value in named.values() for one in (value if isinstance(value, list | tuple) else [value]) if one
    ]
    parts = [one.rpartition("--") for one in classes]
    files = sorted({f"{module.partition('.')[0]}.py" + (f" of {other}" if other else "") for other, _, module in parts})
    return ModelError(
        f"{location} brings its own code, which would run here: {', '.join(files)}",
        hint="read that code, then pass --trust-remote-code",
    )
