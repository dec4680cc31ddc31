"""Folders that last as long as a run: those of others that run are left alone, those of killed runs go."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from zeroinf.engines.scratch import ScratchFolder


def held_by_a_child(parent: Path) -> tuple[int, Path]:
    """A process that holds a folder, and waits; and the folder."""
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        folder = ScratchFolder(parent)
        (folder.path / "weights").write_text("live")
        os.write(writes, str(folder.path).encode())
        signal.pause()
    os.close(writes)
    with os.fdopen(reads) as pipe:
        return pid, Path(os.read(pipe.fileno(), 4096).decode())


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_what_another_run_holds_stays_and_what_a_killed_one_left_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever process numbers and host names say: of two containers neither sees the other's processes."""
    monkeypatch.setattr("psutil.pid_exists", lambda pid: False)
    living, live = held_by_a_child(tmp_path)
    killed, left = held_by_a_child(tmp_path)
    assert (live / "weights").is_file()
    end(killed)
    own = ScratchFolder(tmp_path)
    assert (live / "weights").read_text() == "live"
    assert not left.exists()
    end(living)
    own.remove()
    own.remove()
    assert list(tmp_path.iterdir()) == [live]
    ScratchFolder(tmp_path).remove()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_says_nothing_of_its_owner_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "zeroinf-swap-host-1-rank0-x").mkdir()
    ScratchFolder(tmp_path).remove()
    assert [folder.name for folder in tmp_path.iterdir()] == ["zeroinf-swap-host-1-rank0-x"]
