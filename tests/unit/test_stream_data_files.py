"""A store's data files under many readers at once."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from zeroinf.engines.stream.data_files import THREADS, DataFiles
from zeroinf.engines.stream.store import FileRange, data_file


def test_no_more_reads_are_in_flight_than_serve_a_disk_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_file(tmp_path).write_bytes(bytes(range(64)))
    files, preadv, lock, running, most = DataFiles([tmp_path], direct=False), os.preadv, threading.Lock(), [0], [0]

    def watched(*arguments: Any) -> int:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.01)
        count = preadv(*arguments)
        with lock:
            running[0] -= 1
        return count

    monkeypatch.setattr(os, "preadv", watched)
    targets = [bytearray(1) for _ in range(64)]
    file_ranges = [FileRange(part=0, at=at, start=0, nbytes=1) for at in range(64)]
    with ThreadPoolExecutor(4 * THREADS) as pool:
        list(pool.map(files.read, file_ranges, map(memoryview, targets)))
    files.close()
    assert b"".join(targets) == bytes(range(64))
    assert most == [THREADS]
