"""What the benchmark scripts share: one cell is one `zeroinf run` in a process of its own."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import string
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_LETTERS = string.ascii_uppercase + string.punctuation  # none of them is a digit of a number


def show(**fields: Any) -> None:
    """One JSON object on a line of its own."""
    print(json.dumps(fields, separators=(",", ":")), flush=True)


def write_prompts(path: Path, count: int, tokens: int) -> None:
    """Requests for models without a tokenizer: a prompt's bytes are its tokens."""
    path.write_text(
        "".join(json.dumps({"prompt": prompt_of(number, tokens)}) + "\n" for number in range(count)), encoding="utf-8"
    )


def prompt_of(number: int, tokens: int) -> str:
    """A prompt of so many bytes that no other number has, from the first ones on: nothing of it is shared. Its letters
    are drawn, since tokens that are alike are routed to the same experts, and a GPU multiplies them in less time."""
    drawn = "".join(random.Random(number).choices(_LETTERS, k=tokens))
    return f"{number:x}{drawn}"[:tokens]


class Fresh:
    """Processes that have imported everything and do one piece of work each, with a CUDA context of their own.

    Importing takes longer than many a cell, and a model's modules ask the driver for GPUs, so that none can be forked
    from a process that has them. Hence processes start several at a time, and no work runs while they do.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._ready: deque[tuple[Any, Connection]] = deque()
        self._several = max(1, min(8, len(os.sched_getaffinity(0)) // 2))

    def __call__(
        self, work: Callable[..., dict[str, Any]], *arguments: Any, limit_s: float | None = None
    ) -> dict[str, Any]:
        """What `work` answers, or the `error` that ended it."""
        if not self._ready:
            self._start()
        process, connection = self._ready.popleft()
        connection.send((work, arguments))
        answer: dict[str, Any] = {"error": f"more than {limit_s or 0:.0f} s"}
        if connection.poll(limit_s):
            try:
                answer = connection.recv()
            except EOFError:
                answer = {"error": "died"}
        else:
            process.kill()
        process.join()
        return answer

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        for _ in range(self._several):
            here, there = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(there, self._model), daemon=True)
            process.start()
            there.close()
            self._ready.append((process, here))
        for _, connection in self._ready:
            connection.recv()


def _serve(connection: Connection, model: str) -> None:
    """Imports what planning needs, for `model` all of it, says so, and answers one piece of work."""
    with suppress(Exception):  # the work itself says what is wrong with the model
        _import_all(model)
    connection.send("ready")
    try:
        work, arguments = connection.recv()
    except EOFError:  # there was no work left
        return
    try:
        answer = work(*arguments)
    except BaseException:
        answer = {"error": traceback.format_exc()[-400:]}
    connection.send(answer)


def _import_all(model: str) -> None:
    import torch
    import transformers

    from zeroinf.model.inspect import read_anatomy
    from zeroinf.model.resolve import resolve_model
    from zeroinf.planner.workload import Lengths, Shape
    from zeroinf.simulation.workload import Simulator

    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // 2))
    transformers.logging.set_verbosity_error()
    config = resolve_model(model, random_weights=True).config
    simulate = Simulator(config, read_anatomy(config, dtype="bfloat16"), Lengths(prompt_tokens=8, new_tokens=2))
    simulate(Shape(2, 2, 16))


def run_report(options: Sequence[str], work: Path, *, limit_s: float, fresh: Fresh | None = None) -> dict[str, Any]:
    """The report of `zeroinf run` with `options` and `whole_s`; or `error`, and the exit `code` where there is one.

    In a `fresh` process its start and its imports are no part of the run.
    """
    report, words = work / "report.json", work / "stderr"
    command = ["zeroinf", "run", "-q", *options, "--report", str(report)]
    started = time.monotonic()
    answer = fresh(_command_line, command, words, limit_s=limit_s) if fresh else _started(command, words, limit_s)
    if "error" in answer:
        return answer
    if answer["code"]:
        return {"error": words.read_text().strip()[-300:], **answer}
    return {**json.loads(report.read_text()), "whole_s": time.monotonic() - started}


def _started(command: Sequence[str], words: Path, limit_s: float) -> dict[str, Any]:
    try:
        with words.open("w", encoding="utf-8") as file:
            python = [sys.executable, "-W", "ignore", "-m", *command]
            return {"code": subprocess.run(python, stdout=file, stderr=file, timeout=limit_s).returncode}
    except subprocess.TimeoutExpired:
        return {"error": f"more than {limit_s:.0f} s"}


def _command_line(command: Sequence[str], words: Path) -> dict[str, Any]:
    from zeroinf.cli.main import main

    descriptor = os.open(words, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = [*command]
    try:
        main()
    except SystemExit as end:
        return {"code": end.code}


def passes(report: dict[str, Any]) -> int:
    """Walks over the blocks in the measured part of a run."""
    return max(int(rank["passes"]) for rank in report["ranks"])
