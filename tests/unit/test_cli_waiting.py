"""What takes seconds says so on a terminal, and nowhere else."""

from __future__ import annotations

import io

import pytest

from zeroinf.cli.waiting import waiting


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "quiet", "shown"),
    [(_Terminal(), False, True), (_Terminal(), True, False), (io.StringIO(), False, False)],
)
def test_words_are_for_terminals(
    stream: io.StringIO, quiet: bool, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", stream)
    with waiting("planning", quiet=quiet):
        pass
    assert ("planning" in stream.getvalue()) is shown
    assert shown or not stream.getvalue()
