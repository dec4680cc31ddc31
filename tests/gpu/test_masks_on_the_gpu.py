"""Masks of structured answers reach the GPU from page-locked memory: the tokens are those of a run on the CPU."""

from __future__ import annotations

import pytest
from generating import PlainEngine, anatomy_of, run_rows
from small_models import EOS, VOCABULARY, build_model, build_tokenizer

from zeroinf.generation.row import Row, Sampling
from zeroinf.service.text import TextCodec
from zeroinf.structured.answer_format import of_choices, of_regex, of_schema
from zeroinf.structured.matcher import AnswerState, Vocabulary

pytestmark = pytest.mark.gpu

FORMATS = (of_regex("[a-f]{9}"), None, of_choices(["yes", "no"]), of_schema({"type": "array", "maxItems": 0}), None)


def generated(device: str, **limits: int) -> list[tuple[str | None, list[int]]]:
    model = build_model("llama").to(device)
    codec = TextCodec(build_tokenizer(), anatomy_of(model))
    vocabulary = Vocabulary(codec.piece, VOCABULARY, codec.special_tokens, {EOS})
    rows = [
        Row(
            index=number,
            prompt=[5 + number % 5, 9, 8],
            sampling=Sampling(max_new_tokens=24, answer_format=asked),
            decode=codec.decode_as_it_is,
            piece=codec.piece,
            answer=None if asked is None else AnswerState(vocabulary, asked),
        )
        for number, asked in enumerate(FORMATS * 20)
    ]
    run_rows(PlainEngine(model), rows, **limits)
    return [(row.finish_reason, row.generated) for row in rows]


@pytest.mark.parametrize("limits", [{"rows": 16, "micro_batch_rows": 8}, {"rows": 100}, {"forward_tokens": 64}])
def test_tokens_with_a_format_are_those_of_a_run_on_the_cpu(limits: dict[str, int]) -> None:
    assert generated("cuda", **limits) == generated("cpu", **limits)
