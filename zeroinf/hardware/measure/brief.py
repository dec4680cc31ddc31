"""Measures the rates of a GPU that plans depend on most and that take a second, before a run is planned.

It does so in a process of its own, so that the run finds its GPU untouched. Run as a program, it is that process.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from zeroinf.hardware.machine import Gpu
from zeroinf.hardware.measure.children import run_children
from zeroinf.hardware.measure.gpu_rates import measure_hbm, measure_launch, measure_matmul


def measure_briefly(gpu: Gpu, dtype: str) -> dict[str, Any]:
    """Rates of `gpu` by their names in `Rates`: its memory, its matrix products in `dtype`, and a kernel's launch.

    Raises EnvironmentProblem where the process fails.
    """
    (found,) = run_children(__name__, [[str(gpu.index), dtype]])
    by_rows = {int(rows): tflops for rows, tflops in found["matmul_tflops"].items()}
    return {**found, "matmul_tflops": {dtype: by_rows}}


def _look(index: int, dtype: str) -> dict[str, Any]:
    import torch

    with torch.cuda.device(index), torch.inference_mode():
        return {"hbm_gbps": measure_hbm(), "matmul_tflops": measure_matmul(dtype), "launch_s": measure_launch()}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_look(int(sys.argv[1]), sys.argv[2])) + "\n")
