"""The decode loop and its micro-batches over plain transformers models: the engine is the only fake."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from generating import PlainEngine, greedy_by_transformers, run_rows
from generating import rows_of as made
from small_models import EOS, PAD, VOCABULARY, build_model, small_config
from transformers import AutoModelForCausalLM, GenerationConfig

from zeroinf.distributed.control import Control
from zeroinf.distributed.world import World
from zeroinf.generation.micro_batch import TokenRules
from zeroinf.generation.row import Row
from zeroinf.generation.sampling import choose_tokens

PROMPTS = ((5, 6, 7, 8, 9, 10, 11), (20,), (30, 31, 32), (40, 41, 42, 43, 44))
# Few pages, small micro-batches, prompts in pieces: rows come and go, and meet others at every pass.
PRESSED = {"rows": 3, "pages": 5, "micro_batch_rows": 2, "prefill_tokens": 4}
PACKED = {"rows": 3, "pages": 5, "prefill_tokens": 8, "forward_tokens": 5}


class Ranks(Control):
    """What the other ranks say in each round: (busy, stop)."""

    def __init__(self, others: Sequence[tuple[int, int]]) -> None:
        super().__init__(World(), "cpu")
        self.said: list[tuple[int, ...]] = []
        self._others = list(others)

    def start_all_reduce_max(self, *values: int) -> Callable[[], tuple[int, ...]]:
        busy, *may_come, stop = values  # whether there may be more rows is asked only where it is asked for certain
        others_busy, others_stop = self._others[len(self.said)]
        self.said.append((busy, stop))
        return lambda: (max(busy, others_busy), *may_come, max(stop, others_stop))


@pytest.fixture(scope="module")
def model() -> Any:
    return build_model("llama")


@pytest.fixture(autouse=True)
def _own_generation_config(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test sets on the shared model's generation config is undone."""
    if "model" not in request.fixturenames:
        yield
        return
    config = request.getfixturevalue("model").generation_config
    before = dict(config.__dict__)
    yield
    config.__dict__.clear()
    config.__dict__.update(before)


def rows_of(
    lengths: Sequence[int] | int = 12, prompts: Sequence[Sequence[int]] = PROMPTS, **sampling: Any
) -> list[Row]:
    return made(prompts, lengths, **sampling)


def by_transformers(model: Any, prompts: Sequence[Sequence[int]] = PROMPTS, new: int = 12) -> list[list[int]]:
    """What `generate` makes of each prompt alone."""
    found = []
    for prompt in prompts:
        out = model.generate(torch.tensor([prompt]), do_sample=False, pad_token_id=PAD, max_new_tokens=new)
        found.append(out[0, len(prompt) :].tolist())
    return found


def shapes(engine: PlainEngine) -> list[tuple[int, ...]]:
    return [shape for groups in engine.passes for shape in groups]


@pytest.mark.parametrize("limits", [{}, PRESSED])
@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.8}, {"no_repeat_ngram_size": 2}])
def test_greedy_tokens_equal_generate_with_the_models_own_generation_config(
    model: Any, settings: dict[str, float], limits: dict[str, int]
) -> None:
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    rows = rows_of()
    run_rows(PlainEngine(model), rows, draw=3, **limits)
    assert [row.generated for row in rows] == by_transformers(model)


def test_a_repetition_penalty_of_the_generation_config_changes_the_tokens(model: Any) -> None:
    plain, penalised = rows_of(), rows_of()
    run_rows(PlainEngine(model), plain)
    model.generation_config.repetition_penalty = 1.8
    run_rows(PlainEngine(model), penalised)
    assert [row.generated for row in plain] != [row.generated for row in penalised]


def test_every_end_token_of_the_generation_config_ends_a_row(model: Any) -> None:
    long = by_transformers(model)
    first, second = long[0][4], long[1][6]
    model.generation_config.eos_token_id = [first, second]
    rows = rows_of()
    run_rows(PlainEngine(model), rows)
    for row, full in zip(rows, long, strict=True):
        ends = [at for at, token in enumerate(full) if token in (first, second)]
        assert row.generated == (full[: ends[0] + 1] if ends else full)
        assert row.finish_reason == ("stop" if ends else "length")
    assert {row.finish_reason for row in rows} == {"stop", "length"} or len(rows[0].generated) <= 5


def test_the_tokenizers_end_token_counts_where_the_generation_config_has_none() -> None:
    config = GenerationConfig(do_sample=True)
    rules = TokenRules(SimpleNamespace(generation_config=config), None, (EOS,))
    assert rules.eos_tokens == {EOS}
    assert rules.pad_token == EOS


def test_ignored_end_tokens_leave_the_tokens_as_they_are(model: Any) -> None:
    long = by_transformers(model)
    model.generation_config.eos_token_id = [long[0][4]]
    rows = rows_of(ignore_eos=True)
    run_rows(PlainEngine(model), rows)
    assert [row.generated for row in rows] == long


def test_rows_have_lengths_of_their_own_and_leave_when_they_end(model: Any) -> None:
    lengths, ended = (3, 12, 1, 7), list[int]()
    rows, engine = rows_of(lengths), PlainEngine(model)
    run_rows(engine, rows, done=lambda row: ended.append(row.index))
    assert [row.generated for row in rows] == [
        full[:length] for full, length in zip(by_transformers(model), lengths, strict=True)
    ]
    assert ended == [2, 0, 3, 1], "each row is handed back when it ends"
    assert [sum(rows for rows, _ in groups) for groups in engine.passes] == [4, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 1]


def test_a_row_that_ends_makes_room_for_one_that_waits(model: Any) -> None:
    rows, engine = rows_of((2, 6, 6, 6)), PlainEngine(model)
    run_rows(engine, rows, rows=2)
    assert [row.generated for row in rows] == [
        full[: row.sampling.max_new_tokens] for full, row in zip(by_transformers(model), rows, strict=True)
    ]
    assert all(sum(rows for rows, _ in groups) == 2 for groups in engine.passes[:8])
    assert len(engine.passes) == 12


def test_prompts_and_single_tokens_share_a_pass(model: Any) -> None:
    engine = PlainEngine(model)
    run_rows(engine, rows_of((8, 8)[:2], PROMPTS[:1] * 2), draw=1, prefill_tokens=5)
    assert engine.passes[:4] == [[(1, 5)], [(1, 2)], [(1, 5), (1, 1)], [(1, 2), (1, 1)]]


class SleepyEngine(PlainEngine):
    def forward(self, micro_batches: Sequence[Mapping[str, Any]]) -> list[Any]:
        time.sleep(0.02)
        return super().forward(micro_batches)


def test_passes_that_are_a_token_for_every_row_are_timed(model: Any) -> None:
    _, scheduler = run_rows(SleepyEngine(model), rows_of((4, 4, 7, 7)))
    # Prompts, three tokens for all, three for half of the rows; the first of the three has no full step before it.
    assert scheduler.counts.passes == 7
    assert scheduler.counts.full_steps == 2
    assert scheduler.counts.full_steps_s >= 2 * 0.02


class WatchfulEngine(PlainEngine):
    """Notes how many tokens the rows have each time that a pass is started."""

    def __init__(self, model: Any, rows: Sequence[Row]) -> None:
        super().__init__(model)
        self.known: list[list[int]] = []
        self._rows = rows

    def forward(self, micro_batches: Sequence[Mapping[str, Any]]) -> list[Any]:
        self.known.append([len(row.generated) for row in self._rows])
        return super().forward(micro_batches)


def test_a_pass_is_started_before_the_last_tokens_are_read_while_a_row_surely_goes_on(model: Any) -> None:
    rows = rows_of((6, 2), PROMPTS[:2], ignore_eos=True)
    engine = WatchfulEngine(model, rows)
    run_rows(engine, rows)
    assert engine.known == [[0, 0], [0, 0], [1, 1], [2, 2], [3, 2], [4, 2]]
    assert [len(row.generated) for row in rows] == [6, 2]


def test_no_pass_is_started_on_tokens_that_may_end_every_row(model: Any) -> None:
    rows = rows_of(4, PROMPTS[:2], stop=("x",))
    engine = WatchfulEngine(model, rows)
    run_rows(engine, rows)
    assert engine.known == [[0, 0], [1, 1], [2, 2], [3, 3]]


@pytest.mark.parametrize(("runs_ahead", "known"), [(False, [0, 1, 2, 3]), (True, [0, 0, 1, 2])])
def test_passes_begin_ahead_of_tokens_that_hardly_end_all_rows_where_the_gpu_would_wait(
    model: Any, runs_ahead: bool, known: list[int]
) -> None:
    rows = rows_of(5, PROMPTS * 2)
    engine = WatchfulEngine(model, rows)
    run_rows(engine, rows, runs_ahead=runs_ahead)
    assert [each[0] for each in engine.known[:4]] == known
    assert len(engine.passes) == 5
    assert [row.generated for row in rows] == by_transformers(model, PROMPTS * 2, 5)


def test_only_the_first_rows_that_all_end_together_cost_a_pass_of_those_that_begin_ahead(model: Any) -> None:
    full = by_transformers(model, PROMPTS[:1])[0]
    model.generation_config.eos_token_id = [full[3]]
    at_once, waves = full.index(full[3]) + 1, 3
    rows, engine = rows_of(12, PROMPTS[:1] * 8 * waves), PlainEngine(model)
    run_rows(engine, rows, rows=8, runs_ahead=True)
    assert {tuple(row.generated) for row in rows} == {tuple(full[:at_once])}
    assert len(engine.passes) == waves * at_once + 1


def test_tokens_that_are_read_late_are_the_same(model: Any) -> None:
    """The first row lets passes be started early; the others end by an end token on the way."""
    long = by_transformers(model)
    model.generation_config.eos_token_id = [long[1][3], long[2][5]]
    rows, read_at_once = [*rows_of(ignore_eos=True)[:1], *rows_of()[1:]], rows_of()
    engine = PlainEngine(model)
    run_rows(engine, rows)
    run_rows(PlainEngine(model), read_at_once)
    assert rows[0].generated == long[0]
    assert [row.generated for row in rows[1:]] == [row.generated for row in read_at_once[1:]]
    assert {row.finish_reason for row in rows} == {"stop", "length"}
    assert len(engine.passes) == 12


def test_tokens_chosen_before_a_stop_are_not_lost(model: Any) -> None:
    rows = rows_of((9, 3), PROMPTS[:2], ignore_eos=True)
    engine, ended = PlainEngine(model), []
    stopped, _ = run_rows(
        engine, rows, stop_requested=lambda: 2 if len(engine.passes) == 3 else 0, done=ended.append
    )  # fmt: skip
    assert stopped == 2
    assert [len(row.generated) for row in rows] == [3, 3]
    assert ended == [rows[1]]


class ForgetfulEngine(PlainEngine):
    """Looks whether anybody still holds logits of a pass when the next one begins."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.held = 0
        self._logits: list[weakref.ref[torch.Tensor]] = []

    def forward(self, micro_batches: Sequence[Mapping[str, Any]]) -> list[Any]:
        self.held += any(logits() is not None for logits in self._logits)
        outputs = super().forward(micro_batches)
        self.asked.clear()
        self._logits = [weakref.ref(output.logits) for output in outputs]
        return outputs


@pytest.mark.parametrize("settings", [{}, {"ignore_eos": True}, {"temperature": 1.0, "ignore_eos": True}])
def test_logits_are_gone_before_the_next_pass_begins(model: Any, settings: dict[str, Any]) -> None:
    engine = ForgetfulEngine(model)
    run_rows(engine, rows_of(**settings), micro_batch_rows=3)
    assert engine.held == 0
    assert len(engine.passes) >= 12


def test_only_the_last_position_is_asked_for_and_only_new_tokens_are_fed(model: Any) -> None:
    engine = PlainEngine(model)
    run_rows(engine, rows_of(), together=True)
    assert shapes(engine) == [(4, 7)] + [(4, 1)] * 11
    assert all(inputs["logits_to_keep"] == 1 for inputs in engine.asked)


def test_what_grows_is_what_is_generated(model: Any) -> None:
    grown: list[int] = []
    rows = rows_of((2, 5, 1, 3))
    run_rows(PlainEngine(model), rows, grew=grown.append)
    assert grown == [4, 3, 2, 1, 1]
    assert sum(grown) == sum(len(row.generated) for row in rows)


def test_rows_are_taken_until_none_is_left(model: Any) -> None:
    rows = rows_of()
    assert run_rows(PlainEngine(model), rows, draw=1, rows=2)[0] == 0
    assert all(row.finished for row in rows)


def test_a_stop_ends_the_loop_between_passes_with_rows_unfinished(model: Any) -> None:
    engine, rows = PlainEngine(model), rows_of()
    stopped, _ = run_rows(engine, rows, stop_requested=lambda: 15 if len(engine.passes) == 3 else 0)
    assert stopped == 15
    assert [len(row.generated) for row in rows] == [3] * 4


def test_an_idle_rank_keeps_the_others_company_until_all_are_done(model: Any) -> None:
    engine, ranks = PlainEngine(model, in_step=True), Ranks([(1, 0)] * 5 + [(0, 0)] * 2)
    assert run_rows(engine, [], control=ranks)[0] == 0
    assert engine.passes == [[(1, 1)]] * 5


def test_a_rank_that_ran_dry_keeps_company_after_its_own_rows(model: Any) -> None:
    engine, ranks = PlainEngine(model, in_step=True), Ranks([(1, 0)] * 9 + [(0, 0)] * 2)
    rows = rows_of(4)
    run_rows(engine, rows, control=ranks)
    assert all(row.finished for row in rows)
    assert [sum(rows for rows, _ in groups) for groups in engine.passes] == [4] * 4 + [1] * 5


def test_a_stop_on_another_rank_stops_this_one_in_the_same_round(model: Any) -> None:
    engine, ranks = PlainEngine(model, in_step=True), Ranks([(1, 0), (1, 0), (1, 2)])
    assert run_rows(engine, rows_of(), control=ranks)[0] == 2
    assert len(engine.passes) == 2


def test_ranks_in_step_make_no_pass_in_vain_where_rows_end_by_length(model: Any) -> None:
    engine, ranks = PlainEngine(model, in_step=True), Ranks([(0, 0)] * 9)
    assert run_rows(engine, [*rows_of(4), *rows_of(2)], draw=4, rows=4, static=True, control=ranks)[0] == 0
    assert [sum(rows for rows, _ in groups) for groups in engine.passes] == [4] * 6


def test_a_last_row_that_may_end_at_any_token_makes_ranks_ask_before_each_pass(model: Any) -> None:
    full = by_transformers(model, PROMPTS[:1])[0]
    model.generation_config.eos_token_id = [full[3]]
    engine, ranks = PlainEngine(model, in_step=True), Ranks([(0, 0)] * 20)
    run_rows(engine, rows_of(12, PROMPTS[:1]), control=ranks)
    assert len(engine.passes) == full.index(full[3]) + 1
    assert [busy for busy, _ in ranks.said] == [1, 0] * len(engine.passes) + [0]


def test_rows_that_all_end_unexpectedly_cost_ranks_in_step_one_pass_of_company(model: Any) -> None:
    full = by_transformers(model, PROMPTS[:1])[0]
    model.generation_config.eos_token_id = [full[3]]
    engine, ranks = PlainEngine(model, in_step=True), Ranks([(0, 0)] * 20)
    run_rows(engine, rows_of(12, PROMPTS[:1] * 2), control=ranks)
    assert [rows for rows, _ in shapes(engine)] == [2] * (full.index(full[3]) + 1) + [1]


def test_an_engine_whose_ranks_need_not_step_together_asks_nobody_and_keeps_no_company(model: Any) -> None:
    engine, ranks = PlainEngine(model), Ranks([])
    run_rows(engine, rows_of(3), control=ranks)
    assert ranks.said == []
    assert len(engine.passes) == 3


def test_an_engine_whose_passes_serve_one_micro_batch_is_given_one(model: Any) -> None:
    engine, rows = PlainEngine(model, shares_passes=False), rows_of((3, 12, 1, 7))
    run_rows(engine, rows, rows=2)
    assert all(len(groups) == 1 for groups in engine.passes)
    assert [row.generated for row in rows] == [
        full[: row.sampling.max_new_tokens] for full, row in zip(by_transformers(model), rows, strict=True)
    ]


@pytest.mark.parametrize(
    "limits", [{}, {"rows": 2, "micro_batch_rows": 1, "prefill_tokens": 6}, {"rows": 3, "forward_tokens": 9}]
)
def test_rotary_factors_that_change_on_the_way_make_all_tokens_run_again(limits: dict[str, int]) -> None:
    config = small_config("phi3")
    factors = {"short_factor": [1.0] * 8, "long_factor": [3.0] * 8, "original_max_position_embeddings": 12}
    config.rope_parameters = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    config.original_max_position_embeddings = 12
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    engine = PlainEngine(model)
    run_rows(engine, rows_of(12, PROMPTS[:1]))
    assert [width for _, width in shapes(engine)] == [7] + [1] * 5 + [13] + [1] * 5
    prompts = (*PROMPTS, tuple(range(5, 25)))  # some stay below the change, one begins beyond it
    rows = rows_of((12, 6, 12, 3, 5), prompts)
    run_rows(PlainEngine(model), rows, **limits)
    assert [row.generated for row in rows] == [
        _step_by_step(model, row.prompt, row.sampling.max_new_tokens) for row in rows
    ]


def _step_by_step(model: Any, prompt: Sequence[int], new: int) -> list[int]:
    """Each token computed anew from all those before it."""
    tokens = list(prompt)
    for _ in range(new):
        tokens.append(greedy_by_transformers(model, tokens, [0])[0])
    return tokens[len(prompt) :]


@pytest.mark.parametrize("limits", [PRESSED, PACKED], ids=["padded", "packed"])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "top_k": 3, "seed": 5}])
def test_logprobs_are_those_of_plain_transformers_logits_whatever_alters_the_scores(
    model: Any, settings: dict[str, Any], limits: dict[str, int]
) -> None:
    model.generation_config.repetition_penalty = 1.3
    rows = rows_of((6, 12, 3, 9), **settings)
    asked: list[int | None] = [0, None, 20, 4]
    for row, count in zip(rows, asked, strict=True):
        row.sampling = replace(row.sampling, logprobs=count)
    run_rows(PlainEngine(model), rows, **limits)
    for row, count in zip(rows, asked, strict=True):
        if count is None:
            assert not row.likelihoods
            continue
        tokens = torch.tensor([[*row.prompt, *row.generated[:-1]]])
        logs = model(tokens, use_cache=False).logits[0, len(row.prompt) - 1 :].log_softmax(-1)
        assert len(row.likelihoods) == len(row.generated)
        for token, told, wanted in zip(row.generated, row.likelihoods, logs, strict=True):
            assert told.logprob == pytest.approx(wanted[token].item(), abs=1e-4)
            assert [token for token, _ in told.top] == wanted.topk(count).indices.tolist()
            assert [log for _, log in told.top] == pytest.approx(wanted.topk(count).values.tolist(), abs=1e-4)


def test_without_logprobs_no_log_softmax_is_computed(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "log_softmax", lambda *args, **how: pytest.fail("computed for nobody"))
    run_rows(PlainEngine(model), rows_of(2))


def test_scores_of_half_precision_give_the_tokens_of_their_float32_copies() -> None:
    rows = rows_of(1, ((1,),) * 64)
    for dtype in (torch.bfloat16, torch.float16):
        scores = torch.randn(64, 5000, generator=torch.Generator().manual_seed(1)).clamp(max=2.5).to(dtype)
        assert ((scores == scores.amax(-1, keepdim=True)).sum(-1) > 1).all(), "no ties to break"
        assert choose_tokens(scores, rows, [0] * 64).equal(choose_tokens(scores.float(), rows, [0] * 64))


@pytest.mark.parametrize("limits", [PRESSED, PACKED, {"together": True}, {"rows": 1}])
def test_sampled_rows_do_not_depend_on_who_shares_their_passes(model: Any, limits: dict[str, Any]) -> None:
    together, apart = rows_of(temperature=0.9, seed=3), rows_of(temperature=0.9, seed=3)
    run_rows(PlainEngine(model), together)
    run_rows(PlainEngine(model), apart, draw=1, **limits)
    assert [row.generated for row in apart] == [row.generated for row in together]
    assert len({tuple(row.generated) for row in together}) == 4
    assert all(0 <= token < VOCABULARY for row in together for token in row.generated)
