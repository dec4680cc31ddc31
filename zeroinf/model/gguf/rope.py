"""The rotary position embedding that a GGUF file describes, as transformers' `rope_parameters`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from zeroinf.model.gguf.facts import GgufFacts, Unknown

LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
FREQUENCIES = "rope_freqs.weight"


def rope_parameters(facts: GgufFacts, width: int, *, partial: bool = False) -> dict[str, Any]:
    """`rope_parameters` of heads of `width`, of which all turn unless they may turn in part.

    Raises Unknown for scaling that transformers would not compute alike.
    """
    turned = facts.get("rope.dimension_count", width)
    if turned != width and not partial:
        raise Unknown(f"{turned} of {width} elements of a head turn")
    rope = {"rope_type": "default", "rope_theta": facts.get("rope.freq_base", 10000.0)}
    if partial:
        rope["partial_rotary_factor"] = turned / width
    facts.expect("rope.scaling.finetuned", True, False)
    factor = facts.get("rope.scaling.factor", facts.get("rope.scale_linear", 1.0))
    kind = facts.get("rope.scaling.type", "linear" if factor not in (0.0, 1.0) else "none")
    original = facts.get("rope.scaling.original_context_length", None)
    if kind == "linear":
        rope |= {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        rope |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        rope |= {"beta_fast": facts.get("rope.scaling.yarn_beta_fast", 32.0)}
        rope |= {"beta_slow": facts.get("rope.scaling.yarn_beta_slow", 1.0)}
        facts.expect("rope.scaling.yarn_ext_factor", 1.0)
        if (attention := facts.get("rope.scaling.yarn_attn_factor", None)) is not None:
            rope["attention_factor"] = attention
    elif kind not in ("none", "longrope") or (kind == "longrope") > facts.has(LONG):
        raise Unknown(f"its rope.scaling.type is {kind}")
    if facts.has(LONG):
        rope |= _longrope(facts, original)
    if facts.has(FREQUENCIES):
        rope |= _llama3(facts.numbers(FREQUENCIES), rope["rope_theta"], turned)
    return rope


def _longrope(facts: GgufFacts, original: int) -> dict[str, Any]:
    """Factors of each frequency, for sequences up to `original` tokens and for longer ones."""
    return {
        "rope_type": "longrope",
        "long_factor": facts.numbers(LONG),
        "short_factor": facts.numbers(SHORT),
        "factor": facts.get("context_length") / original,
        "original_max_position_embeddings": original,
        "attention_factor": facts.get("rope.scaling.attn_factor"),
    }


def _llama3(factors: list[float], theta: float, turned: int) -> dict[str, Any]:
    """Llama 3's rope settings, found from the factors of each frequency, which are all that a file keeps of them."""
    factor, low, original = max(factors), 1.0, 8192
    if factor == 1:
        return {}
    for high in (4.0, 1.0):  # Llama 4 has no frequencies between
        expected = _factors_of_llama3(len(factors), theta, turned, factor, high)
        if all(math.isclose(found, one, rel_tol=1e-4) for found, one in zip(factors, expected, strict=True)):
            kept = {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": original}
            return {"rope_type": "llama3", "factor": round(factor, 4), **kept}
    raise Unknown("its rope_freqs are not those of Llama 3")


def _factors_of_llama3(count: int, theta: float, turned: int, factor: float, high: float) -> Iterator[float]:
    for at in range(count):
        turns = 8192 * theta ** (-2 * at / turned) / (2 * math.pi)
        smooth = float(turns >= 1) if high == 1 else min(1.0, max(0.0, (turns - 1) / (high - 1)))
        yield 1 / ((1 - smooth) / factor + smooth)
