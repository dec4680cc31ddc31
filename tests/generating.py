"""Rows run through the decode loop over plain transformers models, and what transformers itself makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial
from itertools import cycle
from typing import Any

import torch
from small_models import PAD

from zeroinf.distributed.control import Control
from zeroinf.distributed.world import World
from zeroinf.engines.base import EngineStats
from zeroinf.engines.stream.host_memory import HostMemory
from zeroinf.engines.stream.lockstep import LockStep
from zeroinf.generation.cache import PagePool
from zeroinf.generation.host_cache import HostCache
from zeroinf.generation.loop import Feed, generate
from zeroinf.generation.micro_batch import BatchState, TokenRules, breaks_at
from zeroinf.generation.pass_limits import Limits
from zeroinf.generation.row import Row, Sampling
from zeroinf.generation.scheduler import Scheduler
from zeroinf.model.anatomy import Anatomy
from zeroinf.model.cache_layout import HostSize, KvDtype, PoolSize
from zeroinf.model.inspect import find_blocks, read_anatomy

CPU = torch.device("cpu")


class PlainEngine:
    """A transformers model on this process alone, its micro-batches in lock-step; notes the shapes of each pass."""

    name = "plain"
    link_stream = None

    def __init__(self, model: Any, *, in_step: bool = False, shares_passes: bool = True) -> None:
        self.model, self.in_step, self.shares_passes = model, in_step, shares_passes
        self.passes: list[list[tuple[int, ...]]] = []
        self.asked: list[Mapping[str, Any]] = []
        self._lock_step = LockStep(list(find_blocks(model)[1]), lambda block: None, lambda block: None)

    def forward(self, micro_batches: Sequence[Mapping[str, Any]]) -> list[Any]:
        self.passes.append([tuple(inputs["input_ids"].shape) for inputs in micro_batches])
        self.asked += micro_batches
        with torch.inference_mode():
            return self._lock_step.run([partial(self.model, **inputs) for inputs in micro_batches])

    def recover(self) -> bool:
        return True

    def stats(self) -> EngineStats:
        return EngineStats(passes=len(self.passes), streamed_bytes_per_pass=0)

    def close(self) -> None: ...


@cache
def anatomy_of(model: Any) -> Anatomy:
    return read_anatomy(model.config, dtype=str(model.dtype).removeprefix("torch."))


def words(tokens: Sequence[int]) -> str:
    return " ".join(map(str, tokens))


def rows_of(prompts: Sequence[Sequence[int]], lengths: Sequence[int] | int, **sampling: Any) -> list[Row]:
    """A row for each prompt, with its own most new tokens or the same for all; the text of a token is its number."""
    most = [lengths] * len(prompts) if isinstance(lengths, int) else lengths
    return [
        Row(
            index=i,
            prompt=prompt,
            sampling=Sampling(max_new_tokens=new, **sampling),
            decode=words,
            piece=lambda token: f" {token}".encode(),
        )
        for i, (prompt, new) in enumerate(zip(prompts, most, strict=True))
    ]


def limits_of(model: Any, rows: Sequence[Row], /, *, shares_passes: bool = True, **given: Any) -> Limits:
    """Room for `rows` at once, all in one micro-batch, prompts in one pass, where `given` does not say else."""
    anatomy = anatomy_of(model)
    tokens = max(len(row.prompt) for row in rows) + max(row.sampling.max_new_tokens for row in rows)
    live = given.get("rows", len(rows))
    fields = {
        "rows": live,
        "pages": live * anatomy.row_pages(tokens),
        "micro_batch_rows": live,
        "prefill_tokens": live * tokens,
        "breaks_at": breaks_at(model.config),
        "together": not (anatomy.is_paged and (shares_passes or given.get("forward_tokens"))),
        "keeps_ended": not anatomy.is_paged,
        "whole": bool(anatomy.whole_because),
        "keeps_states": anatomy.mixers is not None,
        "evenly": anatomy.encoder is not None,
        "staged_tokens": tokens if given.get("cpu_rows") else 0,
    }
    return Limits(**{**fields, **given})


def desk_of(
    model: Any, rows: Sequence[Row], limits: Limits, pad: int = PAD, kv_dtype: KvDtype = "model", stream: Any = None
) -> BatchState:
    """Tokens and pages for as many of `rows` as `limits` says; memory that nobody has written is NaN."""
    tokens = max(len(row.prompt) for row in rows) + max(row.sampling.max_new_tokens for row in rows)
    pool = PagePool(
        model,
        anatomy_of(model),
        PoolSize(rows=limits.rows, tokens=tokens, pages=limits.pages, prefix_pages=limits.prefix_pages),
        model.device,
    )
    for states in pool._states:
        for memory in states:
            memory[1:] = float("nan")
    if pool.states is not None:
        pool.states._memory.fill_(255)
    host = host_of(model, tokens, limits, kv_dtype, stream) if limits.host_tokens else None
    return BatchState(model, TokenRules(model, pad, ()), pool, model.device, host)


def host_of(model: Any, tokens: int, limits: Limits, dtype: KvDtype, stream: Any) -> HostCache:
    """Room on the host, and staging full of NaN, for rows of up to `tokens` tokens."""
    rows = limits.rows if limits.together else limits.micro_batch_rows
    size = HostSize(
        tokens=limits.host_tokens,
        seen_columns=limits.staged_tokens or rows * tokens,
        new_columns=(max(limits.forward_tokens, tokens) if limits.runs_whole else limits.forward_tokens)
        or max(limits.prefill_tokens, rows * (tokens if limits.together else 1), tokens),
        dtype=dtype,
        cpu_rows=limits.cpu_rows,
        query_heads=model.config.get_text_config(decoder=True).num_attention_heads if limits.cpu_rows else 0,
    )
    on_gpu = model.device.type == "cuda"
    host = HostCache(model, anatomy_of(model), size, model.device, stream, pin=on_gpu)
    for memory in (host._host, *host.link._fetched._slots, *host.link._sent._slots):
        (memory.bytes if isinstance(memory, HostMemory) else memory).fill_(255)
    return host


def run_rows(
    engine: Any,
    rows: Sequence[Row],
    /,
    *,
    control: Control | None = None,
    draw: int | None = None,
    kv_dtype: KvDtype = "model",
    **given: Any,
) -> tuple[int, Scheduler]:
    """Generate all of `rows`, taken `draw` at a time; what is `given` is a limit, or where rows come from and go to.

    Returns what `generate` does, and the scheduler.
    """
    feed = {name: given.pop(name) for name in tuple(given) if name in Feed.__slots__}
    left = [rows[start : start + (draw or len(rows))] for start in range(0, len(rows), draw or max(1, len(rows)))]
    feed = {"take": lambda: left.pop(0) if left else [], "done": lambda row: None, **feed}
    known = rows or rows_of([[1]], 1)
    limits = limits_of(engine.model, known, shares_passes=engine.shares_passes, **given)
    scheduler = Scheduler(limits, anatomy_of(engine.model).row_pages)
    batch_state = desk_of(engine.model, known, limits, kv_dtype=kv_dtype, stream=engine.link_stream)
    try:
        return generate(engine, control or Control(World(), "cpu"), batch_state, scheduler, Feed(**feed)), scheduler
    finally:
        if batch_state.host is not None:
            batch_state.host.close()


def greedy_by_transformers(model: Any, prompt: Sequence[int], tokens: Sequence[int]) -> list[int]:
    """What plain transformers chooses after `prompt` and each of `tokens` but the last: the row alone, no cache."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *tokens[:-1]]], device=model.device), use_cache=False).logits
    return logits[0, len(prompt) - 1 :].argmax(-1).tolist()


def put_into_slots(model: Any, slots: int) -> None:
    """Let weights of blocks come into so many slots in turn, as those that stream, and be lost behind each block."""
    blocks = list(find_blocks(model)[1])
    own = [{name: each.data.clone() for name, each in block.named_parameters()} for block in blocks]
    turns = cycle([{name: torch.empty_like(each) for name, each in own[0].items()} for _ in range(slots)])

    def fill(block: Any, tensors: dict[str, torch.Tensor]) -> None:
        for (name, parameter), slot in zip(block.named_parameters(), next(turns).values(), strict=True):
            parameter.data = slot.copy_(tensors[name])

    def lose(block: Any) -> None:
        for parameter in block.parameters():
            parameter.data.fill_(float("nan"))

    for block, tensors in zip(blocks, own, strict=True):
        block.register_forward_pre_hook(lambda block, inputs, tensors=tensors: fill(block, tensors))
        block.register_forward_hook(lambda block, inputs, output: lose(block))
