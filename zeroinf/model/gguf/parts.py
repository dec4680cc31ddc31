"""Parts of configs: functions that make some of a config's entries of what a file says.

Each takes the file's facts and the entries so far. Keys and their meaning are those of llama.cpp's `conversion/` and
`src/models/`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zeroinf.model.gguf.facts import GgufFacts, Unknown
from zeroinf.model.gguf.rope import rope_parameters

Config = dict[str, Any]
Part = Callable[[GgufFacts, Config], Config]


def decoder(facts: GgufFacts) -> Config:
    """The config entries that all decoders have. Sizes of tensors are taken from the tensors."""
    vocabulary, hidden = facts.shape("token_embd.weight")
    facts.expect("embedding_length", hidden)
    facts.expect("vocab_size", vocabulary)
    facts.expect("attention.causal", True)
    stored = facts.get("block_count")
    facts.refuse_layers_from(stored)
    layers = stored - facts.get("nextn_predict_layers", 0)
    attention = {}
    if heads := facts.get("attention.head_count"):
        keys = max(facts.each("attention.head_count_kv", layers, heads))
        attention = {"num_attention_heads": heads, "num_key_value_heads": keys}
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "max_position_embeddings": facts.get("context_length"),
        "tie_word_embeddings": not facts.has("output.weight"),
        **attention,
    }


def fixed(**entries: Any) -> Part:
    """Entries that files do not say, as the models' makers have them."""
    return lambda facts, config: entries


def reads(**keys: str) -> Part:
    """Entries that a key says, which must be there."""
    return lambda facts, config: {entry: facts.get(key) for entry, key in keys.items()}


def may_read(**keys: str) -> Part:
    """Entries that a key says, if it is there; else None."""
    return lambda facts, config: {entry: facts.get(key, None) for entry, key in keys.items()}


def expects(**values: Any) -> Part:
    """No entries, and a refusal where keys (a dot written as two underscores) say anything but these values."""

    def expect(facts: GgufFacts, config: Config) -> Config:
        for key, value in values.items():
            facts.expect(key.replace("__", "."), value)
        return {}

    return expect


def needless(*keys: str) -> Part:
    """No entries: what these keys say follows from tensors, or changes nothing of texts."""

    def read(facts: GgufFacts, config: Config) -> Config:
        for key in keys:
            facts.get(key, None)
        return {}

    return read


def has(**tensors: str) -> Part:
    """Entries that are true where the file holds a tensor."""
    return lambda facts, config: {entry: facts.has(tensor) for entry, tensor in tensors.items()}


def rms_norm(facts: GgufFacts, config: Config) -> Config:
    return {"rms_norm_eps": facts.get("attention.layer_norm_rms_epsilon")}


def layer_norm(entry: str = "layer_norm_eps") -> Part:
    return lambda facts, config: {entry: facts.get("attention.layer_norm_epsilon")}


def dense(facts: GgufFacts, config: Config) -> Config:
    """The width of a feed-forward part that is as wide in each layer; files of experts alone may not say one."""
    return {"intermediate_size": facts.get("feed_forward_length", None)}


def head_dim(facts: GgufFacts, config: Config) -> Config:
    """The width of a head."""
    width: int = facts.get("attention.key_length", config["hidden_size"] // config["num_attention_heads"])
    facts.expect("attention.value_length", width)
    return {"head_dim": width}


def rope(facts: GgufFacts, config: Config) -> Config:
    """Heads that turn by their position as a whole."""
    return {"rope_parameters": rope_parameters(facts, config["head_dim"])}


def partial_rope(facts: GgufFacts, config: Config) -> Config:
    """Heads of which a part turns by its position."""
    return {"rope_parameters": rope_parameters(facts, config["head_dim"], partial=True)}


def sliding(default: int | None = None) -> Part:
    """Layers that see a window of positions, and others that see all; by default every so many layers is one of these.

    Without a window no layer is so.
    """

    def windows(facts: GgufFacts, config: Config) -> Config:
        window, layers = facts.get("attention.sliding_window", None) or None, config["num_hidden_layers"]
        pattern = facts.get("attention.sliding_window_pattern", default)
        if window is None:
            return {"sliding_window": None, "layer_types": ["full_attention"] * layers}
        if pattern is None:
            raise Unknown("it does not say which layers have its attention.sliding_window")
        slides = pattern if isinstance(pattern, list) else [pattern] * layers
        if not isinstance(slides[0], bool):
            slides = [(layer + 1) % pattern != 0 for layer in range(layers)]
        return {"sliding_window": window, "layer_types": _types(slides[:layers], "sliding_attention")}

    return windows


def ropes_by_window(facts: GgufFacts, config: Config) -> Config:
    """Rotary embeddings that are scaled in layers which see all positions, and no others."""
    scaled = rope_parameters(facts, config["head_dim"])
    plain = {"rope_type": "default", "rope_theta": facts.get("rope.freq_base_swa", scaled["rope_theta"])}
    return {"rope_parameters": {"full_attention": scaled, "sliding_attention": plain}}


def _types(are_other: list[bool], other: str, usual: str = "full_attention") -> list[str]:
    return [other if one else usual for one in are_other]


def attention_or(other: str, usual: str = "full_attention") -> Part:
    """`layer_types` of layers of which those without heads of keys are no attention but `other`."""

    def layer_types(facts: GgufFacts, config: Config) -> Config:
        heads = facts.each("attention.head_count_kv", config["num_hidden_layers"])
        return {"layer_types": _types([not one for one in heads], other, usual)}

    return layer_types


def routed(**names: str) -> Part:
    """How many experts there are, how many a token takes, and how wide each is, under these names: `experts`, `used`
    and `width`."""

    def entries(facts: GgufFacts, config: Config) -> Config:
        width = next(t.shape[-1] for name, t in facts.tensors.items() if name.endswith("ffn_down_exps.weight"))
        facts.expect("expert_feed_forward_length", width)
        found = {"experts": facts.get("expert_count"), "used": facts.get("expert_used_count"), "width": width}
        return {name: found[fact] for fact, name in names.items()}

    return entries


def routed_in_groups(facts: GgufFacts, config: Config) -> Config:
    """The config entries of mixtures of experts as DeepSeek has them, but for their groups."""
    facts.get("expert_shared_feed_forward_length", None)  # as wide as all shared experts, by their tensors
    return {
        "n_routed_experts": facts.get("expert_count"),
        "num_experts_per_tok": facts.get("expert_used_count"),
        "n_shared_experts": facts.get("expert_shared_count"),
        "moe_intermediate_size": facts.get("expert_feed_forward_length"),
        "first_k_dense_replace": facts.get("leading_dense_block_count", 0),
        "routed_scaling_factor": facts.get("expert_weights_scale", 1.0),
        "norm_topk_prob": facts.get("expert_weights_norm", False),
    }


def groups(facts: GgufFacts, config: Config) -> Config:
    """Groups of experts, of which a token takes some alone."""
    return {"n_group": facts.get("expert_group_count", 1), "topk_group": facts.get("expert_group_used_count", 1)}


def shared_expert(facts: GgufFacts, config: Config) -> Config:
    shared = facts.shape("blk.0.ffn_down_shexp.weight")[-1]
    facts.expect("expert_shared_feed_forward_length", shared)
    return {"shared_expert_intermediate_size": shared}


def linear_attention(facts: GgufFacts, config: Config) -> Config:
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


def mamba2(**names: str) -> Part:
    """The config entries of Mamba-2's mixers, under these names: `heads`, `width`, `groups`, `state`, `kernel` and
    `inner`, as far as the model has them."""

    def entries(facts: GgufFacts, config: Config) -> Config:
        heads, inner = facts.get("ssm.time_step_rank"), facts.get("ssm.inner_size")
        found = {
            "heads": heads,
            "width": inner // heads,
            "inner": inner,
            "expand": expansion(facts, config) if "expand" in names else None,
            "groups": facts.get("ssm.group_count"),
            "state": facts.get("ssm.state_size"),
            "kernel": facts.get("ssm.conv_kernel"),
        }
        return {name: found[fact] for fact, name in names.items()}

    return entries


def expansion(facts: GgufFacts, config: Config) -> int:
    """How many times as wide as the model its state space layers are."""
    factor, rest = divmod(facts.get("ssm.inner_size"), config["hidden_size"])
    if rest:
        raise Unknown("its ssm.inner_size is no multiple of its embedding_length")
    return int(factor)
