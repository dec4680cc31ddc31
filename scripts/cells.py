"""What the benchmark scripts share: one cell is one `zeroinf run` in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def show(**fields: Any) -> None:
    """One JSON object on a line of its own."""
    print(json.dumps(fields, separators=(",", ":")), flush=True)


def write_prompts(path: Path, count: int, tokens: int) -> None:
    """Requests for models without a tokenizer: a prompt's bytes are its tokens."""
    path.write_text((json.dumps({"prompt": "x" * tokens}) + "\n") * count)


def run_report(options: Sequence[str], work: Path, *, limit_s: float) -> dict[str, Any]:
    """The report of `zeroinf run` with `options` and `whole_s`; or `error`, and the exit `code` where there is one."""
    report = work / "report.json"
    command = [sys.executable, "-W", "ignore", "-m", "zeroinf", "run", "-q", *options, "--report", str(report)]
    started = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return {"error": f"more than {limit_s:.0f} s"}
    if done.returncode:
        return {"error": done.stderr.strip()[-300:], "code": done.returncode}
    return {**json.loads(report.read_text()), "whole_s": time.monotonic() - started}


def passes(report: dict[str, Any]) -> int:
    """Walks over the blocks in the measured part of a run."""
    return max(int(rank["passes"]) for rank in report["ranks"])
