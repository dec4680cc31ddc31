"""What DeepSpeed's engine says of the weights that cross the link is what its coordinator gathers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# Counts the bytes of every parameter that is gathered and does not stay, in the method that all fetches go through.
DRIVER = """
import json, sys
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator
from zeroinf.cli.main import main

name, gathered = "_PartitionedParameterCoordinator__all_gather_params_", [0]
plain = getattr(Coordinator, name)

def counting(self, params, *more, **how):
    gathered[0] += sum(p.ds_numel * p.element_size() for p in params if not p.ds_persist)
    return plain(self, params, *more, **how)

setattr(Coordinator, name, counting)
try:
    main()
finally:
    print(json.dumps({"gathered": gathered[0]}), file=sys.stderr)
"""


def test_a_weight_that_is_used_twice_crosses_twice(small_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    model = str(small_checkpoint("llama_tied"))
    how = ["run", "-m", model, "--engine", "zero", "--offload", "cpu", "--ignore-eos", "--report", str(report)]
    command = [sys.executable, "-c", DRIVER, *how, "--prompt", "Hello", "--max-new-tokens", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    gathered = json.loads(done.stderr.strip().splitlines()[-1])["gathered"]
    assert gathered == json.loads(report.read_text())["streamed_bytes"] > 0
