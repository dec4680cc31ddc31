"""Small GGUF files as llama.cpp's converters write them, and the models in transformers that they stand for.

Names, orders and metadata follow `conversion/` in the repository of llama.cpp; values are those of the package gguf.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    get_tensor_name_map,
)
from gguf.quants import dequantize, quantize
from gguf_metadata import write_metadata
from small_models import INIT_STD, build_model

ARCHITECTURES = {
    "arcee": "arcee",
    "cohere": "command-r",
    "cohere2": "cohere2",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "dots1": "dots1",
    "ernie4_5": "ernie4_5",
    "ernie4_5_moe": "ernie4_5-moe",
    "exaone4": "exaone4",
    "exaone_moe": "exaone-moe",
    "falcon_h1": "falcon-h1",
    "falcon_mamba": "mamba",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gemma4_moe": "gemma4",
    "gemma4_text": "gemma4",
    "glm4": "glm4",
    "glm4_moe": "glm4moe",
    "glm4_moe_lite": "deepseek2",
    "glm_moe_dsa": "glm-dsa",
    "gpt_oss": "gpt-oss",
    "granite": "granite",
    "granitemoe": "granitemoe",
    "granitemoehybrid": "granitehybrid",
    "granitemoeshared": "granitemoe",
    "hunyuan_v1_dense": "hunyuan-dense",
    "hunyuan_v1_moe": "hunyuan-moe",
    "jamba": "jamba",
    "kimi_linear": "kimi-linear",
    "lfm2": "lfm2",
    "lfm2_moe": "lfm2moe",
    "llama": "llama",
    "llama4": "llama4",
    "llama_tied": "llama",
    "mamba": "mamba",
    "mamba2": "mamba2",
    "minimax_m2": "minimax-m2",
    "ministral3": "mistral3",
    "mistral": "mistral3",
    "mixtral": "llama",
    "nemotron": "nemotron",
    "nemotron_h": "nemotron_h",
    "nemotron_h_moe": "nemotron_h_moe",
    "olmo": "olmo",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
    "olmoe": "olmoe",
    "phi": "phi2",
    "phi3": "phi3",
    "phi3_long": "phi3",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen2_vl": "qwen2vl",
    "qwen3": "qwen3",
    "qwen3_5": "qwen35",
    "qwen3_5_moe": "qwen35moe",
    "qwen3_moe": "qwen3moe",
    "qwen3_next": "qwen3next",
    "qwen3_vl": "qwen3vl",
    "qwen3_vl_moe": "qwen3vlmoe",
    "seed_oss": "seed_oss",
    "smollm3": "smollm3",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
}
"""What GGUF calls the architectures of small models."""

# Where float16 scales lie in a block, of types for which the package has no encoder.
_SCALES = {
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ2_XXS": (0,), "IQ2_XS": (0,),
    "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,), "IQ1_S": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip

_Change = tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]
_Tensor = tuple[str, torch.Tensor, Any, _Change]
"""A tensor's name in the file, the part of a parameter that it holds, in which order, and what the file has in place of
its values, there and back."""

_AS_IT_IS: _Change = (lambda values: values, lambda values: values)
_PLUS_ONE: _Change = (lambda values: values + np.float32(1), lambda values: values - np.float32(1))
_DECAY: _Change = (lambda values: -np.exp(values), lambda values: np.log(-values))
_TURNED = (
    *("arcee", "granite", "granitehybrid", "granitemoe", "llama", "mistral3", "nemotron_h", "nemotron_h_moe"),
    *("olmo", "smollm3"),
)
_NORMS_PLUS_ONE = ("gemma", "gemma2", "gemma3", "nemotron", "qwen35", "qwen35moe", "qwen3next")


def write_gguf(name: str, file: Path, kinds: Sequence[str], *, model: Any = None, parts: int = 1) -> Any:
    """Write the small model `name`, its matrices in `kinds` in turn where their rows fill blocks; return the model in
    transformers with the values that are in the file."""
    model = build_model(name) if model is None else model
    if name in ("qwen3_moe", "qwen3_vl_moe"):  # llama.cpp knows no other
        model.config.norm_topk_prob = True
        for module in model.modules():
            module.norm_topk_prob = True
    _draw_vectors(model)
    if name.startswith("nemotron_h"):  # the time steps of prompts alone have a least one
        for own, parameter in model.named_parameters():
            parameter.data.fill_(8) if own.endswith("dt_bias") else None
    if name == "lfm2":
        model.config.intermediate_size = model.model.layers[0].feed_forward.w1.weight.shape[0]
        model.config.block_auto_adjust_ff_dim = False
    architecture = ARCHITECTURES[name]
    count = sum(1 for _ in _tensors(architecture, model))
    writer = GGUFWriter(file, architecture, split_max_tensors=-(-count // parts) if parts > 1 else 0)
    write_metadata(writer, model.config, architecture)
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for number, (called, part, order, (change, back)) in enumerate(_tensors(architecture, model)):
            values = change((part[order] if order is not None else part).float().numpy())
            kind = GGMLQuantizationType[kinds[number % len(kinds)]]
            is_quantized = part.dim() > 1 and "gate_inp" not in called and not called.endswith(".bias")
            fits = is_quantized and values.shape[-1] % GGML_QUANT_SIZES[kind][0] == 0
            kind = kind if fits else GGMLQuantizationType.F32
            data = _packed(values, kind, rng)
            writer.add_tensor(called, data, raw_dtype=kind)
            stored = dequantize(data, kind).reshape(values.shape)
            if kind == GGMLQuantizationType.NVFP4:
                stored = _scale(writer, called, stored, rng)
            found = torch.from_numpy(back(stored))
            if order is None:
                part.copy_(found)
            else:
                part[order] = found
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _scale(writer: GGUFWriter, called: str, stored: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Write what NVFP4 has beside a matrix: a scale for all of it, or for each expert, and one for what it multiplies.
    Returns the numbers that the matrix stands for."""
    size = INIT_STD / stored.std()
    scale = rng.uniform(0.5 * size, 1.5 * size, stored.shape[: stored.ndim - 2] or 1).astype(np.float32)
    writer.add_tensor(called.replace(".weight", ".scale"), scale)
    writer.add_tensor(called.replace(".weight", ".input_scale"), scale)
    return stored * scale.reshape(-1, *[1] * (stored.ndim - 1))


def _draw_vectors(model: Any) -> None:
    """Change norms, biases and their like a little, which are made alike and could be taken for one another."""
    torch.manual_seed(0)
    buffers = [value for name, value in model.named_buffers() if name.endswith(_BUFFERS)]
    for value in [*model.parameters(), *buffers]:
        if value.dim() == 1:
            value.data += 0.1 * torch.randn_like(value)


def _packed(values: np.ndarray, kind: GGMLQuantizationType, rng: np.random.Generator) -> np.ndarray:
    """`values` in the type `kind`; random ones of about their size where the package gguf has no encoder for it."""
    if kind.name not in (*_SCALES, "IQ1_M", "NVFP4"):
        return quantize(np.ascontiguousarray(values), kind)
    weights, nbytes = GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (values.size // weights, nbytes), dtype=np.uint8)

    if kind.name == "NVFP4":
        blocks[:, :4] = rng.integers(0x20, 0x48, (len(blocks), 4))
        return blocks.reshape(*values.shape[:-1], -1)

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


_BUFFERS = ("e_score_correction_bias", "expert_bias", "layer_scalar")


def _tensors(architecture: str, model: Any) -> Iterator[_Tensor]:
    config = model.config
    arch = next(key for key, called in MODEL_ARCH_NAMES.items() if called == architecture)
    names = get_tensor_name_map(arch, config.num_hidden_layers)

    def called(base: str, suffix: str = "weight") -> str:
        found = names.get_name(_as_in_checkpoints(base, architecture) + ".weight", (".weight",))
        assert found is not None, base
        return f"{found.removesuffix('.weight')}.{suffix}"

    for name, parameter in model.named_parameters():
        yield from _of_parameter(called, architecture, name, parameter.data, config)
    for name, value in model.named_buffers():
        if name.endswith(_BUFFERS):
            yield from _of_parameter(called, architecture, name, value, config)
    yield from _of_rope(config)


def _as_in_checkpoints(base: str, architecture: str) -> str:
    """The name of a module in the checkpoints that converters read, or that they stack experts under."""
    if architecture.startswith("nemotron_h"):
        at, _, leaf = base.partition(".mixer.experts.")
        return f"{at}.mlp.experts.{leaf}" if leaf else base.replace("model.", "backbone.", 1)
    if architecture.startswith("granite"):
        return base.replace("block_sparse_moe.experts", "mlp.experts").replace("moe.router", "moe.router.layer")
    return base.replace("mlp.gate.moe_statics", "mlp.moe_statics").replace("self_attn.forget_gate.", "self_attn.")


_OF_GEMMA4 = {".router.scale": "ffn_gate_inp.scale", ".router.per_expert_scale": "ffn_down_exps.scale"}


def _of_parameter(called: Any, architecture: str, name: str, value: torch.Tensor, config: Any) -> Iterator[_Tensor]:
    base, _, suffix = name.rpartition(".")
    if architecture == "gemma4" and suffix == "gate_up_proj":
        yield called(name), value, None, _AS_IT_IS
    elif scale := next((called for own, called in _OF_GEMMA4.items() if name.endswith(own)), None):
        yield f"blk.{name.split('.')[2]}.{scale}", value, None, _AS_IT_IS
    elif suffix in ("gate_up_proj", "gate_up_proj_bias"):
        halves = (value[:, ::2], value[:, 1::2])
        if architecture == "gpt-oss" and value.dim() == 3:
            halves = (value.transpose(1, 2)[:, ::2], value.transpose(1, 2)[:, 1::2])
        elif architecture == "llama4":
            halves = value.transpose(1, 2).chunk(2, dim=1)
        elif architecture != "gpt-oss":
            halves = value.chunk(2, dim=1)
        for half, which in zip(halves, ("gate", "up"), strict=True):
            yield called(f"{base}.{which}_proj", "bias" if "bias" in suffix else "weight"), half, None, _AS_IT_IS
    elif suffix in ("down_proj", "down_proj_bias"):
        is_turned = architecture in ("gpt-oss", "llama4") and value.dim() == 3
        kind = "bias" if "bias" in suffix else "weight"
        yield called(f"{base}.down_proj", kind), value.transpose(1, 2) if is_turned else value, None, _AS_IT_IS
    elif "linear_attn" in name and not base.endswith("linear_attn.norm"):
        yield from _of_linear_attention(called, name, value, config)
    elif base.endswith("shared_expert_gate") and architecture == "qwen35moe":
        yield called(base, suffix), value[0], None, _AS_IT_IS
    elif base.endswith("shared_mlp.input_linear"):
        ends = called(base.replace("input_linear", "output_linear"))
        for half, which in zip(value.chunk(2), ("gate", "up"), strict=True):
            yield ends.replace("ffn_down", f"ffn_{which}"), half, None, _AS_IT_IS
    elif base.endswith("self_attn.conv1d"):
        for part, which in zip(value.chunk(3), "qkv", strict=True):
            yield called(base.replace("conv1d", f"{which}_conv1d")), part.view(1, len(part), 1, -1), None, _AS_IT_IS
    elif base.endswith(("conv.conv", "conv1d")) and suffix == "weight":
        yield called(base), value.squeeze(1), None, _AS_IT_IS
    elif base.endswith("kv_b_proj"):
        heads, keys = config.num_attention_heads, config.qk_nope_head_dim
        both = value.view(heads, keys + config.v_head_dim, -1)
        yield called(base.replace("kv_b", "k_b")), both[:, :keys].transpose(1, 2), None, _AS_IT_IS
        yield called(base.replace("kv_b", "v_b")), both[:, keys:], None, _AS_IT_IS
    elif suffix in ("A_log", "D", "dt_bias"):
        yield from _of_states(called, architecture, name, value)
    elif suffix in ("e_score_correction_bias", "expert_bias"):
        yield called(name if suffix == "expert_bias" else name.removesuffix("_bias"), "bias"), value, None, _AS_IT_IS
    elif suffix not in ("weight", "bias"):
        yield called(name), value, None, _AS_IT_IS
    elif architecture in _TURNED and base.endswith(("q_proj", "k_proj")):
        heads = config.num_attention_heads if base.endswith("q_proj") else config.num_key_value_heads
        order = torch.arange(value.shape[0]).view(heads, 2, -1).transpose(1, 2).flatten()
        yield called(base, suffix), value, order, _AS_IT_IS
    elif base.endswith((".mamba.norm", ".mixer.norm")):
        groups = next(filter(None, (getattr(config, key, None) for key in ("mamba_n_groups", "n_groups"))))
        yield called(base), value.view(groups, -1), None, _AS_IT_IS
    elif architecture == "falcon-h1":
        yield called(base, suffix), value, None, _scaled(base, config)
    else:
        is_plus_one = name.endswith("norm.weight") and architecture in _NORMS_PLUS_ONE
        change = _PLUS_ONE if is_plus_one and "linear_attn" not in name else _AS_IT_IS
        yield called(base, suffix), value, None, change


def _of_states(called: Any, architecture: str, name: str, value: torch.Tensor) -> Iterator[_Tensor]:
    """What state space layers have for each head; Mamba's first generation has it for each element."""
    base, _, suffix = name.rpartition(".")
    if suffix == "dt_bias":
        yield called(f"{base}.dt_proj", "bias"), value, None, _AS_IT_IS
        return
    part = value if architecture in ("mamba", "jamba", "kimi-linear") else value.unsqueeze(-1)
    yield called(name).removesuffix(".weight"), part, None, _DECAY if suffix == "A_log" else _AS_IT_IS


def _scaled(base: str, config: Any) -> _Change:
    """Falcon-H1's multipliers, which files have in the weights."""
    factors = {
        "down_proj": config.mlp_multipliers[1],
        "gate_proj": config.mlp_multipliers[0],
        "k_proj": config.key_multiplier * config.attention_in_multiplier,
        "q_proj": config.attention_in_multiplier,
        "v_proj": config.attention_in_multiplier,
        "o_proj": config.attention_out_multiplier,
        "out_proj": config.ssm_out_multiplier,
        "lm_head": config.lm_head_multiplier,
        "embed_tokens": config.embedding_multiplier,
    }
    leaf = base.rpartition(".")[2]
    factor = np.float32(factors.get(leaf, 1.0))
    if leaf == "in_proj":
        inner, states = config.mamba_d_ssm, config.mamba_n_groups * config.mamba_d_state
        rows = (inner, inner, states, states, config.mamba_n_heads)
        factor = np.repeat(np.float32(config.ssm_multipliers), rows)[:, None] * np.float32(config.ssm_in_multiplier)
    return lambda values: values * factor, lambda values: values / factor


def _of_rope(config: Any) -> Iterator[_Tensor]:
    every = getattr(config, "rope_parameters", None) or {}
    if every.get("rope_type") == "longrope":
        for which in ("long", "short"):
            yield f"rope_factors_{which}.weight", torch.tensor(every[f"{which}_factor"]), None, _AS_IT_IS
    rope = every.get("full_attention", {})
    if rope.get("rope_type") == "proportional":
        width = config.per_layer_config[config.layer_types.index("full_attention")].head_dim
        turned = int(width * rope["partial_rotary_factor"] / 2)
        factors = torch.tensor([1.0] * turned + [1e30] * (width // 2 - turned))
        yield "rope_freqs.weight", factors, None, _AS_IT_IS


def _of_linear_attention(called: Any, name: str, value: torch.Tensor, config: Any) -> Iterator[_Tensor]:
    """Value heads in tiles: the first of each key head, then the second of each."""
    keys, of_value = config.linear_num_key_heads, config.linear_value_head_dim
    base, _, leaf = name.rpartition(".")
    of_key = config.linear_key_head_dim
    if base.endswith("in_proj_qkvz"):
        sizes = [of_key, of_key, *2 * [config.linear_num_value_heads // keys * of_value]]
        places = torch.arange(len(value)).view(keys, -1).split(sizes, dim=1)
        qkv, gate = torch.cat([part.flatten() for part in places[:3]]), places[3].flatten()
        yield called(base).replace("ssm_in", "attn_qkv"), value, qkv, _AS_IT_IS
        yield called(base).replace("ssm_in", "attn_gate"), value, gate, _AS_IT_IS
        return
    wide = base.endswith(("in_proj_qkv", "conv1d", "in_proj_z", "out_proj"))
    heads = torch.arange(config.linear_num_value_heads * (of_value if wide else 1))
    order = heads.view(keys, -1, of_value if wide else 1).transpose(0, 1).flatten()
    others = torch.arange(2 * keys * of_key) if base.endswith(("in_proj_qkv", "conv1d")) else heads[:0]
    order = torch.cat((others, len(others) + order))
    if config.model_type == "qwen3_next":
        order = torch.arange(value.shape[1] if base.endswith("out_proj") else len(value))
    if leaf == "A_log":
        yield called(name).removesuffix(".weight"), value, order, _DECAY
    elif leaf == "dt_bias":
        yield called(f"{base}.dt_proj", "bias"), value, order, _AS_IT_IS
    elif base.endswith("out_proj"):
        yield called(base), value, (slice(None), order), _AS_IT_IS
    else:
        yield called(base), value.squeeze(1) if base.endswith("conv1d") else value, order, _AS_IT_IS
