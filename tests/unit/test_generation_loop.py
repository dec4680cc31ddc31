"""The decode loop and its micro-batches over plain transformers models: the engine is the only fake."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import EOS, PAD, SMALL_MODELS, VOCABULARY, build_model, small_config
from transformers import AutoModelForCausalLM

from zeroinf.distributed.control import Control
from zeroinf.distributed.world import World
from zeroinf.engines.base import EngineStats
from zeroinf.generation.cache import CachePool
from zeroinf.generation.loop import generate
from zeroinf.generation.micro_batch import MicroBatch, TokenRules
from zeroinf.generation.row import Row, Sampling
from zeroinf.generation.sampling import choose_tokens
from zeroinf.model.inspect import read_anatomy

CPU = torch.device("cpu")
PROMPTS = ((5, 6, 7, 8, 9, 10, 11), (20,), (30, 31, 32), (40, 41, 42, 43, 44))


class PlainEngine:
    """A transformers model on this process alone."""

    name = "plain"

    def __init__(self, model: Any, *, in_step: bool = False) -> None:
        self.model = model
        self.in_step = in_step
        self.forwards: list[Mapping[str, Any]] = []

    def forward(self, micro_batches: Sequence[Mapping[str, Any]]) -> list[Any]:
        self.forwards.extend(micro_batches)
        with torch.no_grad():
            return [self.model(**inputs) for inputs in micro_batches]

    def stats(self) -> EngineStats:
        return EngineStats(passes=len(self.forwards), streamed_bytes_per_pass=0)

    def close(self) -> None: ...


class Ranks(Control):
    """What the other ranks say in each round: (busy, stop)."""

    def __init__(self, others: Sequence[tuple[int, int]]) -> None:
        super().__init__(World(), "cpu")
        self.said: list[tuple[int, ...]] = []
        self._others = list(others)

    def ask_most(self, *values: int) -> Callable[[], tuple[int, ...]]:
        other = self._others[len(self.said)]
        self.said.append(values)
        return lambda: tuple(map(max, values, other))


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


def rows_of(prompts: Sequence[Sequence[int]] = PROMPTS, **sampling: Any) -> list[Row]:
    settings = {"max_new_tokens": 12, **sampling}
    return [
        Row(index=i, prompt=prompt, sampling=Sampling(**settings), decode=lambda tokens: " ".join(map(str, tokens)))
        for i, prompt in enumerate(prompts)
    ]


def run(engine: PlainEngine, batches: Sequence[Sequence[Row]], *, control: Control | None = None, **more: Any) -> int:
    left = list(batches)
    return generate(
        engine,
        TokenRules(engine.model, PAD, ()),
        control or Control(World(), "cpu"),
        CachePool(engine.model, read_anatomy(engine.model.config), rows=4, tokens=7 + 12, device=CPU),
        CPU,
        take=lambda: left.pop(0) if left else [],
        done=more.pop("done", lambda row: None),
        **more,
    )


def by_transformers(model: Any, prompts: Sequence[Sequence[int]] = PROMPTS, **options: Any) -> list[list[int]]:
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        ids, attention_mask=mask, do_sample=False, pad_token_id=PAD, **{"max_new_tokens": 12, **options}
    )
    return [list(tokens) for tokens in out[:, width:].tolist()]


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.8}, {"no_repeat_ngram_size": 2}])
def test_greedy_tokens_equal_generate_with_the_models_own_generation_config(
    model: Any, settings: dict[str, float]
) -> None:
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    rows = rows_of()
    run(PlainEngine(model), [rows])
    assert [row.generated for row in rows] == by_transformers(model)


def test_a_repetition_penalty_of_the_generation_config_changes_the_tokens(model: Any) -> None:
    plain, penalised = rows_of(), rows_of()
    run(PlainEngine(model), [plain])
    model.generation_config.repetition_penalty = 1.8
    run(PlainEngine(model), [penalised])
    assert [row.generated for row in plain] != [row.generated for row in penalised]


def test_every_end_token_of_the_generation_config_ends_a_row(model: Any) -> None:
    long = by_transformers(model)
    first, second = long[0][4], long[1][6]
    model.generation_config.eos_token_id = [first, second]
    rows = rows_of()
    run(PlainEngine(model), [rows])
    for row, full in zip(rows, long, strict=True):
        ends = [at for at, token in enumerate(full) if token in (first, second)]
        assert row.generated == (full[: ends[0] + 1] if ends else full)
        assert row.finish_reason == ("stop" if ends else "length")
    assert {row.finish_reason for row in rows} == {"stop", "length"} or len(rows[0].generated) <= 5


def test_the_tokenizers_end_token_counts_where_the_generation_config_has_none() -> None:
    config = SimpleNamespace(eos_token_id=None, do_sample=True, min_new_tokens=None, min_length=None)
    rules = TokenRules(SimpleNamespace(generation_config=config), None, (EOS,))
    assert rules.eos_tokens == {EOS}
    assert rules.pad_token == EOS


def test_ignored_end_tokens_leave_the_tokens_as_they_are(model: Any) -> None:
    long = by_transformers(model)
    model.generation_config.eos_token_id = [long[0][4]]
    rows = rows_of(ignore_eos=True)
    run(PlainEngine(model), [rows])
    assert [len(row.generated) for row in rows] == [12] * 4
    assert rows[0].generated == long[0]


def test_rows_of_one_batch_may_have_lengths_of_their_own(model: Any) -> None:
    long = by_transformers(model)
    lengths = (3, 12, 1, 7)
    rows = [rows_of(max_new_tokens=length)[i] for i, length in enumerate(lengths)]
    ended: list[int] = []
    engine = PlainEngine(model)
    run(engine, [rows], done=lambda row: ended.append(row.index))
    assert [row.generated for row in rows] == [full[:length] for full, length in zip(long, lengths, strict=True)]
    assert ended == [2, 0, 3, 1], "each row is handed back when it ends"
    assert len(engine.forwards) == 12


class WatchfulEngine(PlainEngine):
    """Notes how many tokens the rows have each time that a forward is started."""

    def __init__(self, model: Any, rows: Sequence[Row]) -> None:
        super().__init__(model)
        self.known: list[list[int]] = []
        self._rows = rows

    def forward(self, micro_batches: Sequence[Mapping[str, Any]]) -> list[Any]:
        self.known.append([len(row.generated) for row in self._rows])
        return super().forward(micro_batches)


def test_a_forward_is_started_before_the_last_tokens_are_read_while_a_row_surely_goes_on(model: Any) -> None:
    rows = [rows_of(ignore_eos=True, max_new_tokens=length)[i] for i, length in enumerate((6, 2))]
    engine = WatchfulEngine(model, rows)
    run(engine, [rows])
    assert engine.known == [[0, 0], [0, 0], [1, 1], [2, 2], [3, 2], [4, 2]]
    assert [len(row.generated) for row in rows] == [6, 2]


def test_no_forward_is_started_on_tokens_that_may_end_every_row(model: Any) -> None:
    rows = [
        *rows_of(PROMPTS[:1], max_new_tokens=4),
        *rows_of(PROMPTS[1:2], max_new_tokens=4, ignore_eos=True, stop=("x",)),
    ]
    engine = WatchfulEngine(model, rows)
    run(engine, [rows])
    assert engine.known == [[0, 0], [1, 1], [2, 2], [3, 3]]


def test_tokens_that_are_read_late_are_the_same(model: Any) -> None:
    """The first row lets forwards be started early; the others end by an end token on the way."""
    long = by_transformers(model)
    model.generation_config.eos_token_id = [long[1][3], long[2][5]]
    rows = [*rows_of(ignore_eos=True)[:1], *rows_of()[1:]]
    engine = PlainEngine(model)
    run(engine, [rows])
    read_at_once = rows_of()
    model.generation_config.eos_token_id = [long[1][3], long[2][5]]
    run(PlainEngine(model), [read_at_once])
    assert rows[0].generated == long[0]
    assert [row.generated for row in rows[1:]] == [row.generated for row in read_at_once[1:]]
    assert {row.finish_reason for row in rows} == {"stop", "length"}
    assert len(engine.forwards) == 12


def test_tokens_chosen_before_a_stop_are_not_lost(model: Any) -> None:
    rows = [rows_of(ignore_eos=True, max_new_tokens=length)[i] for i, length in enumerate((9, 3))]
    engine, ended = PlainEngine(model), []
    run(engine, [rows], stop_requested=lambda: 2 if len(engine.forwards) == 3 else 0, done=ended.append)
    assert [len(row.generated) for row in rows] == [3, 3]
    assert ended == [rows[1]]


class ForgetfulEngine(PlainEngine):
    """Looks whether anybody still holds logits of a forward when the next one begins."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.held = 0
        self._logits: weakref.ref[torch.Tensor] | None = None

    def forward(self, micro_batches: Sequence[Mapping[str, Any]]) -> list[Any]:
        self.held += self._logits is not None and self._logits() is not None
        outputs = super().forward(micro_batches)
        self._logits = weakref.ref(outputs[0].logits)
        return outputs


@pytest.mark.parametrize("settings", [{}, {"ignore_eos": True}, {"temperature": 1.0, "ignore_eos": True}])
def test_logits_are_gone_before_the_next_forward_begins(model: Any, settings: dict[str, Any]) -> None:
    engine = ForgetfulEngine(model)
    run(engine, [rows_of(**settings)])
    assert len(engine.forwards) == 12
    assert engine.held == 0


def test_only_the_last_position_is_asked_for_and_only_new_tokens_are_fed(model: Any) -> None:
    engine = PlainEngine(model)
    run(engine, [rows_of()])
    assert [inputs["input_ids"].shape for inputs in engine.forwards] == [(4, 7)] + [(4, 1)] * 11
    assert all(inputs["logits_to_keep"] == 1 for inputs in engine.forwards)


def test_what_grows_is_what_is_generated(model: Any) -> None:
    grown: list[int] = []
    rows = [rows_of(max_new_tokens=length)[i] for i, length in enumerate((2, 5, 1, 3))]
    run(PlainEngine(model), [rows], grew=grown.append)
    assert grown == [4, 3, 2, 1, 1]
    assert sum(grown) == sum(len(row.generated) for row in rows)


def test_batches_are_taken_one_after_the_other_until_none_is_left(model: Any) -> None:
    batches = [rows_of(PROMPTS[:2]), rows_of(PROMPTS[2:]), rows_of(PROMPTS[:1])]
    assert run(PlainEngine(model), batches) == 0
    assert all(row.finished for batch in batches for row in batch)


def test_a_stop_ends_the_loop_between_forwards_with_rows_unfinished(model: Any) -> None:
    engine, rows = PlainEngine(model), rows_of()
    stopped = run(engine, [rows], stop_requested=lambda: 15 if len(engine.forwards) == 3 else 0)
    assert stopped == 15
    assert [len(row.generated) for row in rows] == [3] * 4


def test_an_idle_rank_keeps_the_others_company_until_all_are_done(model: Any) -> None:
    engine, ranks = PlainEngine(model, in_step=True), Ranks([(1, 0)] * 5 + [(0, 0)] * 2)
    assert run(engine, [], control=ranks) == 0
    assert [inputs["input_ids"].shape for inputs in engine.forwards] == [(1, 1)] * 5


def test_a_rank_that_ran_dry_keeps_company_after_its_own_rows(model: Any) -> None:
    engine, ranks = PlainEngine(model, in_step=True), Ranks([(1, 0)] * 9 + [(0, 0)] * 2)
    rows = rows_of(max_new_tokens=4)
    run(engine, [rows], control=ranks)
    assert all(row.finished for row in rows)
    assert [inputs["input_ids"].shape[0] for inputs in engine.forwards] == [4] * 4 + [1] * 5


def test_a_stop_on_another_rank_stops_this_one_in_the_same_round(model: Any) -> None:
    engine, ranks = PlainEngine(model, in_step=True), Ranks([(1, 0), (1, 0), (1, 2)])
    assert run(engine, [rows_of()], control=ranks) == 2
    assert len(engine.forwards) == 2


def test_ranks_in_step_make_no_forward_in_vain_where_rows_end_by_length(model: Any) -> None:
    engine, ranks = PlainEngine(model, in_step=True), Ranks([(0, 0)] * 9)
    assert run(engine, [rows_of(max_new_tokens=4), rows_of(max_new_tokens=2)], control=ranks) == 0
    assert [inputs["input_ids"].shape for inputs in engine.forwards] == [(4, 7)] + [(4, 1)] * 3 + [(4, 7), (4, 1)]


def test_a_last_row_that_may_end_at_any_token_makes_ranks_ask_before_each_forward(model: Any) -> None:
    full = by_transformers(model, PROMPTS[:1])[0]
    model.generation_config.eos_token_id = [full[3]]
    engine, ranks = PlainEngine(model, in_step=True), Ranks([(0, 0)] * 20)
    run(engine, [rows_of(PROMPTS[:1])], control=ranks)
    assert len(engine.forwards) == full.index(full[3]) + 1
    assert [busy for busy, _ in ranks.said] == [1, 0] * len(engine.forwards) + [0]


def test_rows_that_all_end_unexpectedly_cost_ranks_in_step_one_forward_of_company(model: Any) -> None:
    full = by_transformers(model, PROMPTS[:1])[0]
    model.generation_config.eos_token_id = [full[3]]
    engine, ranks = PlainEngine(model, in_step=True), Ranks([(0, 0)] * 20)
    run(engine, [rows_of(PROMPTS[:1] * 2)], control=ranks)
    assert [inputs["input_ids"].shape[0] for inputs in engine.forwards] == [2] * (full.index(full[3]) + 1) + [1]


def test_an_engine_whose_ranks_need_not_step_together_asks_nobody_and_keeps_no_company(model: Any) -> None:
    engine, ranks = PlainEngine(model, in_step=False), Ranks([])
    run(engine, [rows_of(max_new_tokens=3)], control=ranks)
    assert ranks.said == []
    assert len(engine.forwards) == 3


@pytest.mark.parametrize("name", sorted(SMALL_MODELS))
def test_inputs_of_a_decode_step_are_those_that_the_model_would_prepare(name: str) -> None:
    model = build_model(name)
    for prompts in (PROMPTS, ((5, 6, 7), (8, 9, 10))):
        rows, pool = (
            rows_of(prompts, max_new_tokens=3),
            CachePool(model, read_anatomy(model.config), rows=4, tokens=10, device=CPU),
        )
        batch = MicroBatch(model, rows, TokenRules(model, PAD, ()), pool, CPU)
        for _ in range(3):
            inputs, prepared = batch.inputs(), batch._inputs_by_the_model()
            assert inputs.keys() == prepared.keys()
            for key, value in prepared.items():
                assert torch.equal(inputs[key], value) if isinstance(value, torch.Tensor) else inputs[key] is value
            with torch.no_grad():
                batch.choose(model(**inputs))
            batch.accept(lambda row: None)


def test_rotary_factors_that_change_on_the_way_make_all_tokens_run_again_in_the_same_memory() -> None:
    config = small_config("phi3")
    config.original_max_position_embeddings = 12
    factors = {"short_factor": [1.0] * 8, "long_factor": [3.0] * 8, "original_max_position_embeddings": 12}
    config.rope_parameters = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    rows, engine = rows_of(PROMPTS[:1]), PlainEngine(model)
    run(engine, [rows])
    assert [inputs["input_ids"].shape[1] for inputs in engine.forwards] == [7] + [1] * 5 + [13] + [1] * 5
    expected = list(PROMPTS[0])
    with torch.no_grad():
        for _ in range(12):
            expected.append(model(torch.tensor([expected]), use_cache=False).logits[0, -1].argmax().item())
    assert rows[0].generated == expected[7:]


def test_scores_of_half_precision_give_the_tokens_of_their_float32_copies() -> None:
    rows = rows_of(((1,),) * 64)
    for dtype in (torch.bfloat16, torch.float16):
        scores = torch.randn(64, 5000, generator=torch.Generator().manual_seed(1)).clamp(max=2.5).to(dtype)
        assert ((scores == scores.amax(-1, keepdim=True)).sum(-1) > 1).all(), "no ties to break"
        assert choose_tokens(scores, rows).equal(choose_tokens(scores.float(), rows))


def test_sampled_rows_do_not_depend_on_who_shares_their_batch(model: Any) -> None:
    """The prompts are equally long: padding would change the last bits of the scores."""
    prompts = [(7 + i, 8, 9) for i in range(4)]
    together = rows_of(prompts, temperature=0.9, seed=3)
    run(PlainEngine(model), [together])
    apart = rows_of(prompts, temperature=0.9, seed=3)
    run(PlainEngine(model), [[apart[3]], [apart[1], apart[0]], [apart[2]]])
    assert [row.generated for row in apart] == [row.generated for row in together]
    assert len({tuple(row.generated) for row in together}) == 4
    assert all(0 <= token < VOCABULARY for row in together for token in row.generated)
