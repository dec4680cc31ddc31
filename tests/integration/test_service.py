"""One loaded model that takes requests as they come, on one rank and on two: tokens, order, scores and errors."""

from __future__ import annotations

import asyncio
import random
import re
import threading
import time
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from observers import Notes
from ranks import on_ranks
from serving import NEW_TOKENS, PROMPT_TOKENS, greedy, is_greedy, plain, serving, some_prompts
from small_models import PACKED_MODELS, RECURRENT_MODELS
from tiers import full, tiered

from zeroinf.distributed.control import Control
from zeroinf.errors import InputError, UsageError, ZeroinfError
from zeroinf.generation.row import Sampling
from zeroinf.model.cache_layout import PAGE_TOKENS
from zeroinf.model.inspect import find_blocks
from zeroinf.service.core import Asked, Service
from zeroinf.service.handles import Completion

REQUESTS = 200


@pytest.fixture(scope="module")
def folder(small_checkpoint: Callable[[str], Path]) -> Path:
    return small_checkpoint("llama")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return plain(folder, "llama")


SHARED = {"forward_tokens": 40, "prefix_pages": 8}
"""Packed forwards whose rows share what their prompts begin with."""


def storm(service: Service, count: int, seed: int) -> list[tuple[list[int], bool, Completion]]:
    """Requests at random times, of random lengths and priorities, half of which begin alike; every third is cancelled
    at some time. Of each its prompt, whether it was cancelled, and what came of it."""
    draw, found = random.Random(seed), []
    timers = []
    for number, prompt in enumerate(some_prompts(count, seed)):
        if number % 2 and len(prompt) > PAGE_TOKENS:
            prompt[:PAGE_TOKENS] = range(10, 10 + PAGE_TOKENS)
        handle = service.submit(
            prompt,
            greedy(draw.randint(1, NEW_TOKENS), ignore_eos=True),
            priority=draw.choice(("interactive", "batch")),
            stream=draw.random() < 0.5,
        )
        if number % 3 == 0:
            timers.append(threading.Timer(draw.uniform(0, 0.1), handle.cancel))
            timers[-1].start()
        found.append((prompt, number % 3 == 0, handle))
        time.sleep(draw.expovariate(500))
    for timer in timers:
        timer.join()
    return [(prompt, cancelled, handle.result(120)) for prompt, cancelled, handle in found]


def check(model: Any, found: Sequence[tuple[list[int], bool, Completion]]) -> None:
    """Every request has come back, with the tokens of plain transformers, as far as it went."""
    reasons = [completion.finish_reason for _, _, completion in found]
    assert all(reason == "length" for reason, (_, cancelled, _) in zip(reasons, found, strict=True) if not cancelled)
    assert "cancelled" in reasons
    assert all(is_greedy(model, prompt, completion.tokens) for prompt, _, completion in found)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("llama", {}),
        ("llama", SHARED),
        ("llama", {"on_host": True}),
        ("gemma2", {"rows": 3}),
        ("mamba", {}),
        ("t5", {"scored_tokens": 0}),
    ],
    ids=["pages", "packed, with shared prefixes", "host memory", "windows", "states", "encoder"],
)
def test_a_storm_of_requests_gives_every_one_its_tokens_and_all_room_back(
    name: str, changed: dict[str, Any], small_checkpoint: Callable[[str], Path]
) -> None:
    folder = small_checkpoint(name)
    with serving(folder, **changed) as service:
        found = storm(service, REQUESTS if name == "llama" else REQUESTS // 4, seed=1)
        service.drain()
        scheduler = service.model.scheduler
        assert scheduler.reserved_pages == 0
        assert scheduler.free_rows == scheduler.limits.rows
        assert (scheduler.counts.shared_tokens > 0) == ("prefix_pages" in changed)
    check(plain(folder, name), found)


@pytest.mark.parametrize("count", [REQUESTS, pytest.param(1000, marks=pytest.mark.full)])
@pytest.mark.parametrize(("fetch", "changed"), [("replicated", {}), ("partitioned", SHARED)])
def test_so_does_one_on_two_ranks_which_share_the_work(
    fetch: str, changed: dict[str, Any], count: int, folder: Path, model: Any
) -> None:
    def body(control: Control) -> Any:
        with serving(folder, control, fetch=fetch, **changed) as service:
            found = storm(service, count, seed=2) if control.world.is_main else None
            if not control.world.is_main:
                service.wait()
            passes, scheduler = service.model.engine.stats().passes, service.model.scheduler
            if control.world.is_main:
                service.drain()
                service.close()
            control.all_gather(None)
            return found, passes, scheduler.reserved_pages, scheduler.free_rows, scheduler.counts.prefill_columns

    ranks, _ = on_ranks(2, body, seconds=200)
    assert not [rank for rank in ranks if isinstance(rank, Exception)], ranks
    check(model, ranks[0][0])
    for _, _, pages, free, prefilled in ranks:
        assert (pages, free) == (0, 4)
        assert prefilled, "a rank had nothing to do"


def test_requests_that_are_submitted_together_enter_one_pass(folder: Path) -> None:
    with serving(folder, rows=4) as service:
        asked = [Asked([5, 6, number + 7], Sampling(max_new_tokens=6, ignore_eos=True)) for number in range(4)]
        handles = service.submit_all(asked, priority="batch")
        assert [len(handle.result(60).tokens) for handle in handles] == [6] * 4
        assert service.model.engine.stats().passes == 6
        with pytest.raises(InputError, match="no tokens"):
            service.submit_all([*asked, Asked([], asked[0].sampling)])
        service.drain()  # nothing of them was submitted
        assert service.model.engine.stats().passes == 6


def test_a_cancelled_row_makes_room_within_a_pass(folder: Path) -> None:
    with serving(folder, rows=1) as service:
        first = service.submit([5] * 4, greedy(NEW_TOKENS, ignore_eos=True), stream=True)
        second = service.submit([6] * 4, greedy(1), stream=True)
        events = iter(first)
        next(events)
        first.cancel()
        begun = service.model.engine.stats().passes
        assert second.result(60).finish_reason == "length"
        assert service.model.engine.stats().passes - begun <= 4
        assert first.result(60).finish_reason == "cancelled"
        assert len(first.result().tokens) < NEW_TOKENS


def test_interactive_requests_enter_before_all_batch_rows_that_wait(folder: Path) -> None:
    ended: list[str] = []
    with serving(folder, rows=2) as service:
        rows = [service.submit([7, 8], greedy(6, ignore_eos=True), priority="batch") for _ in range(20)]
        for handle in rows:
            handle.when_changed(lambda: ended.append("batch"))
        urgent = service.submit([9], greedy(6, ignore_eos=True))
        urgent.when_changed(lambda: ended.append("interactive"))
        service.drain()
    assert len(ended) == 21
    assert ended.index("interactive") <= 6


def test_the_same_seed_gives_the_same_text_whatever_runs_beside_it(folder: Path) -> None:
    sampling = Sampling(max_new_tokens=NEW_TOKENS, temperature=2.0, seed=7, ignore_eos=True)
    with serving(folder) as service:
        alone = service.submit([5, 6, 7], sampling).result(60)
        others = [
            service.submit(prompt, sampling, priority="batch", index=i) for i, prompt in enumerate(some_prompts(9))
        ]
        beside = service.submit([5, 6, 7], sampling).result(60)
        in_a_batch = service.submit([5, 6, 7], sampling, priority="batch", index=3).result(60)
        for handle in others:
            handle.result(60)
    assert beside.tokens == alone.tokens
    assert in_a_batch.tokens != alone.tokens, "a line of a batch draws numbers of its own"


@pytest.mark.parametrize("stop", [(), ("a", "xyz")])
def test_events_are_the_completion_in_pieces(stop: tuple[str, ...], folder: Path) -> None:
    async def read(service: Service) -> tuple[str, Completion]:
        sampling = Sampling(max_new_tokens=NEW_TOKENS, temperature=1.5, seed=3, stop=stop, logprobs=1)
        handle = service.submit([5, 6, 7], sampling, stream=True)
        texts = [event.text async for event in handle]
        return "".join(texts), await handle

    with serving(folder) as service:
        for _ in range(2):
            text, completion = asyncio.run(read(service))
            assert text == completion.text
            assert len(completion.likelihoods) == len(completion.tokens)
            if completion.finish_reason == "length":
                assert text == service.model.codec.decode(completion.tokens)


def all_likelihoods(model: Any, tokens: Sequence[int], start: int) -> torch.Tensor:
    """Log-probabilities of every token in the places from `start` on."""
    with torch.no_grad():
        logs: torch.Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0].log_softmax(-1)
    return logs[start - 1 : -1]


def likelihoods(model: Any, tokens: Sequence[int], start: int) -> torch.Tensor:
    """Log-probabilities of the tokens from `start` on."""
    return all_likelihoods(model, tokens, start).gather(1, torch.tensor(tokens[start:])[:, None])[:, 0]


@pytest.mark.parametrize("forward_tokens", [0, 40])
def test_scores_are_those_of_transformers_many_to_a_pass_and_beside_rows(
    forward_tokens: int, folder: Path, model: Any
) -> None:
    sequences = [(tokens, 1 + len(tokens) // 2) for tokens in some_prompts(40, seed=4) if len(tokens) > 2]
    with serving(folder, forward_tokens=forward_tokens) as service:
        beside = service.submit([5, 6], greedy(NEW_TOKENS, ignore_eos=True))
        before = service.model.engine.stats().passes
        found = [future.result(60) for future in service.score(sequences)]
        passes = service.model.engine.stats().passes - before
        assert is_greedy(model, [5, 6], beside.result(60).tokens)
    assert passes < len(sequences)
    for (tokens, start), scores in zip(sequences, found, strict=True):
        wanted = likelihoods(model, tokens, start)
        assert scores.logprobs == pytest.approx(wanted.tolist(), abs=1e-4)
        assert scores.is_greedy == is_greedy(model, tokens[:start], tokens[start:])
        likeliest = all_likelihoods(model, tokens, start).max(dim=-1)
        assert [token for token, _ in scores.likeliest] == likeliest.indices.tolist()
        assert [log for _, log in scores.likeliest] == pytest.approx(likeliest.values.tolist(), abs=1e-4)


PACKED_SCORES = [name for name in PACKED_MODELS if name not in RECURRENT_MODELS]


@pytest.mark.parametrize("name", tiered(PACKED_SCORES, ["llama", "gemma2", "gpt_oss", "qwen3_moe"]))
def test_continuations_share_what_they_follow(name: str, small_checkpoint: Callable[[str], Path]) -> None:
    folder, draw = small_checkpoint(name), random.Random(5)
    model = plain(folder, name)
    contexts = [tokens[: PROMPT_TOKENS // 2] for tokens in some_prompts(12, seed=6) if len(tokens) > 2]
    following = [
        [[draw.randrange(3, 250) for _ in range(draw.randint(1, 4))] for _ in range(number % 4)]
        for number in range(1, len(contexts) + 1)
    ]
    sequences = [
        (context, len(context) if after else len(context) - 1)
        for context, after in zip(contexts, following, strict=True)
    ]
    with serving(folder) as service:
        assert service.model.shares_scores
        found = [future.result(60) for future in service.score(sequences, following)]
    for (context, start), after, scores in zip(sequences, following, found, strict=True):
        texts = [(context, start), *(([*context, *each], len(context)) for each in after)]
        for (tokens, first), told in zip(texts, [scores, *scores.following], strict=True):
            wanted = likelihoods(model, tokens, first)
            assert told.logprobs == pytest.approx(wanted.tolist(), abs=1e-4)
            assert told.is_greedy == is_greedy(model, tokens[:first], tokens[first:])


@pytest.mark.parametrize("name", ["bloom", full("bamba")])
def test_padded_forwards_do_not_share_what_continuations_follow(
    name: str, small_checkpoint: Callable[[str], Path]
) -> None:
    folder = small_checkpoint(name)
    model = plain(folder, name)
    with serving(folder) as service:
        (scores,) = (future.result(60) for future in service.score([([5, 6, 7], 1)], [[[8], [9]]]))
        with pytest.raises(UsageError, match="scores of this model are computed in padded forwards"):
            service.score([([5, 6, 7], 3)], [[[8, 9]]])
    for last, told in zip((8, 9), scores.following, strict=True):
        *wanted, behind = likelihoods(model, [5, 6, 7, last], 1).tolist()
        assert scores.logprobs == pytest.approx(wanted, abs=1e-4)
        assert told.logprobs == pytest.approx([behind], abs=1e-4)


@pytest.mark.parametrize("fetch", ["replicated", "partitioned"])
def test_ranks_share_what_is_scored(fetch: str, folder: Path, model: Any) -> None:
    sequences = [(tokens, 1) for tokens in some_prompts(30, seed=5) if len(tokens) > 1]

    def body(control: Control) -> Any:
        with serving(folder, control, fetch=fetch) as service:
            if control.world.is_main:
                return [future.result(60).logprobs for future in service.score(sequences)]
            service.wait()
            return None

    ranks, _ = on_ranks(2, body, seconds=100)
    assert not isinstance(ranks[0], Exception), ranks
    for (tokens, start), logprobs in zip(sequences, ranks[0], strict=True):
        assert logprobs == pytest.approx(likelihoods(model, tokens, start).tolist(), abs=1e-4)


def break_down(service: Service, when: Callable[[tuple[int, ...]], bool]) -> list[tuple[int, ...]]:
    """Let a block run out of memory for inputs of such a shape; returns the shapes seen."""
    seen: list[tuple[int, ...]] = []

    def hook(module: Any, inputs: Any) -> None:
        seen.append(tuple(inputs[0].shape[:2]))
        if when(seen[-1]):
            raise torch.OutOfMemoryError("no memory, the test says")

    find_blocks(service.model.engine.model)[1][1].register_forward_pre_hook(hook)
    return seen


def test_passes_that_run_out_of_memory_go_on_in_halves(folder: Path, model: Any) -> None:
    notes = Notes()
    with serving(folder, notes=notes) as service:
        break_down(service, lambda shape: shape[0] > 1)
        prompts = some_prompts(9, seed=6)
        rows = [service.submit(prompt, greedy(5, ignore_eos=True)) for prompt in prompts]
        scored = service.score([(prompt, 1) for prompt in prompts if len(prompt) > 1])
        assert all(is_greedy(model, p, row.result(60).tokens) for p, row in zip(prompts, rows, strict=True))
        assert all(future.result(60).logprobs for future in scored)
    assert any("out of GPU memory, although the plan fits" in note for note in notes.notes)


def test_what_is_scored_after_a_lack_of_memory_is_scored_in_smaller_forwards(folder: Path, model: Any) -> None:
    most, notes = 15, Notes()
    with serving(folder, notes=notes) as service:
        seen = break_down(service, lambda shape: prod(shape) > most)
        for seed in (6, 7):
            sequences = [(tokens[:6], 1) for tokens in some_prompts(9, seed=seed) if len(tokens) > 1]
            failed = len([shape for shape in seen if prod(shape) > most])
            for (tokens, start), future in zip(sequences, service.score(sequences), strict=True):
                assert future.result(60).logprobs == pytest.approx(likelihoods(model, tokens, start).tolist(), abs=1e-4)
    assert failed  # and not again
    assert len([shape for shape in seen if prod(shape) > most]) == failed == len(notes.notes)
    assert re.search(r"48 tokens, \d+ where they are scored", notes.notes[-1])


def test_a_loop_that_fails_tells_everybody_who_waits_and_who_comes_later(folder: Path) -> None:
    with serving(folder) as service:
        break_down(service, lambda shape: True)
        handle = service.submit([5, 6], greedy(5))
        with pytest.raises(ZeroinfError, match="out of GPU memory with 1 row"):
            handle.result(60)
        with pytest.raises(ZeroinfError, match="out of GPU memory"):
            service.submit([5], greedy(1))
        with pytest.raises(ZeroinfError, match="out of GPU memory"):
            service.drain()


def test_scores_that_are_no_numbers_end_a_row_in_error_and_no_other(folder: Path) -> None:
    with serving(folder) as service:

        def spoil(module: Any, inputs: Any, output: Any) -> Any:
            bad = (inputs[0] == 42).any(dim=1)
            return torch.where(bad[:, None, None], float("nan"), output)

        service.model.engine.model.get_input_embeddings().register_forward_hook(spoil)
        good, bad = (service.submit([first, 5], greedy(3, ignore_eos=True)) for first in (4, 42))
        (scored,) = service.score([([42, 5, 6], 1)])
        assert (good.result(60).finish_reason, bad.result(60).finish_reason) == ("length", "error")
        assert not all(logprob == logprob for logprob in scored.result(60).logprobs)


def test_what_was_not_planned_for_is_refused_before_it_runs(folder: Path) -> None:
    with serving(folder) as service:
        for prompt, sampling, words in (
            ([], greedy(1), "no tokens"),
            ([5] * (PROMPT_TOKENS + 1), greedy(1), "a prompt of 25 tokens"),
            ([5], greedy(NEW_TOKENS + 1), "a completion of 13 tokens"),
        ):
            with pytest.raises(InputError, match=words):
                service.submit(prompt, sampling)
        with pytest.raises(InputError, match="scores from token 1 on, of 1"):
            service.score([([5], 1)])
    with pytest.raises(UsageError, match="closed"):
        service.submit([5], greedy(1))


def test_closing_cancels_what_has_not_ended(folder: Path) -> None:
    with serving(folder, rows=1) as service:
        handles = [service.submit([5, i], greedy(NEW_TOKENS, ignore_eos=True)) for i in range(3, 20)]
    reasons = [handle.result(1).finish_reason for handle in handles]
    assert reasons.count("cancelled") > 10
    assert "cancelled" in reasons[-1]
