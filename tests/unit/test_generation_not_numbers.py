"""A row whose scores are not numbers never becomes text, and its neighbours and successors never learn of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from generating import PlainEngine, greedy_by_transformers, rows_of, run_rows
from small_models import VOCABULARY, build_model

NAN, INF = float("nan"), float("inf")
BAD = 300
# Bad rows begin with what is bad, end with it or have it in their midst; later rows take their pages.
LENGTHS = ((7, 6), (1, 9), (20, 3), (12, 5), (3, 12), (9, 8), (18, 14), (5, 9), (30, 2))
BAD_AT = {0: 0, 3: 5, 5: 8, 6: 0}
MIXED = {"draw": 2, "rows": 5, "pages": 3, "host_tokens": 80, "micro_batch_rows": 2, "prefill_tokens": 8}
WAYS = {
    "pages": {"draw": 2, "rows": 4, "pages": 7, "micro_batch_rows": 3, "prefill_tokens": 40},
    "host and pages": MIXED,
    "host": {**MIXED, "pages": 0},
    "static": {"draw": 3, "rows": 3, "static": True},
    "packed": {"draw": 2, "rows": 4, "pages": 7, "prefill_tokens": 40, "forward_tokens": 25},
}


def damaged(name: str, bad: int = BAD) -> Any:
    """A model for which the token `bad` is no number."""

    def damage(module: Any, given: Any, found: torch.Tensor) -> torch.Tensor:
        return found.masked_fill((given[0] == bad)[..., None], NAN)

    model = build_model(name)
    model.get_input_embeddings().register_forward_hook(damage)
    return model


@pytest.mark.parametrize(
    ("name", "way"), [*(("llama", way) for way in WAYS), ("gemma2", "pages"), ("mixtral", "host"), ("lfm2", "static")]
)
def test_rows_that_go_bad_end_in_error_and_all_others_get_the_tokens_that_they_get_alone(name: str, way: str) -> None:
    model = damaged(name)
    prompts = [[3 + (7 * row + 11 * at) % (BAD - 3) for at in range(n)] for row, (n, _) in enumerate(LENGTHS)]
    for row, at in BAD_AT.items():
        prompts[row][at] = BAD
    rows = rows_of(prompts, [new for _, new in LENGTHS], ignore_eos=True)
    run_rows(PlainEngine(model), rows, **WAYS[way])
    for row in rows:
        if row.index in BAD_AT:
            assert (row.finish_reason, row.text, row.generated) == ("error", "", [])
        else:
            assert len(row.generated) == row.sampling.max_new_tokens
            assert row.generated == greedy_by_transformers(model, row.prompt, row.generated)


def test_a_row_that_goes_bad_on_its_way_has_no_text_and_grows_no_more() -> None:
    plain, grown = rows_of(((5, 6, 7), (20, 21)), 9), list[int]()
    run_rows(PlainEngine(build_model("llama")), plain)
    bad = plain[0].generated[4]
    assert bad not in (*plain[0].generated[:4], *plain[1].generated), "choose another prompt"
    rows = rows_of(((5, 6, 7), (20, 21)), 9)
    run_rows(PlainEngine(damaged("llama", bad)), rows, grew=grown.append)
    assert (rows[0].finish_reason, rows[0].text, rows[0].generated) == ("error", "", plain[0].generated[:5])
    assert (rows[1].text, rows[1].finish_reason) == (plain[1].text, "length")
    assert sum(grown) == 5 + 9


class Overwriting(PlainEngine):
    """Every row's first scores are as it says: the score of each token, and that of one of them."""

    first = ((None, -INF), (None, INF), (None, NAN), (-INF, -INF), (-INF, 1.0))

    def forward(self, micro_batches: Sequence[Mapping[str, Any]]) -> list[Any]:
        outputs = super().forward(micro_batches)
        for row, (every, one) in enumerate(self.first if len(self.passes) == 1 else ()):
            scores = outputs[0].logits[row, -1]
            scores[:] = scores if every is None else every
            scores[BAD] = one
        return outputs


@pytest.mark.parametrize(
    "how", [{}, {"logprobs": 2}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 5, "top_p": 0.9}]
)
def test_infinite_scores_are_no_numbers_but_what_is_ruled_out_may_be(how: dict[str, Any]) -> None:
    rows, engine = rows_of([(5 + row, 6) for row in range(5)], 3, **how), Overwriting(build_model("llama"))
    with torch.inference_mode():
        run_rows(engine, rows)
    assert [row.finish_reason for row in rows] == ["length", "error", "error", "error", "length"]
    assert [len(row.generated) for row in rows] == [3, 0, 0, 0, 3]
    assert rows[4].generated[0] == BAD != rows[0].generated[0]
    fed = torch.cat([inputs["input_ids"].flatten() for inputs in engine.asked])
    assert ((fed >= 0) & (fed < VOCABULARY)).all()


def test_a_generation_config_that_removes_invalid_values_lets_a_row_go_on_as_transformers_does() -> None:
    model = build_model("llama")
    head = model.lm_head

    def spoil(module: Any, given: Any, found: torch.Tensor) -> torch.Tensor:
        return found.index_fill(-1, torch.tensor([9, 11]), NAN)

    head.register_forward_hook(spoil)
    model.generation_config.remove_invalid_values = True
    (row,) = rows = rows_of(((5, 6, 7),), 6)
    run_rows(PlainEngine(model), rows)
    theirs = model.generate(torch.tensor([row.prompt]), do_sample=False, max_new_tokens=6)
    assert row.finish_reason == "length" and row.generated == theirs[0, 3:].tolist()
