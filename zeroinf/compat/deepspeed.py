"""Gives access to what DeepSpeed keeps to itself, or sets for a whole process.

Relies on DeepSpeed 0.19.8 and on transformers' integration of it; each function names what it uses.
`tests/unit/test_compat.py` fails when that changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def partition_models(config: dict[str, Any]) -> Any:
    """Let transformers build models in partitions, as the DeepSpeed `config` says, until `build_whole_models`.

    Returns what must be kept alive meanwhile: transformers refers to it weakly (`HfDeepSpeedConfig`).
    """
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig(config)


def build_whole_models() -> None:
    """Let transformers build whole models again. Relies on `unset_hf_deepspeed_config`."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def builds_partitions() -> bool:
    """Whether transformers builds models in partitions now."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    return bool(is_deepspeed_zero3_enabled())


def run_tensor_parallel_in(group: Any) -> None:
    """Let `init_inference` share a model among the ranks of `group`, a process group; without it, it takes the first
    ranks of all. Relies on the class attribute `InferenceEngine.inference_mp_group`."""
    from deepspeed.inference.engine import InferenceEngine

    InferenceEngine.inference_mp_group = group


def fused_rows(name: str, shape: Sequence[int], ranks: int, block: Any, config: Any) -> Sequence[int] | None:
    """Rows of queries, keys and values in the fused weight `name` of `block`, (rows, ...), where DeepSpeed splits each
    of them over `ranks`; the whole where it splits it at once, None where it interleaves them.

    Relies on `require_tp_fused_qkvw`, `fused_qkv_subparam_sizes` and `AutoTPMeta` of `deepspeed.module_inject`.
    """
    from deepspeed.module_inject.fusedqkv_utils import fused_qkv_subparam_sizes, require_tp_fused_qkvw
    from deepspeed.module_inject.tp_shard import AutoTPMeta

    if not require_tp_fused_qkvw(name, ranks):
        return (shape[0],)
    found: Sequence[int] | None = fused_qkv_subparam_sizes(block, tuple(shape), AutoTPMeta.from_model_config(config))
    return found


def without_shared_memory_op() -> None:
    """Let DeepSpeed not compile its all-reduce between CPUs (a minute, on first use), which gloo does as well.

    Relies on the table `deepspeed.ops.__compatible_ops__`.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def gathered_bytes(model: Any) -> int:
    """Bytes of weights that a forward of the partitioned `model` gathers: one that it uses twice counts twice, since it
    is let go in between. Relies on `ds_persist` and `ds_numel` of parameters."""
    moved = (p for _, p in model.named_parameters(remove_duplicate=False) if not p.ds_persist)
    return sum(int(p.ds_numel) * p.element_size() for p in moved)


def has_codes(weight: Any) -> bool:
    """Whether DeepSpeed keeps codes in the place of `weight`. Relies on `weight_quantized`."""
    return bool(getattr(weight, "weight_quantized", False))


def codes_of(weight: Any, numbers: Any) -> Any:
    """The data that `weight`, which `has_codes`, holds in place of `numbers`: codes, scales and minima in one tensor.

    Relies on `quantizer.quantize` of a weight and on `concat_to_compat_param`.
    """
    from deepspeed.inference.quantization.utils import concat_to_compat_param

    codes = (part.view(weight.dtype) for part in weight.quantizer.quantize(numbers))
    return concat_to_compat_param(*codes, return_param=False)
