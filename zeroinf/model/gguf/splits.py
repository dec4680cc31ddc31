"""Lets byte-level tokenizers of GGUF files split text, before bytes are merged, as the files name it.

A file names a way to split and does not hold it. The names are those of llama.cpp (`src/llama-vocab.cpp`), the patterns
those of the models' own `tokenizer.json`. Readers of other packages split as GPT-2 where they do not know a name, and
give other tokens without a word; here a name that is not known is refused.
"""

from __future__ import annotations

from typing import Any

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LARGE = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_SMALL = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_OTHERS_AND_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_LLAMA_3 = (rf"{_ENDINGS}|{_WORDS}|\p{{N}}{{1,3}}|{_OTHERS}",)
_QWEN_2 = (rf"{_ENDINGS}|{_WORDS}|\p{{N}}|{_OTHERS}",)
_MARKED = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN_35 = (f"{_ENDINGS}|{_MARKED}",)
_TEKKEN = (rf"{_LARGE}|{_SMALL}|\p{{N}}|{_OTHERS_AND_SLASHES}",)
_GPT_4O = (rf"{_LARGE}{_ENDINGS}?|{_SMALL}{_ENDINGS}?|\p{{N}}{{1,3}}|{_OTHERS_AND_SLASHES}",)
_SIGNS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
_AND_SIGNS = r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_DEEPSEEK_3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    f"{_SIGNS}|{_AND_SIGNS}",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}")
# Cased letters as Unicode 11 knew them, but for small Armenian ones.
_CASED = """
41-5a 61-7a b5 c0-d6 d8-f6 f8-1ba 1bc-1bf 1c4-293 295-2af 370-373 376-377 37b-37d 37f 386 388-38a 38c 38e-3a1
3a3-3f5 3f7-481 48a-52f 531-556 10a0-10c5 13a0-13f5 13f8-13fd 1c90-1cba 1cbd-1cbf 1d00-1d2b 1d6b-1d77
1d79-1d9a 1e00-1f15 1f18-1f1d 1f20-1f45 1f48-1f4d 1f50-1f57 1f59 1f5b 1f5d 1f5f-1f7d 1f80-1fb4 1fb6-1fbc 1fbe
1fc2-1fc4 1fc6-1fcc 1fd0-1fd3 1fd6-1fdb 1fe0-1fec 1ff2-1ff4 1ff6-1ffc 2102 2107 210a-2113 2115 2119-211d 2124
2126 2128 212a-212d 212f-2134 2139 213c-213f 2145-2149 214e 2183-2184 2c00-2c7b 2c7e-2ce4 2ceb-2cee 2cf2-2cf3
a640-a66d a680-a69b a722-a76f a771-a787 a78b-a78e ab70-abbf fb00-fb06 fb13-fb17 ff21-ff3a ff41-ff5a
10400-1044f 104b0-104d3 104d8-104fb 10c80-10cb2 10cc0-10cf2 118a0-118df 1e900-1e943
"""
_CASED_RANGES = "".join("-".join(chr(int(end, 16)) for end in letters.split("-")) for letters in _CASED.split())
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_CASED_RANGES}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    r"\p{N}",
)
_KIMI_WORDS = f"{_LARGE}{_ENDINGS}?|{_SMALL}{_ENDINGS}?".replace(r"\p{M}]", r"\p{M}&&[^\p{Han}]]")
_KIMI = (rf"\p{{Han}}+|{_KIMI_WORDS}|\p{{N}}{{1,3}}|{_OTHERS}",)
_BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
)
_SEED = (rf"{_ENDINGS}|{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",)
_PHRASES = r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+"
_EXAONE_MOE = (rf"{_ENDINGS}|{_PHRASES}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",)
_MINICPM_5 = (r"\p{N}{1,3}", rf"{_ENDINGS}|{_WORDS}|\p{{N}}+|{_OTHERS}")
_AYA = (r"\d{1,3}(?=(?:\d{3})*\b)", *_GPT_4O)
_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGITS = (r"\p{N}", _GPT_2)

_SPLITS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "lfm2", "dbrx", "smaug-bpe"), _LLAMA_3),
    **dict.fromkeys(("chatglm-bpe", "glm4", "falcon-h1", "midm-2.0", "jina-v5-nano"), _LLAMA_3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "kormo", "f2llmv2", "hunyuan"), _QWEN_2),
    **dict.fromkeys(("grok-2", "solar-open"), _QWEN_2),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "minimax-m2", "talkie"), _GPT_4O),
    **dict.fromkeys(("gpt-2", "gpt2", "mpt", "olmo", "trillion", "phi-2", "exaone4", "gigachat", "a.x-4.0"), (_GPT_2,)),
    **dict.fromkeys(("mellum", "jais", "granite-docling"), (_GPT_2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), _DEEPSEEK_3),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"), _BAILING),
    **dict.fromkeys(("tiny_aya", "cohere2moe"), _AYA),
    "mellum2": _DIGITS,
    "qwen35": _QWEN_35,
    "tekken": _TEKKEN,
    "deepseek-coder": _DEEPSEEK_CODER,
    "deepseek-llm": _DEEPSEEK_LLM,
    "exaone-moe": _EXAONE_MOE,
    "kimi-k2": _KIMI,
    "minicpm5": _MINICPM_5,
    "seed-coder": _SEED,
}
"""Patterns by names; each splits what those before it have left."""

NAMES = frozenset((*_SPLITS, "falcon"))

_WHOLE = frozenset(
    (
        *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
        *("tekken", "minicpm5", "kimi-k2", "hunyuan"),
    )
)
"""Names of tokenizers that take a word that is a token as it is, whether or not merges lead to it."""


def set_split(tokenizer: Any, name: str) -> None:
    """Let the byte-level `tokenizer` split text as `name`, one of `NAMES`, says."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.model.ignore_merges = name in _WHOLE
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        _of_falcon() if name == "falcon" else [*map(_split, _SPLITS[name]), _bytes(use_regex=False)]
    )


def _split(pattern: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def _bytes(*, use_regex: bool) -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _of_falcon() -> list[Any]:
    """Falcon's, which looks for digits among the signs that stand for bytes."""
    from tokenizers import pre_tokenizers

    digits = pre_tokenizers.Digits(individual_digits=False)
    return [pre_tokenizers.Punctuation("contiguous"), _bytes(use_regex=True), digits, _split("[0-9][0-9][0-9]")]
