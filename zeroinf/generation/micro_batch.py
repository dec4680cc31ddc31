"""Micro-batches: prepares the inputs of one forward and chooses tokens from its output."""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn import Module
from transformers import DynamicCache, LogitsProcessorList

from zeroinf.compat.masks import padding_is_known
from zeroinf.compat.models import attention_by, greedy_processors
from zeroinf.errors import ModelError
from zeroinf.generation.attention import IMPLEMENTATION, kernel_for, tokens_of
from zeroinf.generation.cache import PagePool, columns_of
from zeroinf.generation.ends import Ends
from zeroinf.generation.groups import Group
from zeroinf.generation.host_cache import HostCache
from zeroinf.generation.link import Unit
from zeroinf.generation.masks import Masks
from zeroinf.generation.prefixes import PrefixPage
from zeroinf.generation.prompts import EncodedPrompts
from zeroinf.generation.row import NO_TOKEN, NO_TOKEN_ALLOWED, Row
from zeroinf.generation.sampling import Likelihoods, alter_scores, choose_tokens, likelihoods_of
from zeroinf.generation.seats import Seat
from zeroinf.generation.settings import check_settings
from zeroinf.generation.states import MakeMixing, Mixing
from zeroinf.generation.upload import to_device
from zeroinf.model.kv import cache_name
from zeroinf.model.mixers import mixed_by_cache, modules_of


def breaks_at(config: Any) -> int | None:
    """Tokens beyond which the model of `config` has other rotary factors, so that no key of before holds any more."""
    rope = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    return rope.get("original_max_position_embeddings") if rope.get("rope_type") == "longrope" else None


class TokenRules:
    """The rules of a model's generation config about tokens: which end a row, which pads, which scores are altered."""

    def __init__(self, model: Any, pad_token: int | None, eos_tokens: Sequence[int]) -> None:
        """Raises ModelError for settings that are not carried out (`zeroinf.generation.settings`)."""
        config = model.generation_config
        check_settings(config)
        listed = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        self.eos_tokens = frozenset(t for t in (*listed, *eos_tokens) if t is not None)
        self.pad_token = next((t for t in (pad_token, *sorted(self.eos_tokens)) if t is not None), 0)
        self.stops = _texts(config.stop_strings)
        """Strings that end every row, as the generation config has them."""
        self.mends_scores = config.remove_invalid_values is True
        """Whether a token is chosen even where scores are no numbers."""
        self._model = model
        self._config = copy.deepcopy(config)
        self._config.do_sample = False
        if config.min_new_tokens is not None:  # it wins, and transformers makes the same min_length of it
            self._config.min_length = None
        self._forces_end = config.forced_eos_token_id is not None
        of_prompts = (config.min_new_tokens, config.begin_suppress_tokens, config.exponential_decay_length_penalty)
        self._counts_prompt = any(setting is not None for setting in of_prompts)
        self._processors: dict[tuple[int, int], LogitsProcessorList] = {}
        self._ends = Ends(self.eos_tokens, self.stops)

    def ends(self, row: Row) -> Container[int]:
        """Tokens after which `row` may have ended: after any other it goes on, unless it has all its tokens."""
        return self._ends.of(row)

    def may_end_early(self, row: Row) -> bool:
        """Whether `row` can end before it has all its tokens."""
        own = bool(row.sampling.stop or row.sampling.stop_token_ids)
        return own or row.answer is not None or (bool(self.eos_tokens or self.stops) and not row.sampling.ignore_eos)

    def alters_scores(self, device: torch.device) -> bool:
        """Whether the model's scores may be altered before a token is chosen by them."""
        return self._forces_end or self._counts_prompt or bool(self.processors((1, 0), device))

    def kind(self, row: Row) -> tuple[int, int]:
        """The facts that a row's processors depend on: its prompt's length and, where its last token is forced, its
        own; 1 and 0 where they depend on neither."""
        prompt = len(row.prompt)
        total = prompt + row.sampling.max_new_tokens if self._forces_end else 0
        return prompt if self._counts_prompt else 1, total

    def processors(self, kind: tuple[int, int], device: torch.device) -> LogitsProcessorList:
        """The processors that transformers' greedy search would use for this model, such as a repetition penalty."""
        if kind not in self._processors:
            prompt_length, self._config.max_length = kind
            self._processors[kind] = greedy_processors(
                self._model,
                self._config,
                prompt_tokens=prompt_length,
                eos_tokens=sorted(self.eos_tokens),
                device=device,
            )
        return self._processors[kind]

    def try_out(self, vocabulary: int) -> None:
        """Alter scores of a row of one token, and of the ones behind. Raises ModelError where that cannot be done."""
        try:
            processors = self.processors((1, 2), torch.device("cpu"))
            later = max((getattr(one, "regulation_start", 1) + 1 for one in processors), default=1)
            for length in (1, later):
                processors(torch.zeros(1, length, dtype=torch.int64), torch.zeros(1, vocabulary))
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
            raise ModelError(f"the model's generation config cannot be carried out: {error}") from error


def _texts(given: str | Sequence[str] | None) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given or ())


class BatchState:
    """The live rows of one job on the device: their tokens, and their pages in the KV cache. `host` holds the KV cache
    of the others.
    """

    def __init__(
        self, model: Any, rules: TokenRules, pool: PagePool, device: torch.device, host: HostCache | None = None
    ) -> None:
        self.rules, self.pool, self.device, self.host = rules, pool, device, host
        self.ids = torch.full((pool.size.rows, pool.size.tokens), rules.pad_token, device=device)
        """(rows, tokens), int64: those of each seat, from the first on."""
        self.last = pool.size.tokens - 1
        """The last column; rows that have ended, but keep their places, may be beyond."""
        accepted = inspect.signature(model.forward).parameters
        self.takes_positions = "position_ids" in accepted
        self.cache_name = cache_name(model)
        self.always: dict[str, Any] = {"use_cache": True}
        self.keeps_logits = "logits_to_keep" in accepted
        if self.keeps_logits:
            self.always["logits_to_keep"] = 1
        self.kernel = kernel_for(device)
        """What attends in packed forwards."""
        self.has_encoder = bool(model.config.is_encoder_decoder)
        self.encoded: EncodedPrompts | None = None
        """Those of the live rows, which are one micro-batch where there is an encoder."""
        self.masks = Masks(pool.size.rows, device)
        """Of rows whose answers have a format."""
        self.mixing: MakeMixing = Mixing
        """What runs recurrent modules in a forward, where the model has some."""
        self.mixers = modules_of(model, pool.mixers)
        """The recurrent modules, each with the number of its layer."""
        self._cache = pool.new_cache()
        self._is_paged = pool.is_whole

    def open(self, seats: Sequence[Seat], dropped: Sequence[PrefixPage] = ()) -> None:
        """Write the tokens of rows that enter, and give them pages, of which those `dropped` are free again."""
        self.pool.drop(dropped)
        if not seats:
            return
        ids = np.full((len(seats), max(seat.known for seat in seats)), self.rules.pad_token)
        for tokens, seat in zip(ids, seats, strict=True):
            prompt, generated = len(seat.row.prompt), seat.row.generated
            tokens[:prompt] = seat.row.prompt
            tokens[prompt : prompt + len(generated)] = generated
            seat.ends, seat.may_end_early = self.rules.ends(seat.row), self.rules.may_end_early(seat.row)
        numbers = to_device([seat.number for seat in seats], self.device)
        self.ids[:, : ids.shape[1]].index_copy_(0, numbers, to_device(ids.reshape(-1), self.device).view(ids.shape))
        paged = [seat for seat in seats if not seat.on_host]
        self.pool.open({seat.number: seat.total for seat in paged}, {seat.number: seat.prefix for seat in paged})
        self.masks.enter(seats)

    def close(self, seats: Sequence[Seat]) -> None:
        """Take back the pages of rows that have ended."""
        self.pool.close([seat.number for seat in seats if not seat.on_host])
        self.masks.leave(seats)

    def begin(self, batches: Sequence[MicroBatch]) -> None:
        """The next pass runs `batches`, whose inputs are made, in this order."""
        if self.host is not None:
            self.host.begin([batch.fetched for batch in batches])

    def batch(self, group: Group) -> MicroBatch:
        """The micro-batch of `group`."""
        return PackedBatch(self, group) if group.is_packed else PaddedBatch(self, group)

    def cache(self, *, anew: bool) -> DynamicCache:
        """A cache for one forward; states that are not paged are those of the forward before, unless `anew`."""
        if self._is_paged:
            return copy.copy(self._cache)
        if anew:
            self._cache = self.pool.new_cache()
        return self._cache

    def mix(self, cache: DynamicCache, group: Group, firsts: Sequence[int], total: int) -> DynamicCache:
        """`cache` with the states of the rows of `group`, whose next tokens lie from `firsts` on among `total` ones;
        rows that begin have none."""
        if (states := self.pool.states) is None:
            return cache
        states.clear([seat.number for seat, start in zip(group.seats, group.starts, strict=True) if not start])
        cache.mix = self.mixing(states, [seat.number for seat in group.seats], firsts, group.counts, total)
        return cache


@contextmanager
def running(model: Any, mixers: Sequence[tuple[int, Module]] = (), *, packed: bool) -> Iterator[None]:
    """While it lasts, forwards attend as their batches were made to: all of them packed, or all padded; and their
    caches run the recurrent modules `mixers`, each with the number of its layer."""
    with attention_by(model, IMPLEMENTATION) if packed else padding_is_known(), mixed_by_cache(mixers):
        yield


class MicroBatch(ABC):
    """One forward of some rows: what goes into it, and the tokens chosen from what comes out.

    `inputs`, the desk's `begin`, a forward, `choose`: none of them waits for the device.
    """

    fetched: Sequence[Unit] = ()
    """What the forward will fetch from host memory, once the inputs are made."""

    def __init__(self, batch_state: BatchState, group: Group) -> None:
        self.group, self._batch_state = group, batch_state
        self._choosing: Sequence[int] = range(len(group.seats))
        self._chosen: Sequence[Seat] = group.seats
        if not all(group.chooses):
            self._choosing = [index for index, chooses in enumerate(group.chooses) if chooses]
            self._chosen = [group.seats[index] for index in self._choosing]

    @abstractmethod
    def inputs(self) -> dict[str, Any]:
        """Arguments of the model's forward."""

    @abstractmethod
    def _scores(self, output: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scores (rows, vocabulary), seats and lengths (rows,), both int64, of the rows whose prompts are through."""

    def choose(self, output: Any) -> Chosen | None:
        """Choose the next token of each row whose prompt is through; None where there is none.

        A row of which a score is NaN or infinite, or every one minus infinity, gets NO_TOKEN, unless the generation
        config has `remove_invalid_values`. One whose answer has a format that leaves it none gets NO_TOKEN_ALLOWED.
        """
        batch_state = self._batch_state
        if not self._choosing:
            return None
        scores, seats, lengths = self._scores(output)
        chosen, is_stuck = self._chosen, None
        processed = self._processed(scores, chosen)
        rows = [] if all(seat.is_plain for seat in chosen) else [seat.row for seat in chosen]
        if any(row.sampling.alters_scores for row in rows):
            known = [seat.known for seat in chosen]
            of_rows = batch_state.ids.index_select(0, seats)
            processed = alter_scores(processed, rows, of_rows, known, batch_state.rules.eos_tokens)
            is_stuck = batch_state.masks.forbid(processed, chosen, seats)
        judged = processed if batch_state.rules.mends_scores else scores
        highest = judged.amax(dim=-1)  # a NaN is the highest of all
        is_broken = highest.sub(highest).ne(0)  # an infinite one less itself is a NaN
        tokens = choose_tokens(processed, rows, _numbers(chosen) if rows else ()).masked_fill_(is_broken, 0)
        batch_state.ids.index_put_((seats, lengths.clamp(max=batch_state.last)), tokens)
        likelihoods = likelihoods_of(scores, tokens, rows)
        tokens.masked_fill_(is_broken, NO_TOKEN)
        if is_stuck is not None:
            tokens.masked_fill_(is_stuck, NO_TOKEN_ALLOWED)
        return Chosen(chosen, tokens, likelihoods, batch_state.masks)

    def _processed(self, scores: torch.Tensor, seats: Sequence[Seat]) -> torch.Tensor:
        """The scores as the generation config wants them: rows with equally long prompts and completions together."""
        batch_state = self._batch_state
        if not batch_state.rules.alters_scores(batch_state.device):
            greedy = all(seat.is_plain or seat.row.sampling.is_greedy for seat in seats)
            return scores if greedy else scores.to(torch.float32, copy=True)
        alike: dict[tuple[tuple[int, int], int], list[int]] = {}
        for number, seat in enumerate(seats):
            alike.setdefault((batch_state.rules.kind(seat.row), seat.known), []).append(number)
        scores = scores.to(torch.float32, copy=True)
        for (kind, known), members in alike.items():
            index = to_device(members, batch_state.device)
            ids = batch_state.ids.index_select(0, to_device([seats[i].number for i in members], batch_state.device))[
                :, :known
            ]
            processed = batch_state.rules.processors(kind, batch_state.device)(ids, scores.index_select(0, index))
            scores.index_copy_(0, index, processed)
        return scores


class PaddedBatch(MicroBatch):
    """Left-padded rows, as transformers' `generate` would make a batch of them."""

    def __init__(self, batch_state: BatchState, group: Group) -> None:
        super().__init__(batch_state, group)
        self._columns = columns_of(
            [seat.number for seat in group.seats], group.starts, group.counts, batch_state.device
        )

    def inputs(self) -> dict[str, Any]:
        """Arguments of the model's forward."""
        batch_state, columns = self._batch_state, self._columns
        positions = columns.positions[:, columns.total - columns.new :].clamp(min=0)
        ids = batch_state.ids.index_select(0, columns.seats).gather(1, positions.clamp(max=batch_state.last))
        if batch_state.has_encoder:
            encoded = self._encoded()
            own = {"decoder_input_ids": ids, batch_state.cache_name: encoded.cache(self._cache())}
            return {**batch_state.always, **own, **encoded.inputs()}
        inputs = {**batch_state.always, "input_ids": ids, batch_state.cache_name: self._cache()}
        if batch_state.takes_positions:
            inputs["position_ids"] = positions
        if columns.is_padded and (columns.is_first or batch_state.pool.grows) and batch_state.pool.takes_masks:
            inputs["attention_mask"] = (columns.positions >= 0).long()
        return inputs

    def _cache(self) -> DynamicCache:
        batch_state, columns = self._batch_state, self._columns
        cache = batch_state.cache(anew=columns.is_first)
        firsts = [(row + 1) * columns.new - count for row, count in enumerate(self.group.counts)]
        cache = batch_state.mix(cache, self.group, firsts, len(firsts) * columns.new)
        if not self.group.on_host:
            return batch_state.pool.page(cache, columns)
        assert batch_state.host is not None
        self.fetched = batch_state.host.page(cache, columns, self.group)
        return cache

    def _encoded(self) -> EncodedPrompts:
        batch_state = self._batch_state
        if self._columns.is_first or batch_state.encoded is None:
            rows = [seat.row for seat in self.group.seats]
            batch_state.encoded = EncodedPrompts(rows, batch_state.rules.pad_token, batch_state.device)
        return batch_state.encoded

    def choose(self, output: Any) -> Chosen | None:
        if self._batch_state.encoded is not None:
            self._batch_state.encoded.keep(output)
        return super().choose(output)

    def _scores(self, output: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        found = output.logits[:, -1], self._columns.seats, self._columns.lengths
        if len(self._choosing) == len(self.group.seats):
            return found
        index = to_device(self._choosing, self._batch_state.device)
        scores, seats, lengths = (each.index_select(0, index) for each in found)
        return scores, seats, lengths


class PackedBatch(MicroBatch):
    """Rows side by side as one sequence, prompts and decode steps alike, with neither padding nor a mask."""

    def __init__(self, batch_state: BatchState, group: Group) -> None:
        super().__init__(batch_state, group)
        seats = [seat.number for seat in group.seats]
        self._tokens = tokens_of(seats, group.starts, group.counts, batch_state.device)
        self._are_steps = self._tokens.total == len(self._choosing)
        """Whether each token is that of a row whose next one is chosen."""
        if self._are_steps:
            self._last = self._tokens.rows[3]
            return
        firsts, counts = self._tokens.firsts, group.counts
        last = [firsts[row] + counts[row] - 1 for row in self._choosing]
        self._last = to_device(last or [self._tokens.total - 1], batch_state.device)
        """Where the last tokens of rows lie whose next one is chosen; of some token, the model is asked in any case."""

    def inputs(self) -> dict[str, Any]:
        """Arguments of the model's forward."""
        batch_state, tokens = self._batch_state, self._tokens
        places = tokens.positions.clamp(max=batch_state.last).add_(tokens.seats * batch_state.ids.shape[1])
        inputs = {
            **batch_state.always,
            "input_ids": batch_state.ids.view(-1).index_select(0, places)[None],
            batch_state.cache_name: self._cache(),
        }
        if batch_state.takes_positions:
            inputs["position_ids"] = tokens.positions[None]
        if batch_state.keeps_logits:
            inputs["logits_to_keep"] = self._last
        return inputs

    def _cache(self) -> DynamicCache:
        batch_state = self._batch_state
        if not self.group.on_host:
            cache = batch_state.pool.pack(self._tokens, batch_state.kernel)
        else:
            assert batch_state.host is not None
            cache = batch_state.pool.new_cache()
            self.fetched = batch_state.host.pack(cache, self._tokens, self.group, batch_state.kernel)
        return batch_state.mix(cache, self.group, self._tokens.firsts, self._tokens.total)

    def _scores(self, output: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self._are_steps:
            return output.logits[0], self._tokens.seats, self._tokens.lengths
        scores = output.logits[0] if self._batch_state.keeps_logits else output.logits[0].index_select(0, self._last)
        return scores, self._tokens.seats.index_select(0, self._last), self._tokens.lengths.index_select(0, self._last)


class Chosen:
    """The tokens chosen for some rows, on their way to the host."""

    def __init__(
        self, seats: Sequence[Seat], tokens: torch.Tensor, likelihoods: Likelihoods | None, masks: Masks
    ) -> None:
        """tokens: (rows,), int64, with NO_TOKEN or NO_TOKEN_ALLOWED for a row that ends in error."""
        self.seats = seats
        self._tokens = tokens.to("cpu", non_blocking=True)
        self._likelihoods = None if likelihoods is None else likelihoods.to_host()
        self._copied = torch.cuda.Event() if tokens.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        if self._copied is not None:
            self._copied.record()
        self._followed = masks.follow(seats, self._on_host)

    def _on_host(self) -> list[int]:
        """The tokens, once they are there. From any thread."""
        if self._copied is not None:
            self._copied.synchronize()
        tokens: list[int] = self._tokens.tolist()
        return tokens

    def accept(self, rules: TokenRules) -> tuple[int, list[Seat]]:
        """Wait for the tokens and give them to their rows: how many rows grew, and the seats of those that ended."""
        tokens = self._on_host()
        if self._followed is not None:
            self._followed.result()
        told = {} if self._likelihoods is None else self._likelihoods.by_place()
        for place, likelihood in told.items():
            if not self.seats[place].row.finished:
                self.seats[place].row.likelihoods.append(likelihood)
        grown, ended = 0, list[Seat]()
        for seat, token in zip(self.seats, tokens, strict=True):
            row = seat.row
            if row.finish_reason is not None:
                continue
            if token not in seat.ends and seat.known < seat.total:
                row.generated.append(token)
                grown += 1
                continue
            row.accept(token, rules.eos_tokens, rules.stops)
            grown += token >= 0
            if row.finish_reason is not None:
                ended.append(seat)
        return grown, ended


def _numbers(seats: Sequence[Seat]) -> list[int]:
    """The number of the token that is chosen for each seat, counted from 0 in its row."""
    return [seat.known - len(seat.row.prompt) for seat in seats]
