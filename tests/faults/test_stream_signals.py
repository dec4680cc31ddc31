"""Runs that read from a store and are stopped or killed leave it whole, and the next run starts from it."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import has_results, run_zeroinf, started, wait_until
from tiers import full

from zeroinf.engines.stream.manage_stores import list_stores, verify_store
from zeroinf.engines.stream.store import open_store


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """More work than any test waits for."""
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"prompt {i}\n" for i in range(10_000)))
    return path


@pytest.mark.parametrize(
    ("number", "code", "ranks"), [full(signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 2), (signal.SIGKILL, None, 1)]
)
def test_a_run_that_is_stopped_leaves_a_sound_store_and_no_lock(
    number: int, code: int | None, ranks: int, many: Path, small_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    nvme, model = tmp_path / "nvme", str(small_checkpoint("llama"))
    nvme.mkdir()
    common = ["-m", model, "--offload", "nvme", "--nvme-path", str(nvme), "-b", "2", "--max-new-tokens", "12"]
    out = tmp_path / "out.jsonl"
    launcher = "none" if ranks == 1 else "num-gpus"
    with started([*common, "-i", str(many), "-o", str(out)], ranks=ranks, launcher=launcher) as process:
        wait_until(lambda: has_results(tmp_path / "out.jsonl", 2), process)
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
    if code is not None:
        assert process.returncode == code, err
        assert re.search(r"finished results? (is|are) saved in ", err)
    (summary,) = list_stores([nvme])
    store = open_store([nvme], summary.name)
    assert store is not None
    verify_store(store, lambda nbytes: None)
    done = run_zeroinf([*common, "--prompt", "next", "--report", str(tmp_path / "report.json")])
    assert done.code == 0, done.err
    assert "writing" not in done.err
    assert "waiting" not in done.err.partition("loaded in")[0]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["pinned_host_bytes"] == 0, "there is no GPU to lock memory for"
    for rank in report["ranks"]:
        assert rank["slot_bytes"] > 0
        assert rank["stalls"].keys() == {"link_s", "disk_s", "compute_s", "host_s", "between_s"}
        assert 0 <= rank["stalls"]["disk_s"] <= report["generate_s"]
