"""Observers of jobs for tests: they take the calls of the protocol, and no others.

A call that the protocol does not know ends in an error, as it would with the command line's observer.
"""

from __future__ import annotations

from zeroinf.service.observer import Observer


class Deaf(Observer):
    """An observer that does nothing."""


class Notes(Observer):
    """An observer that remembers notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)
