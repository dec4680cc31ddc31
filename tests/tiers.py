"""The two tiers of tests: the default one, and the cells of large matrices that only `scripts/test --all` runs.

The latter carry the marker `full` (docs/contributing/testing.md). A run that leaves them out says how many they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest
from durations import cpu_seconds

_LEFT = pytest.StashKey[set[str]]()


def tiered(cells: Iterable[Any], default: Collection[Any]) -> list[Any]:
    """`cells` for `pytest.mark.parametrize`, those outside of `default` marked `full`.

    Raises ValueError where `default` names a cell that is not there.
    """
    cells = list(cells)
    if unknown := [cell for cell in default if cell not in cells]:
        raise ValueError(f"no such cells: {unknown}")
    return [cell if cell in default else full(*(cell if isinstance(cell, tuple) else (cell,))) for cell in cells]


def full(*cell: Any) -> Any:
    """The parameters `cell` of one test, marked `full`."""
    return pytest.param(*cell, marks=pytest.mark.full)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_LEFT] = set()


def pytest_deselected(items: list[pytest.Item]) -> None:
    left = {item.nodeid for item in items if item.get_closest_marker("full")}
    if items:
        items[0].config.stash[_LEFT] |= left


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left"] = sorted(session.config.stash[_LEFT])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker of pytest-xdist has ended."""
    node.config.stash[_LEFT] |= set(getattr(node, "workeroutput", {}).get("left", ()))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if left := config.stash[_LEFT]:
        minutes = cpu_seconds(left) / 60
        terminalreporter.write_line(f"left for scripts/test --all: {len(left)} tests, about {minutes:.0f} CPU minutes")
