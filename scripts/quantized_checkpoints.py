"""Checkpoints of known models in quantized formats, without weights: for runs with random ones.

A format is written as its usual tools write it: a config that names it, or a GGUF file whose tensors are a hole.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_GROUPED = {"bits": 4, "group_size": 128}
_MARKS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "desc_act": False, "sym": True, **_GROUPED},
    "awq": {"quant_method": "awq", "version": "gemm", "zero_point": True, **_GROUPED},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "nvfp4": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
}
FORMATS = (*_MARKS, "q4_k_m")
"""All that `checkpoint` makes."""

_GGUF_ARCHITECTURES = {"llama": "llama", "qwen3_moe": "qwen3moe"}


def checkpoint(model: str, form: str | None, folder: Path, layers: int | None = None) -> Path:
    """The catalog's `model`, or its first `layers` layers, in `folder`: what `zeroinf run --random-weights` takes. In
    the format `form`, or (None) as the catalog has it."""
    from zeroinf.model.catalog import catalog_config

    config = catalog_config(model)
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    folder = folder / (form or "as it is")
    folder.mkdir(exist_ok=True)
    if form == "q4_k_m":
        return _gguf(config, folder / "model.gguf")
    marked = config.to_dict() if form is None else {**config.to_dict(), "quantization_config": _MARKS[form]}
    (folder / "config.json").write_text(json.dumps(marked))
    return folder


def _gguf(config: Any, file: Path) -> Path:
    """Q4_K_M: Q4_K, but Q6_K for the head, and for values and last products of the first and last eighth of the layers
    and of each third between."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quant_shape_to_byte_shape

    writer = GGUFWriter(file, _GGUF_ARCHITECTURES[config.model_type])
    _write_metadata(writer, config)
    kinds = {1: GGMLQuantizationType.F32, 2: GGMLQuantizationType.Q4_K, 3: GGMLQuantizationType.Q4_K}
    size = 0
    for name, shape in _tensors(config):
        kind = kinds[len(shape)]
        if "gate_inp" in name:
            kind = GGMLQuantizationType.F32
        elif name == "output.weight" or (("attn_v" in name or "ffn_down" in name) and _is_larger(name, config)):
            kind = GGMLQuantizationType.Q6_K
        stored = shape if kind == GGMLQuantizationType.F32 else quant_shape_to_byte_shape(shape, kind)
        nbytes = 4 if kind == GGMLQuantizationType.F32 else 1
        for length in stored:
            nbytes *= length
        writer.add_tensor_info(name, stored, _numpy(kind), nbytes, raw_dtype=kind)
        size += -(-nbytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with file.open("r+b") as opened:
        start = -(-file.stat().st_size // 32) * 32
        opened.truncate(start + size)
    return file


def _numpy(kind: Any) -> Any:
    import numpy as np

    return np.dtype(np.float32 if kind.name == "F32" else np.uint8)


def _is_larger(name: str, config: Any) -> bool:
    layer, layers = int(name.split(".")[1]), int(config.num_hidden_layers)
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _tensors(config: Any) -> list[tuple[str, tuple[int, ...]]]:
    width, vocabulary = config.hidden_size, config.vocab_size
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    queries, keys = head * config.num_attention_heads, head * config.num_key_value_heads
    found: list[tuple[str, tuple[int, ...]]] = [
        ("token_embd.weight", (vocabulary, width)), ("output.weight", (vocabulary, width)),
        ("output_norm.weight", (width,)),
    ]  # fmt: skip
    for layer in range(config.num_hidden_layers):
        own: dict[str, tuple[int, ...]] = {
            "attn_norm": (width,), "ffn_norm": (width,), "attn_q": (queries, width), "attn_k": (keys, width),
            "attn_v": (keys, width), "attn_output": (width, queries),
        }  # fmt: skip
        if config.model_type == "qwen3_moe":
            experts, inner = config.num_experts, config.moe_intermediate_size
            own |= {"attn_q_norm": (head,), "attn_k_norm": (head,), "ffn_gate_inp": (experts, width)}
            own |= {f"ffn_{part}_exps": (experts, inner, width) for part in ("gate", "up")}
            own["ffn_down_exps"] = experts, width, inner
        else:
            inner = config.intermediate_size
            own |= {"ffn_gate": (inner, width), "ffn_up": (inner, width), "ffn_down": (width, inner)}
        found += [(f"blk.{layer}.{name}.weight", shape) for name, shape in own.items()]
    return found


def _write_metadata(writer: Any, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if width := getattr(config, "head_dim", None):
        writer.add_key_length(width)
        writer.add_value_length(width)
    if config.model_type == "qwen3_moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    _write_tokenizer(writer)


def _write_tokenizer(writer: Any) -> None:
    """A token for each byte, as GPT-2 spells them."""
    from gguf import TokenType

    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (chr(256 + number) for number in range(256 - len(plain)))
    pieces = [chr(byte) if byte in plain else next(others) for byte in range(256)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    pairs = pieces[:2], pieces[1:3]  # transformers wants merges, and takes a list of one for a text
    writer.add_token_list([*pieces, *map("".join, pairs), "<s>"])
    writer.add_token_types([TokenType.NORMAL] * 258 + [TokenType.CONTROL])
    writer.add_token_merges([*map(" ".join, pairs)])
    writer.add_bos_token_id(258)
    writer.add_eos_token_id(258)
    writer.add_add_bos_token(False)
