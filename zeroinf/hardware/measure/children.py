"""Runs measurements that need a fresh process: each is a module of this package that prints one JSON object."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from zeroinf.errors import EnvironmentProblem

_PATIENCE_S = 120.0


def run_children(module: str, arguments: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Run `python -m module` once for each list of arguments, all at once; what each printed, in that order.

    Raises EnvironmentProblem when one fails or they take longer than two minutes; none is left running.
    """
    children = [
        subprocess.Popen(
            [sys.executable, "-m", module, *own], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for own in arguments
    ]
    try:
        return [_answer(child) for child in children]
    except subprocess.TimeoutExpired:
        raise EnvironmentProblem(f"{module} did not end within {_PATIENCE_S:g} s") from None
    finally:
        for child in children:
            child.kill()
            child.communicate()


def _answer(child: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = child.communicate(timeout=_PATIENCE_S)
    if child.returncode:
        last = (err.strip().splitlines() or ["it said nothing"])[-1]
        raise EnvironmentProblem(f"a measuring process ended with {child.returncode}: {last}")
    answer: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return answer
