"""Derives the transformers config from a GGUF file's metadata.

Every key of the file's architecture is used or refused by name, since an unknown key may change what a model computes.
Keys and their meaning are those of llama.cpp's `conversion/` and `src/llama-model.cpp`.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Mapping
from typing import Any

from zeroinf.errors import ModelError
from zeroinf.model.gguf.header import FLOAT_TYPES, GgufHeader

OF_CONFIG = ("rope_freqs.weight",)
"""Tensors whose values a config takes up."""

_REQUIRED = object()
_LAYER = re.compile(r"blk\.(\d+)\.")
_Config = dict[str, Any]


class _Facts:
    """Metadata of the architecture; remembers what was read, so that the rest can be refused."""

    def __init__(self, header: GgufHeader) -> None:
        prefix = f"{header.architecture}."
        self.tensors = header.tensors
        self._values = {key.removeprefix(prefix): v for key, v in header.metadata.items() if key.startswith(prefix)}
        self._read: set[str] = set()

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value of `key`; a list of equal numbers, one a layer, is that number."""
        self._read.add(key)
        value = self._values.get(key, default)
        if value is _REQUIRED:
            raise _Unknown(f"it does not say {key}")
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            return value[0]
        return value

    def expect(self, key: str, *values: Any) -> None:
        """Refuse the file where it says anything but one of `values` of `key`."""
        if (found := self.get(key, values[0])) not in values:
            raise _Unknown(f"its {key} is {found}")

    def shape(self, tensor: str) -> tuple[int, ...]:
        if tensor not in self.tensors:
            raise _Unknown(f"it has no tensor {tensor}")
        return self.tensors[tensor].shape

    def numbers(self, tensor: str) -> list[float]:
        """The elements of a small tensor in float32."""
        found = self.tensors[tensor]
        if FLOAT_TYPES.get(found.kind) != "float32":
            raise _Unknown(f"its {tensor} is not in float32")
        with found.path.open("rb") as file:
            file.seek(found.offset)
            return list(struct.unpack(f"<{found.nbytes // 4}f", file.read(found.nbytes)))

    def refuse_layers_from(self, count: int) -> None:
        """Refuse the file where it holds tensors of more than `count` layers."""
        for tensor in self.tensors:
            if (layer := _LAYER.match(tensor)) is not None and int(layer[1]) >= count:
                raise _Unknown(f"it says block_count {count}, and holds {tensor}")

    def refuse_unread(self) -> None:
        unread = sorted(set(self._values) - self._read)
        if unread:
            raise _Unknown(f"what it says of {', '.join(unread)} is not known")


class _Unknown(Exception):  # noqa: N818 - never leaves this module
    """Why no config can be made of a file."""


def build_config(header: GgufHeader) -> _Config:
    """The config, but for how weights lie in the file. Raises ModelError for what is not known to be exact."""
    architecture = header.architecture
    facts = _Facts(header)
    try:
        if architecture not in _BUILDERS:
            raise _Unknown(f"this runs {', '.join(sorted(_BUILDERS))}")
        config = _BUILDERS[architecture](facts) | _tokens(header.metadata)
        facts.refuse_unread()
    except _Unknown as error:
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


def _decoder(facts: _Facts, kind: str, name: str) -> _Config:
    """The config entries that all decoders have. Sizes of tensors are taken from the tensors."""
    vocabulary, hidden = facts.shape("token_embd.weight")
    facts.expect("embedding_length", hidden)
    facts.expect("vocab_size", vocabulary)
    facts.expect("attention.causal", True)
    heads, layers = facts.get("attention.head_count"), facts.get("block_count")
    facts.refuse_layers_from(layers)
    return {
        "model_type": kind,
        "architectures": [name],
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers - facts.get("nextn_predict_layers", 0),
        "max_position_embeddings": facts.get("context_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": facts.get("attention.head_count_kv", heads),
        "tie_word_embeddings": "output.weight" not in facts.tensors,
    }


def _with_rms_norms(facts: _Facts, kind: str, name: str) -> _Config:
    """A decoder with RMS norms, whose feed-forward part is as wide in each layer."""
    config = _decoder(facts, kind, name)
    return config | {
        "rms_norm_eps": facts.get("attention.layer_norm_rms_epsilon"),
        "intermediate_size": facts.get("feed_forward_length", None),
    }


def _head_dim(facts: _Facts, config: _Config) -> int:
    """The width of a head, of which all, or so many as the config says, are turned by their position."""
    width: int = facts.get("attention.key_length", config["hidden_size"] // config["num_attention_heads"])
    facts.expect("attention.value_length", width)
    return width


def _rope(facts: _Facts, width: int, *, partial: bool = False) -> _Config:
    """`rope_parameters` of heads of `width`, of which all turn unless they may turn in part."""
    turned = facts.get("rope.dimension_count", width)
    if turned != width and not partial:
        raise _Unknown(f"{turned} of {width} elements of a head turn")
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
    elif kind != "none":
        raise _Unknown(f"its rope.scaling.type is {kind}")
    if "rope_freqs.weight" in facts.tensors:
        rope |= _llama3(facts.numbers("rope_freqs.weight"), rope["rope_theta"], turned)
    return rope


def _llama3(factors: list[float], theta: float, turned: int) -> _Config:
    """Llama 3's rope settings, found from the factors of each frequency, which are all that a file keeps of them."""
    factor, low, high, original = max(factors), 1.0, 4.0, 8192
    for at, found in enumerate(factors):
        turns = original * theta ** (-2 * at / turned) / (2 * math.pi)
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        if not math.isclose(found, 1 / ((1 - smooth) / factor + smooth), rel_tol=1e-4):
            raise _Unknown("its rope_freqs are not those of Llama 3")
    if factor == 1:
        return {}
    kept = {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": original}
    return {"rope_type": "llama3", "factor": round(factor, 4), **kept}


def _llama(facts: _Facts) -> _Config:
    experts = facts.get("expert_count", 0)
    kind, name = ("mixtral", "MixtralForCausalLM") if experts else ("llama", "LlamaForCausalLM")
    config = _with_rms_norms(facts, kind, name)
    width = _head_dim(facts, config)
    config |= {"head_dim": width, "rope_parameters": _rope(facts, width)}
    used = facts.get("expert_used_count", 0)
    if experts:
        return config | {"num_local_experts": experts, "num_experts_per_tok": used, "sliding_window": None}
    has_bias = {f"{part}_bias": f"blk.0.{one}.bias" in facts.tensors for part, one in _LLAMA_BIASES.items()}
    return config | has_bias


_LLAMA_BIASES = {"attention": "attn_q", "mlp": "ffn_gate"}


def _qwen2(facts: _Facts) -> _Config:
    config = _with_rms_norms(facts, "qwen2", "Qwen2ForCausalLM")
    return config | {"rope_parameters": _rope(facts, _head_dim(facts, config))}


def _qwen3(facts: _Facts) -> _Config:
    config = _with_rms_norms(facts, "qwen3", "Qwen3ForCausalLM")
    width = _head_dim(facts, config)
    return config | {"head_dim": width, "rope_parameters": _rope(facts, width)}


def _routed(facts: _Facts) -> _Config:
    """The config entries of Qwen's mixtures of experts."""
    width = facts.shape("blk.0.ffn_down_exps.weight")[-1]
    facts.expect("expert_feed_forward_length", width)
    return {
        "num_experts": facts.get("expert_count"),
        "num_experts_per_tok": facts.get("expert_used_count"),
        "moe_intermediate_size": width,
    }


def _of_text(build: Callable[[_Facts], _Config]) -> Callable[[_Facts], _Config]:
    """The text part of Qwen3-VL: positions are the same on all axes, and no layer takes what images give."""

    def text(facts: _Facts) -> _Config:
        facts.get("rope.dimension_sections", None), facts.get("n_deepstack_layers", 0)
        return build(facts)

    return text


def _smollm3(facts: _Facts) -> _Config:
    config = _with_rms_norms(facts, "smollm3", "SmolLM3ForCausalLM")
    return config | {"no_rope_layer_interval": 4, "rope_parameters": _rope(facts, _head_dim(facts, config))}


def _experts(facts: _Facts) -> _Config:
    """The same where a config says which layers have experts: all of them."""
    return {**_routed(facts), "decoder_sparse_step": 1, "mlp_only_layers": []}


def _qwen2moe(facts: _Facts) -> _Config:
    config = _with_rms_norms(facts, "qwen2_moe", "Qwen2MoeForCausalLM") | _experts(facts)
    config |= {**_shared_expert(facts), "norm_topk_prob": False}
    return config | {"rope_parameters": _rope(facts, _head_dim(facts, config))}


def _qwen3moe(facts: _Facts) -> _Config:
    config = _with_rms_norms(facts, "qwen3_moe", "Qwen3MoeForCausalLM") | _experts(facts)
    width = _head_dim(facts, config)
    return config | {"head_dim": width, "norm_topk_prob": True, "rope_parameters": _rope(facts, width)}


def _linear_attention(facts: _Facts) -> _Config:
    """The config entries of models of which every so many layers have attention and the others linear attention."""
    heads = facts.get("ssm.time_step_rank")
    return {
        "full_attention_interval": facts.get("full_attention_interval", 4),
        "linear_conv_kernel_dim": facts.get("ssm.conv_kernel"),
        "linear_key_head_dim": facts.get("ssm.state_size"),
        "linear_num_key_heads": facts.get("ssm.group_count"),
        "linear_num_value_heads": heads,
        "linear_value_head_dim": facts.get("ssm.inner_size") // heads,
    }


def _shared_expert(facts: _Facts) -> _Config:
    shared = facts.shape("blk.0.ffn_down_shexp.weight")[-1]
    facts.expect("expert_shared_feed_forward_length", shared)
    return {"shared_expert_intermediate_size": shared}


def _qwen3next(facts: _Facts) -> _Config:
    config = _with_rms_norms(facts, "qwen3_next", "Qwen3NextForCausalLM")
    width = _head_dim(facts, config)
    return config | {
        "head_dim": width,
        **_linear_attention(facts),
        **_experts(facts),
        **_shared_expert(facts),
        "norm_topk_prob": True,
        "rope_parameters": _rope(facts, width, partial=True),
    }


def _qwen35(facts: _Facts) -> _Config:
    config = _with_rms_norms(facts, "qwen3_5_text", "Qwen3_5ForCausalLM")
    width = _head_dim(facts, config)
    sections = facts.get("rope.dimension_sections")[:3]
    rope = _rope(facts, width, partial=True)
    return config | {
        "head_dim": width,
        **_linear_attention(facts),
        "rope_parameters": {**rope, "mrope_section": sections, "mrope_interleaved": True},
    }


def _qwen35moe(facts: _Facts) -> _Config:
    return _qwen35(facts) | {
        "model_type": "qwen3_5_moe_text",
        "architectures": ["Qwen3_5MoeForCausalLM"],
        **_routed(facts),
        **_shared_expert(facts),
    }


def _lfm2(facts: _Facts) -> _Config:
    """LFM2, in which layers without heads of keys are short convolutions."""
    config = _with_rms_norms(facts, "lfm2", "Lfm2ForCausalLM")
    heads = facts.get("attention.head_count_kv")
    each = heads if isinstance(heads, list) else [heads] * config["num_hidden_layers"]
    return config | {
        "num_key_value_heads": max(each),
        "layer_types": ["full_attention" if one else "conv" for one in each],
        "norm_eps": config["rms_norm_eps"],
        "block_auto_adjust_ff_dim": False,
        "conv_L_cache": facts.get("shortconv.l_cache"),
        "conv_bias": any(name.endswith("shortconv.in_proj.bias") for name in facts.tensors),
        "rope_parameters": _rope(facts, _head_dim(facts, config)),
    }


def _gpt_oss(facts: _Facts) -> _Config:
    config = _with_rms_norms(facts, "gpt_oss", "GptOssForCausalLM")
    width, inner = _head_dim(facts, config), facts.shape("blk.0.ffn_down_exps.weight")[-1]
    facts.expect("expert_feed_forward_length", inner)
    return config | {
        "head_dim": width,
        "intermediate_size": inner,
        "num_local_experts": facts.get("expert_count"),
        "num_experts_per_tok": facts.get("expert_used_count"),
        "sliding_window": facts.get("attention.sliding_window"),
        # Its makers' config; files do not say it.
        "rope_parameters": {**_rope(facts, width), "truncate": False},
    }


def _gemma(facts: _Facts) -> _Config:
    config = _with_rms_norms(facts, "gemma", "GemmaForCausalLM")
    width = _head_dim(facts, config)
    return config | {"head_dim": width, "tie_word_embeddings": True, "rope_parameters": _rope(facts, width)}


def _gemma2(facts: _Facts) -> _Config:
    config = _with_rms_norms(facts, "gemma2", "Gemma2ForCausalLM")
    width = _head_dim(facts, config)
    return config | {
        "head_dim": width,
        "query_pre_attn_scalar": _gemma_scale(config, width, largest=46),
        "sliding_window": facts.get("attention.sliding_window"),
        "attn_logit_softcapping": facts.get("attn_logit_softcapping"),
        "final_logit_softcapping": facts.get("final_logit_softcapping"),
        "rope_parameters": _rope(facts, width),
    }


def _gemma3(facts: _Facts) -> _Config:
    config = _with_rms_norms(facts, "gemma3_text", "Gemma3ForCausalLM")
    width = _head_dim(facts, config)
    return config | {
        "head_dim": width,
        "query_pre_attn_scalar": _gemma_scale(config, width, largest=62),
        "sliding_window": facts.get("attention.sliding_window"),
        "final_logit_softcapping": facts.get("final_logit_softcapping", None),
        "rope_parameters": {
            "full_attention": _rope(facts, width),
            "sliding_attention": {"rope_type": "default", "rope_theta": facts.get("rope.freq_base_swa", 10000.0)},
        },
    }


def _gemma_scale(config: _Config, width: int, *, largest: int) -> float:
    """Scores are divided by its root. The largest model of each generation, known by its layers, has its own."""
    heads: int = config["num_attention_heads"]
    return config["hidden_size"] // heads if config["num_hidden_layers"] == largest else width


def _phi3(facts: _Facts) -> _Config:
    config = _with_rms_norms(facts, "phi3", "Phi3ForCausalLM")
    width = _head_dim(facts, config)
    if any(name.startswith("rope_factors_") for name in facts.tensors):
        raise _Unknown("it scales positions by factors of its own (longrope)")
    rope = _rope(facts, width, partial=True)
    return config | {"sliding_window": facts.get("attention.sliding_window", None), "rope_parameters": rope}


def _routed_in_groups(facts: _Facts) -> _Config:
    """The config entries of mixtures of experts as DeepSeek has them, but for their groups."""
    return {
        "n_routed_experts": facts.get("expert_count"),
        "num_experts_per_tok": facts.get("expert_used_count"),
        "n_shared_experts": facts.get("expert_shared_count"),
        "moe_intermediate_size": facts.get("expert_feed_forward_length"),
        "first_k_dense_replace": facts.get("leading_dense_block_count", 0),
        "routed_scaling_factor": facts.get("expert_weights_scale", 1.0),
        "norm_topk_prob": facts.get("expert_weights_norm", False),
    }


def _glm4moe(facts: _Facts) -> _Config:
    config = _with_rms_norms(facts, "glm4_moe", "Glm4MoeForCausalLM")
    width = _head_dim(facts, config)
    facts.expect("expert_gating_func", 2)
    return config | {
        "head_dim": width,
        "attention_bias": "blk.0.attn_q.bias" in facts.tensors,
        "use_qk_norm": "blk.0.attn_q_norm.weight" in facts.tensors,
        "n_group": facts.get("expert_group_count", 1),
        "topk_group": facts.get("expert_group_used_count", 1),
        **_routed_in_groups(facts),
        "rope_parameters": _rope(facts, width, partial=True),
    }


def _minimax_m2(facts: _Facts) -> _Config:
    config = _with_rms_norms(facts, "minimax_m2", "MiniMaxM2ForCausalLM")
    width, inner = _head_dim(facts, config), facts.shape("blk.0.ffn_down_exps.weight")[-1]
    facts.expect("expert_feed_forward_length", inner)
    facts.expect("expert_gating_func", 2)
    return config | {
        "head_dim": width,
        "intermediate_size": inner,
        "num_local_experts": facts.get("expert_count"),
        "num_experts_per_tok": facts.get("expert_used_count"),
        "rope_parameters": _rope(facts, width, partial=True),
    }


def _deepseek2(facts: _Facts) -> _Config:
    gating = facts.get("expert_gating_func", 1)
    if gating not in (1, 2):
        raise _Unknown(f"its expert_gating_func is {gating}")
    number = "V3" if gating == 2 else "V2"
    config = _with_rms_norms(facts, f"deepseek_{number.lower()}", f"Deepseek{number}ForCausalLM")
    turned = facts.get("rope.dimension_count")
    facts.get("attention.key_length", None), facts.get("attention.value_length", None)
    rank = facts.get("attention.kv_lora_rank")
    key = facts.get("attention.key_length_mla", None) or facts.get("attention.key_length")
    value = facts.get("attention.value_length_mla", None) or facts.get("attention.value_length")
    rope = _rope(facts, turned)
    if (scale := facts.get("rope.scaling.yarn_log_multiplier", None)) is not None:
        rope |= {"mscale": round(10 * scale, 6), "mscale_all_dim": round(10 * scale, 6)}
    experts, groups = facts.get("expert_count"), facts.get("expert_group_count", None)
    if groups is None and (number, experts) != ("V2", _UNGROUPED):
        raise _Unknown("it does not say expert_group_count, as early conversions do not")
    return config | {
        "num_key_value_heads": config["num_attention_heads"],
        "q_lora_rank": facts.get("attention.q_lora_rank", None) or None,
        "kv_lora_rank": rank,
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": key - turned,
        "v_head_dim": value,
        "head_dim": turned,
        **_routed_in_groups(facts),
        "n_group": groups or 1,
        "topk_group": facts.get("expert_group_used_count", 1),
        "topk_method": "noaux_tc" if number == "V3" else "greedy" if (groups or 1) == 1 else "group_limited_greedy",
        "rope_parameters": rope,
    }


# DeepSeek-V2-Lite's experts, which have no groups.
_UNGROUPED = 64

_BUILDERS: dict[str, Callable[[_Facts], _Config]] = {
    "deepseek2": _deepseek2,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "glm4moe": _glm4moe,
    "gpt-oss": _gpt_oss,
    "lfm2": _lfm2,
    "llama": _llama,
    "minimax-m2": _minimax_m2,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen2moe": _qwen2moe,
    "qwen3": _qwen3,
    "qwen35": _qwen35,
    "qwen35moe": _qwen35moe,
    "qwen3moe": _qwen3moe,
    "qwen3next": _qwen3next,
    "qwen3vl": _of_text(_qwen3),
    "qwen3vlmoe": _of_text(_qwen3moe),
    "smollm3": _smollm3,
}
