"""A row's sample is its own, and its distribution is the one that was asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from zeroinf.generation.row import Row, Sampling
from zeroinf.generation.sampling import alter_scores, choose_tokens

VOCABULARY = 50


def scores_of(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2


def row(index: int = 0, **sampling: object) -> Row:
    return Row(
        index=index,
        prompt=(1,),
        sampling=Sampling(**{"max_new_tokens": 1000, "temperature": 1.0, **sampling}),  # type: ignore[arg-type]
        decode=str,
    )


def draws(rows: Sequence[Row], scores: torch.Tensor, steps: int) -> list[list[int]]:
    """Each row's tokens over `steps` draws from the same scores."""
    chosen = (choose_tokens(scores, rows, [number] * len(rows)).tolist() for number in range(steps))
    return [list(tokens) for tokens in zip(*chosen, strict=True)]


def test_greedy_rows_take_the_highest_score_whatever_their_seed() -> None:
    scores = scores_of(3)
    rows = [row(i, temperature=0.0, seed=i) for i in range(3)]
    assert choose_tokens(scores, rows, [0] * 3).tolist() == scores.argmax(-1).tolist()


def test_same_seed_and_place_give_the_same_sample_and_others_another() -> None:
    scores = scores_of(1)

    def sample(index: int, seed: int) -> list[int]:
        return draws([row(index, seed=seed)], scores, 40)[0]

    assert sample(0, 7) == sample(0, 7)
    assert sample(0, 7) != sample(0, 8)
    assert sample(0, 7) != sample(1, 7)


def test_a_rows_sample_does_not_depend_on_its_neighbours_or_their_order() -> None:
    scores = scores_of(4)
    kinds = [{"seed": 1}, {"temperature": 0.7, "top_k": 5}, {"temperature": 0.0}, {"top_p": 0.8, "seed": 3}]

    def rows() -> list[Row]:
        return [row(i, **kind) for i, kind in enumerate(kinds)]

    together = draws(rows(), scores, 30)
    order = [2, 0, 3, 1]
    shuffled = draws([rows()[i] for i in order], scores[order], 30)
    assert [shuffled[order.index(i)] for i in range(4)] == together
    alone = [draws([rows()[i]], scores[i : i + 1], 30)[0] for i in range(4)]
    assert alone == together


def test_top_k_of_one_is_greedy_at_any_temperature() -> None:
    scores = scores_of(1)
    assert set(draws([row(temperature=5.0, top_k=1)], scores, 50)[0]) == {scores.argmax().item()}


@pytest.mark.parametrize(
    ("sampling", "warpers"),
    [
        ({}, []),
        ({"temperature": 0.5}, [TemperatureLogitsWarper(0.5)]),
        ({"temperature": 1.7}, [TemperatureLogitsWarper(1.7)]),
        ({"top_k": 4}, [TopKLogitsWarper(4)]),
        ({"top_p": 0.6}, [TopPLogitsWarper(0.6)]),
        (
            {"temperature": 1.4, "top_k": 9, "top_p": 0.7},
            [TemperatureLogitsWarper(1.4), TopKLogitsWarper(9), TopPLogitsWarper(0.7)],
        ),
    ],
)
def test_tokens_are_drawn_from_the_distribution_of_transformers_own_filters(
    sampling: dict[str, float], warpers: list[object]
) -> None:
    scores, count = scores_of(1, seed=5), 4000
    wanted = LogitsProcessorList(warpers)(None, scores.clone()).softmax(-1)[0]
    found = Counter(draws([row(**sampling)], scores, count)[0])
    assert all(wanted[token] > 0 for token in found), "a token that the filters take out"
    # Pearson's statistic over the tokens that are expected five times or more, and the rest as one.
    often = [token for token in range(VOCABULARY) if wanted[token] * count >= 5]
    cells = [(found[token], float(wanted[token]) * count) for token in often]
    rest = count - sum(expected for _, expected in cells)
    if rest >= 5:
        cells.append((count - sum(observed for observed, _ in cells), rest))
    statistic = sum((observed - expected) ** 2 / expected for observed, expected in cells)
    # Mean k - 1 and variance 2 (k - 1) where the distribution is right; five deviations of room, and seeds are fixed.
    freedom = len(cells) - 1
    assert freedom > 0
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_a_random_number_at_either_end_still_gives_a_token_with_a_probability(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scores = torch.full((1, VOCABULARY), -torch.inf)
    scores[0, 3] = scores[0, 9] = 0.0
    for uniform, token in ((0.0, 3), (0.49, 3), (0.51, 9), (1.0 - 2**-53, 9)):
        monkeypatch.setattr(Row, "draw", lambda self, number, uniform=uniform: uniform)
        assert choose_tokens(scores, [row()], [0]).tolist() == [token]


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_new_tokens", 0), ("temperature", -0.1), ("temperature", 101), ("top_p", 0.0), ("top_p", 1.1), ("top_k", -1)],
)
def test_a_setting_out_of_range_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        Sampling(**{"max_new_tokens": 1, field: value})  # type: ignore[arg-type]


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="stop"):
        Sampling(max_new_tokens=1, stop=("a", ""))


# Scores


def altered(scores: torch.Tensor, rows: Sequence[Row], generated: Sequence[Sequence[int]]) -> torch.Tensor:
    """`scores` as the rows want them, which have `generated` tokens, padded by a token of nobody."""
    known = [[*row.prompt, *tokens] for row, tokens in zip(rows, generated, strict=True)]
    width = max(map(len, known)) + 2
    ids = torch.tensor([[*tokens, *[VOCABULARY - 1] * (width - len(tokens))] for tokens in known])
    return alter_scores(scores, rows, ids, list(map(len, known)), frozenset({0, 10**6}))


def test_scores_of_rows_that_ask_for_nothing_are_left_as_they_are() -> None:
    scores = scores_of(2).to(torch.bfloat16)
    assert alter_scores(scores, [row(), row()], torch.ones(2, 3, dtype=torch.int64), [3, 3], frozenset({0})) is scores
    mixed = altered(scores, [row(), row(presence_penalty=1.0)], [[5], [5]])
    assert torch.equal(mixed[0], scores[0].float())


def test_penalties_count_what_was_generated_once_or_each_time() -> None:
    scores = scores_of(3)
    rows = [row(presence_penalty=0.5), row(frequency_penalty=0.25), row(frequency_penalty=-1.0, presence_penalty=2.0)]
    found = altered(scores, rows, [[7, 7, 1], [7, 7, 9], []])
    wanted = scores.clone()
    wanted[0, [7, 1]] -= 0.5
    wanted[1, 7] -= 0.5
    wanted[1, 9] -= 0.25
    assert torch.allclose(found, wanted)  # the prompt's own token, 1, counts where it was generated only


def test_the_repetition_penalty_is_transformers_own() -> None:
    scores = scores_of(2)
    rows = [row(repetition_penalty=1.7), row(repetition_penalty=0.6)]
    found = altered(scores, rows, [[3, 3, 8, 20], [5]])
    for number, (penalty, ids) in enumerate(((1.7, [1, 3, 3, 8, 20]), (0.6, [1, 5]))):
        own = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids]), scores[number : number + 1].clone())
        assert torch.equal(found[number], own[0])


def test_biases_move_scores_and_tokens_that_end_wait_for_the_least_length() -> None:
    scores = scores_of(2)
    rows = [row(logit_bias=((4, 100.0), (5, -100.0))), row(min_tokens=2, stop_token_ids=(8,))]
    found = altered(scores, rows, [[3], [3]])
    assert found[0].argmax() == 4 and found[0, 5] == scores[0, 5] - 100
    assert found[1, [0, 8]].tolist() == [-torch.inf, -torch.inf]
    assert found[1, 1:8].equal(scores[1, 1:8])
    assert altered(scores, rows, [[3], [3, 3]])[1].equal(scores[1])


def test_min_p_draws_only_from_tokens_near_the_likeliest() -> None:
    scores = scores_of(1)
    allowed = MinPLogitsWarper(0.3)(torch.tensor([[1]]), scores.clone())[0].isfinite()
    drawn = set(draws([row(min_p=0.3)], scores, 300)[0])
    assert drawn == set(allowed.nonzero().flatten().tolist())
