"""The metadata of small GGUF files, as llama.cpp's converters (`conversion/`) make it of a config."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

from gguf import ExpertGatingFuncType, GGUFWriter, RopeScalingType, TokenType
from small_models import BOS, EOS, PAD, VOCABULARY, build_tokenizer

_More = dict[str, str | Callable[[Any], Any]]
"""Methods of the writer, and what each is given: a field of the config, or what a function makes of it."""


def write_metadata(writer: GGUFWriter, config: Any, architecture: str) -> None:
    """Write what all converters say, what that of `architecture` adds or says instead, and a tokenizer."""
    config = copy.deepcopy(config)
    config.allow_global_per_layer_attribute_access = True  # of fields that differ from layer to layer
    said = _general(config) | MORE.get(architecture, {})
    for method, source in said.items():
        value = source(config) if callable(source) else getattr(config, source)
        if value is not None:
            getattr(writer, f"add_{method}")(value)
    _write_tokenizer(writer)


def _general(config: Any) -> _More:
    """What converters say of every config, as far as it has the fields."""
    fields = {
        "block_count": ("num_hidden_layers",),
        "context_length": ("max_position_embeddings",),
        "embedding_length": ("hidden_size",),
        "feed_forward_length": ("intermediate_size",),
        "head_count": ("num_attention_heads",),
        "head_count_kv": ("num_key_value_heads",),
        "layer_norm_rms_eps": ("rms_norm_eps", "norm_eps"),
        "layer_norm_eps": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
        "expert_count": ("num_local_experts", "num_experts"),
        "expert_used_count": ("num_experts_per_tok", "num_experts_per_token", "top_k_experts"),
        "expert_group_count": ("n_group",),
        "expert_group_used_count": ("topk_group",),
        "key_length": ("head_dim",),
        "value_length": ("head_dim",),
    }
    said: _More = {}
    for method, names in fields.items():
        if name := next((name for name in names if getattr(config, name, None) is not None), None):
            said[method] = name
    return said | _rope(config)


def _rope(config: Any) -> _More:
    every = getattr(config, "rope_parameters", None) or {}
    rope = every.get("full_attention", every)
    said: _More = {}
    if "rope_theta" in rope:
        said["rope_freq_base"] = lambda config: rope["rope_theta"]
    if "rope_theta" in every.get("sliding_attention", {}):
        said["rope_freq_base_swa"] = lambda config: every["sliding_attention"]["rope_theta"]
    if rope.get("rope_type") == "yarn":
        scaling = {
            "rope_scaling_factor": "factor",
            "rope_scaling_orig_ctx_len": "original_max_position_embeddings",
            "rope_scaling_yarn_beta_fast": "beta_fast",
            "rope_scaling_yarn_beta_slow": "beta_slow",
        }
        said["rope_scaling_type"] = lambda config: RopeScalingType.YARN
        said |= {method: lambda config, key=key: rope[key] for method, key in scaling.items() if key in rope}
    return said


def _slides(config: Any) -> list[bool]:
    return [kind == "sliding_attention" for kind in config.layer_types]


def _attends(config: Any) -> list[bool]:
    kinds = getattr(config, "layers_block_type", None) or config.layer_types
    return [kind in ("attention", "full_attention") for kind in kinds]


def _keys_where_attention(config: Any) -> list[int]:
    return [config.num_key_value_heads if attends else 0 for attends in _attends(config)]


def _fixed(value: Any) -> Callable[[Any], Any]:
    return lambda config: value


def _turned(part: float | None = None) -> Callable[[Any], int]:
    """Elements of a head that turn."""

    def count(config: Any) -> int:
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(width * (part or config.rope_parameters.get("partial_rotary_factor", 1.0)))

    return count


def _attention_factor(config: Any) -> float | None:
    if config.rope_parameters["rope_type"] != "longrope":
        return None
    scale = config.max_position_embeddings / config.original_max_position_embeddings
    return math.sqrt(1 + math.log(scale) / math.log(config.original_max_position_embeddings))


_SIGMOID: _More = {"expert_gating_func": _fixed(ExpertGatingFuncType.SIGMOID)}
_VOCABULARY: _More = {"vocab_size": "vocab_size"}
_WINDOW: _More = {"sliding_window": "sliding_window"}
_WINDOWS: _More = {**_WINDOW, "sliding_window_pattern": _slides}
_LLAMA: _More = {**_VOCABULARY, "rope_dimension_count": _turned(1.0)}
_LOGITS: _More = {"logit_scale": "logit_scale"}
_UNSCALED: _More = {"rope_scaling_type": _fixed(RopeScalingType.NONE)}
_NO_WIDTH: _More = {"key_length": _fixed(None), "value_length": _fixed(None)}
_EXPERT_WIDTH: _More = {"expert_feed_forward_length": "moe_intermediate_size"}
_SHARED_WIDTH: _More = {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"}
_DEEPSEEK_EXPERTS: _More = {
    **_EXPERT_WIDTH,
    "expert_count": "n_routed_experts",
    "leading_dense_block_count": lambda config: getattr(config, "first_k_dense_replace", 1),
    "expert_shared_count": "n_shared_experts",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob",
    "expert_group_count": lambda config: config.n_group or 1,
    "expert_group_used_count": lambda config: config.topk_group or 1,
}
_LINEAR_ATTENTION: _More = {
    "full_attention_interval": lambda config: config.layer_types.index("full_attention") + 1,
    "ssm_conv_kernel": "linear_conv_kernel_dim",
    "ssm_state_size": "linear_key_head_dim",
    "ssm_group_count": "linear_num_key_heads",
    "ssm_time_step_rank": "linear_num_value_heads",
    "ssm_inner_size": lambda config: config.linear_num_value_heads * config.linear_value_head_dim,
    "rope_dimension_count": _turned(),
}
_QWEN35: _More = {**_LINEAR_ATTENTION, "rope_dimension_sections": _fixed([1, 1, 1, 0])}
_OF_IMAGES: _More = {"rope_dimension_sections": _fixed([4, 2, 2, 0])}
_GRANITE: _More = {
    **_LLAMA,
    **_NO_WIDTH,
    "attention_scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
_GRANITE_SHARED: _More = {
    "expert_shared_feed_forward_length": lambda config: getattr(config, "shared_intermediate_size", None),
}
_MAMBA2: _More = {
    "ssm_conv_kernel": "mamba_d_conv",
    "ssm_state_size": "mamba_d_state",
    "ssm_group_count": "mamba_n_groups",
    "ssm_inner_size": lambda config: config.mamba_n_heads * config.mamba_d_head,
    "ssm_time_step_rank": "mamba_n_heads",
}
_UNTURNED: _More = {
    "context_length": _fixed(1 << 20),
    "rope_scaling_finetuned": _fixed(False),
    "head_count_kv": _keys_where_attention,
}
_ATTENTION_ALONE: _More = {
    "rope_scaling_finetuned": _fixed(True),
    **dict.fromkeys(("ssm_conv_kernel", "ssm_state_size", "ssm_group_count", "ssm_inner_size"), _fixed(4)),
    "ssm_time_step_rank": _fixed(4),
}
"""What the converter of hybrids says of one that has no state space layers."""
_NO_ATTENTION: _More = {
    **_NO_WIDTH,
    "context_length": _fixed(1 << 20),
    "feed_forward_length": _fixed(0),
    "head_count": _fixed(0),
    "layer_norm_eps": _fixed(None),
    "layer_norm_rms_eps": "layer_norm_epsilon",
}
_NEMOTRON_H: _More = {
    **_LLAMA,
    **_UNTURNED,
    "rope_dimension_count": lambda config: config.hidden_size // config.num_attention_heads,
    "layer_norm_rms_eps": "layer_norm_epsilon",
    "ssm_conv_kernel": "conv_kernel",
    "ssm_state_size": "ssm_state_size",
    "ssm_group_count": "n_groups",
    "ssm_inner_size": lambda config: config.mamba_num_heads * config.mamba_head_dim,
    "ssm_time_step_rank": "mamba_num_heads",
}
_SHORT_CONVOLUTIONS: _More = {
    **_VOCABULARY,
    "head_count_kv": _keys_where_attention,
    "shortconv_l_cache": "conv_L_cache",
    "layer_norm_rms_eps": "norm_eps",
}


def _of_all(name: str) -> Callable[[Any], Any]:
    """A field of the layers that see all positions."""
    return lambda config: getattr(config.per_layer_config[config.layer_types.index("full_attention")], name)


def _widths_of_gemma4(config: Any) -> int | list[int]:
    width, first = config.intermediate_size, config.num_hidden_layers - config.num_kv_shared_layers
    if not config.use_double_wide_mlp:
        return int(width)
    return [width if layer < first else 2 * width for layer in range(config.num_hidden_layers)]


def _keys_of_gemma4(config: Any) -> int | list[int]:
    heads = [config.per_layer_config[layer].num_key_value_heads for layer in range(config.num_hidden_layers)]
    return heads if len(set(heads)) > 1 else heads[0]


def _gate(config: Any) -> ExpertGatingFuncType:
    return ExpertGatingFuncType.SIGMOID


_DEEPSEEK2: _More = {
    **_DEEPSEEK_EXPERTS,
    **_VOCABULARY,
    "head_count_kv": _fixed(1),
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "key_length": lambda config: config.kv_lora_rank + config.qk_rope_head_dim,
    "value_length": "kv_lora_rank",
    "key_length_mla": lambda config: config.qk_nope_head_dim + config.qk_rope_head_dim,
    "value_length_mla": "v_head_dim",
    "rope_dimension_count": "qk_rope_head_dim",
    "expert_gating_func": lambda config: None if config.model_type == "deepseek_v2" else _gate(config),
}

MORE: dict[str, _More] = {
    "arcee": _LLAMA,
    "cohere2": {**_LOGITS, **_WINDOW, **_VOCABULARY, **_UNSCALED, "rope_dimension_count": _turned(1.0)},
    "command-r": {**_LOGITS, **_UNSCALED},
    "deepseek2": _DEEPSEEK2,
    "glm-dsa": {
        **_DEEPSEEK2,
        "expert_gating_func": _gate,
        "indexer_head_count": "index_n_heads",
        "indexer_key_length": "index_head_dim",
        "indexer_top_k": "index_topk",
    },
    "phi2": {"rope_dimension_count": _turned(), "rope_freq_base": _fixed(None)},
    "stablelm": {"rope_dimension_count": _turned(), "parallel_residual": "use_parallel_residual"},
    "dots1": {**_DEEPSEEK_EXPERTS, **_SIGMOID},
    "ernie4_5-moe": {
        **_EXPERT_WIDTH,
        "expert_count": "moe_num_experts",
        "expert_used_count": "moe_k",
        "interleave_moe_layer_step": "moe_layer_interval",
        "leading_dense_block_count": "moe_layer_start_index",
        "expert_shared_count": "moe_num_shared_experts",
        "expert_shared_feed_forward_length": lambda config: config.intermediate_size // config.num_key_value_heads,
    },
    "exaone-moe": {
        **_WINDOWS,
        **_VOCABULARY,
        **_SIGMOID,
        **_UNSCALED,
        **_EXPERT_WIDTH,
        "expert_shared_count": "num_shared_experts",
        "expert_shared_feed_forward_length": lambda config: config.moe_intermediate_size * config.num_shared_experts,
        "expert_weights_scale": "routed_scaling_factor",
        "expert_weights_norm": "norm_topk_prob",
        "leading_dense_block_count": "first_k_dense_replace",
    },
    "exaone4": {**_WINDOWS, **_VOCABULARY},
    "falcon-h1": {**_MAMBA2, **_VOCABULARY},
    "gemma2": {
        **_WINDOW,
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    "gemma3": _WINDOW,
    "gemma4": {
        **_WINDOWS,
        "shared_kv_layers": "num_kv_shared_layers",
        "embedding_length_per_layer_input": lambda config: config.hidden_size_per_layer_input or 0,
        "key_length": _of_all("head_dim"),
        "value_length": _of_all("head_dim"),
        "key_length_swa": "head_dim",
        "value_length_swa": "head_dim",
        "rope_dimension_count": _of_all("head_dim"),
        "rope_dimension_count_swa": "head_dim",
        "expert_feed_forward_length": "moe_intermediate_size",
        "feed_forward_length": _widths_of_gemma4,
        "head_count_kv": _keys_of_gemma4,
        "final_logit_softcapping": "final_logit_softcapping",
    },
    "glm4": {"rope_dimension_count": _turned()},
    "glm4moe": {**_DEEPSEEK_EXPERTS, **_SIGMOID, "rope_dimension_count": _turned()},
    "gpt-oss": {**_WINDOW, "expert_feed_forward_length": "intermediate_size"},
    "granite": {**_GRANITE, **_ATTENTION_ALONE, "expert_count": _fixed(0), "expert_used_count": _fixed(0)},
    "granitehybrid": {**_GRANITE, **_GRANITE_SHARED, **_MAMBA2, **_UNTURNED},
    "granitemoe": {**_GRANITE, **_GRANITE_SHARED, **_ATTENTION_ALONE},
    "hunyuan-moe": {
        "expert_feed_forward_length": "intermediate_size",
        "expert_shared_feed_forward_length": "intermediate_size",
        "expert_used_count": "moe_topk",
        "expert_shared_count": _fixed(1),
    },
    "jamba": {
        **_NO_WIDTH,
        "head_count_kv": lambda config: [
            config.num_key_value_heads if layer % config.attn_layer_period == config.attn_layer_offset else 0
            for layer in range(config.num_hidden_layers)
        ],
        "ssm_conv_kernel": "mamba_d_conv",
        "ssm_inner_size": lambda config: config.mamba_expand * config.hidden_size,
        "ssm_state_size": "mamba_d_state",
        "ssm_time_step_rank": "mamba_dt_rank",
    },
    "kimi-linear": {
        **_VOCABULARY,
        **_EXPERT_WIDTH,
        **_SIGMOID,
        "head_count_kv": lambda config: [int(attends) for attends in _attends(config)],
        "ssm_conv_kernel": "linear_conv_kernel_dim",
        "kda_head_dim": "linear_head_dim",
        "kv_lora_rank": "kv_lora_rank",
        "rope_dimension_count": "qk_rope_head_dim",
        "key_length": lambda config: config.kv_lora_rank + config.qk_rope_head_dim,
        "key_length_mla": lambda config: config.qk_nope_head_dim + config.qk_rope_head_dim,
        "value_length_mla": "v_head_dim",
        "expert_count": "num_experts",
        "expert_shared_count": "num_shared_experts",
        "leading_dense_block_count": lambda config: config.mlp_layer_types.index("sparse"),
        "expert_weights_scale": "routed_scaling_factor",
    },
    "lfm2": _SHORT_CONVOLUTIONS,
    "lfm2moe": {
        **_SHORT_CONVOLUTIONS,
        **_EXPERT_WIDTH,
        **_SIGMOID,
        "leading_dense_block_count": "num_dense_layers",
    },
    "llama4": {
        **_LLAMA,
        "feed_forward_length": "intermediate_size_mlp",
        "interleave_moe_layer_step": "interleave_moe_layer_step",
        "expert_feed_forward_length": "intermediate_size",
    },
    "mamba": {
        **_NO_ATTENTION,
        "ssm_conv_kernel": "conv_kernel",
        "ssm_inner_size": lambda config: config.expand * config.hidden_size,
        "ssm_state_size": "state_size",
        "ssm_time_step_rank": "time_step_rank",
        "ssm_dt_b_c_rms": lambda config: config.model_type == "falcon_mamba",
    },
    "mamba2": {
        **_NO_ATTENTION,
        "ssm_conv_kernel": "conv_kernel",
        "ssm_inner_size": lambda config: config.num_heads * config.head_dim,
        "ssm_state_size": "state_size",
        "ssm_time_step_rank": "num_heads",
        "ssm_group_count": "n_groups",
    },
    "minimax-m2": {**_SIGMOID, "rope_dimension_count": _turned(), "expert_feed_forward_length": "intermediate_size"},
    "mistral3": {
        **_LLAMA,
        "rope_scaling_yarn_log_mul": lambda config: config.rope_parameters.get("mscale_all_dim"),
        "attn_temperature_scale": lambda config: config.rope_parameters.get("llama_4_scaling_beta"),
    },
    "nemotron": {**_VOCABULARY, **_UNSCALED, "layer_norm_eps": "norm_eps"} | {"rope_dimension_count": _turned()},
    "nemotron_h": {
        **_NEMOTRON_H,
        "feed_forward_length": lambda config: [
            config.intermediate_size if kind == "mlp" else 0 for kind in config.layers_block_type
        ],
        "expert_count": _fixed(None),
    },
    "nemotron_h_moe": {
        **_NEMOTRON_H,
        **_EXPERT_WIDTH,
        "feed_forward_length": lambda config: [
            config.moe_intermediate_size if kind == "moe" else 0 for kind in config.layers_block_type
        ],
        "expert_count": "n_routed_experts",
        "expert_shared_feed_forward_length": "moe_shared_expert_intermediate_size",
        "expert_shared_count": "n_shared_experts",
        "expert_weights_norm": "norm_topk_prob",
        "expert_weights_scale": "routed_scaling_factor",
        "moe_latent_size": "moe_latent_size",
    },
    "olmo": {"layer_norm_eps": _fixed(1e-5), "clamp_kqv": "clip_qkv"},
    "olmo2": {
        "sliding_window": lambda config: getattr(config, "sliding_window", None),
        "sliding_window_pattern": lambda config: _slides(config) if hasattr(config, "sliding_window") else None,
    },
    "phi3": {
        "sliding_window": lambda config: config.sliding_window or 0,
        "rope_dimension_count": _turned(),
        "rope_scaling_orig_ctx_len": "original_max_position_embeddings",
        "rope_scaling_attn_factors": _attention_factor,
    },
    "qwen2moe": {**_EXPERT_WIDTH, **_SHARED_WIDTH},
    "qwen2vl": _OF_IMAGES,
    "qwen35": _QWEN35,
    "qwen35moe": {**_QWEN35, **_EXPERT_WIDTH, **_SHARED_WIDTH, "feed_forward_length": _fixed(None)},
    "qwen3moe": _EXPERT_WIDTH,
    "qwen3next": {**_LINEAR_ATTENTION, **_EXPERT_WIDTH, **_SHARED_WIDTH},
    "qwen3vl": {**_OF_IMAGES, "num_deepstack_layers": _fixed(3)},
    "qwen3vlmoe": {**_OF_IMAGES, **_EXPERT_WIDTH, "num_deepstack_layers": _fixed(3)},
}
"""By what GGUF calls the architecture."""


def _write_tokenizer(writer: GGUFWriter) -> None:
    tokens = sorted(build_tokenizer().get_vocab().items(), key=lambda item: item[1])
    pieces = [piece for piece, _ in tokens]
    pieces[-3:] = ["abc", "ba", "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(pieces)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (VOCABULARY - 3))
    writer.add_token_merges(["a b", "b a"])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_pad_token_id(PAD)
