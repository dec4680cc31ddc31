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
_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGITS = (r"\p{N}", _GPT_2)

_SPLITS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "lfm2", "dbrx", "smaug-bpe"), _LLAMA_3),
    **dict.fromkeys(("chatglm-bpe", "glm4", "falcon-h1", "midm-2.0", "jina-v5-nano"), _LLAMA_3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "kormo", "f2llmv2", "hunyuan"), _QWEN_2),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "minimax-m2", "talkie"), _GPT_4O),
    **dict.fromkeys(("default", "gpt-2", "gpt2", "mpt", "olmo", "trillion"), (_GPT_2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    "qwen35": _QWEN_35,
    "tekken": _TEKKEN,
    "deepseek-v3": _DEEPSEEK_3,
    "hunyuan-dense": _DEEPSEEK_3,
    "deepseek-coder": _DEEPSEEK_CODER,
}
"""Patterns by names; each splits what those before it have left."""

NAMES = frozenset(_SPLITS)


def set_split(tokenizer: Any, name: str) -> None:
    """Let the byte-level `tokenizer` split text as `name`, one of `NAMES`, says."""
    from tokenizers import Regex, pre_tokenizers

    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in _SPLITS[name]]
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, as_bytes])
