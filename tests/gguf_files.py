"""Small GGUF files as llama.cpp's converters write them, and the models in transformers that they stand for.

Names, orders and metadata follow `conversion/` in the repository of llama.cpp; values are those of the package gguf.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    MODEL_ARCH_NAMES,
    ExpertGatingFuncType,
    GGMLQuantizationType,
    GGUFWriter,
    TokenType,
    get_tensor_name_map,
)
from gguf.quants import dequantize, quantize
from small_models import BOS, EOS, INIT_STD, PAD, VOCABULARY, build_model, build_tokenizer

ARCHITECTURES = {
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "glm4_moe": "glm4moe",
    "gpt_oss": "gpt-oss",
    "lfm2": "lfm2",
    "llama": "llama",
    "llama_tied": "llama",
    "minimax_m2": "minimax-m2",
    "mixtral": "llama",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_5": "qwen35",
    "qwen3_5_moe": "qwen35moe",
    "qwen3_moe": "qwen3moe",
    "qwen3_next": "qwen3next",
    "qwen3_vl": "qwen3vl",
    "qwen3_vl_moe": "qwen3vlmoe",
    "smollm3": "smollm3",
}
"""What GGUF calls the architectures of small models."""

# Where float16 scales lie in a block, of types for which the package has no encoder.
_SCALES = {
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ2_XXS": (0,), "IQ2_XS": (0,),
    "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,), "IQ1_S": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip

_Tensor = tuple[str, torch.Tensor, Any, float | None]
"""A tensor's name in the file, the part of a parameter that it holds, in which order, and what is added; None where the
file has minus the exponential."""


def write_gguf(name: str, file: Path, kinds: Sequence[str], *, model: Any = None, parts: int = 1) -> Any:
    """Write the small model `name`, its matrices in `kinds` in turn where their rows fill blocks; return the model in
    transformers with the values that are in the file."""
    model = build_model(name) if model is None else model
    if name in ("qwen3_moe", "qwen3_vl_moe"):  # llama.cpp knows no other
        model.config.norm_topk_prob = True
        for module in model.modules():
            module.norm_topk_prob = True
    if name == "lfm2":
        model.config.intermediate_size = model.model.layers[0].feed_forward.w1.weight.shape[0]
        model.config.block_auto_adjust_ff_dim = False
    architecture = ARCHITECTURES[name]
    count = sum(1 for _ in _tensors(architecture, model))
    writer = GGUFWriter(file, architecture, split_max_tensors=-(-count // parts) if parts > 1 else 0)
    _write_metadata(writer, model.config, architecture)
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for number, (called, part, order, added) in enumerate(_tensors(architecture, model)):
            values = (part[order] if order is not None else part).float().numpy()
            values = -np.exp(values) if added is None else values + np.float32(added)
            kind = GGMLQuantizationType[kinds[number % len(kinds)]]
            is_quantized = part.dim() > 1 and "gate_inp" not in called and not called.endswith(".bias")
            fits = is_quantized and values.shape[-1] % GGML_QUANT_SIZES[kind][0] == 0
            kind = kind if fits else GGMLQuantizationType.F32
            data = _packed(values, kind, rng)
            writer.add_tensor(called, data, raw_dtype=kind)
            stored = dequantize(data, kind).reshape(values.shape)
            found = torch.from_numpy(np.log(-stored) if added is None else stored - np.float32(added))
            if order is None:
                part.copy_(found)
            else:
                part[order] = found
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _packed(values: np.ndarray, kind: GGMLQuantizationType, rng: np.random.Generator) -> np.ndarray:
    """`values` in the type `kind`; random ones of about their size where the package gguf has no encoder for it."""
    if kind.name not in _SCALES and kind.name != "IQ1_M":
        return quantize(np.ascontiguousarray(values), kind)
    weights, nbytes = GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (values.size // weights, nbytes), dtype=np.uint8)

    def scaled(scale: float) -> np.ndarray:
        half = np.float16(scale).view(np.uint16)
        if kind.name == "IQ1_M":  # four bits of it in each of four words
            words = blocks[:, 48:].view(np.uint16)
            for part in range(4):
                words[:, part] = (words[:, part] & 0x0FFF) | ((int(half) >> 4 * part & 15) << 12)
        for at in _SCALES.get(kind.name, ()):
            blocks[:, at : at + 2] = np.array([half]).view(np.uint8)
        return blocks.reshape(*values.shape[:-1], -1)

    return scaled(INIT_STD / dequantize(scaled(1.0), kind).std()).copy()


def _tensors(architecture: str, model: Any) -> Iterator[_Tensor]:
    config = model.config
    arch = next(key for key, called in MODEL_ARCH_NAMES.items() if called == architecture)
    names = get_tensor_name_map(arch, config.num_hidden_layers)

    def called(base: str, suffix: str = "weight") -> str:
        return f"{names.get_name(base)}.{suffix}"

    for name, parameter in model.named_parameters():
        value = parameter.data
        base, _, suffix = name.rpartition(".")
        if suffix in ("gate_up_proj", "gate_up_proj_bias"):
            halves = (value[:, ::2], value[:, 1::2])
            if architecture == "gpt-oss" and value.dim() == 3:
                halves = (value.transpose(1, 2)[:, ::2], value.transpose(1, 2)[:, 1::2])
            elif architecture != "gpt-oss":
                halves = value.chunk(2, dim=1)
            for half, which in zip(halves, ("gate", "up"), strict=True):
                yield called(f"{base}.{which}_proj", "bias" if "bias" in suffix else "weight"), half, None, 0
        elif suffix in ("down_proj", "down_proj_bias"):
            is_turned = architecture == "gpt-oss" and value.dim() == 3
            kind = "bias" if "bias" in suffix else "weight"
            yield called(f"{base}.down_proj", kind), value.transpose(1, 2) if is_turned else value, None, 0
        elif "linear_attn" in name and not base.endswith("linear_attn.norm"):
            yield from _of_linear_attention(called, name, value, config)
        elif base.endswith("shared_expert_gate") and architecture == "qwen35moe":
            yield called(base, suffix), value[0], None, 0
        elif base.endswith("conv.conv"):
            yield called(base), value.squeeze(1), None, 0
        elif base.endswith("kv_b_proj"):
            heads, keys = config.num_attention_heads, config.qk_nope_head_dim
            both = value.view(heads, keys + config.v_head_dim, -1)
            yield called(base.replace("kv_b", "k_b")), both[:, :keys].transpose(1, 2), None, 0
            yield called(base.replace("kv_b", "v_b")), both[:, keys:], None, 0
        elif suffix not in ("weight", "bias"):
            yield called(name), value, None, 0
        elif architecture in ("llama", "smollm3") and base.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if base.endswith("q_proj") else config.num_key_value_heads
            order = torch.arange(value.shape[0]).view(heads, 2, -1).transpose(1, 2).flatten()
            yield called(base, suffix), value, order, 0
        else:
            is_plus_one = name.endswith("norm.weight") and architecture.startswith(("gemma", "qwen35", "qwen3next"))
            yield called(base, suffix), value, None, 1 if is_plus_one and "linear_attn" not in name else 0
    for name, value in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            yield called(name.removesuffix("_bias"), "bias"), value, None, 0


def _of_linear_attention(called: Any, name: str, value: torch.Tensor, config: Any) -> Iterator[_Tensor]:
    """Value heads in tiles: the first of each key head, then the second of each."""
    keys, of_value = config.linear_num_key_heads, config.linear_value_head_dim
    base, _, leaf = name.rpartition(".")
    of_key = config.linear_key_head_dim
    if base.endswith("in_proj_qkvz"):
        sizes = [of_key, of_key, *2 * [config.linear_num_value_heads // keys * of_value]]
        places = torch.arange(len(value)).view(keys, -1).split(sizes, dim=1)
        qkv, gate = torch.cat([part.flatten() for part in places[:3]]), places[3].flatten()
        yield called(base).replace("ssm_in", "attn_qkv"), value, qkv, 0
        yield called(base).replace("ssm_in", "attn_gate"), value, gate, 0
        return
    wide = base.endswith(("in_proj_qkv", "conv1d", "in_proj_z", "out_proj"))
    heads = torch.arange(config.linear_num_value_heads * (of_value if wide else 1))
    order = heads.view(keys, -1, of_value if wide else 1).transpose(0, 1).flatten()
    others = torch.arange(2 * keys * of_key) if base.endswith(("in_proj_qkv", "conv1d")) else heads[:0]
    order = torch.cat((others, len(others) + order))
    if config.model_type == "qwen3_next":
        order = torch.arange(value.shape[1] if base.endswith("out_proj") else len(value))
    if leaf == "A_log":
        yield called(name).removesuffix(".weight"), value, order, None
    elif leaf == "dt_bias":
        yield called(f"{base}.dt_proj", "bias"), value, order, 0
    elif base.endswith("out_proj"):
        yield called(base), value, (slice(None), order), 0
    else:
        yield called(base), value.squeeze(1) if base.endswith("conv1d") else value, order, 0


def _write_metadata(writer: GGUFWriter, config: Any, architecture: str) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    if architecture != "qwen35moe":
        writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    heads = 1 if architecture == "deepseek2" else config.num_key_value_heads
    if architecture == "lfm2":
        writer.add_shortconv_l_cache(config.conv_L_cache)
        heads = [heads if kind == "full_attention" else 0 for kind in config.layer_types]
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(config.norm_eps if architecture == "lfm2" else config.rms_norm_eps)
    ropes = config.rope_parameters
    rope = ropes.get("full_attention", ropes)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "yarn":
        writer.add_string(f"{architecture}.rope.scaling.type", "yarn")
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    if architecture != "deepseek2" and (width := getattr(config, "head_dim", None)):
        writer.add_key_length(width)
        writer.add_value_length(width)
    if getattr(config, "sliding_window", None) and architecture != "llama":
        writer.add_sliding_window(config.sliding_window)
    counts = (getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))
    experts = next(filter(None, counts), None)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if architecture in ("qwen2moe", "qwen3moe", "qwen3vlmoe", "qwen3next", "qwen35moe"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if architecture.startswith("qwen3vl"):
        writer.add_rope_dimension_sections([4, 2, 2, 0])
        writer.add_num_deepstack_layers(3)
    if architecture in ("qwen3next", "qwen35", "qwen35moe"):
        _write_linear_attention(writer, config)
    if architecture in ("qwen2moe", "qwen3next", "qwen35moe"):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if architecture in ("gpt-oss", "minimax-m2"):
        writer.add_expert_feed_forward_length(config.intermediate_size)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if architecture in ("glm4moe", "minimax-m2"):
        writer.add_rope_dimension_count(int(config.head_dim * rope.get("partial_rotary_factor", 1)))
        writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    if architecture == "deepseek2":
        _write_deepseek(writer, config)
    if architecture in ("deepseek2", "glm4moe"):
        _write_routed_in_groups(writer, config)
    _write_tokenizer(writer)


def _write_linear_attention(writer: GGUFWriter, config: Any) -> None:
    writer.add_full_attention_interval(config.layer_types.index("full_attention") + 1)
    writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    writer.add_ssm_state_size(config.linear_key_head_dim)
    writer.add_ssm_group_count(config.linear_num_key_heads)
    writer.add_ssm_time_step_rank(config.linear_num_value_heads)
    writer.add_ssm_inner_size(config.linear_num_value_heads * config.linear_value_head_dim)
    if config.model_type != "qwen3_next":
        writer.add_rope_dimension_sections([1, 1, 1, 0])
    writer.add_rope_dimension_count(int(config.head_dim * config.rope_parameters["partial_rotary_factor"]))


def _write_deepseek(writer: GGUFWriter, config: Any) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    if config.model_type == "deepseek_v3":
        writer.add_uint32("deepseek2.expert_gating_func", 2)  # sigmoid


def _write_routed_in_groups(writer: GGUFWriter, config: Any) -> None:
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_group_count(config.n_group or 1)
    writer.add_expert_group_used_count(config.topk_group or 1)


def _write_tokenizer(writer: GGUFWriter) -> None:
    tokens = sorted(build_tokenizer().get_vocab().items(), key=lambda item: item[1])
    pieces = [piece for piece, _ in tokens]
    pieces[-2:] = ["ba", "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(pieces)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (VOCABULARY - 3))
    writer.add_token_merges(["a b", "b a"])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_pad_token_id(PAD)
