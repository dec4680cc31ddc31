"""Runs of checkpoints in which one tensor was removed, renamed, cut or doubled, compared with plain transformers."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from driver import run_cell
from fake_job import exit_code, in_child
from matrix import plain_tokens
from mutations import cut, doubled, other_names, removed, renamed, rewritten
from safetensors.torch import load_file
from small_models import SEQ2SEQ_MODELS, auto_class, make_checkpoint
from test_seq2seq import NEW_TOKENS, by_transformers

from zeroinf.distributed.control import Control
from zeroinf.distributed.world import World
from zeroinf.errors import ModelError
from zeroinf.model.inspect import build_meta
from zeroinf.model.resolve import resolve_model

ENGINES = (("stream", "cpu"), ("stream", "nvme"), ("zero", "cpu"), ("accelerate", "nvme"), ("resident", "none"))
MUTATIONS = ("removed", "renamed", "cut", "doubled")
# Two batches, both padded.
PROMPTS = ("One", "A prompt of some length", "Two words", "x")
_BATCH_SIZE = 2


@dataclass
class Tally:
    """Of one family and mutation: checkpoints that were refused before anything was loaded, or by every engine; those
    with equal tokens in every engine; and what else came out."""

    refused: int = 0
    equal: int = 0
    other: list[str] = field(default_factory=list)


def sweep(name: str, scratch: Path) -> dict[str, Tally]:
    """Every mutation of the small model `name`, of one tensor of each kind, in every engine."""
    folder = make_checkpoint(name, scratch / "whole")
    model = build_meta(resolve_model(str(folder)).config, "float32")
    prefix, tied = model.base_model_prefix, dict(model.all_tied_weights_keys)
    tallies = {mutation: Tally() for mutation in MUTATIONS}
    for tensor in one_of_each_kind(folder):
        changes = [("removed", removed, ()), ("renamed", renamed, ()), ("cut", cut, ())]
        changes += [("doubled", doubled, (other,)) for other in other_names(tensor, prefix, tied)]
        for number, (mutation, change, more) in enumerate(changes):
            changed = rewritten(folder, scratch / f"{number}-{tensor}", lambda t: change(t, tensor, *more))  # noqa: B023
            _judge(name, changed, tallies[mutation], f"{name}, {tensor} {mutation} {' '.join(more)}")
    return tallies


def one_of_each_kind(folder: Path) -> list[str]:
    """Names of stored tensors, one for all that differ in numbers only: neither the first nor the last of them."""
    kinds: dict[str, list[str]] = {}
    for name in sorted(load_file(folder / "model.safetensors")):
        kinds.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    return [names[len(names) // 2] for names in kinds.values()]


def _judge(name: str, folder: Path, tally: Tally, what: str) -> None:
    with suppress(ModelError):
        resolve_model(str(folder))
        outcomes = run_all(name, folder)
        differing = [f"{what}: {'-'.join(engine)}: {found}" for engine, found in outcomes if found != "equal"]
        tally.other += differing
        tally.equal += not differing
        return
    tally.refused += 1


def run_all(name: str, folder: Path) -> Iterator[tuple[tuple[str, str], str]]:
    """For each engine "equal", or what came out instead."""
    wanted: list[list[int]] | None = None
    for engine in ENGINES[:2] if name in SEQ2SEQ_MODELS else ENGINES:
        found = run(folder, *engine)
        if "error" in found:
            yield engine, str(found["error"])
            continue
        wanted = wanted or _by_transformers(name, folder, found)
        yield engine, "equal" if found["tokens"] == wanted else "other tokens"


def run(folder: Path, engine: str, offload: str) -> dict[str, Any]:
    """Tokens in the order of the prompts, or an error, of a run in a process of its own."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        work, answer = Path(scratch), Path(scratch, "answer")
        cell = cell_of(folder, work, engine, offload)

        def body() -> int:
            try:
                found = run_cell(cell, World(), Control(World(), "cpu"))
                rows = [found["tokens"][index] for index in sorted(found["tokens"])]
                answer.write_text(json.dumps({**found, "tokens": rows}, default=str), encoding="utf-8")
            except Exception as error:
                answer.write_text(json.dumps({"error": f"{type(error).__name__}: {error}"}), encoding="utf-8")
            return 0

        exit_code(in_child(body))
        return dict(json.loads(answer.read_text(encoding="utf-8")))


def cell_of(folder: Path, work: Path, engine: str, offload: str) -> dict[str, Any]:
    """A run of the driver in float32, with its files in `work`."""
    (work / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return {
        "name": engine,
        "model": str(folder),
        "dtype": "float32",
        "parallel": {},
        "engine": engine,
        "fetch": "auto",
        "offload": offload,
        "nvme_path": str(work),
        "input": str(work / "prompts.txt"),
        "batch_size": _BATCH_SIZE,
        "max_new_tokens": NEW_TOKENS,
    }


def _by_transformers(name: str, folder: Path, found: dict[str, Any]) -> list[list[int]]:
    if name in SEQ2SEQ_MODELS:
        return by_transformers(name, folder, PROMPTS)
    model = auto_class(name).from_pretrained(folder, dtype=torch.float32).eval()
    return plain_tokens(model, found["prompts"], found["pad_token"], found["batch_size"], NEW_TOKENS)


def totals(tallies: dict[str, Tally]) -> Counter[str]:
    """Counts of one family over all mutations."""
    return Counter(
        refused=sum(tally.refused for tally in tallies.values()),
        equal=sum(tally.equal for tally in tallies.values()),
        other=sum(len(tally.other) for tally in tallies.values()),
    )
