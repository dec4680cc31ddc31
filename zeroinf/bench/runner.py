"""Running cells: each is `zeroinf run` in a process of its own."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from zeroinf.bench.matrix import Cell, Settings
from zeroinf.bench.results import Outcome, Results, outcome_of
from zeroinf.errors import DoesNotFitError, UsageError
from zeroinf.generation.row import Sampling
from zeroinf.jobs.requests import Request
from zeroinf.jobs.text import TextCodec
from zeroinf.model.inspect import read_anatomy
from zeroinf.model.source import load_tokenizer, resolve_model

_OUT_OF_MEMORY = "out of GPU memory"
_MESSAGE_LINES = 3


def run_cells(
    cells: Sequence[Cell],
    settings: Settings,
    results: Results,
    *,
    done: Callable[[Outcome, Results], None],
    begins: Callable[[Cell, int], None],
    time_limit_s: float = math.inf,
) -> Results:
    """Run those of `cells` that `results` lacks; `done` is called after each, with all there is by then.

    A cell that fails has its failure as its value, and the next one runs. None begins after `time_limit_s`.
    """
    deadline = time.monotonic() + time_limit_s
    prompts: dict[tuple[str, int], str] = {}
    for number, cell in enumerate(cells):
        if results.of(cell) is not None:
            continue
        if time.monotonic() > deadline:
            break
        begins(cell, number)
        try:
            if settings.prompt is None and (cell.model, cell.input_len) not in prompts:
                prompts[cell.model, cell.input_len] = _prompt_of(cell, settings)
            outcome = run_cell(cell, settings, settings.prompt or prompts[cell.model, cell.input_len])
        except UsageError as error:
            outcome = Outcome(cell=cell, status="refused", message=error.message)
        results = results.with_outcome(outcome)
        done(outcome, results)
    return results


def run_cell(cell: Cell, settings: Settings, prompt: str) -> Outcome:
    """Run one cell and read its report."""
    with tempfile.TemporaryDirectory(prefix="zeroinf-bench-") as name:
        folder = Path(name)
        rows = cell.batch_size * (1 if cell.engine_name == "tensor-parallel" else cell.num_gpus)
        (folder / "in.jsonl").write_text((json.dumps({"prompt": prompt}) + "\n") * rows)
        environment = {**os.environ, **({"DS_ACCELERATOR": "cpu"} if settings.device == "cpu" else {})}
        process = subprocess.Popen(
            [sys.executable, "-m", "zeroinf", "run", *arguments(cell, settings, folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )
        try:
            _, said = process.communicate(timeout=settings.cell_limit_s)
        except subprocess.TimeoutExpired:
            _end(process)
            return Outcome(cell=cell, status="timeout", message=f"more than {settings.cell_limit_s:g} s")
        except BaseException:
            _end(process)
            raise
        if process.returncode == 0:
            return outcome_of(cell, json.loads((folder / "report.json").read_text()))
        return _failure(cell, process.returncode, said)


def arguments(cell: Cell, settings: Settings, folder: Path) -> list[str]:
    """What comes after `zeroinf run` for `cell`; input and report lie in `folder`."""
    engine, _, fetch = cell.engine.partition("/")
    words = ["-q", "--benchmark", "-r", settings.repetitions, "-m", cell.model, "--dtype", settings.dtype]
    words += ["--engine", engine, "--offload", cell.offload, "-b", cell.batch_size, "--ignore-eos"]
    words += ["--max-new-tokens", cell.output_len, "-i", folder / "in.jsonl", "-o", folder / "out.jsonl"]
    words += ["--report", folder / "report.json"]
    if cell.offload != "none" and engine in ("stream", "accelerate"):
        words += ["--resident-blocks", settings.resident_blocks]
    words += ["--fetch", fetch] if fetch else []
    words += ["--num-gpus", cell.num_gpus] if cell.num_gpus > 1 else []
    words += ["--random-weights"] if settings.random_weights else []
    words += ["--trust-remote-code"] if settings.trust_remote_code else []
    words += ["--gpu-memory", settings.gpu_memory_bytes] if settings.gpu_memory_bytes else []
    if cell.offload == "nvme":
        several = settings.nvme_paths if engine == "stream" else settings.nvme_paths[:1]
        words += [word for path in several for word in ("--nvme-path", path)]
    return [str(word) for word in words]


def _end(process: subprocess.Popen[str]) -> None:
    """The run and its ranks: all are in its session."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            continue


def _failure(cell: Cell, code: int, said: str) -> Outcome:
    lines = [line for line in said.strip().splitlines() if line.strip()]
    told = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), None)
    message = told or " / ".join(lines[-_MESSAGE_LINES:])
    if _OUT_OF_MEMORY in said or "OutOfMemoryError" in said:
        return Outcome(cell=cell, status="out of memory", message=message)
    status = {DoesNotFitError.exit_code: "does not fit", UsageError.exit_code: "refused"}.get(code, "failed")
    return Outcome(cell=cell, status=status, message=message or f"exit code {code}")


def _prompt_of(cell: Cell, settings: Settings) -> str:
    """A text of `cell.input_len` tokens, or of nearly as many where no text has just that."""
    source = resolve_model(
        cell.model, trust_remote_code=settings.trust_remote_code, random_weights=settings.random_weights
    )
    codec = TextCodec(load_tokenizer(source), read_anatomy(source.config).vocabulary)

    def tokens(words: int) -> int:
        sampling = Sampling(max_new_tokens=1)
        text = _text(words)
        return len(codec.encode(Request(index=0, line=None, id="", prompt=text, messages=None, sampling=sampling)))

    low, high = 1, max(2, cell.input_len)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if tokens(middle) <= cell.input_len else (low, middle - 1)
    return _text(low)


def _text(words: int) -> str:
    return "a" + " a" * (words - 1)
