"""Parts of configs that one family of models alone has."""

from __future__ import annotations

from zeroinf.model.gguf.facts import GgufFacts, Unknown
from zeroinf.model.gguf.parts import Config, Part, routed
from zeroinf.model.gguf.rope import FREQUENCIES, rope_parameters

# DeepSeek-V2-Lite's experts, which have no groups.
_UNGROUPED = 64


def as_wide_as_experts(facts: GgufFacts, config: Config) -> Config:
    return routed(width="intermediate_size")(facts, config)


def scaled_by_position(facts: GgufFacts, config: Config) -> Config:
    every = facts.get("rope.scaling.yarn_log_multiplier", 0.0)
    more = {"mscale": 1.0, "mscale_all_dim": every} if every else {}
    beta = facts.get("attention.temperature_scale")
    return {"rope_parameters": {**config["rope_parameters"], **more, "llama_4_scaling_beta": beta}}


def llama4(facts: GgufFacts, config: Config) -> Config:
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


def granite_hybrid(facts: GgufFacts, config: Config) -> Config:
    return {
        "position_embedding_type": "rope" if facts.get("rope.scaling.finetuned", True) else "nope",
        "num_local_experts": facts.get("expert_count", 0),
        "num_experts_per_tok": facts.get("expert_used_count", 0),
    }


def as_dense(facts: GgufFacts, config: Config) -> Config:
    """Experts, all shared experts and dense layers are equally wide."""
    facts.expect("expert_feed_forward_length", config["intermediate_size"])
    facts.expect("expert_shared_feed_forward_length", config["intermediate_size"])
    return {}


def nemotron_h(facts: GgufFacts, config: Config) -> Config:
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


def mixer_norm(facts: GgufFacts, config: Config) -> Config:
    return {"layer_norm_epsilon": facts.get("attention.layer_norm_rms_epsilon")}


def jamba(facts: GgufFacts, config: Config) -> Config:
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


def lfm2(facts: GgufFacts, config: Config) -> Config:
    return {
        "norm_eps": config["rms_norm_eps"],
        "block_auto_adjust_ff_dim": False,
        "conv_L_cache": facts.get("shortconv.l_cache"),
        "conv_bias": facts.has("blk.*.shortconv.in_proj.bias"),
    }


def qwen35_rope(facts: GgufFacts, config: Config) -> Config:
    sections = facts.get("rope.dimension_sections")[:3]
    turned = rope_parameters(facts, config["head_dim"], partial=True)
    return {"rope_parameters": {**turned, "mrope_section": sections, "mrope_interleaved": True}}


def phi3(facts: GgufFacts, config: Config) -> Config:
    return {"sliding_window": facts.get("attention.sliding_window", None) or None}  # Phi-4 has none, written as 0


def gpt_oss(facts: GgufFacts, config: Config) -> Config:
    # Its makers' config; files do not say it.
    return {"rope_parameters": {**config["rope_parameters"], "truncate": False}}


def gemma_scale(largest: int) -> Part:
    """Scores are divided by its root. The largest model of each generation, known by its layers, has its own."""

    def scale(facts: GgufFacts, config: Config) -> Config:
        by_hidden = config["hidden_size"] // config["num_attention_heads"]
        return {
            "query_pre_attn_scalar": by_hidden if config["num_hidden_layers"] == largest else config["head_dim"],
        }

    return scale


def gemma4(facts: GgufFacts, config: Config) -> Config:
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


def gemma4_heads(facts: GgufFacts, config: Config) -> Config:
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


def gemma4_experts(facts: GgufFacts, config: Config) -> Config:
    if not facts.get("expert_count", 0):
        return {"enable_moe_block": False}
    experts = routed(experts="num_experts", used="top_k_experts", width="moe_intermediate_size")
    return {"enable_moe_block": True, **experts(facts, config)}


def latent_attention(facts: GgufFacts, config: Config) -> Config:
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


def groups_of_deepseek(number: str) -> Part:
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


def kimi_linear(facts: GgufFacts, config: Config) -> Config:
    """Kimi Linear: delta attention, and latent attention of which nothing turns by its position."""
    layers, dense = config["num_hidden_layers"], facts.get("leading_dense_block_count")
    turned = facts.get("rope.dimension_count")
    return {
        "num_key_value_heads": config["num_attention_heads"],
        "layer_types": [
            "full_attention" if one else "linear_attention" for one in facts.each("attention.head_count_kv", layers)
        ],
        "mlp_layer_types": ["dense" if layer < dense else "sparse" for layer in range(layers)],
        "linear_num_heads": config["num_attention_heads"],
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": facts.get("attention.key_length_mla") - turned,
    }
