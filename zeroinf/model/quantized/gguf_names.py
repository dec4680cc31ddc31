"""The names that parameters of transformers have in GGUF files.

The package gguf maps names of checkpoints; those of modules that differ from them are respelled first.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

_RESPELLED = tuple(
    (architecture, re.compile(pattern), spelling)
    for architecture, pattern, spelling in (
        ("nemotron_h", r"^model\.(?!.+\.mixer\.experts\.)", "backbone."),
        ("nemotron_h", r"\.mixer\.experts\.", ".mlp.experts."),
        ("granite", r"\.block_sparse_moe\.experts\.", ".mlp.experts."),
        ("granite", r"\.router\.weight$", ".router.layer.weight"),
        ("granite", r"\.shared_mlp\.input_linear\.", ".mlp.shared_expert.gate_proj."),
        ("gemma4", r"\.router\.scale$", ".router.proj.scale"),
        ("gemma4", r"\.router\.per_expert_scale$", ".experts.down_proj.scale"),
        ("kimi-linear", r"\.forget_gate\.", "."),
        ("kimi-linear", r"\.self_attn\.conv1d\.", ".self_attn.q_conv1d."),
        ("ernie4_5", r"\.gate\.moe_statics\.", ".moe_statics."),
        ("", r"\.dt_bias$", ".dt_proj.bias"),
        ("", r"\.expert_bias$", ".expert_bias.bias"),
        ("", r"(e_score_correction|_proj)_bias$", r"\1.bias"),
    )
)
"""Patterns of names and how they are spelled instead, each for architectures that begin so."""

_BARE = (".A_log", ".D")
_SUFFIXES = ("weight", "bias", "scale")


def file_name(names: Any, name: str, architecture: str, stored: Collection[str]) -> str | None:
    """The file's name for the parameter `name`, if one tensor were all of it; None where it is not known.

    `names` is the package's map for the architecture, `stored` the names in the file.
    """
    for prefix, pattern, spelling in _RESPELLED:
        if architecture.startswith(prefix):
            name = pattern.sub(spelling, name)
    base, _, suffix = name.rpartition(".")
    if suffix not in _SUFFIXES:
        base, suffix = name, "weight"
    known = _known(names, base)
    if known is None or f"{known}.{suffix}" not in stored:  # files have it whole or in halves
        known = _known(names, base.replace("gate_up_proj", "gate_proj")) or known
    if known is None:
        return None
    if base.endswith(_BARE):
        return str(known)
    found = f"{known}.{suffix}"
    alone = found.replace("_shexp", "")  # shared experts of models without others
    return alone if found not in stored and alone in stored else found


def _known(names: Any, base: str) -> str | None:
    """What the package's map calls the module `base`, of which it has some with and some without a suffix."""
    found = names.get_name(f"{base}.weight", try_suffixes=(".weight",))
    return found and str(found).removesuffix(".weight")
