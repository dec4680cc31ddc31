"""What DeepSpeed's own codes leave of weights, and of which, and what makes weights of them again: the bytes that cross
are in the integration tests."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from small_models import small_config
from torch.profiler import ProfilerActivity, profile

from zeroinf.engines.zero.codes import expansion, with_codes
from zeroinf.model.anatomy import TensorSpec
from zeroinf.model.inspect import build_meta, read_anatomy

GROUP = 16


def codes_of(bits: int) -> dict[str, object]:
    return {"num_bits": bits, "group_size": GROUP, "group_dim": 1, "symmetric": False}


def changed(architecture: str, bits: int) -> dict[str, tuple[TensorSpec, TensorSpec]]:
    """Tensors before and after, of those that differ."""
    config = small_config(architecture)
    whole = read_anatomy(config, dtype="bfloat16")
    coded = with_codes(whole, build_meta(config, "bfloat16"), codes_of(bits))
    pairs = zip(whole.tensors(), coded.tensors(), strict=True)
    return {before.name: (before, after) for before, after in pairs if before != after}


@pytest.mark.parametrize(("bits", "share"), [(4, 1 / 4), (8, 1 / 2)])
def test_matrices_become_codes_with_two_numbers_a_group(bits: int, share: float) -> None:
    coded = changed("llama", bits)
    assert {name.split(".")[-2] for name in coded} >= {"q_proj", "down_proj", "embed_tokens"}
    for before, after in coded.values():
        assert after.nbytes == before.nbytes * (share + 2 / GROUP)


def test_what_is_no_linear_layer_and_no_embedding_is_left_alone() -> None:
    assert set(changed("gpt2", 4)) == {"transformer.wte.weight", "transformer.wpe.weight"}  # the others are Conv1D


@pytest.mark.parametrize(("bits", "element_bytes"), [(4, 3), (8, 2)])
def test_the_largest_weight_is_there_in_full_while_it_is_made(bits: int, element_bytes: int) -> None:
    config = small_config("llama")
    whole = read_anatomy(config, dtype="bfloat16")
    largest = max(tensor.numel for tensor in whole.tensors() if len(tensor.shape) == 2)
    assert expansion(whole, build_meta(config, "bfloat16"), codes_of(bits)).nbytes == largest * element_bytes


@pytest.mark.parametrize(("bits", "dtype"), [(4, "bfloat16"), (8, "bfloat16"), (4, "float16"), (8, "float32")])
def test_a_pass_launches_what_makes_each_weight_of_its_codes(bits: int, dtype: str) -> None:
    """As many kernels as DeepSpeed's own code launches, and for as many weights."""
    config, codes = small_config("llama"), codes_of(bits)
    found = expansion(read_anatomy(config, dtype=dtype), build_meta(config, dtype), codes)
    (kernels,) = found.kernels
    assert len(kernels.kernels) == len(changed("llama", bits)) * launched(codes, dtype)


def launched(codes: dict[str, object], dtype: str) -> int:
    """Operators that DeepSpeed's code calls for one weight, those left out that launch nothing."""
    from deepspeed.inference.quantization.utils import DeQuantizer, Quantizer

    if dtype == "float16":
        return 1  # a kernel of its own, on a GPU only
    quantize, restore = Quantizer(codes), DeQuantizer(codes, getattr(torch, dtype))
    parts = quantize.quantize(torch.randn(4, 2 * GROUP, dtype=getattr(torch, dtype)))
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        restore.dequantize(*parts)
    kinds = Counter(event.name.removeprefix("aten::") for event in profiled.events())
    launching = ("copy_", "bitwise_right_shift", "bitwise_and", "zero_", "div_", "add_")
    return sum(kinds[name] for name in launching) - kinds["_to_copy"]  # of the shift and the mask: numbers of the host
