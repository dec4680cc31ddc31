"""Sets environment variables that libraries read, and restores them afterwards."""

from __future__ import annotations

import os
from collections.abc import Mapping


class Environment:
    """The variables as they are now, and what is set in them until `note`."""

    def __init__(self, changes: Mapping[str, str] | None = None) -> None:
        """`changes` are made at once."""
        self._before = dict(os.environ)
        self._set: dict[str, str] | None = None
        os.environ.update(changes or {})

    def note(self) -> None:
        """Whatever is set from now on is not ours."""
        self._set = {name: value for name, value in os.environ.items() if self._before.get(name) != value}

    def restore(self) -> None:
        """Take back what was set and not changed since."""
        if self._set is None:
            self.note()
        for name, value in (self._set or {}).items():
            if os.environ.get(name) != value:
                continue
            if name in self._before:
                os.environ[name] = self._before[name]
            else:
                del os.environ[name]
