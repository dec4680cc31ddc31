"""What prompts and chats become as tokens."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from zeroinf.generation.row import Sampling
from zeroinf.service.requests import ChatOptions, Request
from zeroinf.service.text import TextCodec

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant"
    "{% if enable_thinking is defined and not enable_thinking %} quiet{% endif %}{% endif %}"
)
WORDS = ("<unk>", "<s>", "<turn>", "user", "assistant", "system", "hi", "there", "quiet")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One that begins texts with <s>, whose vocabulary is WORDS."""
    fast = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        unk_token="<unk>",
        bos_token="<s>",
        additional_special_tokens=["<turn>"],
        chat_template=TEMPLATE,
    )


def codec(tokenizer: Any) -> TextCodec:
    anatomy: Any = SimpleNamespace(vocabulary=len(WORDS), context_limit=None)
    return TextCodec(tokenizer, anatomy)


def request(what: str | list[dict[str, str]], **chat: Any) -> Request:
    prompt, messages = (what, None) if isinstance(what, str) else (None, tuple(what))
    return Request(
        index=0, line=1, id="a", prompt=prompt, messages=messages, sampling=Sampling(max_new_tokens=1),
        chat=ChatOptions(**chat),
    )  # fmt: skip


def words(codec: TextCodec, asked: Request) -> str:
    return " ".join(WORDS[token] for token in codec.tokens(asked))


def test_requests_longer_than_is_taken_are_refused(tokenizer: Any) -> None:
    anatomy: Any = SimpleNamespace(vocabulary=len(WORDS), context_limit=None)
    taking = TextCodec(tokenizer, anatomy, most_tokens=4)
    assert taking.encode(request("hi there")) == [1, 6, 7]
    said = "the prompt has 4 tokens and max_new_tokens is 1, but --max-model-len is 4"
    with pytest.raises(ValueError, match=said):
        taking.encode(request("hi there hi"))


HI = [{"role": "user", "content": "hi"}]


def test_a_prompt_that_was_templated_elsewhere_begins_once(tokenizer: Any) -> None:
    ours = codec(tokenizer)
    assert words(ours, request("hi there")) == "<s> hi there"
    assert (ours.templated, ours.doubled) == (0, 0)
    assert words(ours, request("<s> hi there")) == "<s> hi there"
    assert (ours.templated, ours.doubled) == (1, 1)
    assert words(ours, request("<turn> hi")) == "<s> <turn> hi"
    assert (ours.templated, ours.doubled) == (2, 1)


def test_chats_begin_once_and_end_as_asked(tokenizer: Any) -> None:
    ours = codec(tokenizer)
    assert words(ours, request(HI)) == "<s> user hi assistant"
    assert words(ours, request(HI, add_generation_prompt=False)) == "<s> user hi"
    begun = [*HI, {"role": "assistant", "content": "there"}]
    assert words(ours, request(begun, add_generation_prompt=False, continue_final_message=True)) == (
        "<s> user hi assistant there"
    )
    assert (ours.templated, ours.doubled) == (0, 0)


def test_variables_reach_the_template_and_one_that_it_does_not_read_is_refused(tokenizer: Any) -> None:
    ours = codec(tokenizer)
    assert words(ours, request(HI, variables=(("enable_thinking", "false"),))) == "<s> user hi assistant quiet"
    assert words(ours, request(HI, variables=(("enable_thinking", "true"),))) == "<s> user hi assistant"
    with pytest.raises(ValueError, match="does not read 'reasoning_effort'"):
        ours.tokens(request(HI, variables=(("reasoning_effort", '"low"'),)))


def test_a_text_that_the_tokenizer_does_not_take_is_refused(tokenizer: Any) -> None:
    lacking = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(unk_token="<unk>")))
    with pytest.raises(ValueError, match=r"the tokenizer refuses it: .*not found in the vocabulary"):
        codec(lacking).tokens(request("hi"))


def test_a_chat_without_a_template_is_refused() -> None:
    with pytest.raises(ValueError, match="the model has no chat template"):
        codec(None).tokens(request(HI))


class Counting:
    """A tokenizer that says how many texts it was given at a time."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.counts: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, texts: str | list[str], **settings: Any) -> Any:
        self.counts.append(0 if isinstance(texts, str) else len(texts))
        return self._tokenizer(texts, **settings)


def test_many_prompts_and_chats_are_tokenized_together_and_as_one_by_one(tokenizer: Any) -> None:
    begun = [*HI, {"role": "assistant", "content": "there"}]
    requests = [
        request("hi there"),
        request(HI),
        request("<s> hi there"),
        request(HI, variables=(("enable_thinking", "false"),)),
        request(HI, variables=(("reasoning_effort", '"low"'),)),
        request([{"role": "user", "content": "<s> hi"}]),
        replace(request("hi"), prompt=None, tokens=(5, 6, 7)),
        replace(request(begun), truncate=2),
        replace(request("hi there <turn>"), truncate=2),
        replace(request("hi"), prompt=None, tokens=(99,)),
    ]
    counting = Counting(tokenizer)
    ours, alone = codec(counting), codec(tokenizer)

    def one(asked: Request) -> str:
        try:
            return str(alone.encode(asked))
        except ValueError as error:
            return str(error)

    assert [str(found) for found in ours.encode_all(requests)] == [one(asked) for asked in requests]
    assert (ours.templated, ours.doubled) == (alone.templated, alone.doubled) == (2, 1)
    assert counting.counts == [3, 4]


def test_a_chat_that_the_tokenizer_does_not_take_is_refused(tokenizer: Any) -> None:
    lacking = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(unk_token="<unk>")), chat_template=TEMPLATE)
    (found,) = codec(lacking).encode_all([request(HI)])
    assert isinstance(found, ValueError)
    assert "the tokenizer refuses it" in str(found)
