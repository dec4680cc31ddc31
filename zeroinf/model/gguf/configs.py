"""Derives the transformers config from a GGUF file's metadata.

Every key of the file's architecture is used or refused by name, since an unknown key may change what a model computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zeroinf.errors import ModelError
from zeroinf.model.gguf.facts import GgufFacts, Unknown
from zeroinf.model.gguf.families import FAMILIES, Family
from zeroinf.model.gguf.header import FLOAT_TYPES, GgufHeader
from zeroinf.model.gguf.parts import decoder
from zeroinf.model.gguf.rope import FREQUENCIES, LONG, SHORT

OF_CONFIG = (FREQUENCIES, LONG, SHORT)
"""Tensors whose values a config takes up."""

_Config = dict[str, Any]


def build_config(header: GgufHeader) -> _Config:
    """The config, but for how weights lie in the file. Raises ModelError for what is not known to be exact."""
    architecture = header.architecture
    facts = GgufFacts(header)
    try:
        if architecture not in FAMILIES:
            raise Unknown(f"this runs {', '.join(sorted(FAMILIES))}")
        found = FAMILIES[architecture]
        family = found if isinstance(found, Family) else found(facts)
        config = {"model_type": family.model_type, "architectures": [family.name], **decoder(facts)}
        for part in family.parts:
            config |= part(facts, config)
        config |= _tokens(header.metadata)
        facts.refuse_unread()
    except Unknown as error:
        raise ModelError(
            f"{header.parts[0]} holds a model of the architecture {architecture}, which is not known to run: {error}",
            hint="take the model's safetensors, and --wire int8 or int4 to move fewer bytes",
        ) from error
    return config | {"dtype": _dtype(header)}


def _dtype(header: GgufHeader) -> str:
    """The dtype of the file's matrices, where none is quantized; else bfloat16."""
    kinds = {tensor.kind for tensor in header.tensors.values() if len(tensor.shape) > 1}
    return FLOAT_TYPES[kinds.pop()] if len(kinds) == 1 and kinds <= set(FLOAT_TYPES) else "bfloat16"


def _tokens(metadata: Mapping[str, Any]) -> _Config:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
