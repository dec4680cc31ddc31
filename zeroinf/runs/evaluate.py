"""Evaluates how well a model predicts a text (perplexity), with the same plan and engine as a run: the quality cost of
a wire format.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from zeroinf.distributed.world import World
from zeroinf.errors import DoesNotFitError, InputError, UsageError, ZeroinfError
from zeroinf.hardware.snapshot import read_machine
from zeroinf.model.anatomy import Anatomy
from zeroinf.model.tokenizer import load_tokenizer
from zeroinf.options.model import anatomy_of, source_of
from zeroinf.options.options import RunOptions
from zeroinf.planner.memory import scores_bytes
from zeroinf.planner.plan import Plan
from zeroinf.planner.workload import Lengths
from zeroinf.runs.session import Session
from zeroinf.service.observer import Observer, Progress, rate
from zeroinf.service.requests import NOT_NUMBERS, NOT_NUMBERS_HINT
from zeroinf.service.text import TextCodec
from zeroinf.sizes import gib, limit_of

_WINDOW = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """A text, as predicted by a model. Times in seconds."""

    plan: Plan
    window: int
    """Tokens of one forward: what a token can see is at most as long."""
    text_bytes: int
    tokens: int
    """Those that were predicted."""
    nats: float
    """The sum of the negative logarithms of their probabilities."""
    load_s: float
    evaluate_s: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Comparable between models, whatever their tokenizers."""
        return self.nats / math.log(2) / self.text_bytes

    @property
    def tokens_per_second(self) -> float:
        return rate(self.tokens, self.evaluate_s)

    def to_json(self) -> dict[str, Any]:
        """Every figure. `schema` changes when a name or a meaning does."""
        planned = ("engine", "offload", "wire", "dtype", "device", "resident_blocks", "nvme_blocks")
        own = ("window", "text_bytes", "tokens", "perplexity", "bits_per_byte", "load_s", "evaluate_s")
        rates = ("tokens_per_second",)
        return {
            "schema": 1,
            "architecture": self.plan.anatomy.architecture,
            **{name: getattr(self.plan, name) for name in planned},
            **{name: getattr(self, name) for name in (*own, *rates)},
        }


def evaluate(
    options: RunOptions, text: Path, window: int | None, device: torch.device, observer: Observer
) -> Evaluation:
    """Let the model of `options` predict the file `text` (UTF-8) in windows of `window` tokens (None: the usual).

    Windows overlap by what the first token of each needs to be predicted. Raises InputError for a text that cannot be
    read, UsageError for a window that the model cannot take, ZeroinfError where the model's scores are not numbers, and
    whatever planning and loading raise.
    """
    content = _read(text)
    observer.doing("reading the model")
    source = source_of(options, device.type)
    tokenizer = load_tokenizer(source)
    assert tokenizer is not None  # only random weights come without one
    anatomy = anatomy_of(options, source, device.type)
    if anatomy.encoder is not None:
        raise UsageError(
            f"{anatomy.architecture} has an encoder: perplexity needs a decoder-only model",
            hint="choose a decoder-only model",
        )
    limit = anatomy.context_limit or sys.maxsize
    if window is not None and window > limit:
        raise UsageError(f"--window {window}, but the model's context is {limit}", hint="shorten it")
    window = window or min(_WINDOW, limit)
    lead = tokenizer("")["input_ids"]
    windows = list(cut(tokenizer(content, add_special_tokens=False)["input_ids"], lead, window))
    if not windows:
        raise InputError(f"{text} holds too few tokens to predict one")
    try:
        TextCodec(tokenizer, anatomy).check([max(one) for one in windows])
    except ValueError as error:
        raise InputError(f"cannot predict {text}: {error}") from error
    longest, predicted = max(map(len, windows)), sum(len(one) - max(1, len(lead)) for one in windows)
    _check_scores_fit(options, anatomy, longest, device)
    lengths = Lengths(prompt_tokens=longest, new_tokens=1, padded=False, whole=True, scored_tokens=longest)
    mean = predicted / len(windows)
    with Session(
        options, source, anatomy, lengths, len(windows), World(), device, observer,
        timed=lambda plan: _timed_by_windows(plan, mean * (plan.prefill_tokens // longest)),
    ) as session:  # fmt: skip
        loaded = time.perf_counter()
        nats = sum(_nats_of_all(session, windows, max(1, len(lead)), observer))
        return Evaluation(
            plan=session.plan,
            window=window,
            text_bytes=len(content.encode()),
            tokens=predicted,
            nats=nats,
            load_s=session.model.load_s,
            evaluate_s=time.perf_counter() - loaded,
        )


def _timed_by_windows(plan: Plan, tokens: float) -> Plan:
    """The plan with the rate of an evaluation: `tokens` predicted a pass, where a run generates one."""
    if plan.timing is None or not plan.timing.prefill_s:
        return plan
    return replace(plan, timing=replace(plan.timing, tokens_per_second=tokens / plan.timing.prefill_s))


def cut(tokens: Sequence[int], lead: Sequence[int], window: int) -> Iterator[list[int]]:
    """Windows of at most `window` tokens in which each of `tokens` is predicted once.

    Each begins with `lead`, what the tokenizer puts before any text; without one, it begins with the last token of the
    window before, and the first token of all is predicted by none.
    """
    step = window - max(1, len(lead))
    if step < 1:
        raise UsageError(f"--window {window} leaves no token to predict", hint="choose a longer one")
    for start in range(0 if lead else 1, len(tokens), step):
        yield [*(lead or tokens[start - 1 : start]), *tokens[start : start + step]]


def _read(text: Path) -> str:
    try:
        return text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {text}: {error}", hint="--text wants a UTF-8 file") from error


def _check_scores_fit(options: RunOptions, anatomy: Anatomy, window: int, device: torch.device) -> None:
    """Raise DoesNotFitError where the scores of a window, of which a run has only the last, alone take all there is."""
    machine = read_machine()
    if device.type == "cuda":
        where, free = "GPU memory", min(gpu.free_bytes for gpu in machine.gpus)
        asked = limit_of(options.gpu_memory, min(gpu.total_bytes for gpu in machine.gpus))
    else:
        where, free, asked = "host memory", machine.memory.available_bytes, options.host_memory
    limit, needed = min(asked or free, free), scores_bytes(anatomy, window)
    if needed >= limit:
        smaller = max(2, 2 ** int(math.log2(max(1, limit // (2 * scores_bytes(anatomy, 1))))))
        raise DoesNotFitError(
            f"scores of a window of {window} tokens, {anatomy.vocabulary} each, take {gib(needed)}; there "
            f"is {gib(limit)} of {where}",
            hint=f"--window {smaller} takes {gib(scores_bytes(anatomy, smaller))} for them",
        )


def _nats_of_all(session: Session, windows: Sequence[Sequence[int]], lead: int, observer: Observer) -> Iterator[float]:
    """Yield the nats of each window's tokens behind its `lead`, many windows to a pass."""
    started, tokens, engine = time.perf_counter(), 0, session.model.engine
    before = engine.stats().streamed_bytes
    scored = session.service.score([(window, lead) for window in windows])
    try:
        for done, future in enumerate(scored, start=1):
            nats = -math.fsum(future.result().logprobs)
            if not math.isfinite(nats):
                raise ZeroinfError(f"{NOT_NUMBERS}, in window {done} of {len(windows)}", hint=NOT_NUMBERS_HINT)
            yield nats
            tokens += len(windows[done - 1]) - lead
            observer.progress(
                Progress(
                    rows_done=done,
                    rows=len(windows),
                    tokens=tokens,
                    tokens_left=sum(len(one) - lead for one in windows[done:]),
                    elapsed_s=time.perf_counter() - started,
                    streamed_bytes=engine.stats().streamed_bytes - before,
                )
            )
    finally:
        observer.ended()
