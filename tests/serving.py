"""Loaded models with a standing feed, from small checkpoints and plans made by hand: no simulation, no file."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from generating import CPU
from observers import Deaf, Notes
from small_models import auto_class

from zeroinf.distributed.control import Control
from zeroinf.distributed.world import World
from zeroinf.generation.row import Sampling
from zeroinf.model.cache_layout import HostSize
from zeroinf.model.inspect import read_anatomy
from zeroinf.model.resolve import resolve_model
from zeroinf.planner.plan import Plan
from zeroinf.service.core import Service
from zeroinf.service.loaded import LoadedModel

PROMPT_TOKENS, NEW_TOKENS = 24, 12


def plan_of(folder: Path, *, rows: int = 4, on_host: bool = False, **changed: Any) -> Plan:
    """A plan for `rows` rows at once of up to PROMPT_TOKENS and NEW_TOKENS tokens, two to a micro-batch."""
    anatomy = read_anatomy(resolve_model(str(folder)).config, dtype="float32")
    tokens = anatomy.row_tokens(PROMPT_TOKENS, NEW_TOKENS)
    fields: dict[str, Any] = {
        "batch_size": rows,
        "micro_batch_rows": 2,
        "prefill_tokens": 2 * PROMPT_TOKENS,
        "pool_pages": rows * anatomy.row_pages(tokens),
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "scored_tokens": 2 * PROMPT_TOKENS,
    }
    if on_host:
        size = HostSize(tokens=rows * tokens, seen_columns=2 * tokens, new_columns=2 * PROMPT_TOKENS, dtype="model")
        fields |= {"pool_pages": 0, "host_rows": rows, "host": size}
    return Plan(
        anatomy=anatomy, engine="stream", offload="cpu", dtype="float32", device="cpu",
        **{"world_size": 1, **fields, **changed},
    )  # fmt: skip


@contextmanager
def serving(
    folder: Path, control: Control | None = None, notes: Notes | None = None, **changed: Any
) -> Iterator[Service]:
    """The service of the checkpoint in `folder` on this rank."""
    control = control or Control(World(), "cpu")
    plan = plan_of(folder, world_size=control.world.size, **changed)
    model = LoadedModel(plan, resolve_model(str(folder)), control, CPU, notes or Deaf())
    try:
        service = Service(model)
        try:
            yield service
        finally:
            service.close()
    finally:
        model.close()


def plain(folder: Path, name: str) -> Any:
    """transformers' own model."""
    return auto_class(name).from_pretrained(folder, dtype=torch.float32).eval()


def is_greedy(model: Any, prompt: Sequence[int], tokens: Sequence[int]) -> bool:
    """Whether plain transformers would choose each of `tokens`."""
    if not tokens:
        return True
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            given = {"max_new_tokens": len(tokens), "do_sample": False, "num_beams": 1, "eos_token_id": None}
            return bool(model.generate(torch.tensor([list(prompt)]), **given)[0, 1:].tolist() == list(tokens))
        logits = model(torch.tensor([[*prompt, *tokens[:-1]]]), use_cache=False).logits[0, len(prompt) - 1 :]
    return bool(logits.argmax(-1).tolist() == list(tokens))


def some_prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of random lengths and tokens."""
    draw = random.Random(seed)
    return [[draw.randrange(3, 250) for _ in range(draw.randint(1, PROMPT_TOKENS))] for _ in range(count)]


def greedy(tokens: int = NEW_TOKENS, **settings: Any) -> Sampling:
    return Sampling(max_new_tokens=tokens, **settings)
