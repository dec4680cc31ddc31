"""The architectures of GGUF files that are known to run: the model class of transformers that each stands for, and the
parts of which its config is made.

Where one architecture has files of several classes, a function picks by what the file says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from zeroinf.model.gguf.facts import GgufFacts, Unknown
from zeroinf.model.gguf.parts import (
    Config,
    Part,
    attention_or,
    dense,
    expansion,
    expects,
    fixed,
    groups,
    has,
    head_dim,
    layer_norm,
    linear_attention,
    mamba2,
    may_read,
    needless,
    partial_rope,
    reads,
    rms_norm,
    rope,
    ropes_by_window,
    routed,
    routed_in_groups,
    shared_expert,
    sliding,
)
from zeroinf.model.gguf.rope import FREQUENCIES, rope_parameters


@dataclass(frozen=True, slots=True)
class Family:
    """A model class of transformers, and what makes its config of what a file says, part after part."""

    model_type: str
    name: str
    parts: tuple[Part, ...]


def _family(model_type: str, name: str, *parts: Part) -> Family:
    return Family(model_type, f"{name}ForCausalLM", parts)


_NORMED = (rms_norm, dense, head_dim)
_USUAL = (*_NORMED, rope)
_QUERY_BIAS = "blk.0.attn_q.bias"
_EXPERTS = routed(experts="num_experts", used="num_experts_per_tok", width="moe_intermediate_size")
_LOCAL_EXPERTS = routed(experts="num_local_experts", used="num_experts_per_tok")
_QWEN_EXPERTS = (_EXPERTS, fixed(decoder_sparse_step=1, mlp_only_layers=[]))
_SCALES = reads(
    attention_multiplier="attention.scale",
    embedding_multiplier="embedding_scale",
    residual_multiplier="residual_scale",
    logits_scaling="logit_scale",
)
_OF_SIGMOID = expects(expert_gating_func=2)
_WINDOW = reads(sliding_window="attention.sliding_window")


def _as_wide_as_experts(facts: GgufFacts, config: Config) -> Config:
    return routed(width="intermediate_size")(facts, config)


def _llama(facts: GgufFacts) -> Family:
    if facts.get("expert_count", 0):
        return _family("mixtral", "Mixtral", *_USUAL, _LOCAL_EXPERTS, fixed(sliding_window=None))
    biases = has(attention_bias=_QUERY_BIAS, mlp_bias="blk.0.ffn_gate.bias")
    return _family("llama", "Llama", *_USUAL, biases, expects(expert_used_count=0))


def _mistral3(facts: GgufFacts) -> Family:
    """Mistral Small 3 and Devstral are Mistral, Ministral 3 and later ones scale queries by their position."""
    if facts.get("attention.temperature_scale", 0.0):
        return _family("ministral3", "Ministral3", *_USUAL, _scaled_by_position)
    return _family("mistral", "Mistral", *_USUAL, fixed(sliding_window=None))


def _scaled_by_position(facts: GgufFacts, config: Config) -> Config:
    every = facts.get("rope.scaling.yarn_log_multiplier", 0.0)
    more = {"mscale": 1.0, "mscale_all_dim": every} if every else {}
    beta = facts.get("attention.temperature_scale")
    return {"rope_parameters": {**config["rope_parameters"], **more, "llama_4_scaling_beta": beta}}


def _llama4(facts: GgufFacts, config: Config) -> Config:
    """Llama 4, whose largest model alone has no norms of queries and keys. Files do not say how layers see."""
    experts = facts.get("expert_count")
    return {
        "num_local_experts": experts,
        "num_experts_per_tok": facts.get("expert_used_count"),
        "intermediate_size": facts.get("expert_feed_forward_length"),
        "intermediate_size_mlp": facts.get("feed_forward_length"),
        "interleave_moe_layer_step": facts.get("interleave_moe_layer_step"),
        "use_qk_norm": experts != 128,
    }


def _olmo2(facts: GgufFacts) -> Family:
    if facts.get("attention.sliding_window", None) is None:
        return _family("olmo2", "Olmo2", *_USUAL)
    return _family("olmo3", "Olmo3", *_NORMED, sliding(), ropes_by_window)


def _granite_moe(facts: GgufFacts) -> Family:
    parts = (*_USUAL, _LOCAL_EXPERTS, _SCALES, expects(rope__scaling__finetuned=True))
    if facts.get("expert_shared_feed_forward_length", None) is None:
        return _family("granitemoe", "GraniteMoe", *parts)
    shared = reads(shared_intermediate_size="expert_shared_feed_forward_length")
    return _family("granitemoeshared", "GraniteMoeShared", *parts, shared)


def _granite_hybrid(facts: GgufFacts, config: Config) -> Config:
    return {
        "position_embedding_type": "rope" if facts.get("rope.scaling.finetuned", True) else "nope",
        "num_local_experts": facts.get("expert_count", 0),
        "num_experts_per_tok": facts.get("expert_used_count", 0),
    }


def _as_dense(facts: GgufFacts, config: Config) -> Config:
    """Experts, all shared experts and dense layers are equally wide."""
    facts.expect("expert_feed_forward_length", config["intermediate_size"])
    facts.expect("expert_shared_feed_forward_length", config["intermediate_size"])
    return {}


def _nemotron_h(facts: GgufFacts, config: Config) -> Config:
    """Nemotron-H, whose layers are attention, a feed-forward part or Mamba-2 each; positions turn nothing."""
    layers = config["num_hidden_layers"]
    heads, widths = facts.each("attention.head_count_kv", layers), facts.each("feed_forward_length", layers)
    wide = "moe" if facts.get("expert_count", 0) else "mlp"
    epsilon = facts.get("attention.layer_norm_rms_epsilon")
    facts.expect("attention.layer_norm_epsilon", epsilon)
    facts.expect("rope.scaling.finetuned", False)
    kinds = zip(heads, widths, strict=True)
    return {
        "layers_block_type": ["attention" if keys else wide if width else "mamba" for keys, width in kinds],
        "intermediate_size": max(widths),
        "layer_norm_epsilon": epsilon,
    }


_NEMOTRON_H = (
    *(head_dim, _nemotron_h, needless("rope.dimension_count", "rope.freq_base")),
    mamba2(heads="mamba_num_heads", width="mamba_head_dim", groups="n_groups"),
    mamba2(state="ssm_state_size", kernel="conv_kernel"),
    has(use_conv_bias="blk.*.ssm_conv1d.bias", use_bias="blk.*.ssm_in.bias", mamba_proj_bias="blk.*.ssm_in.bias"),
    has(attention_bias="blk.*.attn_q.bias", mlp_bias="blk.*.ffn_up.bias"),
)
_NEMOTRON_H_EXPERTS = (
    *(_OF_SIGMOID, groups, may_read(moe_latent_size="moe_latent_size")),
    routed(experts="n_routed_experts", used="num_experts_per_tok", width="moe_intermediate_size"),
    reads(moe_shared_expert_intermediate_size="expert_shared_feed_forward_length"),
    reads(n_shared_experts="expert_shared_count", routed_scaling_factor="expert_weights_scale"),
    reads(norm_topk_prob="expert_weights_norm"),
)


def _mamba(facts: GgufFacts) -> Family:
    """Mamba, and Falcon-Mamba, which has norms that files do not hold, since they have no weights."""
    has_norms = facts.get("ssm.dt_b_c_rms", False)
    parts = (
        _mixer_norm,
        reads(state_size="ssm.state_size", conv_kernel="ssm.conv_kernel", time_step_rank="ssm.time_step_rank"),
        lambda facts, config: {"expand": expansion(facts, config)},
        has(use_bias="blk.0.ssm_in.bias", use_conv_bias="blk.0.ssm_conv1d.bias"),
        needless("feed_forward_length"),
    )
    return _family("falcon_mamba", "FalconMamba", *parts) if has_norms else _family("mamba", "Mamba", *parts)


def _mixer_norm(facts: GgufFacts, config: Config) -> Config:
    return {"layer_norm_epsilon": facts.get("attention.layer_norm_rms_epsilon")}


def _jamba(facts: GgufFacts, config: Config) -> Config:
    """Jamba, which repeats attention, and experts, after so many layers each."""
    layers = config["num_hidden_layers"]
    attends = [bool(heads) for heads in facts.each("attention.head_count_kv", layers)]
    has_experts = [facts.has(f"blk.{layer}.ffn_gate_inp.weight") for layer in range(layers)]
    found: Config = {"use_mamba_kernels": False}
    for name, repeats in (("attn", attends), ("expert", has_experts)):
        at = [layer for layer, one in enumerate(repeats) if one]
        period = at[1] - at[0] if len(at) > 1 else layers
        if not at or repeats != [layer % period == at[0] % period for layer in range(layers)] or at[0] >= period:
            raise Unknown(f"its layers with {'attention' if name == 'attn' else 'experts'} do not repeat evenly")
        found |= {f"{name}_layer_period": period, f"{name}_layer_offset": at[0]}
    return found


def _lfm2(facts: GgufFacts, config: Config) -> Config:
    return {
        "norm_eps": config["rms_norm_eps"],
        "block_auto_adjust_ff_dim": False,
        "conv_L_cache": facts.get("shortconv.l_cache"),
        "conv_bias": facts.has("blk.*.shortconv.in_proj.bias"),
    }


def _qwen35_rope(facts: GgufFacts, config: Config) -> Config:
    sections = facts.get("rope.dimension_sections")[:3]
    turned = rope_parameters(facts, config["head_dim"], partial=True)
    return {"rope_parameters": {**turned, "mrope_section": sections, "mrope_interleaved": True}}


def _phi3(facts: GgufFacts, config: Config) -> Config:
    return {"sliding_window": facts.get("attention.sliding_window", None) or None}  # Phi-4 has none, written as 0


def _gpt_oss(facts: GgufFacts, config: Config) -> Config:
    # Its makers' config; files do not say it.
    return {"rope_parameters": {**config["rope_parameters"], "truncate": False}}


def _gemma_scale(largest: int) -> Part:
    """Scores are divided by its root. The largest model of each generation, known by its layers, has its own."""

    def scale(facts: GgufFacts, config: Config) -> Config:
        by_hidden = config["hidden_size"] // config["num_attention_heads"]
        return {
            "query_pre_attn_scalar": by_hidden if config["num_hidden_layers"] == largest else config["head_dim"],
        }

    return scale


def _gemma4(facts: GgufFacts, config: Config) -> Config:
    """Gemma 4, whose last layers take the keys of others, and may be twice as wide; layers may have embeddings."""
    layers = config["num_hidden_layers"]
    widths, shared = facts.each("feed_forward_length", layers), facts.get("attention.shared_kv_layers", 0)
    is_double = [width == 2 * widths[0] for width in widths]
    if widths != [widths[0] * (2 if wide else 1) for wide in is_double] or (
        any(is_double) and is_double != [layer >= layers - shared for layer in range(layers)]
    ):
        raise Unknown(f"its feed_forward_length is {widths}")
    own = facts.get("embedding_length_per_layer_input", 0)
    table = facts.shape("per_layer_token_embd.weight")[0] if own else config["vocab_size"]
    return {
        "intermediate_size": widths[0],
        "num_kv_shared_layers": shared,
        "use_double_wide_mlp": any(is_double),
        "hidden_size_per_layer_input": own,
        "vocab_size_per_layer_input": table,
        "final_logit_softcapping": facts.get("final_logit_softcapping", None),
    }


def _gemma4_heads(facts: GgufFacts, config: Config) -> Config:
    """Heads of layers that see a window, and of those that see all, which may take keys as values."""
    layers = config["num_hidden_layers"]
    slides = [bool(one) for one in facts.each("attention.sliding_window_pattern", layers)]
    heads = facts.each("attention.head_count_kv", layers)
    wide, narrow = facts.get("attention.key_length"), facts.get("attention.key_length_swa")
    facts.expect("attention.value_length", wide)
    facts.expect("attention.value_length_swa", narrow)
    facts.expect("rope.dimension_count", wide)
    facts.expect("rope.dimension_count_swa", narrow)
    few, many = ({one for one, slide in zip(heads, slides, strict=True) if slide is which} for which in (False, True))
    if len(few) != 1 or len(many) > 1:
        raise Unknown(f"its attention.head_count_kv is {heads}")
    turned = [factor == 1 for factor in facts.numbers(FREQUENCIES)]
    theta = facts.get("rope.freq_base")
    whole = {"rope_type": "proportional", "partial_rotary_factor": sum(turned) / len(turned), "rope_theta": theta}
    sliding = {"rope_type": "default", "rope_theta": facts.get("rope.freq_base_swa", 10000.0)}
    own_values = [facts.has(f"blk.{layer}.attn_v.weight") for layer, slide in enumerate(slides) if not slide]
    return {
        "layer_types": ["sliding_attention" if slide else "full_attention" for slide in slides],
        "num_key_value_heads": max(many | few) if not many else many.pop(),
        "num_global_key_value_heads": few.pop(),
        "head_dim": narrow,
        "global_head_dim": wide,
        "attention_k_eq_v": not any(own_values),
        "rope_parameters": {"full_attention": whole, "sliding_attention": sliding},
    }


def _gemma4_experts(facts: GgufFacts, config: Config) -> Config:
    if not facts.get("expert_count", 0):
        return {"enable_moe_block": False}
    experts = routed(experts="num_experts", used="top_k_experts", width="moe_intermediate_size")
    return {"enable_moe_block": True, **experts(facts, config)}


def _deepseek2(facts: GgufFacts) -> Family:
    gating = facts.get("expert_gating_func", 1)
    if gating not in (1, 2):
        raise Unknown(f"its expert_gating_func is {gating}")
    number = "V3" if gating == 2 else "V2"
    parts = (rms_norm, dense, routed_in_groups, _latent_attention, _groups_of_deepseek(number))
    return _family(f"deepseek_{number.lower()}", f"Deepseek{number}", *parts)


def _latent_attention(facts: GgufFacts, config: Config) -> Config:
    turned = facts.get("rope.dimension_count")
    facts.get("attention.key_length", None), facts.get("attention.value_length", None)
    key = facts.get("attention.key_length_mla", None) or facts.get("attention.key_length")
    value = facts.get("attention.value_length_mla", None) or facts.get("attention.value_length")
    turns = rope_parameters(facts, turned)
    if (scale := facts.get("rope.scaling.yarn_log_multiplier", None)) is not None:
        turns |= {"mscale": round(10 * scale, 6), "mscale_all_dim": round(10 * scale, 6)}
    return {
        "num_key_value_heads": config["num_attention_heads"],
        "q_lora_rank": facts.get("attention.q_lora_rank", None) or None,
        "kv_lora_rank": facts.get("attention.kv_lora_rank"),
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": key - turned,
        "v_head_dim": value,
        "head_dim": turned,
        "rope_parameters": turns,
    }


def _groups_of_deepseek(number: str) -> Part:
    def entries(facts: GgufFacts, config: Config) -> Config:
        count = facts.get("expert_group_count", None)
        if count is None and (number, config["n_routed_experts"]) != ("V2", _UNGROUPED):
            raise Unknown("it does not say expert_group_count, as early conversions do not")
        limited = "greedy" if (count or 1) == 1 else "group_limited_greedy"
        return {
            "n_group": count or 1,
            "topk_group": facts.get("expert_group_used_count", 1),
            "topk_method": "noaux_tc" if number == "V3" else limited,
        }

    return entries


# DeepSeek-V2-Lite's experts, which have no groups.
_UNGROUPED = 64

_QWEN3_NEXT = (*_NORMED, linear_attention, *_QWEN_EXPERTS, shared_expert, fixed(norm_topk_prob=True), partial_rope)
_QWEN35 = (*_NORMED, linear_attention, _qwen35_rope)
_QWEN3_MOE = _family("qwen3_moe", "Qwen3Moe", *_USUAL, *_QWEN_EXPERTS, fixed(norm_topk_prob=True))
_OF_IMAGES = needless("rope.dimension_sections", "n_deepstack_layers")
"""Of text, positions are the same on all axes, and no layer takes what images give."""
_SHORT_CONVOLUTIONS = (*_USUAL, attention_or("conv"), _lfm2)
_ROUTED_IN_GROUPS = (_OF_SIGMOID, routed_in_groups, groups)
_HYBRID_BIASES = has(mamba_conv_bias="blk.*.ssm_conv1d.bias", mamba_proj_bias="blk.*.ssm_in.bias")

FAMILIES: dict[str, Family | Callable[[GgufFacts], Family]] = {
    "arcee": _family("arcee", "Arcee", *_USUAL, has(attention_bias=_QUERY_BIAS, mlp_bias="blk.0.ffn_up.bias")),
    "cohere2": _family(
        "cohere2",
        "Cohere2",
        *(layer_norm(), dense, head_dim, rope, sliding(4), reads(logit_scale="logit_scale")),
        has(attention_bias=_QUERY_BIAS),
    ),
    "command-r": _family(
        "cohere",
        "Cohere",
        *(layer_norm(), dense, head_dim, rope, reads(logit_scale="logit_scale")),
        has(attention_bias=_QUERY_BIAS, use_qk_norm="blk.0.attn_q_norm.weight"),
    ),
    "deepseek2": _deepseek2,
    "dots1": _family(
        "dots1", "Dots1", *_USUAL, *_ROUTED_IN_GROUPS, fixed(sliding_window=None), has(attention_bias=_QUERY_BIAS)
    ),
    "ernie4_5": _family("ernie4_5", "Ernie4_5", *_USUAL, has(use_bias=_QUERY_BIAS)),
    "ernie4_5-moe": _family(
        "ernie4_5_moe",
        "Ernie4_5_Moe",
        *(*_USUAL, has(use_bias=_QUERY_BIAS), needless("expert_shared_feed_forward_length")),
        routed(experts="moe_num_experts", used="moe_k", width="moe_intermediate_size"),
        reads(moe_layer_interval="interleave_moe_layer_step", moe_layer_start_index="leading_dense_block_count"),
        reads(moe_num_shared_experts="expert_shared_count"),
        lambda facts, config: {"moe_layer_end_index": config["num_hidden_layers"] - 1},
    ),
    "exaone-moe": _family(
        "exaone_moe",
        "ExaoneMoe",
        *(*_USUAL, sliding(4), _EXPERTS, groups, _OF_SIGMOID, needless("expert_shared_feed_forward_length")),
        reads(num_shared_experts="expert_shared_count", routed_scaling_factor="expert_weights_scale"),
        reads(norm_topk_prob="expert_weights_norm", first_k_dense_replace="leading_dense_block_count"),
    ),
    "exaone4": _family("exaone4", "Exaone4", *_USUAL, sliding(4)),
    "falcon-h1": _family(
        "falcon_h1",
        "FalconH1",
        *(*_USUAL, _HYBRID_BIASES),
        mamba2(heads="mamba_n_heads", width="mamba_d_head", inner="mamba_d_ssm", groups="mamba_n_groups"),
        mamba2(state="mamba_d_state", kernel="mamba_d_conv"),
        # Weights have been multiplied by what the makers' configs say.
        fixed(
            **dict.fromkeys(("lm_head_multiplier", "embedding_multiplier", "key_multiplier"), 1.0),
            **dict.fromkeys(("attention_in_multiplier", "attention_out_multiplier"), 1.0),
            **dict.fromkeys(("ssm_in_multiplier", "ssm_out_multiplier"), 1.0),
            mlp_multipliers=[1.0] * 2,
            ssm_multipliers=[1.0] * 5,
            mamba_norm_before_gate=False,
        ),
        has(mamba_rms_norm="blk.0.ssm_norm.weight", attention_bias=_QUERY_BIAS, mlp_bias="blk.0.ffn_up.bias"),
    ),
    "gemma": _family("gemma", "Gemma", *_USUAL, fixed(tie_word_embeddings=True)),
    "gemma2": _family(
        "gemma2",
        "Gemma2",
        *(*_USUAL, _gemma_scale(46), _WINDOW),
        reads(attn_logit_softcapping="attn_logit_softcapping", final_logit_softcapping="final_logit_softcapping"),
    ),
    "gemma3": _family(
        "gemma3_text",
        "Gemma3",
        *(*_NORMED, _gemma_scale(62), _WINDOW, may_read(final_logit_softcapping="final_logit_softcapping")),
        lambda facts, config: {
            "rope_parameters": {
                "full_attention": rope_parameters(facts, config["head_dim"]),
                "sliding_attention": {"rope_type": "default", "rope_theta": facts.get("rope.freq_base_swa", 10000.0)},
            }
        },
    ),
    "gemma4": _family("gemma4_text", "Gemma4", rms_norm, _WINDOW, _gemma4, _gemma4_heads, _gemma4_experts),
    "glm4": _family("glm4", "Glm4", *_NORMED, partial_rope, has(attention_bias=_QUERY_BIAS)),
    "glm4moe": _family(
        "glm4_moe",
        "Glm4Moe",
        *(*_NORMED, *_ROUTED_IN_GROUPS, partial_rope),
        has(attention_bias=_QUERY_BIAS, use_qk_norm="blk.0.attn_q_norm.weight"),
    ),
    "gpt-oss": _family("gpt_oss", "GptOss", *_USUAL, _as_wide_as_experts, _LOCAL_EXPERTS, _WINDOW, _gpt_oss),
    "granite": _family(
        "granite",
        "Granite",
        *(*_USUAL, _SCALES, expects(rope__scaling__finetuned=True)),
        has(attention_bias=_QUERY_BIAS, mlp_bias="blk.0.ffn_up.bias"),
    ),
    "granitehybrid": _family(
        "granitemoehybrid",
        "GraniteMoeHybrid",
        *(*_USUAL, _SCALES, attention_or("mamba", "attention"), _granite_hybrid, _HYBRID_BIASES),
        reads(shared_intermediate_size="expert_shared_feed_forward_length"),
        mamba2(heads="mamba_n_heads", width="mamba_d_head", expand="mamba_expand", groups="mamba_n_groups"),
        mamba2(state="mamba_d_state", kernel="mamba_d_conv"),
    ),
    "granitemoe": _granite_moe,
    "hunyuan-dense": _family("hunyuan_v1_dense", "HunYuanDenseV1", *_USUAL, has(attention_bias=_QUERY_BIAS)),
    "hunyuan-moe": _family(
        "hunyuan_v1_moe",
        "HunYuanMoEV1",
        *(*_USUAL, _as_dense, routed(experts="num_experts", used="moe_topk"), expects(expert_shared_count=1)),
        has(attention_bias=_QUERY_BIAS),
    ),
    "jamba": _family(
        "jamba",
        "Jamba",
        *(rms_norm, dense, _jamba, _HYBRID_BIASES, routed(experts="num_experts", used="num_experts_per_tok")),
        reads(mamba_d_state="ssm.state_size", mamba_d_conv="ssm.conv_kernel", mamba_dt_rank="ssm.time_step_rank"),
        lambda facts, config: {"mamba_expand": expansion(facts, config)},
    ),
    "lfm2": _family("lfm2", "Lfm2", *_SHORT_CONVOLUTIONS),
    "lfm2moe": _family(
        "lfm2_moe",
        "Lfm2Moe",
        *(*_SHORT_CONVOLUTIONS, _EXPERTS, _OF_SIGMOID, reads(num_dense_layers="leading_dense_block_count")),
        fixed(norm_topk_prob=True, routed_scaling_factor=1.0, use_expert_bias=True),
    ),
    "llama": _llama,
    "llama4": _family("llama4_text", "Llama4", *_USUAL, _llama4, has(attention_bias=_QUERY_BIAS)),
    "mamba": _mamba,
    "mamba2": _family(
        "mamba2",
        "Mamba2",
        *(_mixer_norm, needless("feed_forward_length")),
        mamba2(heads="num_heads", width="head_dim", expand="expand", groups="n_groups"),
        mamba2(state="state_size", kernel="conv_kernel"),
        has(use_bias="blk.0.ssm_in.bias", use_conv_bias="blk.0.ssm_conv1d.bias"),
    ),
    "minimax-m2": _family(
        "minimax_m2", "MiniMaxM2", *_NORMED, _as_wide_as_experts, _LOCAL_EXPERTS, _OF_SIGMOID, partial_rope
    ),
    "mistral3": _mistral3,
    "nemotron": _family("nemotron", "Nemotron", layer_norm("norm_eps"), dense, head_dim, partial_rope),
    "nemotron_h": _family("nemotron_h", "NemotronH", *_NEMOTRON_H),
    "nemotron_h_moe": _family("nemotron_h", "NemotronH", *_NEMOTRON_H, *_NEMOTRON_H_EXPERTS),
    "olmo": _family(
        "olmo",
        "Olmo",
        *(expects(attention__layer_norm_epsilon=1e-5), dense, head_dim, rope),
        may_read(clip_qkv="attention.clamp_kqv"),
    ),
    "olmo2": _olmo2,
    "olmoe": _family(
        "olmoe",
        "Olmoe",
        *(*_USUAL, routed(experts="num_experts", used="num_experts_per_tok"), fixed(norm_topk_prob=False)),
    ),
    "phi3": _family("phi3", "Phi3", *_NORMED, partial_rope, _phi3),
    "qwen2": _family("qwen2", "Qwen2", *_USUAL),
    "qwen2moe": _family("qwen2_moe", "Qwen2Moe", *_USUAL, *_QWEN_EXPERTS, shared_expert, fixed(norm_topk_prob=False)),
    "qwen2vl": _family("qwen2", "Qwen2", *_USUAL, _OF_IMAGES),
    "qwen3": _family("qwen3", "Qwen3", *_USUAL),
    "qwen35": _family("qwen3_5_text", "Qwen3_5", *_QWEN35),
    "qwen35moe": _family("qwen3_5_moe_text", "Qwen3_5Moe", *_QWEN35, _EXPERTS, shared_expert),
    "qwen3moe": _QWEN3_MOE,
    "qwen3next": _family("qwen3_next", "Qwen3Next", *_QWEN3_NEXT),
    "qwen3vl": _family("qwen3", "Qwen3", *_USUAL, _OF_IMAGES),
    "qwen3vlmoe": Family(_QWEN3_MOE.model_type, _QWEN3_MOE.name, (*_QWEN3_MOE.parts, _OF_IMAGES)),
    "seed_oss": _family(
        "seed_oss",
        "SeedOss",
        *_USUAL,
        has(attention_bias=_QUERY_BIAS, attention_out_bias="blk.0.attn_output.bias", mlp_bias="blk.0.ffn_up.bias"),
    ),
    "smollm3": _family("smollm3", "SmolLM3", *_USUAL, fixed(no_rope_layer_interval=4)),
    "starcoder2": _family(
        "starcoder2",
        "Starcoder2",
        *(layer_norm("norm_epsilon"), dense, head_dim, rope, has(use_bias=_QUERY_BIAS), fixed(sliding_window=4096)),
    ),
}
