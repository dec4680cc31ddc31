"""Tiny random models of every class that transformers' `AutoModelForCausalLM` knows, for the sweep over all of them.

A config is the class's default, with each of its integer fields that is a size made small by its name; few families
need fields of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging import version
from small_models import EMBEDDING_STD, INIT_STD
from torch.nn import Embedding
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto import modeling_auto

CAUSAL: Mapping[str, str] = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""Names of the classes of all causal language models, by the `model_type` of their configs."""
WITH_IMAGES: Mapping[str, str] = {
    family: name
    for family, name in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items()
    if family not in CAUSAL
}
"""Those of models that take images, too, and are in no other list."""
FAMILIES = {**CAUSAL, **WITH_IMAGES}
if version.parse(transformers.__version__) < version.parse("5.18"):
    for name in ("qwen4_exp", "qwen4_exp_text"):  # their cache keeps states outside of its layers until then
        FAMILIES.pop(name, None)

VOCABULARY = 384
LAYERS = 4
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

_SIZES: dict[int, tuple[str, ...]] = {
    VOCABULARY: ("vocab_size", "decoder_vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input"),
    256: ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions", "context_length"),
    128: ("num_position_embeddings", "max_source_positions", "rel_extent"),
    64: (
        *("hidden_size", "d_model", "n_embd", "emb_dim", "word_embed_proj_dim", "lru_width", "backbone_hidden_size"),
        *("embedding_size", "embedding_dim", "hidden_size_global", "router_hidden_size", "mamba_d_ssm"),
        *("out_hidden_size", "projector_output_dim", "adapter_out_dim", "downsample_hidden_size", "image_size"),
        *("attention_hidden_size", "ple_embed_dim", "vision_output_dim", "output_embedding_size"),
    ),
    96: (
        *("intermediate_size", "ffn_dim", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim", "dim_ff", "dff", "d_inner"),
        *("ffn_hidden_size", "feed_forward_size", "mlp_dim", "intermediate_size_mlp", "dense_intermediate_size"),
        *("conv_output_size", "input_size"),
    ),
    32: (
        *("moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"),
        *("shared_experts_intermediate_size", "expert_ffn_hidden_size", "shared_intermediate_size", "index_head_dim"),
        *("laurel_rank", "prompt_mid_dim", "pronunciation_embed_dim", "shape_embed_dim", "vision_dim"),
        *("codebook_dim", "base_channels", "input_embedding_size", "sliding_window_size", "attention_chunk_size"),
    ),
    24: ("q_lora_rank", "o_lora_rank", "hc_lowrank"),
    16: (
        *("head_dim", "dim_head", "attention_head_dim", "kv_channels", "attention_head_size", "d_head", "d_kv"),
        *("qk_nope_head_dim", "v_head_dim", "swa_head_dim", "linear_head_dim", "kv_lora_rank", "sliding_window"),
        *("linear_key_head_dim", "linear_value_head_dim", "mamba_head_dim", "mamba_d_head", "ssm_state_size"),
        *("mamba_d_state", "chunk_size", "mamba_chunk_size", "hidden_size_per_layer_input", "state_size"),
        *("query_pre_attn_scalar", "loop_gate_rank", "gated_norm_rank", "adapter_rank", "attention_window_size"),
        *("window_size", "local_attention_window_len", "local_attention", "index_topk", "mamba_dt_rank"),
        *("time_step_rank", "num_buckets", "heads_per_ngram", "index_block_size", "global_window"),
    ),
    8: ("qk_rope_head_dim", "rotary_dim", "mamba_n_heads", "mamba_num_heads", "patch_size", "moe_num_experts"),
    LAYERS: (
        *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers"),
        *("encoder_layers", "num_encoder_layers", "num_blocks"),
        *("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads"),
        *("num_decoder_attention_heads", "swa_num_attention_heads", "linear_num_value_heads", "linear_num_heads"),
        *("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_layer", "index_n_heads"),
        *("encoder_attention_heads", "num_encoder_attention_heads", "global_attn_every_n_layers"),
        *("layer_group_size", "num_layers_per_stack", "num_query_groups", "split_ngram_parts", "o_groups"),
        *("n_layers_per_attn_res_block", "zero_expert_num", "index_topk_blocks"),
    ),
    2: (
        *("num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads", "linear_num_key_heads"),
        *("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "depth"),
        *("n_input_layers", "n_output_layers", "n_groups", "num_global_layers"),
        *("num_codebooks", "num_quantizers", "num_kv_shared_layers", "max_window_layers"),
        *("n_group", "num_expert_group"),
    ),
    1: ("first_k_dense_replace", "n_shared_experts", "num_shared_experts", "num_dense_layers", "topk_group"),
    1024: ("encoder_hash_byte_group_vocab", "ngram_vocab_size_base", "codebook_size", "audio_vocab_size"),
}
_SMALL = {name: size for size, names in _SIZES.items() for name in names}

_FILLED = (
    *("head_dim", "n_routed_experts", "num_experts_per_tok", "num_experts", "n_shared_experts"),
    *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
)
"""Of these, a size takes the place of None."""
_ALIKE = (("num_key_value_heads", "num_attention_heads"), ("head_dim", "qk_rope_head_dim"))
"""Pairs of fields of which the first is the second one where the default has it so."""
_DECODER = {"is_decoder": True, "is_encoder_decoder": False, "add_cross_attention": False}
_MAMBA_ATTENTION = {"attn_layer_indices": [1, 3]}
_HYBRID = ["linear_attention", "full_attention", "linear_attention", "full_attention"]

_QWEN4 = {
    "layer_types": ["linear_attention", "indexed_attention"] * 2,
    "ple_layer_ids": [1, 3],
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "eos_token_id": 2,
}
_HYBRID = {"layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 128}


def _with_sections(*sections: int, **more: float) -> dict[str, Any]:
    """Rotary embeddings of which so many frequencies are for time, height and width."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections), **more}
    return {"text_config": {"rope_parameters": rope}}


_OWN: dict[str, dict[str, Any]] = {
    **{family: _with_sections(4, 2, 2) for family in ("qwen2_vl", "qwen2_5_vl", "glm46v", "glm4v", "glm_ocr", "glmga")},
    "glm4v_moe": _with_sections(2, 1, 1, partial_rotary_factor=0.5),
    "paddleocr_vl": _with_sections(4, 2, 2),
    "ernie4_5_vl_moe": _with_sections(3, 3, 2),
    "hunyuan_vl": _with_sections(4, 2, 2),
    "bamba": {"attn_layer_indices": [1, 3]},
    "blenderbot": {"encoder_layers": LAYERS},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0, "kv_n_heads": 2}},
    "cohere_compass": {
        "text_config": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}}
    },
    "inkling2": {"vision_config": {"text_hidden_size": 64}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [-1, -2]}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "dots3_note": {
        "vision_config": {"mlp_layer_types": ["dense"] * 2, "per_layer_config": None, "adapter_in_dim": 64},
        "audio_config": {"adapter_input_size": 64},
    },
    "gemma3n_text": {"activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0]},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hrm_text": {"num_layers_per_stack": None},
    "inkling2_loop_text": {"loop_layer_index_start": 1, "loop_layer_index_end": 3, "n_layers_per_attn_res_block": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mistral4": {
        "head_dim": 8,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 256,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [16, 16]},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {**_HYBRID, "attention_head_dim": 32},
    "zamba2": {**_HYBRID, "attention_head_dim": 32},
}
"""Fields of families for which sizes by name do not make a config."""


def tiny_config(family: str) -> Any:
    """A small config of `family`, a key of FAMILIES."""
    return _shrunk(CONFIG_MAPPING[family], _OWN.get(family, {}))


def _shrunk(kind: Any, own: Mapping[str, Any]) -> Any:
    """The config class `kind` with its default fields made small, and the fields `own`, sub-configs' by name."""
    default = vars(kind())
    fields: dict[str, Any] = {}
    for name, value in default.items():
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            fields[name] = _shrunk(type(value), own.get(name, {}))
        elif name in own:
            fields[name] = own[name]
        elif name in _DECODER and isinstance(value, bool):
            fields[name] = _DECODER[name]
        elif name in _IDS and value is not None:
            fields[name] = _IDS[name]
        elif name in _SMALL and type(value) is int and value > 0:
            fields[name] = min(value, _SMALL[name])
        elif name in _FILLED and value is None:
            fields[name] = _SMALL[name]
    rope = default.get("rope_parameters")
    if isinstance(rope, dict) and "mrope_section" in rope and "rope_parameters" not in own:
        width = fields.get("qk_rope_head_dim") or fields.get("head_dim") or 16
        half = int(width * rope.get("partial_rotary_factor", 1)) // 2  # of positions in time, height and width
        fields["rope_parameters"] = {**rope, "mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}
    for name, like in _ALIKE:
        if like in fields and default.get(name) == default[like]:
            fields[name] = fields[like]
    return kind(**{**own, **fields})


def auto_class(family: str) -> Any:
    """The class of transformers that loads a model of `family`."""
    return AutoModelForCausalLM if family in CAUSAL else AutoModelForImageTextToText


def build_tiny(family: str, *, seed: int = 0) -> Any:
    """A small model of `family` with random weights in float32, the same ones for the same seed."""
    torch.manual_seed(seed)
    model = auto_class(family).from_config(tiny_config(family), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and not getattr(parameter, "_no_weight_decay", False):
                parameter.normal_(std=INIT_STD)
        for module in model.modules():
            if isinstance(module, Embedding):
                module.weight.normal_(std=EMBEDDING_STD)
    return model


def save_tiny(family: str, folder: Path) -> Path:
    """Save the small model of `family` into `folder`."""
    build_tiny(family).save_pretrained(folder)
    return folder
