"""Small random models of many architectures, and checkpoints of them, for every test of the project.

Weights are drawn wider than transformers initialises them, so that greedy decoding does not repeat one token.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging import version
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCABULARY = 384
HIDDEN = 64
LAYERS = 3
HEADS = 4
CONTEXT = 256
BOS, EOS, PAD = 1, 2, 0
# The spread of random weights: at transformers' own 0.02 every context gives nearly the same logits. Embeddings stay
# small, or a tied model's own input would outweigh what its blocks add, and it would repeat one token.
INIT_STD = 0.3
EMBEDDING_STD = 0.02

_IDS = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
# The names that nearly all configs understand.
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": CONTEXT,
    **_IDS,
}
_LLAMA = {**_COMMON, "intermediate_size": 96, "num_key_value_heads": 2}
_HEAD_DIM = {"head_dim": 16}
_DEEPSEEK = {
    "num_key_value_heads": HEADS,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
_MULTIPLIERS = {
    "attention_multiplier": 0.2,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 4.0,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

if version.parse(transformers.__version__) < version.parse("5.21"):
    # Until then Gemma-2 takes sdpa, which leaves out the cap of its scores: not what tokens are compared with.
    transformers.Gemma2PreTrainedModel._supports_sdpa = False


def _of(config: str, *parts: dict[str, Any], **fields: Any) -> Callable[[], Any]:
    """A function that makes the config of class `config`; later fields win."""
    merged = {key: value for part in (*parts, fields) for key, value in part.items()}
    return lambda: getattr(transformers, config)(**merged)


SMALL_MODELS: dict[str, Callable[[], Any]] = {
    "apertus": _of("ApertusConfig", _LLAMA),
    "bamba": _of(
        "BambaConfig",
        _LLAMA,
        attn_layer_indices=[1],
        mamba_n_heads=8,
        mamba_d_head=16,
        mamba_d_state=16,
        mamba_expand=2,
        mamba_chunk_size=16,
    ),
    "biogpt": _of("BioGptConfig", _COMMON, intermediate_size=96),
    "bloom": _of("BloomConfig", _IDS, vocab_size=VOCABULARY, hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS),
    "codegen": _of(
        "CodeGenConfig",
        _IDS,
        vocab_size=VOCABULARY,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=CONTEXT,
        n_ctx=CONTEXT,
        rotary_dim=8,
    ),
    "cohere": _of("CohereConfig", _LLAMA, logit_scale=1.0),
    "cohere2": _of("Cohere2Config", _LLAMA, _HEAD_DIM, sliding_window=16, logit_scale=1.0),
    "deepseek_v2": _of("DeepseekV2Config", _LLAMA, _DEEPSEEK, topk_method="greedy", n_group=None, topk_group=None),
    "deepseek_v3": _of("DeepseekV3Config", _LLAMA, _DEEPSEEK, n_group=2, topk_group=1),
    "exaone4": _of("Exaone4Config", _LLAMA, sliding_window=16, sliding_window_pattern=2),
    "falcon": _of("FalconConfig", _COMMON, multi_query=True, new_decoder_architecture=False),
    "falcon_gqa": _of("FalconConfig", _COMMON, new_decoder_architecture=True, num_kv_heads=2),
    "falcon_mamba": _of(
        "FalconMambaConfig", _IDS, vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, state_size=8
    ),
    "gemma": _of("GemmaConfig", _LLAMA, _HEAD_DIM, num_key_value_heads=1),
    "gemma2": _of("Gemma2Config", _LLAMA, _HEAD_DIM, sliding_window=16, query_pre_attn_scalar=16),
    "gemma3_text": _of("Gemma3TextConfig", _LLAMA, _HEAD_DIM, sliding_window=16, query_pre_attn_scalar=16),
    "glm": _of("GlmConfig", _LLAMA, _HEAD_DIM),
    "glm4": _of("Glm4Config", _LLAMA, _HEAD_DIM),
    "gpt2": _of(
        "GPT2Config", _IDS, vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_positions=CONTEXT
    ),
    "gpt_bigcode": _of(
        "GPTBigCodeConfig",
        _IDS,
        vocab_size=VOCABULARY,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=CONTEXT,
        multi_query=True,
    ),
    "gpt_neo": _of(
        "GPTNeoConfig",
        _IDS,
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_layers=4,
        num_heads=HEADS,
        max_position_embeddings=CONTEXT,
        attention_types=[[["global", "local"], 2]],
        window_size=16,
    ),
    "gpt_neox": _of("GPTNeoXConfig", _COMMON, intermediate_size=128, use_parallel_residual=True, rotary_pct=0.25),
    "gpt_oss": _of("GptOssConfig", _LLAMA, _HEAD_DIM, num_local_experts=4, num_experts_per_tok=2, sliding_window=16),
    "gptj": _of(
        "GPTJConfig",
        _IDS,
        vocab_size=VOCABULARY,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=CONTEXT,
        rotary_dim=8,
    ),
    "granite": _of("GraniteConfig", _LLAMA, _MULTIPLIERS),
    "granitemoe": _of("GraniteMoeConfig", _LLAMA, _MULTIPLIERS, num_local_experts=4, num_experts_per_tok=2),
    "helium": _of("HeliumConfig", _LLAMA, _HEAD_DIM),
    "jamba": _of(
        "JambaConfig",
        _LLAMA,
        num_hidden_layers=4,
        num_experts=4,
        num_experts_per_tok=2,
        expert_layer_period=2,
        expert_layer_offset=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=8,
        use_mamba_kernels=False,
    ),
    "lfm2": _of("Lfm2Config", _LLAMA, layer_types=["conv", "full_attention", "conv"]),
    "llama": _of("LlamaConfig", _LLAMA),
    "llama_tied": _of("LlamaConfig", _LLAMA, tie_word_embeddings=True),
    "mamba": _of(
        "MambaConfig", _IDS, vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, state_size=8
    ),
    "mamba2": _of(
        "Mamba2Config",
        _IDS,
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        state_size=16,
        num_heads=8,
        head_dim=16,
        n_groups=1,
        chunk_size=16,
    ),
    "mistral": _of("MistralConfig", _LLAMA, sliding_window=16),
    "mixtral": _of("MixtralConfig", _LLAMA, num_local_experts=4, num_experts_per_tok=2),
    "mpt": _of(
        "MptConfig", _IDS, vocab_size=VOCABULARY, d_model=HIDDEN, n_layers=LAYERS, n_heads=HEADS, max_seq_len=CONTEXT
    ),
    "nemotron": _of("NemotronConfig", _LLAMA),
    "olmo": _of("OlmoConfig", _LLAMA),
    "olmo2": _of("Olmo2Config", _LLAMA),
    "olmoe": _of("OlmoeConfig", _LLAMA, num_experts=4, num_experts_per_tok=2),
    "opt": _of("OPTConfig", _COMMON, ffn_dim=128, word_embed_proj_dim=HIDDEN),
    "persimmon": _of("PersimmonConfig", _COMMON, intermediate_size=96),
    "phi": _of("PhiConfig", _LLAMA),
    "phi3": _of("Phi3Config", _LLAMA),
    "qwen2": _of("Qwen2Config", _LLAMA),
    "qwen2_moe": _of("Qwen2MoeConfig", _LLAMA, _EXPERTS, shared_expert_intermediate_size=32),
    "qwen3": _of("Qwen3Config", _LLAMA, _HEAD_DIM),
    "qwen3_moe": _of("Qwen3MoeConfig", _LLAMA, _EXPERTS, _HEAD_DIM),
    "qwen3_next": _of(
        "Qwen3NextConfig",
        _LLAMA,
        _EXPERTS,
        _HEAD_DIM,
        shared_expert_intermediate_size=32,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    ),
    "smollm3": _of("SmolLM3Config", _LLAMA),
    "stablelm": _of("StableLmConfig", _LLAMA),
    "starcoder2": _of("Starcoder2Config", _LLAMA),
    "xglm": _of(
        "XGLMConfig",
        _IDS,
        vocab_size=VOCABULARY,
        d_model=HIDDEN,
        num_layers=LAYERS,
        attention_heads=HEADS,
        ffn_dim=128,
        max_position_embeddings=CONTEXT,
    ),
}

_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": LAYERS,
    "num_decoder_layers": 2,
    "num_heads": HEADS,
    "decoder_start_token_id": PAD,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
}
_BART = {
    **_IDS,
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "encoder_layers": LAYERS,
    "decoder_layers": 2,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": CONTEXT,
    "decoder_start_token_id": EOS,
}

SEQ2SEQ_MODELS: dict[str, Callable[[], Any]] = {
    "bart": _of("BartConfig", _BART),
    "m2m_100": _of("M2M100Config", _BART),
    "marian": _of("MarianConfig", _BART),
    "mbart": _of("MBartConfig", _BART),
    "mt5": _of("MT5Config", _T5),
    "pegasus": _of("PegasusConfig", _BART),
    "t5": _of("T5Config", _T5),
    "t5_own_head": _of("T5Config", _T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "umt5": _of("UMT5Config", _T5),
}
"""Models with an encoder, which has more layers than the decoder. Flan-T5 is of the kind of `t5_own_head`."""

_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 16}
_DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}

MORE_RECURRENT_MODELS: dict[str, Callable[[], Any]] = {
    "falcon_h1": _of(
        "FalconH1Config",
        _LLAMA,
        _HEAD_DIM,
        _MAMBA2,
        mamba_d_ssm=128,
        lm_head_multiplier=0.5,
        embedding_multiplier=2.0,
        key_multiplier=0.75,
        attention_in_multiplier=0.5,
        attention_out_multiplier=1.5,
        ssm_in_multiplier=1.25,
        ssm_out_multiplier=0.75,
        mlp_multipliers=[0.5, 1.5],
        ssm_multipliers=[0.5, 1.5, 0.75, 1.25, 0.25],
    ),
    "granitemoehybrid": _of(
        "GraniteMoeHybridConfig",
        _LLAMA,
        _MULTIPLIERS,
        _MAMBA2,
        layer_types=["mamba", "attention", "mamba"],
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=32,
        position_embedding_type="nope",
    ),
    "kimi_linear": _of(
        "KimiLinearConfig",
        _LLAMA,
        num_key_value_heads=HEADS,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        linear_head_dim=16,
        linear_num_heads=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_intermediate_size=32,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
    ),
    "lfm2_moe": _of(
        "Lfm2MoeConfig", _LLAMA, _EXPERTS, layer_types=["conv", "full_attention", "conv"], num_dense_layers=1
    ),
    "nemotron_h": _of(
        "NemotronHConfig",
        _LLAMA,
        _HEAD_DIM,
        layers_block_type=["mamba", "attention", "mlp"],
        mamba_num_heads=8,
        mamba_head_dim=16,
        n_groups=1,
        ssm_state_size=8,
        chunk_size=16,
        time_step_min=1e-9,  # transformers holds to it in prompts alone: its own tokens depend on how they are cached
    ),
    "olmo_hybrid": _of("OlmoHybridConfig", _LLAMA, _DELTA, linear_num_key_heads=4),
    "qwen3_5": _of("Qwen3_5TextConfig", _LLAMA, _HEAD_DIM, _DELTA),
}
"""Models with recurrent layers beside those of `SMALL_MODELS`, for the tests of such layers alone."""

_GEMMA4 = {
    **_LLAMA,
    **_HEAD_DIM,
    "num_hidden_layers": 4,
    "global_head_dim": 32,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "final_logit_softcapping": 30.0,
}
_SIGMOID_EXPERTS = {**_DEEPSEEK, **_HEAD_DIM, "num_key_value_heads": 2}

MODELS_OF_FILES: dict[str, Callable[[], Any]] = {
    "arcee": _of("ArceeConfig", _LLAMA, _HEAD_DIM),
    "dots1": _of("Dots1Config", _LLAMA, _SIGMOID_EXPERTS, norm_topk_prob=True, routed_scaling_factor=2.0),
    "ernie4_5": _of("Ernie4_5Config", _LLAMA, _HEAD_DIM),
    "ernie4_5_moe": _of(
        "Ernie4_5_MoeConfig",
        _LLAMA,
        moe_num_experts=4,
        moe_k=2,
        moe_intermediate_size=32,
        moe_num_shared_experts=2,
        moe_layer_start_index=1,
        moe_layer_end_index=2,
    ),
    "exaone_moe": _of(
        "ExaoneMoeConfig",
        _LLAMA,
        _EXPERTS,
        _HEAD_DIM,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        routed_scaling_factor=2.0,
    ),
    "gemma4_text": _of(
        "Gemma4TextConfig",
        _GEMMA4,
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
        hidden_size_per_layer_input=32,
        vocab_size_per_layer_input=VOCABULARY,
    ),
    "gemma4_moe": _of(
        "Gemma4TextConfig",
        _GEMMA4,
        hidden_size_per_layer_input=0,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=32,
    ),
    "glm4_moe": _of("Glm4MoeConfig", _LLAMA, _SIGMOID_EXPERTS, use_qk_norm=True),
    "glm4_moe_lite": _of("Glm4MoeLiteConfig", _LLAMA, _DEEPSEEK),
    "glm_moe_dsa": _of(
        "GlmMoeDsaConfig", _LLAMA, _DEEPSEEK, index_topk=16, index_n_heads=2, index_head_dim=16, n_group=2, topk_group=1
    ),
    "granitemoeshared": _of(
        "GraniteMoeSharedConfig",
        _LLAMA,
        _MULTIPLIERS,
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=32,
    ),
    "hunyuan_v1_dense": _of("HunYuanDenseV1Config", _LLAMA, _HEAD_DIM),
    "hunyuan_v1_moe": _of("HunYuanMoEV1Config", _LLAMA, _HEAD_DIM, num_experts=4, moe_topk=2),
    "llama4": _of(
        "Llama4TextConfig",
        _LLAMA,
        _HEAD_DIM,
        num_hidden_layers=4,
        num_local_experts=4,
        intermediate_size_mlp=128,
        interleave_moe_layer_step=2,
    ),
    "minimax_m2": _of("MiniMaxM2Config", _LLAMA, _HEAD_DIM, num_local_experts=4, num_experts_per_tok=2, rotary_dim=8),
    "ministral3": _of(
        "Ministral3Config",
        _LLAMA,
        _HEAD_DIM,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    ),
    "nemotron_h_moe": _of(
        "NemotronHConfig",
        _LLAMA,
        _HEAD_DIM,
        layers_block_type=["mamba", "attention", "moe"],
        mamba_num_heads=8,
        mamba_head_dim=16,
        n_groups=2,
        ssm_state_size=8,
        chunk_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=64,
        moe_latent_size=32,
        routed_scaling_factor=2.0,
    ),
    "olmo3": _of(
        "Olmo3Config",
        _LLAMA,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi3_long": _of(
        "Phi3Config",
        _LLAMA,
        original_max_position_embeddings=32,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "short_factor": [1.0, 1.25, 1.5, 2.0],
            "long_factor": [1.0, 2.0, 4.0, 8.0],
            "original_max_position_embeddings": 32,
        },
    ),
    "qwen2_vl": SMALL_MODELS["qwen2"],
    "qwen3_5_moe": _of("Qwen3_5MoeTextConfig", _LLAMA, _EXPERTS, _HEAD_DIM, _DELTA, shared_expert_intermediate_size=32),
    "qwen3_vl": SMALL_MODELS["qwen3"],
    "qwen3_vl_moe": SMALL_MODELS["qwen3_moe"],
    "seed_oss": _of("SeedOssConfig", _LLAMA, _HEAD_DIM),
}
"""Models for the tests of GGUF files alone; of models that see, the text part."""

RECURRENT_MODELS = sorted(
    ("bamba", "falcon_mamba", "jamba", "lfm2", "mamba", "mamba2", "qwen3_next", *MORE_RECURRENT_MODELS)
)


REPRESENTATIVES = ("llama", "gpt2", "gemma3_text", "gpt_oss", "mixtral", "deepseek_v3", "jamba", "bloom")
"""One for each mechanism that a change can break, for the default tier of tests: grouped queries; learned positions and
transposed weights; sliding windows and tied embeddings; attention sinks and fused experts; experts that are fused
as they load; latent attention and two kinds of blocks; recurrent blocks beside attention; ALiBi."""

PADDED_MODELS = {
    "its forward takes no positions": {"bloom", "mpt"},
    "its layers do not all hand attention to a function that transformers lets others register": {
        *("falcon", "falcon_gqa", "gpt_neo", "xglm"),
    },
}
"""Those whose forwards cannot be packed, by the reason why."""

_SOMETIMES_PACKED = {"codegen", "deepseek_v2", "deepseek_v3", "gptj"}
"""DeepSeek's keys are expanded after they are cached since transformers 5.24; CodeGen and GPT-J dispatch since then."""

PACKED_MODELS = sorted(SMALL_MODELS.keys() - set().union(*PADDED_MODELS.values()) - _SOMETIMES_PACKED)
"""Those whose forwards can be packed with every version of transformers."""


def small_config(name: str) -> Any:
    """The config of the small model `name`."""
    return (SMALL_MODELS | SEQ2SEQ_MODELS | MORE_RECURRENT_MODELS | MODELS_OF_FILES)[name]()


def auto_class(name: str) -> Any:
    """The class of transformers that loads the small model `name`."""
    return transformers.AutoModelForSeq2SeqLM if name in SEQ2SEQ_MODELS else transformers.AutoModelForCausalLM


def build_model(name: str, *, seed: int = 0, dtype: str = "float32") -> Any:
    """The small model `name` with random weights on the CPU, the same ones for the same seed."""
    torch.manual_seed(seed)
    model = auto_class(name).from_config(small_config(name), dtype=torch.float32).eval()
    if name.endswith("_own_head"):
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms, gates and biases (one dimension) and state-space transitions keep the values they are made with.
            if parameter.dim() > 1 and not getattr(parameter, "_no_weight_decay", False):
                parameter.normal_(std=INIT_STD)
        model.get_input_embeddings().weight.normal_(std=EMBEDDING_STD)
    if name in SEQ2SEQ_MODELS:  # what their encoders say outweighs every token
        model.generation_config.no_repeat_ngram_size = 2
    return model.to(getattr(torch, dtype))


def build_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level tokenizer that needs no training: three special tokens, the 256 bytes, and words to fill it up."""
    pieces = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += [f"<extra_{i}>" for i in range(VOCABULARY - len(pieces))]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=CONTEXT
    )


def make_checkpoint(
    name: str, folder: Path, *, seed: int = 0, dtype: str = "float32", with_tokenizer: bool = True
) -> Path:
    """Save the small model `name`, and a tokenizer, into `folder`; return `folder`."""
    build_model(name, seed=seed, dtype=dtype).save_pretrained(folder)
    if name.endswith("_own_head"):  # as checkpoints of such models say it; the config's class would not
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    if with_tokenizer:
        build_tokenizer().save_pretrained(folder)
    return folder
