"""Stop strings against transformers' StopStringCriteria: the same tokens, for tokenizers of every kind."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small_models import build_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, StopStringCriteria

from zeroinf.generation.row import Row, Sampling
from zeroinf.model.demo import demo_file
from zeroinf.model.gguf.convert import convert_gguf
from zeroinf.service.streaming import TextStream
from zeroinf.service.text import TextCodec
from zeroinf.service.token_bytes import TokenBytes
from zeroinf.structured.answer_format import of_regex
from zeroinf.structured.matcher import AnswerState, Vocabulary

TEXT = "The fox — über 日本.\n\n<|im_end|>\n<|im_start|>user\nHi 🙂!! don't <s>[a]</s>, stop <|endoftext|> of it"


def demo() -> Any:
    return AutoTokenizer.from_pretrained(convert_gguf(demo_file()))


def with_byte_fallback() -> Any:
    """As Llama's: spaces are marked in the tokens, and what has no token is spelt in bytes."""
    words = [*sorted({*TEXT.replace(" ", "▁")} - {*"日🙂ü"}), "▁the", "▁st", "op", "▁fo", "on", "'t"]
    pieces = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *words]
    merges = [("▁f", "o"), ("o", "p"), ("o", "n")]
    model = models.BPE(
        vocab={piece: i for i, piece in enumerate([*pieces, "▁f"])},
        merges=[("▁", "f"), *merges],
        byte_fallback=True,
        unk_token="<unk>",
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = pytest.mark.parametrize("make", [demo, build_tokenizer, with_byte_fallback])


@TOKENIZERS
def test_a_token_has_the_bytes_that_transformers_gives_it(make: Callable[[], Any]) -> None:
    tokenizer = make()
    piece, mode = TokenBytes(tokenizer), StopStringCriteria._get_stop_string_matching_mode(tokenizer)
    texts, ids = StopStringCriteria.clean_tokenizer_vocab(tokenizer, stop_string_matching_mode=mode)
    assert [piece(token) for token in ids] == [bytes(text) for text in texts]
    assert piece(len(tokenizer)) is None


@pytest.mark.parametrize(("make", "trials"), [(demo, 4), (build_tokenizer, 40), (with_byte_fallback, 40)])
def test_rows_end_with_the_token_with_which_transformers_ends_them(make: Callable[[], Any], trials: int) -> None:
    tokenizer, rng = make(), random.Random(3)
    piece, ids = TokenBytes(tokenizer), tokenizer(TEXT)["input_ids"]

    def decode(tokens: Any) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    fired = 0
    for trial in range(trials):
        at = rng.randrange(len(TEXT))
        stop = TEXT[at : at + rng.choice([1, 2, 3, 5, 12])]
        start = rng.randrange(1, len(ids) - 1)
        prompt, said = ids[:start], ids[start:]
        if trial % 2:
            rng.shuffle(said)
        try:
            theirs = StopStringCriteria(tokenizer, [stop])
        except ValueError:  # no token ends in it
            continue
        row = Row(0, prompt, Sampling(max_new_tokens=len(said), stop=(stop,)), decode, piece=piece)
        for token in said:
            row.accept(token, frozenset())
            ended = bool(theirs(torch.tensor([[*prompt, *row.generated]]), None))
            assert ended == (row.finish_reason == "stop"), (stop, row.generated)
            if row.finished:
                break
        fired += row.finish_reason == "stop"
        assert decode(row.generated).startswith(row.text)
        assert row.finish_reason == "length" or stop not in row.text
    assert fired >= trials // 4


@TOKENIZERS
def test_answers_with_a_format_are_their_tokens_bytes(make: Callable[[], Any]) -> None:
    """Beginning with a space, characters in parts and texts of special tokens: what the grammar saw is the text."""
    tokenizer = make()
    codec = TextCodec(tokenizer, SimpleNamespace(vocabulary=len(tokenizer)))  # type: ignore[arg-type]
    vocabulary = Vocabulary(codec.piece, len(tokenizer), codec.special_tokens, {tokenizer.eos_token_id})
    pattern = " ?(fox|ü[日🙂]|</s>|the 't){2} "
    mask, found = np.zeros((1, vocabulary.words), np.int64), set[str]()
    for seed in range(8):
        draw, answer, tokens = random.Random(seed), AnswerState(vocabulary, of_regex(pattern)), list[int]()
        while not answer.is_complete:
            vocabulary.fill([(answer, 0)], mask.ctypes.data, 1)
            bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
            tokens.append(int(draw.choice(np.flatnonzero(bits))))
            vocabulary.take([(answer, tokens[-1])])
        assert not codec.special_tokens & {*tokens}
        stream = TextStream(codec.decode_as_it_is, ())
        told = [stream.take(tokens[:count]) for count in range(1, len(tokens) + 1)]
        text = codec.decode_as_it_is([*tokens, tokenizer.eos_token_id])
        assert "".join([*told, stream.finish(text)]) == text
        assert re.fullmatch(pattern, text)
        found.add(text)
    assert any(text.startswith(" ") for text in found)
