"""Rows whose answers have a format, run through the decode loop beside others: their tokens are the likeliest ones that
the format allows, whatever they run beside, and masks are made while passes run."""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from generating import PlainEngine, anatomy_of, run_rows
from small_models import EOS, VOCABULARY, build_model, build_tokenizer

from zeroinf.generation.row import Row, Sampling
from zeroinf.service.text import TextCodec
from zeroinf.structured.answer_format import AnswerFormat, of_choices, of_regex, of_schema
from zeroinf.structured.matcher import AnswerState, Vocabulary

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "tags": {"type": "array", "items": {"enum": ["é", "b"]}, "minItems": 1, "maxItems": 2},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "tags", "age"],
    "additionalProperties": False,
}
NUMBER = re.compile(r"[0-9]{3}-[a-f]{2}")
FORMATS: tuple[AnswerFormat | None, ...] = (
    of_schema(SCHEMA),
    None,
    of_choices(["yes", "no", "perhaps", "ja 😀"]),
    of_regex(NUMBER.pattern),
    None,
    of_schema({"type": "object", "maxProperties": 0}),
)
MOST = 60
SPACES = tuple((build_tokenizer().convert_tokens_to_ids(name), -50.0) for name in "ĉĊčĠ")
"""Random models like white space as well as anything."""


@pytest.fixture(scope="module")
def model() -> Any:
    return build_model("llama")


@pytest.fixture(scope="module")
def codec(model: Any) -> TextCodec:
    return TextCodec(build_tokenizer(), anatomy_of(model))


def made(codec: TextCodec, formats: Sequence[AnswerFormat | None] = FORMATS, **sampling: Any) -> list[Row]:
    sampling = {"logit_bias": SPACES, **sampling}
    vocabulary = Vocabulary(codec.piece, VOCABULARY, codec.special_tokens, {EOS})
    return [
        Row(
            index=number,
            prompt=[5 + number, 9, 8][: 1 + number % 3],
            sampling=Sampling(**{"max_new_tokens": MOST if asked else 12, "answer_format": asked, **sampling}),
            decode=codec.decode_as_it_is,
            piece=codec.piece,
            answer=None if asked is None else AnswerState(vocabulary, asked),
        )
        for number, asked in enumerate(formats)
    ]


def check(rows: Sequence[Row]) -> None:
    """Every answer has the format that its row asks for."""
    texts = [row.text for row in rows]
    assert [row.finish_reason for row in rows if row.answer is not None] == ["stop"] * 4
    jsonschema.validate(json.loads(texts[0]), SCHEMA)
    assert texts[2] in ("yes", "no", "perhaps", "ja 😀")
    assert NUMBER.fullmatch(texts[3])
    assert json.loads(texts[5]) == {}


def likeliest(model: Any, row: Row) -> list[int]:
    """As many tokens as the row has, each the likeliest that its format allows: the row alone, no cache."""
    assert row.answer is not None
    asked, found = AnswerState(row.answer.vocabulary, row.sampling.answer_format), list[int]()
    mask = np.zeros((1, asked.vocabulary.words), np.int64)
    while len(found) < len(row.generated):
        asked.vocabulary.fill([(asked, 0)], mask.ctypes.data, 1)
        allowed = torch.from_numpy(np.unpackbits(mask.view(np.uint8), bitorder="little")[:VOCABULARY]).bool()
        with torch.no_grad():
            scores = model(torch.tensor([[*row.prompt, *found]])).logits[0, -1]
        for token, bias in SPACES:
            scores[token] += bias
        found.append(int(scores.masked_fill(~allowed, -torch.inf).argmax()))
        asked.vocabulary.take([(asked, found[-1])])
    return found


@pytest.mark.parametrize(
    "limits",
    [{}, {"micro_batch_rows": 2}, {"forward_tokens": 16}, {"rows": 2}, {"prefill_tokens": 2}, {"runs_ahead": True}],
)
def test_tokens_are_the_likeliest_that_the_format_allows(model: Any, codec: TextCodec, limits: dict[str, int]) -> None:
    rows, free = made(codec), made(codec, [None] * len(FORMATS))
    run_rows(PlainEngine(model), rows, **limits)
    run_rows(PlainEngine(model), free, **limits)
    check(rows)
    for row, other in zip(rows, free, strict=True):
        assert row.generated == (other.generated if row.answer is None else likeliest(model, row))


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.5, "top_p": 0.9, "min_p": 0.01, "seed": 3},
        {"presence_penalty": 0.5, "repetition_penalty": 1.3, "logit_bias": (*SPACES, (40, 3.0))},
        {"temperature": 0.7, "top_k": 3, "frequency_penalty": 0.2, "logprobs": 2},
    ],
)
def test_an_answer_is_the_same_alone_and_beside_others(model: Any, codec: TextCodec, sampling: dict[str, Any]) -> None:
    together, alone = made(codec, **sampling), made(codec, **sampling)
    run_rows(PlainEngine(model), together, rows=3, micro_batch_rows=2)
    check(together)
    for row, other in zip(alone, together, strict=True):
        run_rows(PlainEngine(model), [row])
        assert (row.generated, row.text) == (other.generated, other.text)
        assert row.sampling.logprobs is None or len(row.likelihoods) == len(row.generated)


class TightEngine(PlainEngine):
    """Every fifth pass runs out of memory."""

    failed = 0

    def forward(self, micro_batches: Sequence[Mapping[str, Any]]) -> list[Any]:
        outputs = super().forward(micro_batches)
        if len(self.passes) % 5 == 4 and max(map(math.prod, self.passes[-1])) > 1:
            self.failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return outputs


@pytest.mark.parametrize(("name", "given"), [("llama", {}), ("llama", {"forward_tokens": 16}), ("lfm2", {})])
def test_answers_go_on_after_passes_that_ran_out_of_memory(name: str, given: dict[str, int], codec: TextCodec) -> None:
    model = build_model(name)
    expected, rows = made(codec), made(codec)
    run_rows(PlainEngine(model), expected, **given)
    engine = TightEngine(model)
    run_rows(engine, rows, **given)
    check(rows)
    assert [row.generated for row in rows] == [row.generated for row in expected]
    assert engine.failed > 1


class WaitingEngine(PlainEngine):
    """A pass ends only when the masks for the choice behind it are there."""

    def __init__(self, model: Any, filled: threading.Semaphore) -> None:
        super().__init__(model)
        self._filled = filled

    def forward(self, micro_batches: Sequence[Mapping[str, Any]]) -> list[Any]:
        outputs = super().forward(micro_batches)
        assert self._filled.acquire(timeout=60), "masks are made between passes"
        return outputs


def test_masks_are_made_while_passes_run(model: Any, codec: TextCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    filled, fill = threading.Semaphore(0), Vocabulary.fill

    def fill_and_tell(*given: Any) -> None:
        fill(*given)
        filled.release()

    monkeypatch.setattr(Vocabulary, "fill", fill_and_tell)
    rows = made(codec)
    run_rows(WaitingEngine(model, filled), rows)
    check(rows)


def test_what_is_cut_ends_with_its_length_unless_it_is_complete(model: Any, codec: TextCodec) -> None:
    formats = [of_schema(SCHEMA), of_choices(["ab"]), of_choices(["abc"])]
    rows = made(codec, formats, max_new_tokens=2)
    run_rows(PlainEngine(model), rows)
    assert [row.finish_reason for row in rows] == ["length", "stop", "length"]
    assert rows[1].text == "ab"
    assert rows[2].text == "ab"


def test_a_format_that_the_vocabulary_cannot_write_is_an_error_of_its_row(model: Any, codec: TextCodec) -> None:
    rows = made(codec, [of_choices(["xy"]), None, of_choices(["12"])])
    digits = Vocabulary(lambda token: piece if (piece := codec.piece(token) or b"").isdigit() else None, 384, (), {EOS})
    for row in (rows[0], rows[2]):
        row.answer = AnswerState(digits, row.sampling.answer_format)  # type: ignore[arg-type]
    free = made(codec, [None] * 2)[1]
    run_rows(PlainEngine(model), rows)
    run_rows(PlainEngine(model), [free])
    assert (rows[0].finish_reason, rows[2].text) == ("error", "12")
    assert "none of the model's tokens" in rows[0].problem
    assert rows[1].generated == free.generated


def test_scores_that_are_no_numbers_are_not_blamed_on_the_format(codec: TextCodec) -> None:
    broken = build_model("llama")
    broken.lm_head.weight.data[7] = float("nan")
    rows = made(codec, [of_choices(["xy"])])
    run_rows(PlainEngine(broken), rows)
    assert (rows[0].finish_reason, rows[0].problem) == ("error", "")


@pytest.mark.parametrize("ends", [{"stop": ("a",)}, {"stop_token_ids": (7,)}, {"ignore_eos": True}, {"min_tokens": 2}])
def test_nothing_else_says_where_an_answer_with_a_format_ends(ends: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(ends))} with response_format"):
        Sampling(max_new_tokens=4, answer_format=of_regex("a"), **ends)
