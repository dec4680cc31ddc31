"""Rows that run one forward together, with their cache."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache, LogitsProcessorList

from zeroinf.generation.row import Row
from zeroinf.generation.sampling import choose_tokens


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

    def processors(self, prompt_length: int, device: torch.device) -> LogitsProcessorList:
        """The processors that transformers' greedy search would use for this model, such as a repetition penalty."""
        return self._model._get_logits_processor(
            generation_config=self._config, input_ids_seq_length=prompt_length, device=str(device)
        )


class MicroBatch:
    """Left-padded rows that start and end together, exactly as transformers' `generate` treats a batch.

    A finished row is fed padding until the last one ends, so that the numbers of the others do not depend on it.
    """

    def __init__(self, model: Any, rows: Sequence[Row], rules: TokenRules, device: torch.device) -> None:
        self.rows = list(rows)
        self._model = model
        self._rules = rules
        self._ids, mask = _left_padded([row.prompt for row in rows], rules.pad_token, device)
        self._processors = rules.processors(self._ids.shape[1], device)
        accepted = inspect.signature(model.forward).parameters
        cache_name = "cache_params" if "cache_params" in accepted else "past_key_values"
        self._state: dict[str, Any] = {
            "use_cache": True,
            cache_name: DynamicCache(config=model.config.get_text_config(decoder=True)),
        }
        if "position_ids" in accepted:
            self._state["position_ids"] = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
        if "logits_to_keep" in accepted:
            self._state["logits_to_keep"] = 1
        self._state["attention_mask"] = None if bool(mask.all()) else mask
        self._started = False

    @property
    def finished(self) -> bool:
        return all(row.finished for row in self.rows)

    def inputs(self) -> dict[str, Any]:
        """Arguments of the next forward: the whole prompts first, one token a row from then on."""
        inputs: dict[str, Any] = self._model.prepare_inputs_for_generation(
            self._ids,
            next_sequence_length=1 if self._started else None,
            is_first_iteration=not self._started,
            **self._state,
        )
        return inputs

    def accept(self, output: Any) -> int:
        """Take a forward's output and choose each row's next token. Returns how many rows grew."""
        self._started = True
        scores = output.logits[:, -1].to(torch.float32, copy=True)
        tokens = choose_tokens(self._processors(self._ids, scores), self.rows)
        live = [not row.finished for row in self.rows]
        for row, token, alive in zip(self.rows, tokens.tolist(), live, strict=True):
            if alive:
                row.accept(token, self._rules.eos_tokens)
        tokens = torch.where(torch.tensor(live, device=tokens.device), tokens, self._rules.pad_token)
        self._grow(tokens)
        return sum(live)

    def _grow(self, tokens: torch.Tensor) -> None:
        self._ids = torch.cat([self._ids, tokens[:, None]], dim=-1)
        mask, positions = self._state["attention_mask"], self._state.get("position_ids")
        if mask is not None:
            self._state["attention_mask"] = torch.cat([mask, mask.new_ones(len(self.rows), 1)], dim=-1)
        if positions is not None:
            self._state["position_ids"] = torch.cat([positions, positions[:, -1:] + 1], dim=-1)


def _left_padded(
    prompts: Sequence[Sequence[int]], pad_token: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask, both (rows, longest prompt), int64."""
    width = max(len(prompt) for prompt in prompts)
    ids = [[pad_token] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
