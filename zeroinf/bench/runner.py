"""Runs benchmark cells, each as `zeroinf run` in a process of its own, and reads the report that it writes.

Input: cells and settings. Output: a `CellResult` for each: figures, or the reason why there are none.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from zeroinf.bench.matrix import BenchmarkSettings, Cell
from zeroinf.bench.prompt import prompt_of
from zeroinf.bench.results import CellResult, Results, cell_result_of
from zeroinf.engines.registry import descriptor_of
from zeroinf.errors import DoesNotFitError, InterruptedRunError, UsageError, ZeroinfError
from zeroinf.runs.interrupts import interrupted
from zeroinf.signals import STOP_SIGNALS

_OUT_OF_MEMORY = ("out of GPU memory", "OutOfMemoryError", "MemoryError", "can't allocate memory")
_STATUS = {DoesNotFitError.exit_code: "does not fit", UsageError.exit_code: "refused"}
_STOPPED = {128 + number: number for number in STOP_SIGNALS}
_MESSAGE_LINES = 3
_GRACE_S = 10.0
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def run_cells(
    cells: Sequence[Cell],
    settings: BenchmarkSettings,
    results: Results,
    *,
    done: Callable[[CellResult, Results], None],
    begins: Callable[[Cell, int], None],
    time_limit_s: float = math.inf,
) -> Results:
    """Run those of `cells` that `results` lacks; `done` is called after each, with all there is by then.

    A cell that fails has its failure as its value, and the next one runs. None begins after `time_limit_s`.
    """
    deadline = time.monotonic() + time_limit_s
    for number, cell in enumerate(cells):
        if results.of(cell) is not None:
            continue
        if time.monotonic() > deadline:
            break
        begins(cell, number)
        try:
            outcome = run_cell(cell, settings, prompt_of(cell, settings))
        except InterruptedRunError:
            raise
        except ZeroinfError as error:
            outcome = CellResult(cell=cell, status=_STATUS.get(error.exit_code, "failed"), message=error.message)
        results = results.with_outcome(outcome)
        done(outcome, results)
    return results


def _environment(settings: BenchmarkSettings) -> dict[str, str]:
    """The environment of a cell's process: the matrix says all options, and none comes from what is set for other
    runs."""
    own = {"DS_ACCELERATOR": "cpu"} if settings.device == "cpu" else {}
    return {name: value for name, value in os.environ.items() if not name.startswith("ZEROINF_RUN_")} | own


def run_cell(cell: Cell, settings: BenchmarkSettings, prompt: str) -> CellResult:
    """Run one cell and read its report. Raises InterruptedRunError where somebody else told the run to stop."""
    with tempfile.TemporaryDirectory(prefix="zeroinf-bench-") as name:
        folder = Path(name)
        rows = cell.batch_size * (1 if cell.engine_name == "tensor-parallel" else cell.num_gpus)
        (folder / "in.jsonl").write_text((json.dumps({"prompt": prompt}) + "\n") * rows)
        with (folder / "stderr").open("wb") as stderr:  # a pipe would be open as long as any rank lives
            process = subprocess.Popen(
                [sys.executable, "-m", "zeroinf", "run", *arguments(cell, settings, folder)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env=_environment(settings),
                start_new_session=True,
                preexec_fn=_stop_with_parent,
            )
        try:
            code = process.wait(timeout=settings.cell_limit_s)
        except subprocess.TimeoutExpired:
            return CellResult(cell=cell, status="timeout", message=f"more than {settings.cell_limit_s:g} s")
        finally:
            _end(process, folder)
        if code == 0:
            return cell_result_of(cell, json.loads((folder / "report.json").read_text()))
        if code in _STOPPED:
            raise interrupted(_STOPPED[code])
        return _failure(cell, code, (folder / "stderr").read_text(errors="replace"))


def arguments(cell: Cell, settings: BenchmarkSettings, folder: Path) -> list[str]:
    """Arguments of `zeroinf run` for `cell`; its input file and report are in `folder`."""
    engine, _, fetch = cell.engine.partition("/")
    words = ["-q", "--benchmark", "-r", settings.repetitions, "-m", cell.model, "--dtype", settings.dtype]
    words += ["--engine", engine, "--offload", cell.offload, "-b", cell.batch_size, "--ignore-eos"]
    words += ["--max-new-tokens", cell.output_len, "-i", folder / "in.jsonl", "-o", folder / "out.jsonl"]
    words += ["--report", folder / "report.json"]
    if cell.offload != "none" and engine in ("stream", "accelerate"):
        words += ["--resident-blocks", settings.resident_blocks]
    if "share_prefixes" in descriptor_of(engine).options:  # all sequences of a cell have the same prompt
        words.append("--no-share-prefixes")
    words += ["--fetch", fetch] if fetch else []
    words += ["--num-gpus", cell.num_gpus] if cell.num_gpus > 1 else []
    words += ["--random-weights"] if settings.random_weights else []
    words += ["--trust-remote-code"] if settings.trust_remote_code else []
    limit = settings.gpu_memory
    words += ["--gpu-memory", f"{limit}B" if isinstance(limit, int) else str(limit)] if limit is not None else []
    if cell.offload == "nvme":
        several = settings.nvme_paths if engine == "stream" else settings.nvme_paths[:1]
        words += [word for path in several for word in ("--nvme-path", path)]
    return [str(word) for word in words]


def _stop_with_parent() -> None:
    """In the child: SIGTERM once the benchmark is gone, however it went, so that its next call has the GPUs."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _end(process: subprocess.Popen[bytes], folder: Path) -> None:
    """The run and its ranks. A launcher begins sessions of its own; every command line names `folder`."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=_GRACE_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for other in psutil.process_iter(["cmdline"]):
        if any(str(folder) in word for word in other.info["cmdline"] or ()):
            with suppress(psutil.Error):
                other.kill()
    process.wait()


def _failure(cell: Cell, code: int, said: str) -> CellResult:
    lines = [line for line in said.strip().splitlines() if line.strip()]
    told = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), None)
    message = told or " / ".join(lines[-_MESSAGE_LINES:])
    if any(words in said for words in _OUT_OF_MEMORY):
        return CellResult(cell=cell, status="out of memory", message=message)
    if code < 0:
        name = signal.Signals(-code).name
        hint = ": the system kills what takes the last of the host memory" if -code == signal.SIGKILL else ""
        return CellResult(cell=cell, status="failed", message=f"killed by {name}{hint}")
    return CellResult(cell=cell, status=_STATUS.get(code, "failed"), message=message or f"exit code {code}")
