"""The architectures of GGUF files that are known to run: the model class of transformers that each stands for, and the
parts of which its config is made.

Where one architecture has files of several classes, a function picks by what the file says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from zeroinf.model.gguf.facts import GgufFacts, Unknown
from zeroinf.model.gguf.own_parts import (
    as_dense,
    as_wide_as_experts,
    gemma4,
    gemma4_experts,
    gemma4_heads,
    gemma_scale,
    gpt_oss,
    granite_hybrid,
    groups_of_deepseek,
    jamba,
    kimi_linear,
    latent_attention,
    lfm2,
    llama4,
    mixer_norm,
    nemotron_h,
    phi3,
    qwen35_rope,
    scaled_by_position,
)
from zeroinf.model.gguf.parts import (
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
from zeroinf.model.gguf.rope import rope_parameters


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
# Written of hybrids without state space layers too.
_NO_STATES = (needless("ssm.conv_kernel", "ssm.state_size", "ssm.group_count", "ssm.inner_size", "ssm.time_step_rank"),)
_SCALES = reads(
    attention_multiplier="attention.scale",
    embedding_multiplier="embedding_scale",
    residual_multiplier="residual_scale",
    logits_scaling="logit_scale",
)
_OF_SIGMOID = expects(expert_gating_func=2)
_ALL_SPARSE = expects(leading_dense_block_count=0)
_OTHER_NORM = needless("attention.layer_norm_rms_epsilon")
_WINDOW = reads(sliding_window="attention.sliding_window")


def _llama(facts: GgufFacts) -> Family:
    if facts.get("expert_count", 0):
        return _family("mixtral", "Mixtral", *_USUAL, _LOCAL_EXPERTS, fixed(sliding_window=None))
    biases = has(attention_bias=_QUERY_BIAS, mlp_bias="blk.0.ffn_gate.bias")
    return _family("llama", "Llama", *_USUAL, biases, expects(expert_used_count=0))


def _mistral3(facts: GgufFacts) -> Family:
    """Mistral Small 3 and Devstral are Mistral, Ministral 3 and later ones scale queries by their position."""
    if facts.get("attention.temperature_scale", 0.0):
        return _family("ministral3", "Ministral3", *_USUAL, scaled_by_position)
    return _family("mistral", "Mistral", *_USUAL, fixed(sliding_window=None))


def _olmo2(facts: GgufFacts) -> Family:
    if facts.get("attention.sliding_window", None) is None:
        return _family("olmo2", "Olmo2", *_USUAL)
    return _family("olmo3", "Olmo3", *_NORMED, sliding(), ropes_by_window)


def _granite_moe(facts: GgufFacts) -> Family:
    parts = (*_USUAL, _LOCAL_EXPERTS, _SCALES, expects(rope__scaling__finetuned=True), *_NO_STATES)
    if facts.get("expert_shared_feed_forward_length", None) is None:
        return _family("granitemoe", "GraniteMoe", *parts)
    shared = reads(shared_intermediate_size="expert_shared_feed_forward_length")
    return _family("granitemoeshared", "GraniteMoeShared", *parts, shared)


_NEMOTRON_H = (
    *(head_dim, nemotron_h, needless("rope.dimension_count", "rope.freq_base")),
    mamba2(heads="mamba_num_heads", width="mamba_head_dim", groups="n_groups"),
    mamba2(state="ssm_state_size", kernel="conv_kernel"),
    has(use_conv_bias="blk.*.ssm_conv1d.bias", use_bias="blk.*.ssm_in.bias", mamba_proj_bias="blk.*.ssm_in.bias"),
    has(attention_bias="blk.*.attn_q.bias", mlp_bias="blk.*.ffn_up.bias"),
)
_NO_ROUTES = needless("expert_used_count", "expert_group_count", "expert_group_used_count")
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
        mixer_norm,
        reads(state_size="ssm.state_size", conv_kernel="ssm.conv_kernel", time_step_rank="ssm.time_step_rank"),
        lambda facts, config: {"expand": expansion(facts, config)},
        has(use_bias="blk.0.ssm_in.bias", use_conv_bias="blk.0.ssm_conv1d.bias"),
        needless("feed_forward_length"),
    )
    return _family("falcon_mamba", "FalconMamba", *parts) if has_norms else _family("mamba", "Mamba", *parts)


def _deepseek2(facts: GgufFacts) -> Family:
    gating = facts.get("expert_gating_func", 1)
    if gating not in (1, 2):
        raise Unknown(f"its expert_gating_func is {gating}")
    number = "V3" if gating == 2 else "V2"
    parts = (rms_norm, dense, routed_in_groups, latent_attention, groups_of_deepseek(number))
    return _family(f"deepseek_{number.lower()}", f"Deepseek{number}", *parts)


_QWEN3_NEXT = (*_NORMED, linear_attention, *_QWEN_EXPERTS, shared_expert, fixed(norm_topk_prob=True), partial_rope)
_QWEN35 = (*_NORMED, linear_attention, qwen35_rope)
_QWEN3_MOE = _family("qwen3_moe", "Qwen3Moe", *_USUAL, *_QWEN_EXPERTS, fixed(norm_topk_prob=True))
_OF_IMAGES = needless("rope.dimension_sections", "n_deepstack_layers")
"""Of text, positions are the same on all axes, and no layer takes what images give."""
_SHORT_CONVOLUTIONS = (*_USUAL, attention_or("conv"), lfm2)
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
        *(*_USUAL, gemma_scale(46), _WINDOW),
        reads(attn_logit_softcapping="attn_logit_softcapping", final_logit_softcapping="final_logit_softcapping"),
    ),
    "gemma3": _family(
        "gemma3_text",
        "Gemma3",
        *(*_NORMED, gemma_scale(62), _WINDOW, may_read(final_logit_softcapping="final_logit_softcapping")),
        lambda facts, config: {
            "rope_parameters": {
                "full_attention": rope_parameters(facts, config["head_dim"]),
                "sliding_attention": {"rope_type": "default", "rope_theta": facts.get("rope.freq_base_swa", 10000.0)},
            }
        },
    ),
    "gemma4": _family("gemma4_text", "Gemma4", rms_norm, _WINDOW, gemma4, gemma4_heads, gemma4_experts),
    "glm-dsa": _family(
        "glm_moe_dsa",
        "GlmMoeDsa",
        *(rms_norm, dense, *_ROUTED_IN_GROUPS, latent_attention),
        reads(index_n_heads="attention.indexer.head_count", index_head_dim="attention.indexer.key_length"),
        reads(index_topk="attention.indexer.top_k"),
    ),
    "glm4": _family("glm4", "Glm4", *_NORMED, partial_rope, has(attention_bias=_QUERY_BIAS)),
    "glm4moe": _family(
        "glm4_moe",
        "Glm4Moe",
        *(*_NORMED, *_ROUTED_IN_GROUPS, partial_rope),
        has(attention_bias=_QUERY_BIAS, use_qk_norm="blk.0.attn_q_norm.weight"),
    ),
    "gpt-oss": _family("gpt_oss", "GptOss", *_USUAL, as_wide_as_experts, _LOCAL_EXPERTS, _WINDOW, gpt_oss),
    "granite": _family(
        "granite",
        "Granite",
        *(*_USUAL, _SCALES, expects(rope__scaling__finetuned=True, expert_count=0, expert_used_count=0), *_NO_STATES),
        *(needless("expert_shared_feed_forward_length"), has(attention_bias=_QUERY_BIAS, mlp_bias="blk.0.ffn_up.bias")),
    ),
    "granitehybrid": _family(
        "granitemoehybrid",
        "GraniteMoeHybrid",
        *(*_USUAL, _SCALES, attention_or("mamba", "attention"), granite_hybrid, _HYBRID_BIASES),
        reads(shared_intermediate_size="expert_shared_feed_forward_length"),
        mamba2(heads="mamba_n_heads", width="mamba_d_head", expand="mamba_expand", groups="mamba_n_groups"),
        mamba2(state="mamba_d_state", kernel="mamba_d_conv"),
    ),
    "granitemoe": _granite_moe,
    "hunyuan-dense": _family("hunyuan_v1_dense", "HunYuanDenseV1", *_USUAL, has(attention_bias=_QUERY_BIAS)),
    "hunyuan-moe": _family(
        "hunyuan_v1_moe",
        "HunYuanMoEV1",
        *(*_USUAL, as_dense, routed(experts="num_experts", used="moe_topk"), expects(expert_shared_count=1)),
        has(attention_bias=_QUERY_BIAS),
    ),
    "jamba": _family(
        "jamba",
        "Jamba",
        *(rms_norm, dense, jamba, _HYBRID_BIASES, routed(experts="num_experts", used="num_experts_per_tok")),
        reads(mamba_d_state="ssm.state_size", mamba_d_conv="ssm.conv_kernel", mamba_dt_rank="ssm.time_step_rank"),
        lambda facts, config: {"mamba_expand": expansion(facts, config)},
    ),
    "kimi-linear": _family(
        "kimi_linear",
        "KimiLinear",
        *(rms_norm, dense, kimi_linear, _OF_SIGMOID, expects(expert_group_count=1, expert_group_used_count=1)),
        routed(experts="num_experts", used="num_experts_per_token", width="moe_intermediate_size"),
        reads(num_shared_experts="expert_shared_count", routed_scaling_factor="expert_weights_scale"),
        reads(linear_head_dim="kda.head_dim", linear_conv_kernel_dim="ssm.conv_kernel"),
        reads(kv_lora_rank="attention.kv_lora_rank", v_head_dim="attention.value_length_mla"),
        may_read(q_lora_rank="attention.q_lora_rank"),
        needless("attention.key_length", "attention.value_length", "rope.freq_base"),
        fixed(moe_renormalize=True),
    ),
    "lfm2": _family("lfm2", "Lfm2", *_SHORT_CONVOLUTIONS),
    "lfm2moe": _family(
        "lfm2_moe",
        "Lfm2Moe",
        *(*_SHORT_CONVOLUTIONS, _EXPERTS, _OF_SIGMOID, reads(num_dense_layers="leading_dense_block_count")),
        fixed(norm_topk_prob=True, routed_scaling_factor=1.0, use_expert_bias=True),
    ),
    "llama": _llama,
    "llama4": _family("llama4_text", "Llama4", *_USUAL, llama4, has(attention_bias=_QUERY_BIAS), _ALL_SPARSE),
    "mamba": _mamba,
    "mamba2": _family(
        "mamba2",
        "Mamba2",
        *(mixer_norm, needless("feed_forward_length")),
        mamba2(heads="num_heads", width="head_dim", expand="expand", groups="n_groups"),
        mamba2(state="state_size", kernel="conv_kernel"),
        has(use_bias="blk.0.ssm_in.bias", use_conv_bias="blk.0.ssm_conv1d.bias"),
    ),
    "minimax-m2": _family(
        "minimax_m2", "MiniMaxM2", *_NORMED, as_wide_as_experts, _LOCAL_EXPERTS, _OF_SIGMOID, partial_rope
    ),
    "mistral3": _mistral3,
    "nemotron": _family("nemotron", "Nemotron", *(layer_norm("norm_eps"), dense, head_dim, partial_rope, _OTHER_NORM)),
    "nemotron_h": _family("nemotron_h", "NemotronH", *_NEMOTRON_H, _NO_ROUTES),
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
    "phi3": _family("phi3", "Phi3", *_NORMED, partial_rope, phi3),
    "phi2": _family("phi", "Phi", layer_norm(), dense, head_dim, partial_rope),
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
    "stablelm": _family(
        "stablelm",
        "StableLm",
        *(layer_norm(), dense, head_dim, partial_rope, reads(use_parallel_residual="use_parallel_residual")),
        has(use_qkv_bias=_QUERY_BIAS),
    ),
    "starcoder2": _family(
        "starcoder2",
        "Starcoder2",
        *(layer_norm("norm_epsilon"), dense, head_dim, rope, has(use_bias=_QUERY_BIAS), fixed(sliding_window=4096)),
    ),
}
