"""Rows that run one forward together, with their cache."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationMixin, LogitsProcessorList

from zeroinf.generation.cache import CachePool
from zeroinf.generation.row import Row
from zeroinf.generation.sampling import choose_tokens, to_device


class TokenRules:
    """What a model's generation config says about tokens: which end a row, which pads, which scores are altered."""

    def __init__(self, model: Any, pad_token: int | None, eos_tokens: Sequence[int]) -> None:
        config = model.generation_config
        listed = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        self.eos_tokens = frozenset(t for t in (*listed, *eos_tokens) if t is not None)
        self.pad_token = next((t for t in (pad_token, *sorted(self.eos_tokens)) if t is not None), 0)
        self._model = model
        self._config = copy.deepcopy(config)
        self._config.do_sample = False
        self._config.min_new_tokens = self._config.min_length = None

    def may_end_early(self, row: Row) -> bool:
        """Whether `row` can end before it has all its tokens."""
        return bool(row.sampling.stop) or (bool(self.eos_tokens) and not row.sampling.ignore_eos)

    def processors(self, prompt_length: int, device: torch.device) -> LogitsProcessorList:
        """The processors that transformers' greedy search would use for this model, such as a repetition penalty."""
        return self._model._get_logits_processor(
            generation_config=self._config, input_ids_seq_length=prompt_length, device=str(device)
        )


class MicroBatch:
    """Left-padded rows that start and end together, exactly as transformers' `generate` treats a batch.

    A finished row is fed padding until the last one ends, so that the numbers of the others do not depend on it.

    A step is `inputs`, a forward, `choose` and `accept`. Only `accept` waits for the device; as long as
    `surely_goes_on` holds, it may be called after the next forward has been started.
    """

    def __init__(
        self, model: Any, rows: Sequence[Row], rules: TokenRules, pool: CachePool, device: torch.device
    ) -> None:
        self.rows = list(rows)
        self._model = model
        self._rules = rules
        self._width = self._length = max(len(row.prompt) for row in rows)
        room = self._width + max(row.sampling.max_new_tokens for row in rows)
        self._ids, mask, positions = _left_padded([row.prompt for row in rows], room, rules.pad_token, device)
        self._processors = rules.processors(self._width, device)
        self._takes_raw_scores = not self._processors and all(row.sampling.is_greedy for row in rows)
        self._sure = max((row.sampling.max_new_tokens for row in rows if not rules.may_end_early(row)), default=0)
        accepted = inspect.signature(model.forward).parameters
        self._cache = pool.lend(len(rows), room)
        self._cache_name = "cache_params" if "cache_params" in accepted else "past_key_values"
        self._always = {"use_cache": True, self._cache_name: self._cache}
        if "logits_to_keep" in accepted:
            self._always["logits_to_keep"] = 1
        self._growing = {"attention_mask": mask} if any(len(row.prompt) < self._width for row in rows) else {}
        if "position_ids" in accepted:
            self._growing["position_ids"] = positions
        self._feeds_plainly = _feeds_plainly(model, self._cache)
        self._ended: torch.Tensor | None = None
        self._chosen: torch.Tensor | None = None
        self._copied = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @property
    def finished(self) -> bool:
        return all(row.finished for row in self.rows)

    @property
    def surely_goes_on(self) -> bool:
        """Whether some row needs another forward, whatever tokens have been chosen."""
        return self._length - self._width < self._sure

    def likely_goes_on(self) -> bool:
        """Whether some row needs another forward after the next one; two that may end early hardly do so together."""
        after = self._length - self._width + 1
        lasting = (row for row in self.rows if not row.finished and row.sampling.max_new_tokens > after)
        return after < self._sure or sum(1 for _ in lasting) > 1

    def inputs(self) -> dict[str, Any]:
        """Arguments of the next forward: the whole prompts first, one token a row from then on."""
        if self._length == self._width or not self._feeds_plainly:
            return self._inputs_by_the_model()
        last = slice(self._length - 1, self._length)
        inputs = {"input_ids": self._ids[:, last], **self._always}
        for name, tensor in self._growing.items():
            inputs[name] = tensor[:, last] if name == "position_ids" else tensor[:, : self._length]
        return inputs

    def _inputs_by_the_model(self) -> dict[str, Any]:
        first = self._length == self._width
        ids = self._ids[:, : self._length]
        always = {**self._always, **{name: tensor[:, : self._length] for name, tensor in self._growing.items()}}
        inputs: dict[str, Any] = self._model.prepare_inputs_for_generation(
            ids, next_sequence_length=None if first else 1, is_first_iteration=first, **always
        )
        if inputs.get(self._cache_name) is None:
            # Phi-3 drops its cache once, where its long rotary factors begin: all tokens run again.
            self._cache.reset()
            return {"input_ids": ids, **always}
        return inputs

    def choose(self, output: Any) -> None:
        """Choose each row's next token from a forward's output, on the device.

        The tokens chosen before must have been accepted: a row that they end gets padding.
        """
        scores = output.logits[:, -1]
        if not self._takes_raw_scores:
            scores = self._processors(self._ids[:, : self._length], scores.to(torch.float32, copy=True))
        tokens = choose_tokens(scores, self.rows)
        if self._ended is not None:
            tokens.masked_fill_(self._ended, self._rules.pad_token)
        self._ids[:, self._length] = tokens
        self._length += 1
        self._chosen = tokens.to("cpu", non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def accept(self, done: Callable[[Row], None]) -> int:
        """Wait for the chosen tokens and give them to their rows; `done` receives each row that ends.

        Returns how many rows grew: 0 where nothing has been chosen since the last call.
        """
        if self._chosen is None:
            return 0
        if self._copied is not None:
            self._copied.synchronize()
        tokens, self._chosen = self._chosen.tolist(), None
        live = [pair for pair in zip(self.rows, tokens, strict=True) if not pair[0].finished]
        ended = False
        for row, token in live:
            row.accept(token, self._rules.eos_tokens)
            if row.finished:
                done(row)
                ended = True
        if ended:
            self._ended = to_device([row.finished for row in self.rows], self._ids.device)
        return len(live)


def _feeds_plainly(model: Any, cache: Any) -> bool:
    """Whether the model's own preparation of a decode step does nothing but take the last token."""
    return (
        type(model).prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation
        and not cache.is_compileable
        and not model.is_remote_code()
    )


def _left_padded(
    prompts: Sequence[Sequence[int]], room: int, pad_token: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, mask and positions, each (rows, room), int64: prompts end in one column, generated tokens follow."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), room), pad_token)
    for row, prompt in zip(ids, prompts, strict=True):
        row[width - len(prompt) : width] = torch.tensor(prompt)
    padding = torch.tensor([width - len(prompt) for prompt in prompts])[:, None]
    positions = torch.arange(room) - padding
    return ids.to(device), (positions >= 0).long().to(device), positions.clamp(min=0).to(device)
